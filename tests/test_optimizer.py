"""Lion8bit as a torch optimizer: options, groups, layouts, bad gradients, errors that change nothing, checkpoints."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same, override_backend
from torch import nn
from torch.optim import lr_scheduler

import lion8bit
from lion8bit import Lion, Lion8, Lion8bit, convert_state_dict, quantize, reference
from lion8bit.backends import cpu, portable
from lion8bit.backends import select as backend
from lion8bit.layout import DTYPES, in_memory_order, memory_order, rows_and_cols
from lion8bit.options import make_hyper
from lion8bit.table import make_entry

LAYOUTS = {
    "vector": lambda: torch.randn(5000),
    "matrix": lambda: torch.randn(70, 90),
    "ragged rows": lambda: torch.randn(50, 131),
    "narrow rows": lambda: torch.randn(1700, 3),
    "rows of one element": lambda: torch.randn(5001, 1),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 7),
    "one row": lambda: torch.randn(1, 6000),
    "channels last": lambda: torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last),
    "narrow channels last": lambda: torch.randn(80, 7, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(80, 70).t(),
    "strided": lambda: torch.randn(80, 140)[:, ::2],
    "misaligned": lambda: torch.randn(6001)[1:],
}


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def gradient_like(param: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    for state in optimizer.state.values():
        tensors += [
            value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value) for value in state.values()
        ]
    return tensors


def assert_same_all(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert_same(a, b, f"tensor {index}")


# ---- The step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_layout", ["same", "contiguous", "transposed"])
def test_every_layout_steps_as_the_reference(layout: str, dtype: torch.dtype, grad_layout: str) -> None:
    torch.manual_seed(0)
    base = LAYOUTS[layout]().to(dtype)
    if layout in ("strided", "misaligned"):  # a dtype conversion would have made it dense
        wide = torch.randn(80, 140).to(dtype)
        base = wide[:, ::2] if layout == "strided" else wide.view(-1)[1:6001]
    param = leaf(base)
    optimizer = Lion8bit([param], lr=1e-3, weight_decay=0.1)
    expected = base.clone(memory_format=torch.preserve_format)
    order = memory_order(expected)
    assert order is not None
    shape = rows_and_cols([expected.shape[dim] for dim in order], 128)
    rows = in_memory_order(expected, order).view(shape)
    quantized = base.numel() >= 4096
    momentum, scales = reference.encode(torch.zeros(rows.shape), 128) if quantized else (torch.zeros(rows.shape), None)
    hyper = make_hyper(lr=1e-3, weight_decay=0.1, weight_rounding="stochastic")
    for step in range(1, 4):
        grad = torch.empty_like(base).copy_(gradient_like(base))
        if grad_layout == "contiguous":
            grad = grad.contiguous()
        elif grad_layout == "transposed" and grad.dim() == 2:
            grad = grad.t().contiguous().t()
        param.grad = grad
        optimizer.step()
        in_order = torch.empty_like(expected).copy_(grad)
        row_grad = in_memory_order(in_order, order).view(shape)
        reference.lion_step_(rows, row_grad, momentum, scales, hyper, seed=0, step=step)
        assert_same(param.detach(), expected, f"parameter after step {step}")
    assert param.stride() == base.stride() and param.data_ptr() == base.data_ptr()


def test_fp32_state_equals_fp32_lion() -> None:
    """optim_bits=32 is the reference optimizer, bit for bit, also below min_8bit_size."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(100, 60), nn.Linear(100, 60)
    theirs.load_state_dict(ours.state_dict())
    one = Lion8bit(ours.parameters(), lr=3e-3, weight_decay=0.2, betas=(0.95, 0.98), optim_bits=32)
    other = Lion(theirs.parameters(), lr=3e-3, weight_decay=0.2, betas=(0.95, 0.98))
    for _ in range(20):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = gradient_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(a.detach(), b.detach(), "parameter")
        assert_same(one.momentum(a), other.state[b]["momentum"], "momentum")


