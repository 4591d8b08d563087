"""State of Lion8bit: checkpoints, copies, reports and seeds."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import (
    assert_same,
    assert_same_all,
    error_bound,
    gradient_like,
    leaf,
    snapshot,
    through_torch_save,
)
from torch import nn

import lion8bit
from lion8bit import Lion, Lion4bit, Lion8, Lion8bit, convert_state_dict, dequantize, quantize, reference
from lion8bit.integrations import report
from lion8bit.layout import DTYPES

# ---- State ----------------------------------------------------------------------------------------------------------


def small_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 80), nn.Linear(80, 90), nn.Conv2d(8, 70, 3), nn.LayerNorm(90))
    model[2].to(memory_format=torch.channels_last)
    return model.to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = gradient_like(param, generator)
        optimizer.step()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_exact(dtype: torch.dtype, bits: int) -> None:
    model = small_model(dtype)
    rounding = "compensated" if (dtype, bits) == (torch.bfloat16, 4) else "stochastic"
    options: dict[str, Any] = {"optim_bits": bits, "weight_rounding": rounding, "min_8bit_size": 1000}
    optimizer = Lion8bit(model.parameters(), lr=1e-3, weight_decay=0.1, **options)
    train(model, optimizer, 3, seed=1)
    saved = through_torch_save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed_model = small_model(dtype)
    resumed_model.load_state_dict(saved["model"])
    resumed = Lion8bit(resumed_model.parameters(), lr=7.0, block_size=256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved["optimizer"])
    assert_same_all(snapshot(optimizer), snapshot(resumed))
    dtypes = {name: value.dtype for s in resumed.state.values() for name, value in s.items() if name != "step"}
    expected = {"codes": torch.int8, "scales": torch.float32, "momentum": torch.float32}
    if bits == 4:
        expected |= {"codes": torch.uint8, "shape": torch.int64}
    assert dtypes == expected | ({"residual": torch.int8} if rounding == "compensated" else {})
    train(model, optimizer, 3, seed=2)
    train(resumed_model, resumed, 3, seed=2)
    assert_same_all(snapshot(optimizer), snapshot(resumed))


def test_loading_copies_and_leaves_its_argument_alone() -> None:
    model = small_model(torch.float32)
    optimizer = Lion8bit(model.parameters())
    train(model, optimizer, 1, seed=1)
    saved = optimizer.state_dict()
    pristine = copy.deepcopy(saved)
    twin_model = copy.deepcopy(model)
    twin = Lion8bit(twin_model.parameters())
    twin.load_state_dict(saved)
    train(twin_model, twin, 2, seed=2)
    for number, state in pristine["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(saved["state"][number][name]), torch.as_tensor(value))


def test_hooks_and_names_survive_loading() -> None:
    model = nn.Linear(80, 80)
    optimizer = Lion8bit(model.named_parameters())
    train(model, optimizer, 1, seed=1)
    calls = []
    other = Lion8bit(model.named_parameters())
    other.register_load_state_dict_pre_hook(lambda opt, sd: calls.append(sorted(sd["state"][0])))
    other.register_load_state_dict_post_hook(lambda opt: calls.append(sorted(opt.state[model.weight])))
    other.load_state_dict(state_dict=optimizer.state_dict())
    assert calls == [["codes", "scales", "step"], ["codes", "scales", "step"]]
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_state_of_version_2_enters(rounding: str) -> None:
    """State in which each narrow row has a scale is quantized again; all other state keeps its bits."""
    params = [leaf(torch.randn(shape).bfloat16()) for shape in ((600, 9), (70, 90), (5000,), (40, 131), (10, 10))]
    old, new = ([leaf(param) for param in copy.deepcopy(params)] for _ in range(2))
    first, second = (Lion8bit(each, lr=1e-3, weight_rounding=rounding) for each in (old, new))
    for param in old:
        param.grad = gradient_like(param)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0]["format_version"] = 2
    for number in (0, 1):
        codes, scales = reference.encode(first.momentum(old[number]), 128)
        saved["state"][number] |= {"codes": codes.contiguous(), "scales": scales}
    pristine = copy.deepcopy(saved)
    for loaded in (saved, convert_state_dict(saved, second)):
        second.load_state_dict(loaded)
        assert second.param_groups[0]["format_version"] == 4
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            state, theirs = second.state[other], saved["state"][number]
            assert state["step"] == 1
            if number in (0, 1):
                per_row = reference.decode(theirs["codes"], theirs["scales"], 128).contiguous()
                codes, scales = quantize(per_row, 128)
                assert_same(state["codes"], codes, "codes")
                assert_same(state["scales"], scales, "scales")
            else:
                assert_same(second.momentum(other), first.momentum(one), "momentum")
            assert ("residual" in state) == (rounding == "compensated")
            if "residual" in state:
                assert_same(state["residual"], theirs["residual"], "residual")
    assert str(saved) == str(pristine)
    for param in new:
        param.grad = gradient_like(param)
    second.step()


def in_version_3(state: dict[str, Any]) -> dict[str, Any]:
    """The state with -128 as the code of an exact zero, which 0 was not."""
    return {**state, "codes": state["codes"].masked_fill(state["codes"] == 0, -128)} if "codes" in state else state


@pytest.mark.parametrize("way", ["load", "convert", "unpickle"])
def test_state_of_version_3_enters(way: str) -> None:
    """Its zeros become the code 0; all other codes stay, and training goes on with the same bits."""
    twins = [[leaf(torch.randn(shape)) for shape in ((600, 9), (70, 90), (40, 131), (10, 10))]]
    twins.append([leaf(param.detach().clone()) for param in twins[0]])
    optimizers = [Lion8bit(params, lr=1e-3) for params in twins]
    first, second = optimizers
    for param in twins[0]:
        param.grad = gradient_like(param)
        param.grad[:, ::7] = 0.0
    first.step()
    for param, other in zip(*twins, strict=True):
        other.data.copy_(param.data)
        assert param.numel() < 4096 or bool((first.state[param]["codes"] == 0).any())
    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0]["format_version"] = 3
    saved["state"] = {number: in_version_3(state) for number, state in saved["state"].items()}
    pristine = copy.deepcopy(saved)
    if way == "unpickle":
        second.state.update({other: saved["state"][number] for number, other in enumerate(twins[1])})
        second.param_groups[0] |= {"format_version": 3, "seed": first.param_groups[0]["seed"]}
        second.__setstate__(second.__getstate__())
    else:
        second.load_state_dict(saved if way == "load" else convert_state_dict(saved, second))
    assert str(saved) == str(pristine)
    assert second.param_groups[0]["format_version"] == 4
    for step in range(2):
        for param, other in zip(*twins, strict=True):
            for name, value in first.state[param].items():
                if name != "step":
                    assert_same(second.state[other][name], value, name)
            assert_same(other.detach(), param.detach(), f"parameter before step {step}")
            param.grad = gradient_like(param)
            other.grad = param.grad.clone()
        first.step()
        second.step()


def test_empty_state_round_trips() -> None:
    model = small_model(torch.bfloat16)
    optimizer = Lion8bit(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(through_torch_save(optimizer.state_dict()))
    train(model, optimizer, 1, seed=1)
    assert optimizer.state


def break_version(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["format_version"] = 99


def break_block_size(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["block_size"] = 64


def break_names(saved: dict[str, Any]) -> None:
    saved["state"][1] = {"exp_avg": torch.zeros(90, 80)}


def break_codes(saved: dict[str, Any]) -> None:
    saved["state"][1]["codes"] = saved["state"][1]["codes"].float()


def break_shape(saved: dict[str, Any]) -> None:
    saved["state"][1]["codes"] = saved["state"][1]["codes"][:5]


CODES_4 = r"codes must be contiguous torch.uint8 \(90, 40\) at block_size 64, got"
SHAPE_4 = "shape must be an int64 vector of the parameter's sizes, got"


def changed(name: str, change: Any) -> Any:
    """Damages an entry of the state of the second parameter, [90, 80], or leaves it out where there is no change."""

    def damage(saved: dict[str, Any]) -> None:
        value = saved["state"][1].pop(name)
        if change is not None:
            saved["state"][1][name] = change(value)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("codes", lambda t: t[:5]), CODES_4),
        (changed("codes", lambda t: t.t().contiguous().t()), CODES_4),
        (changed("codes", lambda t: t.flatten()), CODES_4),
        (changed("codes", lambda t: torch.cat([t, t], 1)), CODES_4),
        (changed("codes", lambda t: t.view(torch.int8)), "codes must be a dense torch.int8 tensor of shape"),
        (changed("codes", lambda t: t.float()), "codes must be a dense torch.int8 tensor of shape"),
        (changed("codes", lambda t: t.fill_(0x8F)), r"codes must be in \[-7, 7\], got -8"),
        (changed("codes", lambda t: t.fill_(0xF8)), r"codes must be in \[-7, 7\], got -8"),
        (changed("codes", None), r"got \['scales', 'shape', 'step'\]"),
        (changed("scales", lambda t: t[:5]), r"scales must be float32 \(90, 2\) at block_size 64, got"),
        (changed("scales", lambda t: t.double()), r"scales must be float32 \(90, 2\) at block_size 64, got"),
        (changed("scales", lambda t: -t), "scales must be 0 or in"),
        (changed("scales", lambda t: t[None, None]), "must have the order in memory"),
        (changed("scales", None), r"got \['codes', 'shape', 'step'\]"),
        (changed("shape", None), "shape must be a tensor, got NoneType"),
        (changed("shape", lambda t: (90, 80)), "shape must be a tensor, got tuple"),
        (changed("shape", lambda t: t.bfloat16()), f"{SHAPE_4} torch.bfloat16"),
        (changed("shape", lambda t: t[None]), f"{SHAPE_4} torch.int64 of shape"),
        (changed("shape", lambda t: t.to("meta")), "shape must hold data"),
        (changed("shape", lambda t: -t), f"{SHAPE_4} torch.int64 of shape"),
        (changed("shape", lambda t: t.to_sparse()), "shape must be a dense tensor"),
        (changed("shape", lambda t: t.flip(0)), r"shape must be the parameter's, \(90, 80\), got \(80, 90\)"),
    ],
)
def test_damaged_4_bit_state_says_what_is_wrong(damage, message: str) -> None:
    model = small_model(torch.float32)
    optimizer = Lion4bit(model.parameters())
    train(model, optimizer, 1, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    before = snapshot(optimizer)
    for way in (optimizer.load_state_dict, lambda state: convert_state_dict(state, Lion8bit(model.parameters()))):
        with pytest.raises(ValueError, match=rf"{message}.*\(parameter 1, shape \(90, 80\)\)"):
            way(saved)
    assert_same_all(snapshot(optimizer), before)
    train(model, optimizer, 1, seed=2)


@pytest.mark.parametrize("shape", [(70, 91), (4097,), (99, 49)], ids=str)
def test_the_half_byte_after_an_odd_row_must_be_zero(shape: tuple[int, ...]) -> None:
    """With rows of a matrix, a vector, and joined rows; kernels would count it as an element."""
    param = leaf(torch.randn(shape))
    optimizer = Lion4bit([param])
    param.grad = gradient_like(param)
    optimizer.step()
    assert bool((optimizer.state[param]["codes"].view(-1, optimizer.state[param]["codes"].shape[-1])[:, -1] < 16).all())
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    saved["state"][0]["codes"].view(-1)[-1] |= 0x10
    with pytest.raises(ValueError, match="codes must end an odd row with half a byte of 0"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_version, "format_version 4, got 99"),
        (break_block_size, r"scales must be float32 \(60, 2\) at block_size 64"),
        (break_names, r"got \['exp_avg'\]"),
        (break_codes, "dense torch.int8"),
        (break_shape, "dense torch.int8"),
    ],
)
def test_incompatible_state_says_what_differs(damage, message: str) -> None:
    model = small_model(torch.float32)
    optimizer = Lion8bit(model.parameters())
    train(model, optimizer, 1, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_all(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["block_size"] == 128
    train(model, optimizer, 1, seed=2)


@pytest.mark.parametrize("optimizer_class", [Lion4bit, Lion8bit])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_deepcopy_and_pickle(clone, optimizer_class: type[Lion8bit]) -> None:
    model = small_model(torch.bfloat16)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    train(model, optimizer, 2, seed=1)
    twin_model, twin = clone((model, optimizer))
    train(model, optimizer, 2, seed=2)
    train(twin_model, twin, 2, seed=2)
    assert_same_all(snapshot(optimizer), snapshot(twin))
    assert twin.nonfinite_count() == 0 and type(twin) is optimizer_class


def test_defaults_rebuild_the_optimizer() -> None:
    params = [leaf(torch.randn(5))]
    optimizer = Lion8bit(params, lr=3e-4, betas=[0.8, 0.9], cautious=True, block_size=64)
    assert Lion8bit(params, **optimizer.defaults).defaults == optimizer.defaults
    assert Lion8 is Lion8bit
    assert "block_size: 64" in repr(optimizer)


def test_lion4bit_is_lion8bit_with_another_default() -> None:
    """Alone, from an AdamW's settings, with other options, with groups that have their own bits; loaded into each."""
    twins = [[leaf(torch.full((70, 91), 1.0)), leaf(torch.full((64, 128), 2.0))] for _ in range(2)]
    groups = [[{"params": params[:1]}, {"params": params[1:], "optim_bits": 8}] for params in twins]
    ours, theirs = Lion4bit(groups[0], 1e-3, [0.8, 0.9], 0.1, cautious=True), None
    theirs = Lion8bit(groups[1], 1e-3, [0.8, 0.9], 0.1, cautious=True, optim_bits=4)
    for param, other in zip(*twins, strict=True):
        param.grad = gradient_like(param)
        other.grad = param.grad.clone()
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same_all(snapshot(ours), snapshot(theirs))
    assert ours.defaults == theirs.defaults and isinstance(ours, Lion8bit) and "Lion4bit" in repr(ours)
    assert [group["block_size"] for group in ours.param_groups] == [64, 128]
    assert [ours.state[param]["codes"].dtype for param in twins[0]] == [torch.uint8, torch.int8]
    converted = Lion4bit.from_adamw(twins[0], lr=1e-3, weight_decay=0.1, block_size=256)
    assert type(converted) is Lion4bit
    expected = {"lr": 2e-4, "weight_decay": 0.5, "block_size": 256, "optim_bits": 4}
    assert {name: pytest.approx(converted.defaults[name]) for name in expected} == expected
    assert Lion4bit(twins[0], optim_bits=8).defaults == Lion8bit(twins[0]).defaults
    assert report(ours)["lion8bit/state_bytes"] == 70 * (46 + 8) + 64 * (128 + 4)
    for optimizer in (Lion4bit(groups_like(twins[0])), Lion8bit(groups_like(twins[0]))):
        optimizer.load_state_dict(ours.state_dict())
        assert_same_all(snapshot(optimizer), snapshot(ours))


