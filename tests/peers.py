"""Momentum of other packages' optimizers, and saved state that must be refused."""

from __future__ import annotations

import copy
import importlib.util
import math
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lion8bit import Lion, Lion8bit
from lion8bit.layout import mark_order

bitsandbytes = pytest.importorskip("bitsandbytes")
lion_pytorch = pytest.importorskip("lion_pytorch")
optimi = pytest.importorskip("optimi", reason="needs torch-optimi")


def timm_lion() -> Any:
    """timm's Lion, from its file: importing timm itself takes torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs timm")
    stand_ins = {}
    for name, folder in (("timm", ""), ("timm.optim", "optim")):
        stand_ins[name] = types.ModuleType(name)
        stand_ins[name].__path__ = [str(Path(spec.submodule_search_locations[0]) / folder)]
    with mock.patch.dict("sys.modules", stand_ins):
        return importlib.import_module("timm.optim.lion").Lion


OPTIONS = {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.1}
Make = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


class BareLion8bit(bitsandbytes.optim.Lion8bit):
    """Saves its tensors beside each other, as earlier releases did."""

    def state_dict(self) -> dict[str, Any]:
        return torch.optim.Optimizer.state_dict(self)


PEERS: dict[str, Make] = {
    "lion-pytorch": lambda params: lion_pytorch.Lion(params, **OPTIONS),
    "optimi": lambda params: optimi.Lion(params, **OPTIONS),
    "optimi foreach": lambda params: optimi.Lion(params, **OPTIONS, foreach=True),
    "optimi gradient release": lambda params: optimi.Lion(params, **OPTIONS, gradient_release=True),
    "bitsandbytes Lion8bit": lambda params: bitsandbytes.optim.Lion8bit(params, **OPTIONS),
    "bitsandbytes Lion8bit, not wrapped": lambda params: BareLion8bit(params, **OPTIONS),
    "bitsandbytes Lion": lambda params: bitsandbytes.optim.Lion(params, **OPTIONS),
    "lion8bit.Lion": lambda params: Lion(params, **OPTIONS),
    "timm": lambda params: timm_lion()(params, **OPTIONS),
    "timm foreach": lambda params: timm_lion()(params, **OPTIONS, foreach=True),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 90), (40, 131), (5,), (6000,)]
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes]


def step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        magnitude = 10.0 ** torch.randint(-4, 1, (1,), generator=generator)
        param.grad = (torch.randn(param.shape, generator=generator) * magnitude).to(param.dtype)
    optimizer.step()


def peer_momentum(state: dict[str, Any]) -> torch.Tensor:
    """The momentum as its own library decodes it."""
    if "qmap1" in state:
        quantized = bitsandbytes.functional.QuantState(
            state["absmax1"], code=state["qmap1"], blocksize=256, dtype=torch.float32
        )
        return bitsandbytes.functional.dequantize_blockwise(state["state1"], quantized)
    return next(state[name] for name in ("exp_avg", "state1", "momentum") if name in state).float()


def stepped(make: Make) -> dict[str, Any]:
    params = parameters()
    optimizer = make(params)
    step(params, optimizer, 1)
    return copy.deepcopy(optimizer.state_dict())


def spoilt(make: Make, name: str, change: Callable[[torch.Tensor], torch.Tensor], number: int = 1) -> dict[str, Any]:
    saved = stepped(make)
    state = saved["state"][number]
    state = state.get("__bnb_optimizer_quant_state__", state)
    state[name] = change(state[name])
    return saved


bnb8, lion = PEERS["bitsandbytes Lion8bit"], PEERS["lion-pytorch"]
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "AdamW": (lambda: stepped(torch.optim.AdamW), r"got \['exp_avg', 'exp_avg_sq', 'step'\].*start Lion without"),
    "SGD": (lambda: stepped(lambda p: torch.optim.SGD(p, 1e-3, 0.9)), r"got \['momentum_buffer'\]"),
    "Adam8bit": (lambda: stepped(bitsandbytes.optim.Adam8bit), r"got \['absmax1', 'absmax2'"),
    "RMSprop8bit": (lambda: stepped(bitsandbytes.optim.RMSprop8bit), "bitsandbytes' SGD, RMSprop"),
    "SGD8bit": (lambda: stepped(lambda p: bitsandbytes.optim.SGD8bit(p, 1e-3, 0.9)), "bitsandbytes' SGD, RMSprop"),
    "shape": (
        lambda: spoilt(lion, "exp_avg", lambda m: m[:3]),
        r"shape, got \(3, 131\) \(parameter 1, shape \(40, 131",
    ),
    "NaN": (lambda: spoilt(lion, "exp_avg", lambda m: m.fill_(torch.nan), 2), r"finite .* \(parameter 2"),
    "scales": (lambda: spoilt(bnb8, "absmax1", lambda s: s[:-1]), "one scale per block"),
    "strides": (lambda: spoilt(bnb8, "state1", lambda c: c.t().contiguous().t()), "contiguous, got strides"),
    "groups": (
        lambda: stepped(lambda p: lion_pytorch.Lion([{"params": p[:1]}, {"params": p[1:]}])),
        r"\[4\].*\[1, 3\]",
    ),
    "version": (lambda: stepped(lambda p: Lion8bit(p)) | {"param_groups": [{"params": [0, 1, 2, 3]}]}, "got None"),
    "complex": (lambda: spoilt(lion, "exp_avg", lambda m: m + 2j), "real numbers, got torch.complex64"),
    "integers": (lambda: spoilt(lion, "exp_avg", lambda m: m.int()), "got torch.int32"),
    "sparse": (lambda: spoilt(lion, "exp_avg", lambda m: m.to_sparse()), "real numbers, got torch.float32 torch.spars"),
    "meta": (lambda: spoilt(lion, "exp_avg", lambda m: m.to("meta")), "must hold data"),
    "a number": (lambda: spoilt(lion, "exp_avg", lambda m: 3), "must be a tensor, got int"),
    "expanded": (lambda: spoilt(lion, "exp_avg", lambda m: m[:1, :1].expand(m.shape)), "must be dense"),
    "short map": (lambda: spoilt(bnb8, "qmap1", lambda q: q[:10]), "qmap1 must have 256 values"),
    "codes of another dtype": (lambda: spoilt(bnb8, "state1", lambda c: c.int()), "state1 must be of torch.uint8"),
    "negative scales": (lambda: spoilt(bnb8, "absmax1", lambda s: -s), "scales of at least 0"),
    "codes without a map": (lambda: spoilt(PEERS["bitsandbytes Lion"], "state1", lambda m: m.byte()), "state1 must be"),
}


def in_state(name: str, change: Callable[[Any], Any], number: int = 0) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        saved["state"][number][name] = change(saved["state"][number][name])

    return damage


def in_group(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update({name: value})


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def one_is(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last element becomes this value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


WHERE = r"\(parameter 0, shape \(70, 90\)\)"
SCALE, MOMENTUM = r"scales must be 0 or in \[2\^-100, 2\^127\)", "momentum must be finite and below"
DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{f"scale {x}": (in_state("scales", one_is(x)), f"{SCALE}, got {x} {WHERE}") for x in (math.nan, math.inf, -1.0)},
    "code -128": (in_state("codes", one_is(-128)), rf"codes must be in \[-127, 127\], got -128 {WHERE}"),
    "tiny scale": (in_state("scales", one_is(2.0**-101)), f"{SCALE}, got 3.9.* {WHERE}"),
    "subnormal scale": (in_state("scales", one_is(1e-40)), SCALE),
    "large scale": (in_state("scales", one_is(2.0**127)), SCALE),
    **{
        f"momentum {x}": (in_state("momentum", one_is(x), 2), rf"{MOMENTUM}.* \(parameter 2, shape \(5,\)")
        for x in (math.nan, -math.inf, -(2.0**127))
    },
    **{
        f"step {value!r}": (in_state("step", lambda _, value=value: value), rf"whole number of updates.* {WHERE}")
        for value in (
            None,
            "abc",
            -1,
            2.5,
            2**70,
            math.nan,
            math.inf,
            [1],
            torch.tensor(math.nan),
            torch.tensor([1, 2]),
        )
    },
    "step on meta": (in_state("step", lambda _: torch.tensor(1, device="meta")), f"whole number.* {WHERE}"),
    "step missing": (lambda saved: saved["state"][0].pop("step"), f"must hold step.* {WHERE}"),
    **{
        f"{name} on meta": (in_state(name, lambda t: t.to("meta")), f"{name} must hold data.* {WHERE}")
        for name in ("codes", "scales")
    },
    "freed codes": (
        in_state("codes", freed),
        f"must hold data.* {WHERE}",
    ),
    "codes are no tensor": (in_state("codes", lambda _: 3), f"codes must be a tensor, got int {WHERE}"),
    "sparse scales": (in_state("scales", lambda t: t.to_sparse()), f"dense tensor of real numbers.* {WHERE}"),
    "strides dropped": (in_state("scales", lambda t: mark_order(t, (1, 0))), f"order in memory that their.* {WHERE}"),
    "entry None": (
        lambda saved: saved["state"].update({0: None}),
        r"state of a parameter must be a dict.* \(parameter 0",
    ),
    "state a list": (lambda saved: saved.update(state=[1]), "a dict named state"),
    "groups None": (lambda saved: saved.update(param_groups=None), "param_groups must be a list"),
    "no params": (lambda saved: saved["param_groups"][0].pop("params"), "must be a dict with a list of numbers"),
    "params are tensors": (in_group("params", [torch.zeros(2)] * 4), "must be a dict with a list of numbers"),
    "a number twice": (in_group("params", [0, 0, 2, 3]), r"a separate number.* \(parameter 0, shape \(40, 131"),
    **{
        f"{name}={value!r}": (in_group(name, value), r"\(group 0 of the saved state\)")
        for name, value in [
            ("lr", math.nan),
            ("lr", None),
            ("lr", -1),
            ("lr", torch.tensor(1.0, device="meta")),
            ("lr", torch.ones(2)),
            ("betas", (2, 3)),
            ("betas", None),
            ("betas", (0.9,)),
            ("weight_decay", -1),
            ("weight_decay", "x"),
            ("block_size", 0),
            ("block_size", None),
            ("weight_rounding", "foo"),
            ("optim_bits", 7),
            ("min_8bit_size", -1),
            ("maximize", None),
            ("maximize", 2),
            ("cautious", "no"),
            ("decoupled_weight_decay", "no"),
            ("fused", None),
            ("format_version", 99),
        ]
    },
}

FOUR_BITS = "4 bits, "  # begins the names of damages to state with 4-bit codes
ODD = r"\(parameter 1, shape \(40, 131\)\)"  # 66 bytes in a row
PACKED = r"codes must be contiguous torch.uint8 \(70, 45\) at block_size 64"
SIZES = "shape must be an int64 vector of the parameter's sizes, got torch."


def with_shape(*sizes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: torch.tensor(sizes)


DAMAGED |= {
    f"{FOUR_BITS}{name}": case
    for name, case in {
        "code -8": (in_state("codes", one_is(0x80)), rf"codes must be in \[-7, 7\], got -8 {WHERE}"),
        "code -8 in the low half": (in_state("codes", one_is(8)), rf"codes must be in \[-7, 7\], got -8 {WHERE}"),
        "half a byte": (in_state("codes", one_is(0x10), 1), f"must end an odd row with half a byte of 0.* {ODD}"),
        "half a byte of a vector": (
            in_state("shape", with_shape(5999), 3),
            r"shape must be .*\(5999,\).* \(parameter 3",
        ),
        "fewer rows": (in_state("codes", lambda t: t[1:]), f"{PACKED}, got .* {WHERE}"),
        "fewer columns": (in_state("codes", lambda t: t[:, 1:].contiguous()), f"{PACKED}, got .* {WHERE}"),
        "codes as a vector": (in_state("codes", lambda t: t.view(-1)), f"{PACKED}, got .* {WHERE}"),
        "transposed codes": (in_state("codes", lambda t: t.t().contiguous().t()), f"{PACKED}, got .* {WHERE}"),
        "codes as int8": (
            in_state("codes", lambda t: t.view(torch.int8)),
            f"codes must be a dense torch.int8.* {WHERE}",
        ),
        "codes as floats": (in_state("codes", torch.Tensor.float), f"codes must be a dense torch.int8.* {WHERE}"),
        "scale nan": (in_state("scales", one_is(math.nan)), f"{SCALE}, got nan {WHERE}"),
        "fewer scales": (in_state("scales", lambda t: t[1:]), rf"scales must be float32 \(70, 2\).* {WHERE}"),
        "scales of another order": (in_state("scales", lambda t: t[None, None]), f"order in memory that .* {WHERE}"),
        "no shape": (lambda saved: saved["state"][0].pop("shape"), f"shape must be a tensor, got NoneType {WHERE}"),
        "shape as a tuple": (in_state("shape", lambda t: (70, 90)), f"shape must be a tensor, got tuple {WHERE}"),
        "shape on meta": (in_state("shape", lambda t: t.to("meta")), f"shape must hold data.* {WHERE}"),
        "shape of floats": (in_state("shape", torch.Tensor.half), f"{SIZES}float16 .* {WHERE}"),
        "shape of two dimensions": (in_state("shape", lambda t: t[None]), f"{SIZES}int64 .* {WHERE}"),
        "negative sizes": (in_state("shape", with_shape(-70, -90)), f"{SIZES}int64 .* {WHERE}"),
        "a transposed shape": (in_state("shape", with_shape(90, 70)), rf"shape must be .*, \(70, 90\), got .* {WHERE}"),
        "a huge shape": (in_state("shape", with_shape(2**40, 2**40)), rf"shape must be .*, \(70, 90\), got .* {WHERE}"),
        "a huge empty shape": (in_state("shape", with_shape(2**62, 2**62, 0)), rf"shape must be .*, got .* {WHERE}"),
        "no block_size": (in_group("block_size", None), r"\(group 0 of the saved state\)"),
        "another block_size": (in_group("block_size", 256), "at block_size 256, got"),
    }.items()
}


def damaged(case: str) -> tuple[dict[str, Any], str]:
    damage, message = DAMAGED[case]
    bits = 4 if case.startswith(FOUR_BITS) else 8
    saved = stepped(lambda p: Lion8bit(p, lr=2e-3, optim_bits=bits))
    damage(saved)
    return saved, message