def test_portable_backend_equals_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model stepped by both backends, in pieces small enough that parameters are cut both ways."""
    monkeypatch.setattr(portable, "PIECE", 512)
    torch.manual_seed(0)
    shapes = [(5000,), (70, 90), (3, 2000), (16, 300), (8, 8), (0,)]
    for dtype in DTYPES:
        models = [[leaf(torch.randn(shape).to(dtype)) for shape in shapes] for _ in range(2)]
        for a, b in zip(*models, strict=True):
            b.data.copy_(a.data)
        optimizers = [Lion8bit(params, lr=1e-3, weight_decay=0.1, block_size=64) for params in models]
        for _ in range(3):
            for a, b in zip(*models, strict=True):
                a.grad = gradient_like(a)
                a.grad.view(-1)[:1] = float("nan")
                b.grad = a.grad.clone()
            optimizers[0].step()
            with override_backend(portable.update_):
                optimizers[1].step()
        assert_same_all(*(snapshot(optimizer) for optimizer in optimizers))
        assert optimizers[0].nonfinite_count() == optimizers[1].nonfinite_count() == 3 * 5


@pytest.mark.parametrize("lr, bad", [(3.4e38, 0.0), (1e-3, float("nan")), (1e-3, float("-inf"))])
def test_portable_backend_equals_native_beyond_numbers(lr: float, bad: float, use_backend: Callable[..., None]) -> None:
    """The largest rates, or momentum that is no number, move the parameter as the kernel does."""
    finals = []
    for update_ in (None, portable.update_):
        use_backend(update_)
        param = leaf(torch.ones(1, 8))
        param.grad = torch.tensor([[0.0, 1.0, -1.0, 0.0, 1.0, -1.0, 0.0, 1.0]])
        optimizer = Lion8bit([param], lr=0.0, optim_bits=32)
        optimizer.step()
        optimizer.state[param]["momentum"].zero_()[0, 3] = bad
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        finals.append(param.detach())
    assert_same(*finals, "parameter")


def test_portable_temporaries_do_not_grow_with_the_parameter(use_backend: Callable[..., None]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    use_backend(portable.update_)
    param = leaf(torch.zeros(8 * portable.PIECE, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = Lion8bit([param])
    optimizer.step()
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in storages:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Recorder():
        optimizer.step()
    assert 0 < largest <= 8 * portable.PIECE  # 64-bit integers of one piece


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """Why there is no native kernel, as the one item of a list."""
    reason: list[str | None] = ["the wheel was built without a C++ compiler"]
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: reason[0])
    monkeypatch.setattr(backend, "_missing", {})
    backend._fastest.cache_clear()
    yield reason
    backend._fastest.cache_clear()


def step_here(optimizer: Lion8bit, param: torch.Tensor) -> None:
    optimizer.step()


def step_param_here(optimizer: Lion8bit, param: torch.Tensor) -> None:
    optimizer.step_param(param, optimizer.param_groups[0])


def backward_here(optimizer: Lion8bit, param: torch.Tensor) -> None:
    module = nn.Module()
    module.weight = param
    lion8bit.fuse_into_backward(module, optimizer)
    param.sum().backward()


@pytest.mark.parametrize("way", [step_here, step_param_here, backward_here])
def test_fallback_warns_once_of_the_callers_line(way, no_compiler) -> None:
    param = nn.Parameter(torch.randn(5000))
    param.grad = torch.ones_like(param)
    optimizer = Lion8bit([param])
    with pytest.warns(lion8bit.SlowBackendWarning, match=r"without a C\+\+ compiler.*lion8bit doctor") as caught:
        way(optimizer, param)
    lines, first = inspect.getsourcelines(way)
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, first + len(lines) - 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_missing_backend_is_looked_for_by_the_next_optimizer(no_compiler) -> None:
    params = [leaf(torch.randn(5000)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.warns(lion8bit.SlowBackendWarning):
        Lion8bit(params[:1]).step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lion8bit(params[1:2]).step()
        assert backend.select("cpu")[0] == "portable"
        no_compiler[0] = None
        Lion8bit(params[2:]).step()
    assert backend.select("cpu")[0] == "cpu"


def test_groups_have_their_own_options() -> None:
    torch.manual_seed(0)
    params = [leaf(torch.randn(64, 128)) for _ in range(4)]
    options: list[dict[str, Any]] = [
        {"lr": 1e-2, "block_size": 64},
        {"optim_bits": 32, "weight_decay": 0.5},
        {"min_8bit_size": 10**6, "betas": [0.5, 0.9]},
        {"maximize": True},
    ]
    copies = [leaf(param.detach().clone()) for param in params]
    together = Lion8bit([{"params": [p], **o} for p, o in zip(params, options, strict=True)], lr=1e-3)
    apart = [Lion8bit([p], **{"lr": 1e-3, **o}) for p, o in zip(copies, options, strict=True)]
    for _ in range(3):
        for a, b in zip(params, copies, strict=True):
            a.grad = gradient_like(a)
            b.grad = a.grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    for a, b in zip(params, copies, strict=True):
        assert_same(a.detach(), b.detach(), "parameter")
    kinds = [sorted(together.state[param]) for param in params]
    assert kinds == [
        ["codes", "scales", "step"],
        ["momentum", "step"],
        ["momentum", "step"],
        ["codes", "scales", "step"],
    ]
    assert together.state[params[0]]["scales"].shape == (64, 2)


def test_frozen_and_gradientless_parameters_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80), nn.Linear(80, 80))
    model[1].requires_grad_(False)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = Lion8bit(model.parameters(), lr=1e-2, weight_decay=0.1)
    model[0](torch.randn(4, 80)).sum().backward()
    optimizer.step()
    after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))
    assert not torch.equal(before[0], after[0])
    assert set(optimizer.state) == {after[0], after[1]}


def test_gradients_that_come_and_go() -> None:
    """Parameters join and leave from step to step; each has its own update count."""
    params = [leaf(torch.randn(5000)) for _ in range(3)]
    copies = [leaf(param.detach().clone()) for param in params]
    together, apart = Lion8bit(params, lr=1e-3), [Lion8bit([param], lr=1e-3) for param in copies]
    for present in ([0, 1, 2], [0], [0, 2], [1], [], [0, 1, 2]):
        together.zero_grad()
        for index in present:
            params[index].grad = gradient_like(params[index])
            copies[index].grad = params[index].grad.clone()
            apart[index].step()
        together.step()
        assert_same_all([p.detach() for p in params], [p.detach() for p in copies])
    assert [together.state[param]["step"] for param in params] == [4, 3, 3]


def test_zero_gradient_and_zero_lr_change_nothing() -> None:
    """Checkpoint tools create the state by a step with zero gradients and lr 0: every bit must stay."""
    for dtype in DTYPES:
        param = leaf(torch.randn(70, 90).to(dtype))
        param.data[0, :3] = torch.tensor([0.0, -0.0, 1e-7])
        before = param.detach().clone()
        optimizer = Lion8bit([param], lr=0.0, weight_decay=0.1)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert_same(param.detach(), before, str(dtype))
        assert not optimizer.momentum(param).any()


@pytest.mark.parametrize("lr", [1e-4, 1e-6])
def test_weight_decay_moves_16_bit_weights_without_gradient(lr: float) -> None:
    """Decay far below half a unit in the last place acts in expectation, within 5 standard errors."""
    param = leaf(torch.full((400, 1000), 1.0).bfloat16())
    optimizer = Lion8bit([param], lr=lr, weight_decay=0.1)
    param.grad = torch.zeros_like(param)
    steps = 200
    for _ in range(steps):
        optimizer.step()
    expected = float(torch.tensor(1 - lr * 0.1)) ** steps  # the factor is rounded to fp32
    standard_error = float(param.detach().double().std()) / param.numel() ** 0.5
    assert abs(float(param.detach().double().mean()) - expected) < 5 * standard_error
    assert float((param != 1).double().mean()) > 1000 * lr
    assert 1 - expected > 40 * standard_error


def test_nearest_freezes_where_stochastic_moves() -> None:
    moved = {}
    for rounding in ("nearest", "stochastic"):
        param = leaf(torch.full((5000,), 1.0).bfloat16())
        optimizer = Lion8bit([param], lr=1e-4, weight_rounding=rounding)
        param.grad = torch.ones_like(param)
        optimizer.step()
        moved[rounding] = float((param != 1).double().mean())
        assert optimizer.frozen_fraction() == (1.0 if rounding == "nearest" else 0.0)
    assert moved["nearest"] == 0.0
    assert 0.01 < moved["stochastic"] < 0.05  # 1e-4 of a spacing of 2^-8 below 1: 2.6 %


def test_tensor_lr_and_scheduler() -> None:
    param, other = leaf(torch.randn(5000)), leaf(torch.zeros(5000))
    other.data.copy_(param.data)
    # PyTorch 2.6's schedulers take no tensor that has a dimension.
    shape = [1] if hasattr(torch.optim.lr_scheduler, "_update_param_group_val") else []
    by_tensor, by_float = Lion8bit([param], lr=torch.full(shape, 1e-2)), Lion8bit([other], lr=1e-2)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.0 + 1e-9, 1.0, 4) for o in (by_tensor, by_float)]
    for _ in range(5):
        param.grad = gradient_like(param)
        other.grad = param.grad.clone()
        for optimizer, schedule in zip((by_tensor, by_float), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert torch.allclose(param, other, rtol=1e-6)
    with pytest.raises(ValueError, match="must be 1-element"):
        Lion8bit([param], lr=torch.tensor([1e-2, 1e-3]))


def test_decouple_lr() -> None:
    """At the initial lr the decay is weight_decay itself; a schedule that halves lr halves the decay."""
    param = leaf(torch.full((5000,), 2.0))
    optimizer = Lion8bit([param], lr=1e-3, weight_decay=0.1, decouple_lr=True)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.allclose(param, torch.full_like(param, 2.0 * 0.9))
    optimizer.param_groups[0]["lr"] = 5e-4
    optimizer.step()
    assert torch.allclose(param, torch.full_like(param, 2.0 * 0.9 * 0.95))


PEAK, STEPS, DECAY = 1e-3, 12, 0.25


def halves(step: int) -> float:
    return 0.5**step


# All of them stay at or below PEAK, the rate at construction.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, halves),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=STEPS - 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.7)], [5]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS - 2, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.7)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, PEAK / 10, PEAK, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, PEAK, total_steps=STEPS),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, PEAK / 2, 5),
}
BY_RATE = {"lr": PEAK, "weight_decay": DECAY / PEAK}
DECAYING: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "decouple_lr": lambda params: Lion8bit(params, lr=PEAK, weight_decay=DECAY, decouple_lr=True),
    "tensor lr": lambda params: Lion8bit(
        params, lr=torch.tensor(PEAK, dtype=torch.float64), weight_decay=DECAY, decouple_lr=True
    ),
    "Lion8bit": lambda params: Lion8bit(params, **BY_RATE),
    "Lion": lambda params: Lion(params, **BY_RATE),
}


def test_every_scheduler_of_torch_is_known() -> None:
    found = [c for c in vars(lr_scheduler).values() if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)]
    assert {c.__name__ for c in found} - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of schedulers that call each other's step
@pytest.mark.parametrize("optimizer_name", DECAYING)
@pytest.mark.parametrize("scheduler_name", SCHEDULERS)
def test_the_decay_follows_every_scheduler(scheduler_name: str, optimizer_name: str) -> None:
    """weight_decay*lr/peak at each step: none writes over the peak, and none makes the decay negative or larger."""
    param = leaf(torch.ones(8))
    optimizer = DECAYING[optimizer_name]([param])
    schedule = SCHEDULERS[scheduler_name](optimizer)
    (group,) = optimizer.param_groups
    rates = []
    for _ in range(STEPS):
        param.data.fill_(1.0)
        param.grad = torch.zeros_like(param)
        rates.append(max(0.0, float(group["lr"])))
        optimizer.step()
        expected = 1.0 - DECAY * rates[-1] / PEAK
        assert 1.0 - DECAY - 1e-7 <= expected <= 1.0
        torch.testing.assert_close(param.detach(), torch.full_like(param, expected), rtol=0.0, atol=1e-7)
        schedule.step(*[1.0] * (scheduler_name == "ReduceLROnPlateau"))
    assert len({*rates}) > 1


@pytest.mark.parametrize("optimizer_name", DECAYING)
def test_a_schedule_starts_from_the_rate_that_is_set(optimizer_name: str) -> None:
    optimizer = DECAYING[optimizer_name]([leaf(torch.ones(8))])
    (group,) = optimizer.param_groups
    assert "initial_lr" not in group
    group["lr"] = PEAK / 2
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert group["lr"] == group["initial_lr"] == PEAK / 2
    assert group.get("peak_lr", PEAK) == pytest.approx(PEAK)


def test_the_peak_is_the_groups_own_where_it_has_one() -> None:
    params = [leaf(torch.ones(8)) for _ in range(3)]
    groups = [{"params": params[:1], "peak_lr": 2e-3}, {"params": params[1:2], "lr": 0.0}, {"params": params[2:]}]
    optimizer = Lion8bit(groups, lr=1e-3, weight_decay=0.5, decouple_lr=True)
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.param_groups[2]["decouple_lr"] = False
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert [param[0].item() for param in params] == pytest.approx([0.75, 1.0, 1.0 - 5e-4])


def test_cautious_keeps_only_updates_along_the_gradient() -> None:
    param = leaf(torch.zeros(5000))
    optimizer = Lion8bit([param], lr=1.0, cautious=True, betas=(0.9, 0.99))
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert bool((param == -1).all())
    param.grad = torch.full_like(param, -1e-4)
    param.grad[:10] = 0.0  # the momentum alone would still move these
    optimizer.step()
    assert bool((param == -1).all())


def test_closure_runs_once_with_gradients_enabled() -> None:
    model = nn.Linear(70, 70)
    optimizer = Lion8bit(model.parameters(), lr=1e-3)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(2, 70)).square().mean()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [True] and loss.item() > 0
    assert not torch.equal(before, model.weight)


def test_step_param_equals_step() -> None:
    params = [leaf(torch.randn(5000).bfloat16()) for _ in range(3)]
    copies = [leaf(param.detach().clone()) for param in params]
    one, other = Lion8bit(params, lr=1e-3), Lion8bit(copies, lr=1e-3)
    for _ in range(3):
        for a, b in zip(params, copies, strict=True):
            a.grad = gradient_like(a)
            b.grad = a.grad.clone()
        one.step()
        for index, param in enumerate(copies):
            other.step_parameter(param, other.param_groups[0], index)
    assert_same_all(snapshot(one), snapshot(other))
    params[0].grad = gradient_like(params[0])
    with pytest.raises(ValueError, match=r"param must be one of this optimizer's parameters, got shape \(5000,\)"):
        other.step_param(params[0], {})


def test_autograd_notices_the_step() -> None:
    weight = leaf(torch.randn(80, 80))
    loss = (weight @ weight).sum()
    weight.grad = torch.ones_like(weight)
    Lion8bit([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_moving_under_the_optimizer() -> None:
    """Parameters and state that are replaced between steps are found again, wherever they went."""
    param = leaf(torch.randn(64, 100))
    other = leaf(param.detach().clone())
    one, two = Lion8bit([param], lr=1e-2), Lion8bit([other], lr=1e-2)
    for turn in range(6):
        grad = torch.randn(64, 100)
        param.grad, other.grad = grad, grad.clone()
        if turn == 1:
            param.data = param.data.clone()
        if turn == 2:
            one.state[param] = {key: copy.deepcopy(value) for key, value in one.state[param].items()}
        if turn == 3:
            for key, value in one.state[param].items():
                if isinstance(value, torch.Tensor):
                    one.state[param][key] = value.clone()
        if turn == 4:
            param.data = param.data.t().contiguous().t()  # the momentum keeps its order in memory
        if turn == 5:
            param.data = param.data.contiguous()
        one.step()
        two.step()
        assert_same(param.detach(), other.detach(), f"turn {turn}")


@pytest.mark.parametrize("layout", ["matrix", "strided", "transposed"])
def test_gradients_are_let_go_of(layout: str) -> None:
    """Between steps the optimizer holds no gradient, nor a copy of anything: zero_grad frees the memory."""
    param = leaf(LAYOUTS[layout]())
    optimizer = Lion8bit([param])
    for _ in range(3):
        param.grad = torch.randn(param.shape)
        grad = weakref.ref(param.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)  # not those without memory that other tests have left
    tensors = [other for other in gc.get_objects() if type(other) in kinds and other.shape == param.shape]
    held = [other for other in tensors if other.dtype == param.dtype and other is not param]
    assert held == []


def test_nothing_is_allocated_after_the_first_step() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = nn.Sequential(*[nn.Linear(90, 90) for _ in range(4)]).bfloat16()
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer = Lion8bit(model.parameters())
    optimizer.step()
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        optimizer.step()
    assert [name for name in seen if not name.startswith("profiler.")] == []


def test_adamw_settings_keep_the_decay_of_a_step() -> None:
    own = {"params": [leaf(torch.ones(3))], "lr": 3e-3, "weight_decay": 0.0}
    groups = [{"params": [("weight", leaf(torch.ones(2, 2)))]}, {**own, "params": [("bias", *own["params"])]}]
    optimizer = Lion8bit.from_adamw(groups, lr=1e-3, weight_decay=0.01, factor=4, cautious=True)
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], first["betas"], first["cautious"]) == (2.5e-4, 0.04, (0.9, 0.99), True)
    assert (second["lr"], second["weight_decay"]) == (7.5e-4, 0.0)
    assert own["lr"] == 3e-3
    (group,) = Lion8bit.from_adamw(iter([leaf(torch.ones(3))]), lr=torch.tensor(0.5), weight_decay=0.0).param_groups
    assert float(group["lr"]) == pytest.approx(0.1)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"maximize": True, "amsgrad": True}])
def test_groups_of_the_adamw_that_is_replaced(scheduled: bool, flags: dict[str, bool]) -> None:
    params = [leaf(torch.ones(3)) for _ in range(2)]
    adamw = torch.optim.AdamW([{"params": params[:1], "name": "a"}, {"params": params[1:], "lr": 2e-3}], **flags)
    if scheduled:
        lr_scheduler.OneCycleLR(adamw, [1e-2, 2e-2], 10)
        lr_scheduler.SequentialLR(adamw, [lr_scheduler.ConstantLR(adamw), lr_scheduler.ConstantLR(adamw)], [5])
    before = [{**group} for group in adamw.param_groups]
    optimizer = Lion8bit.from_adamw(adamw.param_groups, lr=1e-3, weight_decay=0.01, betas=(0.95, 0.98))
    assert adamw.param_groups == before
    for group, theirs in zip(optimizer.param_groups, before, strict=True):
        assert group["betas"] == (0.95, 0.98)
        assert not group.keys() & {"eps", "amsgrad", "foreach", "differentiable"}
        assert group["fused"] is False and group["maximize"] is flags.get("maximize", False)
        assert group.get("name") == theirs.get("name") and group["params"] == theirs["params"]
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & theirs.keys():
            assert group[name] == pytest.approx(theirs[name] / 5)
        assert group["weight_decay"] == pytest.approx(theirs["weight_decay"] * 5)
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for group, theirs in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] == pytest.approx(theirs.get("initial_lr", theirs["lr"]) / 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"factor": 0}, "factor must be positive, got 0"),
        ({"factor": "5"}, "factor must be a number, got the text '5'"),
        ({"lr": "1e-3"}, "lr must be a number, got the text '1e-3'"),
        ({"weight_decay": None}, "weight_decay must be a number, got None"),
        ({"factor": float("inf")}, "factor must be positive, got inf"),
        ({"decouple_lr": True}, "decouple_lr must be False in from_adamw"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_adamw_settings_that_cannot_be_converted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lion8bit.from_adamw([leaf(torch.ones(3))], **{"lr": 1e-3, "weight_decay": 0.1, **changes})


# ---- Bad gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optim_bits", [8, 32])
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
            assert float(error.max()) < 0.02 * float(momentum.abs().max())
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
        ({"optim_bits": 4}, "optim_bits must be 8 or 32"),
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
        ({"optim_bits": "8"}, "optim_bits must be 8 or 32, got '8'"),
        ({"optim_bits": 8.0}, "optim_bits must be 8 or 32, got 8.0"),
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


@pytest.mark.parametrize("damage", ["shape", "dtype", "scales", "strides", "missing"])
def test_damaged_state_is_refused(damage: str) -> None:
    param = leaf(torch.randn(70, 200))
    optimizer = Lion8bit([param])
    param.grad = gradient_like(param)
    optimizer.step()
    state, before = optimizer.state[param], param.detach().clone()
    if damage == "shape":
        state["codes"] = state["codes"][:, :100].contiguous()
    elif damage == "dtype":
        state["codes"] = state["codes"].bfloat16()
    elif damage == "scales":
        state["scales"] = state["scales"][:1]
    elif damage == "strides":
        state["scales"] = state["scales"].t().contiguous().t()
    else:
        del state["codes"]
    with pytest.raises(ValueError, match=r"must .*parameter 0 of group 0"):
        optimizer.step()
    assert_same(param.detach(), before, "parameter")


def test_a_changed_block_size_is_refused() -> None:
    param = leaf(torch.randn(70, 200))
    optimizer = Lion8bit([param])
    param.grad = gradient_like(param)
    optimizer.step()
    optimizer.param_groups[0]["block_size"] = 64
    with pytest.raises(ValueError, match=r"scales must be float32 \(70, 4\) at block_size 64"):
        optimizer.step()


NARROWED = [({"optim_bits": 8}, {"optim_bits": 32}), ({"min_8bit_size": 0}, {"min_8bit_size": 10**6})]


@pytest.mark.parametrize("layout", ["matrix", "channels last", "ragged rows"])
@pytest.mark.parametrize("narrow, wide", NARROWED)
@pytest.mark.parametrize("alone", [False, True])
def test_changed_bits_take_effect(layout: str, narrow: dict[str, int], wide: dict[str, int], alone: bool) -> None:
    """To fp32 exactly, back to codes as `quantize` makes them; the count and the residual stay."""
    param = leaf(LAYOUTS[layout]().bfloat16())
    optimizer = Lion8bit([param], lr=1e-3, weight_rounding="compensated", **narrow)
    (group,) = optimizer.param_groups

    def step() -> None:
        param.grad = gradient_like(param)
        optimizer.step_param(param, group) if alone else optimizer.step()

    step()
    step()
    for options in (wide, narrow):
        momentum = optimizer.momentum(param)
        group |= options
        twin = leaf(param.detach().clone())
        expected = Lion8bit([twin], lr=1e-3, weight_rounding="compensated", **options)
        expected.state[twin] = {
            "step": optimizer.state[param]["step"],
            "residual": optimizer.state[param]["residual"].clone(),
            **dict(zip(("codes", "scales"), lion8bit.quantize(momentum), strict=True)),
        }
        if options is wide:
            expected.state[twin] = {**expected.state[twin], "momentum": momentum}
            del expected.state[twin]["codes"], expected.state[twin]["scales"]
        for _ in range(2):
            step()
            twin.grad = param.grad.clone()
            expected.step()
        assert optimizer.state[param].keys() == expected.state[twin].keys()
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


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_exact(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = Lion8bit(model.parameters(), lr=1e-3, weight_decay=0.1, min_8bit_size=1000)
    train(model, optimizer, 3, seed=1)
    saved = through_torch_save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed_model = small_model(dtype)
    resumed_model.load_state_dict(saved["model"])
    resumed = Lion8bit(resumed_model.parameters(), lr=7.0, block_size=64)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_all(snapshot(optimizer), snapshot(resumed))
    dtypes = {name: value.dtype for s in resumed.state.values() for name, value in s.items() if name != "step"}
    assert dtypes == {"codes": torch.int8, "scales": torch.float32, "momentum": torch.float32}
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
    """Where each narrow row had a scale of its own it is quantized again; all else keeps its bits."""
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


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_deepcopy_and_pickle(clone) -> None:
    model = small_model(torch.bfloat16)
    optimizer = Lion8bit(model.parameters(), lr=1e-3)
    train(model, optimizer, 2, seed=1)
    twin_model, twin = clone((model, optimizer))
    train(model, optimizer, 2, seed=2)
    train(twin_model, twin, 2, seed=2)
    assert_same_all(snapshot(optimizer), snapshot(twin))
    assert twin.nonfinite_count() == 0


def test_defaults_rebuild_the_optimizer() -> None:
    params = [leaf(torch.randn(5))]
    optimizer = Lion8bit(params, lr=3e-4, betas=[0.8, 0.9], cautious=True, block_size=64)
    assert Lion8bit(params, **optimizer.defaults).defaults == optimizer.defaults
    assert Lion8 is Lion8bit
    assert "block_size: 64" in repr(optimizer)


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


def test_momentum_is_readable_in_fp32() -> None:
    param, small = leaf(torch.randn(64, 100).bfloat16()), leaf(torch.randn(10))
    optimizer = Lion8bit([param, small], betas=(0.9, 0.5))
    assert not optimizer.momentum(param).any()
    for p in (param, small):
        p.grad = gradient_like(p)
    optimizer.step()
    assert torch.equal(optimizer.momentum(small), small.grad * 0.5)
    assert torch.allclose(optimizer.momentum(param), param.grad.float() * 0.5, atol=0.03)
    assert optimizer.momentum(param).dtype == torch.float32
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


def test_state_costs_1_032_bytes_per_parameter() -> None:
    param = leaf(torch.randn(1024, 1024))
    optimizer = Lion8bit([param])
    param.grad = gradient_like(param)
    optimizer.step()
    assert optimizer.memory_report()["state_bytes_per_parameter"] == 1 + 4 / 128


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
    [("block_size", 512), ("betas", (0.9, 1.5)), ("optim_bits", 4), ("weight_rounding", "up"), ("lr", "1e-4")],
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
    """Of an optimizer, parameter by parameter; of a group of its own; also through a checkpoint."""
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