def groups_like(params: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [{"params": [param]} for param in params]


def test_older_pickles_get_newer_options() -> None:
    optimizer = Lion8bit([leaf(torch.randn(5000))])
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["cautious"], group["format_version"]
    fresh = Lion8bit.__new__(Lion8bit)
    fresh.__setstate__(state)
    assert fresh.param_groups[0]["cautious"] is False and fresh.param_groups[0]["format_version"] == 4
    state["param_groups"][0]["format_version"] = 99
    with pytest.raises(ValueError, match="format_version 4, got 99"):
        Lion8bit.__new__(Lion8bit).__setstate__(state)


def test_older_checkpoints_keep_the_peak_in_initial_lr() -> None:
    param = leaf(torch.ones(5000))
    optimizer = Lion8bit([param], lr=1e-3, weight_decay=0.5, decouple_lr=True)
    assert optimizer.param_groups[0]["peak_lr"] == 1e-3
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    group |= {"lr": 5e-4, "initial_lr": torch.tensor(2e-3)}
    del group["peak_lr"]
    resumed = Lion8bit([param], lr=1.0, decouple_lr=True)
    for state in (saved, lion8bit.convert_state_dict(saved, resumed)):
        resumed.load_state_dict(through_torch_save(state))
        assert resumed.param_groups[0]["peak_lr"] == pytest.approx(2e-3)
        param.data.fill_(1.0)
        param.grad = torch.zeros_like(param)
        resumed.step()
        torch.testing.assert_close(param.detach(), torch.full_like(param, 0.875))


# ---- Looking inside -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, error", [(4, 0.5), (8, 0.03)])
@pytest.mark.parametrize("shape", [(64, 101), (5001,), (600, 9), (20, 3, 7, 11)], ids=str)
def test_momentum_is_readable_in_fp32(shape: tuple[int, ...], bits: int, error: float) -> None:
    param, small = leaf(torch.randn(shape).bfloat16()), leaf(torch.randn(10))
    optimizer = Lion8bit([param, small], betas=(0.9, 0.5), optim_bits=bits)
    assert not optimizer.momentum(param).any()
    for p in (param, small):
        p.grad = gradient_like(p)
    optimizer.step()
    assert torch.equal(optimizer.momentum(small), small.grad * 0.5)
    assert torch.allclose(optimizer.momentum(param), param.grad.float() * 0.5, atol=error)
    assert optimizer.momentum(param).dtype == torch.float32 and optimizer.momentum(param).shape == shape
    with pytest.raises(ValueError, match="one of this optimizer's"):
        optimizer.momentum(torch.randn(3))


def test_memory_report_counts_bytes() -> None:
    params = [leaf(torch.randn(64, 256).bfloat16()), leaf(torch.randn(100))]
    optimizer = Lion8bit(params)
    for param in params:
        param.grad = gradient_like(param)
    optimizer.step()
    report = optimizer.memory_report()
    assert report["parameters"] == 64 * 256 + 100
    assert report["parameter_bytes"] == report["gradient_bytes"] == 64 * 256 * 2 + 400
    assert report["state_bytes"] == 64 * 256 + 64 * 2 * 4 + 400
    del params[1].grad
    assert Lion8bit([params[0]]).memory_report()["state_bytes_per_parameter"] == 0.0


@pytest.mark.parametrize("bits, expected", [(4, 0.5625), (8, 1.03125), (32, 4.0)])
def test_bytes_per_parameter(bits: int, expected: float) -> None:
    param = leaf(torch.randn(1024, 1024))
    optimizer = Lion8bit([param], optim_bits=bits)
    param.grad = gradient_like(param)
    optimizer.step()
    assert optimizer.memory_report()["state_bytes_per_parameter"] == expected


def test_a_parameter_transposed_in_place_is_noticed() -> None:
    """Same address, same shape, other strides: the momentum must follow the elements' indices, as fp32 Lion's does."""
    ours, theirs = (leaf(torch.arange(4900.0).view(70, 70)) for _ in range(2))
    one, other = Lion8bit([ours], lr=1.0, optim_bits=32), Lion([theirs], lr=1.0)
    for turn in range(3):
        for param in (ours, theirs):
            param.grad = torch.randn(70, 70, generator=torch.Generator().manual_seed(turn))
            if turn == 1:
                param.data = param.data.t()
        one.step()
        other.step()
        assert_same(ours.detach(), theirs.detach(), f"turn {turn}")


@pytest.mark.parametrize(
    ("option", "value"),
    [("block_size", 512), ("betas", (0.9, 1.5)), ("optim_bits", 16), ("weight_rounding", "up"), ("lr", "1e-4")],
)
@pytest.mark.parametrize("warm", [False, True])
def test_an_option_spoilt_after_construction_changes_nothing(option, value, warm: bool) -> None:
    """A block size that the format lacks would run past the kernel's buffers; others would be silently ignored."""
    param = leaf(torch.randn(70, 700))
    optimizer = Lion8bit([param])
    param.grad = gradient_like(param)
    if warm:
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError):
        optimizer.step()
    assert_same_all(snapshot(optimizer), before)


