"""Momentum moved between optimizers: the real packages wherever they step on a CPU, and our own formats."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same, assert_same_tree, scale_of_each
from peers import (
    DAMAGED,
    MOMENTUM,
    OPTIONS,
    PEERS,
    REFUSED,
    WHERE,
    bitsandbytes,
    damaged,
    in_group,
    in_state,
    lion_pytorch,
    one_is,
    optimi,
    parameters,
    peer_momentum,
    step,
    stepped,
)
from torch import nn

from lion8bit import Lion, Lion4bit, Lion8bit, convert_state_dict, export_state_dict, quantize
from lion8bit.quantization import _CHUNK
from lion8bit.reference import RANGE_SQUARED


def assert_within_bound(actual: torch.Tensor, momentum: torch.Tensor, block_size: int = 128, bits: int = 8) -> None:
    """docs/numerics.md, "Error bounds": s*(2*h*sqrt(m/s) + h^2) with h = 1/(2A), and fp32 rounding."""
    s = scale_of_each(quantize(momentum, block_size)[1], momentum.shape, block_size).double()
    h = 0.5 / RANGE_SQUARED[bits] ** 0.5
    bound = s * (2 * h * (momentum.double().abs() / s).sqrt() + h * h + 16 * 2.0**-24)
    assert ((actual.double() - momentum.double()).abs() <= bound).all()


# ---- In -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_momentum_enters(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    peer = PEERS[name](params)
    for seed in range(3):
        step(params, peer, seed)
    saved = peer.state_dict()
    pristine = copy.deepcopy(saved)
    exact = Lion8bit(params, lr=7.0, optim_bits=32)
    coded = Lion8bit(params, lr=7.0, cautious=True)
    packed = Lion4bit(params, lr=7.0)
    for optimizer in (exact, coded, packed):
        optimizer.load_state_dict(saved)
    for param in params:
        momentum = peer_momentum(peer.state[param])
        assert momentum.any()
        assert_same(exact.momentum(param), momentum, "fp32 momentum")
        if param.numel() < 4096:
            assert_same(coded.momentum(param), momentum, "momentum of a small parameter")
            assert_same(packed.momentum(param), momentum, "momentum of a small parameter")
        else:
            assert packed.state[param]["codes"].dtype == torch.uint8
            assert_within_bound(packed.momentum(param), momentum, 64, bits=4)
            assert coded.state[param]["codes"].dtype == torch.int8
            assert_within_bound(coded.momentum(param), momentum)
    assert {key: coded.param_groups[0][key] for key in OPTIONS} == OPTIONS
    assert coded.param_groups[0]["cautious"] and exact.param_groups[0]["optim_bits"] == 32
    assert str(saved) == str(pristine)
    step(params, coded, 9)
    step(params, packed, 9)


@pytest.mark.parametrize("name", [name for name in PEERS if "Lion8bit" not in name])
def test_the_step_after_entering_is_the_peers(name: str) -> None:
    params = parameters()
    peer = PEERS[name](params)
    step(params, peer, 1)
    twins = copy.deepcopy(params)
    ours = Lion8bit(twins, optim_bits=32)
    ours.load_state_dict(peer.state_dict())
    step(params, peer, 2)
    step(twins, ours, 2)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, param, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours.momentum(twin), peer_momentum(peer.state[param]), rtol=1e-5, atol=1e-8)


def test_blocks_of_2048_of_older_bitsandbytes_enter() -> None:
    params = parameters()
    momentum = torch.randn(70, 90)
    codes, quantized = bitsandbytes.functional.quantize_blockwise(momentum, blocksize=2048)
    state = {"step": 5, "state1": codes, "qmap1": quantized.code, "absmax1": quantized.absmax}
    saved = bitsandbytes.optim.Lion8bit(params).state_dict()
    optimizer = Lion8bit(params, optim_bits=32)
    optimizer.load_state_dict({**saved, "state": {0: state}})
    expected = bitsandbytes.functional.dequantize_blockwise(codes, quantized)
    assert_same(optimizer.momentum(params[0]), expected, "momentum")
    assert optimizer.state[params[0]]["step"] == 5 and len(optimizer.state) == 1


def flash_lion_state(momentum: torch.Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor]:
    """What FlashLion of flashoptim 0.1.4 saves, by its documented formulas; it needs CUDA and Triton to run itself.

    Per 32 elements of the flat tensor: s = max|m|, kept in fp16; y = 2x/(1+|x|) with x = m/s; q = floor(127y + 1/2).
    """
    blocks = nn.functional.pad(momentum.flatten(), (0, -momentum.numel() % 32)).view(-1, 32)
    s = blocks.abs().amax(1).clamp(min=1e-12)
    x = blocks / s[:, None]
    q = (2 * x / (1 + x.abs()) * 127 + 0.5).floor().to(torch.int8)
    y = q.float() / 127
    decoded = (y / (2 - y.abs()) * s.half().float()[:, None]).flatten()[: momentum.numel()].view_as(momentum)
    scales = s.half().view(torch.bfloat16) if dtype == torch.bfloat16 else s.half()
    codes = q.flatten()[: momentum.numel()].view_as(momentum)
    extra = {"error_bits": torch.zeros_like(codes, dtype=dtype)} if dtype == torch.bfloat16 else {}
    return {"exp_avg::quantized": codes, "exp_avg::scales": scales, **extra}, decoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantized", [True, False])
def test_flash_lion_enters(dtype: torch.dtype, quantized: bool) -> None:
    params = parameters(dtype)
    states, expected = {}, []
    for number, param in enumerate(params):
        momentum = torch.randn(param.shape)
        state, decoded = flash_lion_state(momentum, dtype)
        states[number] = state if quantized else {"exp_avg": momentum}
        expected.append(decoded if quantized else momentum)
    group = {**OPTIONS, "initial_lr": 4e-3, "master_bytewidth": 3, "quantize": True, "params": [0, 1, 2, 3]}
    optimizer = Lion8bit(params, optim_bits=32)
    optimizer.load_state_dict({"state": states, "param_groups": [group]})
    for param, momentum in zip(params, expected, strict=True):
        assert_same(optimizer.momentum(param), momentum, "momentum")
    options = {**OPTIONS, "initial_lr": 4e-3, "optim_bits": 32}
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    assert "quantize" not in optimizer.param_groups[0]


def test_decoupled_rate_of_optimi_enters() -> None:
    params = parameters()
    options = {**OPTIONS, "weight_decay": 1e-4, "decouple_lr": True, "max_lr": 6e-3}
    peer = optimi.Lion(params, **options)
    step(params, peer, 1)
    twins = copy.deepcopy(params)
    ours = Lion8bit(twins, optim_bits=32)
    ours.load_state_dict(peer.state_dict())
    step(params, peer, 2)
    step(twins, ours, 2)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, param, rtol=1e-6, atol=1e-7)
    back = optimi.Lion(params, lr=1.0, decouple_lr=True)
    back.load_state_dict(export_state_dict(ours, back))
    assert ours.param_groups[0]["peak_lr"] == 6e-3 and "initial_lr" not in ours.param_groups[0]
    assert {key: back.param_groups[0][key] for key in ("lr", "max_lr", "beta1", "beta2", "decouple_lr")} == {
        "lr": 3e-3,
        "max_lr": 6e-3,
        "beta1": 0.95,
        "beta2": 0.98,
        "decouple_lr": True,
    }


def test_names_and_empty_state_enter() -> None:
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 3))
    peer = lion_pytorch.Lion(model.named_parameters(), **OPTIONS)
    optimizer = Lion8bit(model.parameters(), block_size=64)
    optimizer.load_state_dict(peer.state_dict())
    assert not optimizer.state and optimizer.param_groups[0]["block_size"] == 64
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


# ---- Between our own formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [64, 256])
def test_another_block_size(block_size: int, bits: int) -> None:
    params = parameters()
    old = Lion8bit(params, **OPTIONS, block_size=128, optim_bits=bits)
    for seed in range(3):
        step(params, old, seed)
    kept = Lion8bit(params, block_size=block_size)
    kept.load_state_dict(old.state_dict())
    assert kept.param_groups[0]["block_size"] == 128  # the saved options win
    new = Lion8bit(params, block_size=block_size, optim_bits=bits)
    new.load_state_dict(convert_state_dict(old.state_dict(), new))
    assert new.param_groups[0]["block_size"] == block_size and new.param_groups[0]["lr"] == OPTIONS["lr"]
    for param in params:
        assert_same(kept.momentum(param), old.momentum(param), "momentum at the saved block size")
        assert new.state[param]["step"] == 3
        if param.numel() >= 4096:
            assert_within_bound(new.momentum(param), old.momentum(param), block_size, bits)
    step(params, new, 9)


@pytest.mark.parametrize("bits", [4, 8])
def test_32_bits_and_back(bits: int) -> None:
    params = parameters()
    old = Lion8bit(params, **OPTIONS, optim_bits=bits)
    for seed in range(2):
        step(params, old, seed)
    wide = Lion8bit(params, optim_bits=32)
    wide.load_state_dict(convert_state_dict(old.state_dict(), wide))
    again = Lion8bit(params, optim_bits=bits)
    again.load_state_dict(convert_state_dict(wide.state_dict(), again))
    same = Lion8bit(params, optim_bits=bits)
    same.load_state_dict(convert_state_dict(old.state_dict(), same))
    for param in params:
        assert_same(wide.momentum(param), old.momentum(param), "fp32 momentum")
        assert_same(same.momentum(param), old.momentum(param), "momentum in the same format")
    for param in params[:2]:
        assert_within_bound(again.momentum(param), old.momentum(param), 64 if bits == 4 else 128, bits)


def test_4_bits_and_8() -> None:
    """In both directions; options that belong to the present bits stay, residuals do too."""
    params = parameters(torch.bfloat16)
    wide, narrow = (Lion8bit(params, weight_rounding="compensated", optim_bits=bits) for bits in (8, 4))
    step(params, wide, 1)
    narrow.load_state_dict(convert_state_dict(wide.state_dict(), narrow))
    back = Lion8bit(params, weight_rounding="compensated")
    back.load_state_dict(convert_state_dict(narrow.state_dict(), back))
    assert [optimizer.param_groups[0]["block_size"] for optimizer in (narrow, back)] == [64, 128]
    for param in (params[0], params[1]):
        assert_within_bound(narrow.momentum(param), wide.momentum(param), 64, 4)
        assert_within_bound(back.momentum(param), narrow.momentum(param))
        assert narrow.state[param]["shape"].tolist() == [*param.shape] and "shape" not in back.state[param]
    for param in params:
        for optimizer in (narrow, back):
            assert_same(optimizer.state[param]["residual"], wide.state[param]["residual"], "residual")
            assert optimizer.state[param]["step"] == 1


def test_transposed_parameters_keep_their_memory_order() -> None:
    param = nn.Parameter(torch.randn(90, 70).t())
    peer = lion_pytorch.Lion([param], **OPTIONS)
    step([param], peer, 1)
    optimizer = Lion8bit([param])
    optimizer.load_state_dict(peer.state_dict())
    assert optimizer.state[param]["codes"].stride() == param.stride()
    assert_within_bound(optimizer.momentum(param).t().contiguous(), peer.state[param]["exp_avg"].t().contiguous())
    step([param], optimizer, 2)


# ---- Out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PEERS.keys() - {"lion8bit.Lion", "optimi gradient release"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_momentum_leaves(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    ours = Lion8bit(params, **OPTIONS, optim_bits=32, weight_rounding="nearest")
    for seed in range(2):
        step(params, ours, seed)
    twins = copy.deepcopy(params)
    peer = PEERS[name](twins)
    peer.param_groups[0]["lr"] = 7.0
    peer.load_state_dict(export_state_dict(ours, peer))
    for param, twin in zip(params, twins, strict=True):
        expected = ours.momentum(param)
        if "bitsandbytes" not in name:
            expected = expected.to(dtype).float()  # torch's load_state_dict casts
        assert_same(peer_momentum(peer.state[twin]), expected, "momentum")
    step(params, ours, 9)
    step(twins, peer, 9)
    for param, twin in zip(params, twins, strict=True):
        close = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-4}
        torch.testing.assert_close(twin, param, **close)
        if "optimi" in name and dtype == torch.bfloat16:
            assert peer.param_groups[0]["kahan_sum"] and peer.state[twin]["kahan_comp"].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_leaving_without_naming_a_peer(bits: int) -> None:
    params = parameters()
    ours = Lion8bit(params, **OPTIONS, optim_bits=bits)
    step(params, ours, 1)
    params[2].grad = None
    del ours.state[params[2]]
    saved = export_state_dict(ours)
    assert saved["param_groups"] == [{**OPTIONS, "maximize": False, "decouple_lr": False, "params": [0, 1, 2, 3]}]
    assert {number: set(state) for number, state in saved["state"].items()} == {n: {"exp_avg"} for n in (0, 1, 3)}
    peer = lion_pytorch.Lion(params, lr=1.0)
    peer.load_state_dict(saved)
    assert_same(peer.state[params[0]]["exp_avg"], ours.momentum(params[0]), "momentum")


def test_momentum_first_leaves_as_the_lion_it_is() -> None:
    params = parameters()
    ours = Lion8bit(params, lr=3e-3, betas=(0.98, 0.9), optim_bits=32, momentum_first=True)
    step(params, ours, 1)
    twins = copy.deepcopy(params)
    peer = lion_pytorch.Lion(twins)
    peer.load_state_dict(export_state_dict(ours, peer))
    step(params, ours, 2)
    step(twins, peer, 2)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, param, rtol=1e-6, atol=1e-7)
    ours.load_state_dict(peer.state_dict())
    assert ours.param_groups[0]["betas"] == (0.98, 0.9)  # the peer's mean something else


# ---- Refusals -------------------------------------------------------------------------------------------------------


def contents(optimizer: Lion8bit) -> Any:
    """All that loading replaces, copied."""
    saved = {**optimizer.state_dict(), "objects": [id(optimizer.state), *map(id, optimizer.param_groups)]}
    return copy.deepcopy(saved)


def assert_refused(saved: Any, message: str, error: type[BaseException] = ValueError, **options: Any) -> None:
    """Loading raises, nothing of the optimizer has changed, and it steps on with the plan that it had."""
    params = parameters()
    optimizer = Lion8bit(params, lr=1e-3, **options)
    step(params, optimizer, 1)
    before, plan = contents(optimizer), optimizer._stepper.plan
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_same_tree(before, contents(optimizer))
    assert optimizer._stepper.plan is plan is not None
    step(params, optimizer, 2)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_state_changes_nothing(case: str) -> None:
    make, message = REFUSED[case]
    assert_refused(make(), message)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_own_state_changes_nothing(case: str) -> None:
    saved, message = damaged(case)
    assert_refused(saved, message)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(saved, Lion8bit(parameters(), block_size=64))


@pytest.mark.parametrize(
    "case", [case for case in DAMAGED if case.startswith(("code ", "scale ", "momentum ", "step "))]
)
def test_a_damaged_optimizer_is_not_exported(case: str) -> None:
    params = parameters()
    optimizer = Lion8bit(params)
    step(params, optimizer, 1)
    damage, message = DAMAGED[case]
    saved = optimizer.state_dict()  # shares its state
    damage(saved)
    with pytest.raises(ValueError, match=message):
        export_state_dict(optimizer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((in_state("momentum", one_is(x)), f"{MOMENTUM}.* {WHERE}") for x in (math.nan, math.inf, -(2.0**127))),
        (in_state("momentum", lambda t: t[:5]), rf"the parameter's shape, got \(5, 90\) {WHERE}"),
        (in_state("momentum", lambda t: 3), f"momentum must be a tensor, got int {WHERE}"),
        (in_state("momentum", lambda t: t.to("meta")), f"momentum must hold data.* {WHERE}"),
        (in_state("momentum", lambda _: None), f"momentum must be a tensor, got NoneType {WHERE}"),
        (lambda saved: saved["state"].update({0: None}), "state of a parameter must be a dict"),
        (in_group("lr", math.nan), "Invalid learning rate"),
        (in_group("betas", (2, 3)), "Invalid beta1"),
    ],
)
def test_damaged_state_of_fp32_lion_changes_nothing(damage: Callable[[Any], Any], message: str) -> None:
    saved = stepped(Lion)
    damage(saved)
    params = parameters()
    optimizer = Lion(params, lr=0.5)
    step(params, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert str(after) == str(before)
    step(params, optimizer, 2)


@pytest.mark.parametrize("scale", [0.0, 2.0**-100, math.nextafter(2.0**-100, 1), 1.2345e-30, 2.0**126 * 1.999, 1e-3])
def test_every_scale_of_the_format_loads(scale: float) -> None:
    saved = stepped(Lion8bit)
    in_state("scales", one_is(scale))(saved)
    optimizer = Lion8bit(parameters())
    optimizer.load_state_dict(saved)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["scales"].view(-1)[-1] == torch.tensor(scale)


@pytest.mark.parametrize("place", [0, _CHUNK - 1, _CHUNK, 2 * _CHUNK])
def test_values_are_looked_at_in_pieces_and_to_the_end(place: int) -> None:
    param = nn.Parameter(torch.zeros(2 * _CHUNK + 1))
    optimizer = Lion8bit([param], optim_bits=32)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum"][place] = math.nan
    with pytest.raises(ValueError, match="got nan"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3, dtype=torch.int8)])
def test_steps_of_any_kind_become_ints(value: Any) -> None:
    saved = stepped(Lion8bit)
    in_state("step", lambda _: value)(saved)
    params = parameters()
    optimizer = Lion8bit(params)
    optimizer.load_state_dict(saved)
    found = optimizer.state[params[0]]["step"]
    assert type(found) is int and found == 3
    step(params, optimizer, 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("number", [0, 3])
def test_a_copy_that_fails_changes_nothing(number: int, error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out on the device half way."""
    import lion8bit.optimizer as module

    real, calls = module.to_place, []

    def fails(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > number:
            raise error("no memory")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "to_place", lambda t, *a, **o: fails(t, *a, **o) if o.get("copy") else real(t, *a, **o))
    assert_refused(stepped(lambda p: Lion8bit(p, lr=2e-3)), "no memory", error)
    assert len(calls) == number + 1


