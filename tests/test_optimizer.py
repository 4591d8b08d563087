"""Lion8bit as a torch optimizer: every layout and backend, groups, closures and memory."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    LAYOUTS,
    assert_same,
    assert_same_all,
    gradient_like,
    leaf,
    override_backend,
    snapshot,
)
from torch import nn

import lion8bit
from lion8bit import Lion, Lion8bit, reference
from lion8bit.backends import cpu, portable
from lion8bit.backends import select as backend
from lion8bit.layout import DEFAULT_BLOCK_SIZE, DTYPES, in_memory_order, memory_order, rows_and_cols
from lion8bit.options import make_hyper

# ---- The step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_layout", ["same", "contiguous", "transposed"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_layout_steps_as_the_reference(layout: str, dtype: torch.dtype, grad_layout: str, bits: int) -> None:
    """With 4 bits in row-major order, whatever order the parameter has in memory."""
    torch.manual_seed(0)
    base = LAYOUTS[layout]().to(dtype)
    if layout in ("strided", "misaligned"):  # a dtype conversion would have made it dense
        wide = torch.randn(80, 140).to(dtype)
        base = wide[:, ::2] if layout == "strided" else wide.view(-1)[1:6001]
    param = leaf(base)
    optimizer = Lion8bit([param], lr=1e-3, weight_decay=0.1, optim_bits=bits)
    quantized, block_size = base.numel() >= 4096, DEFAULT_BLOCK_SIZE[bits]
    row_major = torch.contiguous_format if bits == 4 and quantized else torch.preserve_format
    expected = base.clone(memory_format=row_major)
    order = memory_order(expected)
    assert order is not None
    shape = rows_and_cols([expected.shape[dim] for dim in order], block_size)
    rows = in_memory_order(expected, order).view(shape)
    zeros = torch.zeros(rows.shape)
    momentum, scales = reference.encode(zeros, block_size, bits) if quantized else (zeros, None)
    hyper = make_hyper(lr=1e-3, weight_decay=0.1, weight_rounding="stochastic", block_size=block_size)
    for step in range(1, 4):
        grad = torch.empty_like(base).copy_(gradient_like(base))
        if grad_layout == "contiguous":
            grad = grad.contiguous()
        elif grad_layout == "transposed" and grad.dim() == 2:
            grad = grad.t().contiguous().t()
        param.grad = grad
        optimizer.step()
        in_order = torch.empty_like(expected).copy_(grad)  # of the same strides
        row_grad = in_memory_order(in_order, order).view(shape)
        reference.lion_step_(rows, row_grad, momentum, scales, hyper, seed=0, step=step)
        assert_same(param.detach(), expected, f"parameter after step {step}")
    if quantized:
        codes = optimizer.state[param]["codes"]
        codes = codes.flatten() if bits == 4 else in_memory_order(codes, order)
        assert_same(codes, momentum.flatten(), "codes")
        assert_same(optimizer.state[param]["scales"].flatten(), scales.flatten(), "scales")
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
        groups = [[{"params": params[:3], "optim_bits": 4}, {"params": params[3:]}] for params in models]
        optimizers = [Lion8bit(each, lr=1e-3, weight_decay=0.1, block_size=64) for each in groups]
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
    params = [leaf(torch.randn(64, 128)) for _ in range(6)]
    options: list[dict[str, Any]] = [
        {"optim_bits": 4},
        {"optim_bits": 4, "block_size": 256},
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
    assert kinds[:2] == [["codes", "scales", "shape", "step"]] * 2
    assert kinds[2:] == [
        ["codes", "scales", "step"],
        ["momentum", "step"],
        ["momentum", "step"],
        ["codes", "scales", "step"],
    ]
    assert [together.state[param]["scales"].shape for param in params[:3]] == [(64, 2), (32,), (64, 2)]
    assert [group["block_size"] for group in together.param_groups] == [64, 256, 64, 128, 128, 128]


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
    for dtype, bits in itertools.product(DTYPES, (4, 8, 32)):
        param = leaf(torch.randn(70, 90).to(dtype))
        param.data[0, :3] = torch.tensor([0.0, -0.0, 1e-7])
        before = param.detach().clone()
        optimizer = Lion8bit([param], lr=0.0, weight_decay=0.1, optim_bits=bits)
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


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_moving_under_the_optimizer(bits: int) -> None:
    """Parameters and state that are replaced between steps are found again, wherever they went."""
    param = leaf(torch.randn(64, 101))
    other = leaf(param.detach().clone())
    one, two = (Lion8bit([each], lr=1e-2, optim_bits=bits) for each in (param, other))
    for turn in range(6):
        grad = torch.randn(64, 101)
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["matrix", "strided", "transposed"])
def test_gradients_are_let_go_of(layout: str, bits: int) -> None:
    """Between steps the optimizer holds no gradient, nor a copy of anything: zero_grad frees the memory."""
    param = leaf(LAYOUTS[layout]())
    optimizer = Lion8bit([param], optim_bits=bits)
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
    groups = [{"params": model[:2].parameters(), "optim_bits": 4}, {"params": model[2:].parameters()}]
    optimizer = Lion8bit(groups)
    optimizer.step()
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        optimizer.step()
    assert [name for name in seen if not name.startswith("profiler.")] == []