# ---- Codes of 4 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 64, 128, 256])
@pytest.mark.parametrize(
    ("shape", "codes_shape"),
    [
        ((), (1, 1)),
        ((1,), (1, 1)),
        ((5001,), (1, 2501)),
        ((70, 301), (70, 151)),
        ((70, 300), (70, 150)),
        ((5, 7, 99), (5, 347)),
        ((20, 16, 5, 7), (20, 280)),
        ((601, 9), (2705,)),
        ((9, 7, 5), (158,)),
        ((600, 1), (300,)),
        ((0, 300), (0, 150)),
        ((0, 7), (0,)),
        ((7, 0), (0,)),
    ],
    ids=str,
)
def test_4_bit_codes_of_any_shape(shape: tuple[int, ...], codes_shape: tuple[int, ...], block_size: int | None) -> None:
    """Within the error bound; those of any order in memory are those of the row-major one."""
    momentum = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(momentum, block_size, bits=4)
    assert (codes.dtype, scales.dtype, tuple(codes.shape)) == (torch.uint8, torch.float32, codes_shape)
    decoded = dequantize(codes, scales, block_size, shape)
    assert decoded.dtype == torch.float32 and decoded.shape == shape and decoded.is_contiguous()
    bound = error_bound(momentum.float(), scales, block_size or 64, 4)
    assert bool(((decoded.double() - momentum).abs() <= bound + 1e-12).all())
    for given in ([*shape], torch.Size(shape)):
        assert_same(dequantize(codes, scales, block_size, given), decoded, "of another kind of shape")
    reverse = [*range(momentum.dim())][::-1]
    backwards = momentum.permute(reverse).contiguous().permute(reverse)
    for one, other in zip(quantize(backwards, block_size, bits=4), (codes, scales), strict=True):
        assert_same(one, other, "of another order in memory")