def test_a_hook_that_fails_undoes_the_load() -> None:
    params = parameters()
    optimizer = Lion8bit(params, lr=1e-3)
    step(params, optimizer, 1)
    before = contents(optimizer)

    def fail(_: torch.optim.Optimizer) -> None:
        assert optimizer.param_groups[0]["lr"] == 2e-3
        raise RuntimeError("no")

    optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.load_state_dict(stepped(lambda p: Lion8bit(p, lr=2e-3)))
    assert_same_tree(before, contents(optimizer))
    step(params, optimizer, 2)


def test_entries_that_are_no_state_load() -> None:
    """Hooks may keep what they like in ``optimizer.state``, as those of torch's own tests do."""
    params = parameters()
    optimizer = Lion8bit(params)
    step(params, optimizer, 1)
    optimizer.state["test"] = 1  # type: ignore[index]
    optimizer.state[params[0]]["shape"] = 7  # which belongs to 4 bits
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state["test"] == 1  # type: ignore[index]
    assert optimizer.state[params[0]]["shape"] == 7
    step(params, optimizer, 2)
    assert set(convert_state_dict(saved, optimizer)["state"]) == {0, 1, 2, 3}


def test_a_lazily_negated_momentum_is_loaded_with_its_sign() -> None:
    saved = stepped(Lion8bit)
    momentum = saved["state"][2]["momentum"]
    saved["state"][2]["momentum"] = torch._neg_view(momentum)
    params = parameters()
    optimizer = Lion8bit(params)
    optimizer.load_state_dict(saved)
    loaded = optimizer.state[params[2]]["momentum"]
    assert not loaded.is_neg() and torch.equal(loaded, -momentum)


# ---- Refusals of exports ---------------------------------------------------------------------------------------------


def test_a_peer_of_other_groups_is_refused() -> None:
    params = parameters()
    with pytest.raises(ValueError, match=r"groups of as many parameters, got \[4\] and \[3\]"):
        export_state_dict(Lion8bit(params), lion_pytorch.Lion(params[1:]))
