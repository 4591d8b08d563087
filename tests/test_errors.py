"""Bad gradients are skipped and counted, and errors change nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    LAYOUTS,
    assert_same,
    assert_same_all,
    gradient_like,
    leaf,
    snapshot,
    through_torch_save,
)
from torch import nn

import lion8bit
from lion8bit import Lion, Lion8bit
from lion8bit.layout import DTYPES
from lion8bit.table import make_entry

# ---- Bad gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optim_bits", [4, 8, 32])
def test_bad_elements_are_skipped_and_counted(dtype: torch.dtype, optim_bits: int) -> None:
    torch.manual_seed(0)
    clean = leaf(torch.randn(40, 128).to(dtype))
    dirty = leaf(clean.detach().clone())
    optimizers = [Lion8bit([p], lr=1e-2, optim_bits=optim_bits) for p in (clean, dirty)]
    bad = torch.zeros(40, 128, dtype=torch.bool)
    for step in range(4):
        clean.grad = gradient_like(clean)
        dirty.grad = clean.grad.clone()
        if step == 2:
            bad[::7, 5] = True
            kept, momentum = dirty.detach()[bad].clone(), optimizers[1].momentum(dirty)[bad]
            for number, where in enumerate(bad.nonzero().tolist()):
                dirty.grad[tuple(where)] = (float("nan"), float("inf"), -float("inf"))[number % 3]
        for optimizer in optimizers:
            optimizer.step()
        if step == 2:
            assert_same(dirty.detach()[bad], kept, "skipped parameters")
            error = (optimizers[1].momentum(dirty)[bad] - momentum).abs()
            assert float(error.max()) < {4: 0.3, 8: 0.02, 32: 0.02}[optim_bits] * float(momentum.abs().max())
            # All other parameters of the same blocks move as if nothing had happened.
            assert_same(dirty.detach()[~bad], clean.detach()[~bad], "their neighbours")
    assert optimizers[0].nonfinite_count() == 0
    assert optimizers[1].nonfinite_count() == int(bad.sum())
    assert bool(optimizers[1].momentum(dirty).isfinite().all())


def test_all_bad_keeps_everything_finite() -> None:
    param = leaf(torch.randn(5000))
    before = param.detach().clone()
    optimizer = Lion8bit([param], weight_decay=0.5, lr=0.1)
    for _ in range(3):
        param.grad = torch.full_like(param, float("nan"))
        optimizer.step()
    assert_same(param.detach(), before, "parameter")
    assert optimizer.nonfinite_count() == 15000


# ---- Errors change nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate"),
        ({"lr": float("inf")}, "Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, "Invalid beta1"),
        ({"betas": (0.9, -0.1)}, "Invalid beta2"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"weight_decay": -0.1}, "Invalid weight_decay"),
        ({"block_size": 100}, "block_size must be one of"),
        ({"min_8bit_size": -1}, "min_8bit_size"),
        ({"optim_bits": 16}, "optim_bits must be 4, 8 or 32"),
        ({"weight_rounding": "up"}, "weight_rounding must be"),
        # Finite in double, infinite in float32.
        ({"lr": 1e39}, "Invalid learning rate: 1e\\+39"),
        ({"lr": torch.tensor(1e300, dtype=torch.float64)}, "Invalid learning rate: 1e\\+300"),
        ({"weight_decay": 1e42}, "Invalid weight_decay: 1e\\+42"),
        # Of another kind.
        ({"lr": "1e-4"}, "lr must be a number, got the text '1e-4'; YAML reads .* write 1.0e-4"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"lr": torch.tensor(1)}, "lr must be a number, got tensor"),
        ({"lr": torch.tensor(float("nan"))}, "Invalid learning rate: nan"),
        ({"lr": np.float32("inf")}, "Invalid learning rate: inf"),
        ({"lr": [1e-4]}, "lr must be a number, got \\[0.0001\\]"),
        ({"lr": 10**400}, "lr must be a number"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"betas": None}, "betas must be two numbers, got None"),
        ({"betas": "0.9"}, "betas must be two numbers, got '0.9'"),
        ({"betas": {0.9, 0.99}}, "betas must be two numbers"),
        ({"betas": (0.9, 0.95, 0.99)}, "betas must be two numbers"),
        ({"betas": ("0.9", 0.99)}, "beta1 must be a number, got the text '0.9'"),
        ({"betas": (0.9, None)}, "beta2 must be a number, got None"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number, got the text '0.1'"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay: nan"),
        ({"maximize": "False"}, "maximize must be True or False, got 'False'"),
        ({"maximize": None}, "maximize must be True or False, got None"),
        ({"cautious": "no"}, "cautious must be True or False, got 'no'"),
        ({"decouple_lr": 2}, "decouple_lr must be True or False, got 2"),
        ({"block_size": 128.0}, "block_size must be one of .* got 128.0"),
        ({"block_size": "128"}, "block_size must be one of .* got '128'"),
        ({"min_8bit_size": "4096"}, "min_8bit_size must be an integer of at least 0, got '4096'"),
        ({"min_8bit_size": None}, "min_8bit_size must be an integer"),
        ({"optim_bits": "8"}, "optim_bits must be 4, 8 or 32, got '8'"),
        ({"optim_bits": 8.0}, "optim_bits must be 4, 8 or 32, got 8.0"),
        ({"weight_rounding": None}, "weight_rounding must be"),
    ],
)
@pytest.mark.parametrize("optimizer_class", [Lion8bit, Lion])
def test_options_out_of_range(options: dict[str, Any], message: str, optimizer_class: Any) -> None:
    """In the constructor, in a group, in a group that is added, and written into a group later."""
    if optimizer_class is Lion and not options.keys() <= {"lr", "betas", "weight_decay", "maximize"}:
        return
    param = leaf(torch.randn(5))
    with pytest.raises(ValueError, match=message):
        optimizer_class([param], **options)
    with pytest.raises(ValueError, match=message):
        optimizer_class([{"params": [param], **options}])
    optimizer = optimizer_class([param])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [leaf(torch.randn(5))], **options})
    param.grad = gradient_like(param)
    before = snapshot(optimizer)
    optimizer.param_groups[0] |= options
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert_same_all(snapshot(optimizer), before)


@pytest.mark.parametrize("later", [False, True])
def test_numbers_of_numpy_are_numbers(later: bool) -> None:
    """At construction they become Python's, which `torch.load` takes."""
    options: dict[str, Any] = {
        "lr": np.float64(0.5),
        "betas": np.array([0.5, 0.75]),
        "weight_decay": np.float32(0.5),
        "block_size": np.int64(64),
        "min_8bit_size": np.int32(10),
        "optim_bits": np.int8(32),
        "maximize": np.True_,
    }
    plain = {"lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.5, "block_size": 64, "min_8bit_size": 10}
    plain |= {"optim_bits": 32, "maximize": True}
    params = [leaf(torch.ones(5000)) for _ in range(2)]
    if later:
        ours = Lion8bit(params[:1])
        ours.param_groups[0] |= options
    else:
        ours = Lion8bit(params[:1], **options)
        saved = through_torch_save(ours.state_dict())["param_groups"][0]
        assert {name: saved[name] for name in plain} == plain
        assert all(type(saved[name]) is type(value) for name, value in plain.items())
        through_torch_save(ours.defaults)
    for param, optimizer in zip(params, (ours, Lion8bit(params[1:], **plain)), strict=True):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert_same(params[0].detach(), params[1].detach(), "parameter")


SMALL_STEPS = {
    "Lion8bit": lambda lr: {"lr": lr, "weight_decay": 2.0},
    "decouple_lr": lambda lr: {"lr": lr, "weight_decay": 0.5, "decouple_lr": True, "peak_lr": 0.25},
    "step_param": lambda lr: {"lr": lr, "weight_decay": 2.0},
    "Lion": lambda lr: {"lr": lr, "weight_decay": 2.0},
}


@pytest.mark.parametrize("kind", SMALL_STEPS)
def test_a_decay_beyond_the_whole_weight_is_refused(kind: str) -> None:
    """A factor below 0 would turn the signs of all weights. At construction lr may still be a schedule's factor."""
    optimizer_class = Lion if kind == "Lion" else Lion8bit
    params = [leaf(torch.randn(5)) for _ in range(2)]
    groups = [{"params": params[:1], **SMALL_STEPS[kind](0.1)}, {"params": params[1:], **SMALL_STEPS[kind](0.75)}]
    optimizer = optimizer_class(groups)
    for param in params:
        param.grad = gradient_like(param)
    before = snapshot(optimizer)
    what = "lr/peak_lr" if kind == "decouple_lr" else "lr"
    with pytest.raises(
        ValueError, match=rf"Invalid weight_decay: .*{what}\*weight_decay must .* 1.5 with lr 0.75"
    ) as e:
        optimizer.step_param(params[1], groups[1]) if kind == "step_param" else optimizer.step()
    assert ("peak_lr 0.25" in str(e.value)) == (kind == "decouple_lr")
    assert_same_all(snapshot(optimizer), before)
    optimizer.param_groups[1]["lr"] = 0.5  # exactly all of it
    optimizer.step()
    assert_same(params[1].detach(), -0.5 * params[1].grad.sign(), "parameter")


@pytest.mark.parametrize("lr", [-3e-21, -9e-10, torch.tensor(-3e-21), -0.0])
@pytest.mark.parametrize("optimizer_class", [Lion8bit, Lion])
def test_rates_that_rounding_made_negative_count_as_zero(lr: Any, optimizer_class: Any) -> None:
    param = leaf(torch.randn(5))
    optimizer = optimizer_class([param], weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = lr
    param.grad = gradient_like(param)
    before = param.detach().clone()
    optimizer.step()
    assert_same(param.detach(), before, "parameter")
    optimizer.param_groups[0]["lr"] = -1e-9
    with pytest.raises(ValueError, match="Invalid learning rate: -1e-09"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_parameter_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"parameters must be float32, bfloat16 or float16.*parameter 1 of group 0"):
        Lion8bit([leaf(torch.randn(5)), leaf(torch.randn(5, dtype=dtype))])


FROZEN = [torch.uint8, torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", FROZEN, ids=str)
def test_frozen_parameters_may_have_any_dtype(dtype: torch.dtype) -> None:
    """As the base of QLoRA, which `model.parameters()` hands over too; refused once it has a gradient."""
    frozen = nn.Parameter(torch.zeros(64, 64).to(dtype), requires_grad=False)
    adapter = nn.Parameter(torch.zeros(64, 80))
    optimizer = Lion8bit([frozen, adapter], lr=0.5, weight_rounding="compensated")
    for _ in range(2):
        adapter.grad = torch.ones_like(adapter)
        optimizer.step()
        assert optimizer.memory_report()["parameters"] == 64 * 80, "of those that are trained"
    saved = through_torch_save(optimizer.state_dict())
    assert saved["state"].keys() == {1}
    optimizer.load_state_dict(saved)
    adapter.grad = torch.ones_like(adapter)
    optimizer.step()
    assert bool((adapter == -1.5).all())
    if dtype.is_floating_point or dtype.is_complex:
        before = snapshot(optimizer)[1:]
        frozen.requires_grad_().grad = torch.zeros_like(frozen)
        with pytest.raises(TypeError, match=r"parameters must be dense float32.*parameter 0 of group 0"):
            optimizer.step()
        assert_same_all(snapshot(optimizer)[1:], before)


def sparse(param: torch.Tensor) -> torch.Tensor:
    return param.detach().to_sparse()


def lost(param: torch.Tensor) -> torch.Tensor:
    grad = torch.ones_like(param)
    grad.untyped_storage().resize_(0)
    return grad


@pytest.mark.parametrize(
    ("grad", "error", "message"), [(sparse, RuntimeError, "sparse gradients"), (lost, RuntimeError, "must have memory")]
)
def test_a_bad_gradient_changes_nothing(grad, error: type[Exception], message: str) -> None:
    params = [leaf(torch.randn(70, 70)) for _ in range(3)]
    optimizer = Lion8bit(params)
    for warm in (False, True):
        for param in params:
            param.grad = gradient_like(param)
        if warm:
            optimizer.step()
        before = snapshot(optimizer)
        params[2].grad = grad(params[2])
        with pytest.raises(error, match=rf"{message}.*parameter 2 of group 0, shape \(70, 70\)"):
            optimizer.step()
        assert_same_all(snapshot(optimizer), before)


def test_a_complex_gradient_is_refused() -> None:
    param = leaf(torch.randn(10))
    grad = torch.randn(10, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"gradients must be float32, bfloat16 or float16, got torch\.complex64"):
        make_entry(param, grad, {}, block_size=128, seed=0, hyper=0)


def test_expanded_and_meta_parameters_are_refused() -> None:
    param = leaf(torch.randn(1, 5000).expand(3, 5000))
    param.grad = torch.randn(3, 5000)
    with pytest.raises(ValueError, match="must not share memory"):
        Lion8bit([param]).step()
    param = leaf(torch.randn(5000, device="meta"))
    param.grad = torch.empty(5000, device="meta")
    with pytest.raises(RuntimeError, match="to_empty"):
        Lion8bit([param]).step()


@pytest.mark.parametrize("asked", [4, 8, 32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("damage", ["shape", "dtype", "scales", "strides", "missing"])
def test_damaged_state_is_refused(damage: str, bits: int, asked: int) -> None:
    """Also where the step would have converted it to other bits."""
    param = leaf(torch.randn(70, 200))
    optimizer = Lion8bit([param], optim_bits=bits)
    param.grad = gradient_like(param)
    optimizer.step()
    state, before = optimizer.state[param], param.detach().clone()
    if damage == "shape":
        state["codes"] = state["codes"][:, :60].contiguous()
    elif damage == "dtype":
        state["codes"] = state["codes"].bfloat16()
    elif damage == "scales":
        state["scales"] = state["scales"][:1]
    elif damage == "strides":
        asked = bits  # a conversion reads them as they are
        state["scales"] = state["scales"].t().contiguous().t()
    else:
        del state["codes"]
    optimizer.param_groups[0]["optim_bits"] = asked
    with pytest.raises(ValueError, match=r"must .*parameter 0 of group 0"):
        optimizer.step()
    assert_same(param.detach(), before, "parameter")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_changed_block_size_is_refused(bits: int) -> None:
    param = leaf(torch.randn(70, 200))
    optimizer = Lion8bit([param], block_size=128, optim_bits=bits)
    param.grad = gradient_like(param)
    optimizer.step()
    optimizer.param_groups[0]["block_size"] = 64
    with pytest.raises(ValueError, match=r"scales must be float32 \(70, 4\) at block_size 64"):
        optimizer.step()


OTHER_BITS = [({"optim_bits": one}, {"optim_bits": other}) for one, other in itertools.permutations((4, 8, 32), 2)]
OTHER_BITS += [({"optim_bits": bits}, {"min_8bit_size": 10**6}) for bits in (4, 8)]


def state_of(momentum: torch.Tensor, bits: int, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """With the momentum in these bits, in the parameter's order in memory unless there are 4."""
    in_order = torch.empty_like(param, dtype=torch.float32).copy_(momentum)
    if bits == 32:
        return {"momentum": in_order}
    names = ("codes", "scales")
    if bits == 8:
        return dict(zip(names, lion8bit.quantize(in_order, 128), strict=True))
    codes = dict(zip(names, lion8bit.quantize(momentum, 128, bits=4), strict=True))
    return {**codes, "shape": torch.tensor(param.shape)}


@pytest.mark.parametrize("layout", ["matrix", "channels last", "ragged rows"])
@pytest.mark.parametrize("first, second", OTHER_BITS)
@pytest.mark.parametrize("alone", [False, True])
def test_changed_bits_take_effect(layout: str, first: dict[str, int], second: dict[str, int], alone: bool) -> None:
    """To fp32 exactly, to codes as `quantize` makes them; the count and the residual stay.

    Where the new momentum has an order in memory, it is the parameter's, so that no step has to copy.
    """
    param = leaf(LAYOUTS[layout]().bfloat16())
    options: dict[str, Any] = {"lr": 1e-3, "weight_rounding": "compensated", "block_size": 128, "min_8bit_size": 0}
    optimizer = Lion8bit([param], **{**options, **first})
    (group,) = optimizer.param_groups

    def step() -> None:
        param.grad = gradient_like(param)
        optimizer.step_param(param, group) if alone else optimizer.step()

    step()
    step()
    for changed in (second, {"min_8bit_size": 0, **first}):
        momentum = optimizer.momentum(param)
        group |= changed
        bits = 32 if group["min_8bit_size"] > param.numel() else group["optim_bits"]
        twin = leaf(param.detach().clone())
        expected = Lion8bit([twin], **{**options, "optim_bits": group["optim_bits"], **changed})
        residual = torch.empty_like(twin, dtype=torch.int8).copy_(optimizer.state[param]["residual"])
        expected.state[twin] = {
            "step": optimizer.state[param]["step"],
            "residual": residual.contiguous() if bits == 4 else residual,
            **state_of(momentum, bits, param),
        }
        for _ in range(2):
            step()
            twin.grad = param.grad.clone()
            expected.step()
        state = optimizer.state[param]
        assert state.keys() == expected.state[twin].keys()
        if bits != 4:
            assert {state["codes" if bits == 8 else "momentum"].stride(), state["residual"].stride()} == {
                param.stride()
            }
        assert_same(param.detach(), twin.detach(), "parameter")
        assert_same(optimizer.momentum(param), expected.momentum(twin), "momentum")
        assert optimizer.state[param]["step"] == expected.state[twin]["step"]


def test_a_scheduler_gone_wrong_changes_nothing() -> None:
    param = leaf(torch.randn(5000))
    optimizer = Lion8bit([param])
    param.grad = gradient_like(param)
    optimizer.param_groups[0]["lr"] = -1e-3
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    assert not optimizer.state


def test_defaults_of_torchs_optimizers_are_accepted_and_nothing_else() -> None:
    params = [leaf(torch.randn(70, 90))]
    for foreach in (None, False):
        optimizer = Lion8bit(params, foreach=foreach, differentiable=False)
        assert not {"foreach", "differentiable"} & optimizer.param_groups[0].keys()
    with pytest.raises(ValueError, match="foreach must be None or False, got True"):
        Lion8bit(params, foreach=True)
    with pytest.raises(ValueError, match="differentiable must be False, got True"):
        Lion8bit(params, differentiable=True)


def test_auto_is_another_name_of_stochastic() -> None:
    assert Lion8bit([leaf(torch.zeros(3))]).param_groups[0]["weight_rounding"] == "stochastic"
    weights = []
    for rounding in ("auto", "stochastic", "nearest"):
        param = leaf(torch.ones(70, 90).bfloat16())
        param.grad = torch.ones_like(param)
        Lion8bit([param], lr=1e-3, weight_rounding=rounding, seed=3).step()
        weights.append(param.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