def test_4_bit_codes_that_do_not_fit_are_refused() -> None:
    codes, scales = quantize(torch.randn(70, 301), bits=4)
    for call, message in {
        lambda: dequantize(codes, scales): "shape must be given for 4-bit codes",
        lambda: dequantize(codes, scales, shape=(70, 300)): r"codes must be \(70, 150\) for momentum \(70, 300\)",
        lambda: dequantize(codes, scales, shape=(301, 70)): r"codes must be \(301, 35\) for momentum",
        lambda: dequantize(codes, scales[1:], shape=(70, 301)): r"scales must be \(70, 5\) for .* at block_size 64",
        lambda: dequantize(codes, scales, 128, (70, 301)): r"scales must be \(70, 3\) for .* at block_size 128",
        lambda: dequantize(codes, scales, 96, (70, 301)): "block_size must be one of",
        lambda: quantize(torch.randn(3), bits=5): r"bits must be one of \(8, 4\), got 5",
        lambda: quantize(torch.randn(3), bits=32): r"bits must be one of \(8, 4\), got 32",
        lambda: quantize(torch.randn(3), bits=True): r"bits must be one of \(8, 4\), got True",
        lambda: quantize(torch.randn(8, 2)[:, 0], bits=4): "momentum must be dense",
        lambda: quantize(torch.tensor([torch.nan]), bits=4): "momentum must be finite",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    eight, theirs = quantize(torch.randn(70, 301))
    with pytest.raises(ValueError, match=r"shape must be that of 8-bit codes, \(70, 301\), got \(301, 70\)"):
        dequantize(eight, theirs, shape=(301, 70))
    for wrong in (codes.int(), codes.bool()):
        with pytest.raises(TypeError, match="codes must be int8 or uint8 and scales float32"):
            dequantize(wrong, scales, shape=(70, 301))


# ---- Seeds -----------------------------------------------------------------------------------------------------------


def rounded_alike(optimizers: Sequence[Lion8bit]) -> list[tuple[int, int]]:
    """Steps all parameters, which begin alike, with the same gradient; the pairs that end with the same bits."""
    params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    for step in range(2):
        grad = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(step))
        for param in params:
            param.grad = grad.to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()
    pairs = itertools.combinations(range(len(params)), 2)
    return [(i, j) for i, j in pairs if torch.equal(params[i], params[j])]


def equal_params(count: int) -> list[torch.nn.Parameter]:
    value = torch.randn(16, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    return [torch.nn.Parameter(value.clone()) for _ in range(count)]


def test_no_two_parameters_of_a_process_have_the_same_random_bits() -> None:
    """One optimizer for all, one for each, several groups, groups that come later; and the numbers run on."""
    params = equal_params(9)
    together = Lion8bit([{"params": params[:2]}, {"params": params[2:4]}], lr=1e-5, seed=None)
    apart = [Lion8bit([param], lr=1e-5, seed=None) for param in params[4:8]]
    together.add_param_group({"params": params[8:]})
    assert rounded_alike([together, *apart]) == []
    first = together.param_groups[0]["seed"]
    assert [group["seed"] - first for group in together.param_groups] == [0, 2, 8]
    assert [optimizer.param_groups[0]["seed"] - first for optimizer in apart] == [4, 5, 6, 7]


def test_a_seed_repeats_the_random_bits() -> None:
    """Of an optimizer, parameter by parameter; of a separate group; also through a checkpoint."""
    params = equal_params(8)
    one, other = (Lion8bit([{"params": p[:2]}, {"params": p[2:]}], lr=1e-5, seed=5) for p in (params[:4], params[4:]))
    assert [group["seed"] for group in one.param_groups] == [5, 7]
    assert rounded_alike([one, other]) == [(i, i + 4) for i in range(4)]
    params = equal_params(3)
    by_group = Lion8bit([{"params": [param], "seed": seed} for param, seed in zip(params, (3, 9, 3))], lr=1e-5)
    assert rounded_alike([by_group]) == [(0, 2)]
    resumed = Lion8bit([{"params": [param]} for param in equal_params(3)], seed=None)
    resumed.load_state_dict(by_group.state_dict())
    assert [group["seed"] for group in resumed.param_groups] == [3, 9, 3]
    saved = by_group.state_dict()
    for group in saved["param_groups"]:
        del group["seed"]
    resumed.load_state_dict(saved)
    assert [group["seed"] for group in resumed.param_groups] == [0, 1, 2], "as before there were seeds"
    for seed in (-1, 1.0, "1", True):
        with pytest.raises(ValueError, match="seed must be"):
            Lion8bit(equal_params(1), seed=seed)


def test_random_bits_follow_a_parameter_that_leaves_its_group() -> None:
    """The kept plan gives those that a new one gives."""
    results = []
    for keep in (True, False):
        params = equal_params(3)
        optimizer = Lion8bit(params, lr=1e-5)
        params[0].requires_grad_(False)
        for step in range(3):
            for param in params[1:]:
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            if step == 2:
                del optimizer.param_groups[0]["params"][0]
                optimizer._stepper.plan = optimizer._stepper.plan if keep else None
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))
