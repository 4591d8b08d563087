"""The table that kernels take is kept while memory stays as it is, and made again as soon as more has changed."""

from __future__ import annotations

import copy
import ctypes
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same, override_backend

from lion8bit import Lion8bit, fuse_into_backward
from lion8bit.backends import native_library, select
from lion8bit.layout import Hyper, TensorRow

SHAPES = [(70, 70), (64, 96), (5000,), (30,), (), (1,), (0, 3)]


Params = list[torch.nn.Parameter]


# ---- Tables --------------------------------------------------------------------------------------------------------


def make(dtype: torch.dtype = torch.float32, weight_rounding: str = "auto", bits: int = 8) -> tuple[Params, Lion8bit]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-2}]
    options = {"weight_rounding": weight_rounding, "optim_bits": bits, "block_size": 128}
    return params, Lion8bit(groups, lr=1e-3, weight_decay=0.1, **options)


def give_gradients(params: Params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def test_a_table_is_kept() -> None:
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()
    plan = optimizer._stepper.plan
    assert plan is not None
    for seed in range(3):
        give_gradients(params, seed)
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        assert optimizer._stepper.plan is plan


def test_a_gradient_on_another_device_is_noticed() -> None:
    """It can only get there by ``.grad.data``; here the table is changed instead."""
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()
    plan = optimizer._stepper.plan
    plan.tables[0]._grad_devices[1] = 7
    optimizer.step()
    assert optimizer._stepper.plan is not plan


def replaced_data(params: Params, optimizer: Lion8bit) -> None:
    params[1].data = params[1].data.clone()


def transposed_data(params: Params, optimizer: Lion8bit) -> None:
    params[0].data = params[0].data.t()


def reshaped_data(params: Params, optimizer: Lion8bit) -> None:
    params[1].data = params[1].data.view(96, 64)
    params[1].grad = torch.ones(96, 64)


def shrunken_data(params: Params, optimizer: Lion8bit) -> None:
    params[2].data = params[2].data[:4500]
    params[2].grad = torch.ones(4500)


def freed_data(params: Params, optimizer: Lion8bit) -> None:
    params[1].untyped_storage().resize_(0)


def gradient_transposed_in_place(params: Params, optimizer: Lion8bit) -> None:
    params[0].grad.t_()


def gradient_of_another_order(params: Params, optimizer: Lion8bit) -> None:
    params[1].grad = params[1].grad.t().contiguous().t()


def gradient_of_another_dtype(params: Params, optimizer: Lion8bit) -> None:
    params[1].grad.data = params[1].grad.data.bfloat16()


def gradient_of_another_shape(params: Params, optimizer: Lion8bit) -> None:
    params[2].grad.data = params[2].grad.data[:10]


def gradient_off_its_alignment(params: Params, optimizer: Lion8bit) -> None:
    grad = params[2].grad.numpy() if params[2].dtype == torch.float32 else params[2].grad.view(torch.int16).numpy()
    raw = np.empty(grad.nbytes + 1, np.uint8)
    odd = raw[1:].view(grad.dtype)
    odd[:] = grad
    params[2].grad = torch.from_numpy(odd).view(params[2].dtype)


def gradient_freed(params: Params, optimizer: Lion8bit) -> None:
    params[1].grad.untyped_storage().resize_(0)


def gradient_gone(params: Params, optimizer: Lion8bit) -> None:
    params[1].grad = None


def state_replaced(params: Params, optimizer: Lion8bit) -> None:
    optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[1]])


def state_tensor_replaced(params: Params, optimizer: Lion8bit) -> None:
    optimizer.state[params[3]]["momentum"] = torch.ones(30)


def state_moved(params: Params, optimizer: Lion8bit) -> None:
    for value in optimizer.state[params[1]].values():
        if isinstance(value, torch.Tensor):
            value.data = value.data.clone()


def state_of_another_shape(params: Params, optimizer: Lion8bit) -> None:
    codes = optimizer.state[params[1]]["codes"]
    codes.data = codes.data[:10]


def state_freed(params: Params, optimizer: Lion8bit) -> None:
    optimizer.state[params[1]]["scales"].untyped_storage().resize_(0)


def state_torn(params: Params, optimizer: Lion8bit) -> None:
    del optimizer.state[params[1]]["scales"]


def state_of_no_tensor(params: Params, optimizer: Lion8bit) -> None:
    optimizer.state[params[1]]["codes"] = None


def state_dropped(params: Params, optimizer: Lion8bit) -> None:
    del optimizer.state[params[1]]


def steps_recounted(params: Params, optimizer: Lion8bit) -> None:
    optimizer.state[params[1]]["step"] = 77


def all_steps_recounted(params: Params, optimizer: Lion8bit) -> None:
    for state in optimizer.state.values():
        state["step"] = 77


def block_size_changed(params: Params, optimizer: Lion8bit) -> None:
    optimizer.param_groups[0]["block_size"] = 64


def bits_changed(params: Params, optimizer: Lion8bit) -> None:
    optimizer.param_groups[0]["optim_bits"] = 12 - optimizer.param_groups[0]["optim_bits"]


def shape_changed(params: Params, optimizer: Lion8bit) -> None:
    """Which no step reads; a new table would refuse it."""
    if "shape" in optimizer.state[params[1]]:
        optimizer.state[params[1]] |= {"shape": torch.tensor([96, 64])}
        optimizer.state[params[1]] = dict(optimizer.state[params[1]])


def rounding_changed(params: Params, optimizer: Lion8bit) -> None:
    optimizer.param_groups[1]["weight_rounding"] = "compensated"


def parameter_moved_to_another_group(params: Params, optimizer: Lion8bit) -> None:
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())


def parameter_replaced(params: Params, optimizer: Lion8bit) -> None:
    fresh = torch.nn.Parameter(params[1].data)
    fresh.grad = params[1].grad
    optimizer.param_groups[0]["params"][1] = params[1] = fresh


CHANGES: list[Callable[[Params, Lion8bit], None]] = [
    replaced_data,
    transposed_data,
    reshaped_data,
    shrunken_data,
    freed_data,
    gradient_transposed_in_place,
    gradient_of_another_order,
    gradient_of_another_dtype,
    gradient_of_another_shape,
    gradient_off_its_alignment,
    gradient_freed,
    gradient_gone,
    state_replaced,
    state_tensor_replaced,
    state_moved,
    state_of_another_shape,
    state_freed,
    state_torn,
    state_of_no_tensor,
    state_dropped,
    steps_recounted,
    all_steps_recounted,
    block_size_changed,
    bits_changed,
    shape_changed,
    rounding_changed,
    parameter_moved_to_another_group,
    parameter_replaced,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "storage",
    [
        (torch.float32, "auto", 8),
        (torch.bfloat16, "auto", 8),
        (torch.bfloat16, "compensated", 8),
        (torch.bfloat16, "compensated", 4),
    ],
    ids=str,
)
def test_every_change_is_noticed(
    change: Callable[[Params, Lion8bit], None], storage: tuple[torch.dtype, str, int]
) -> None:
    """An optimizer with a kept table does what one does that makes it again at every step, down to the error."""
    results: list[list[Any]] = []
    for forgetful in (False, True):
        params, optimizer = make(*storage)
        outcome: list[Any] = []
        for seed in range(4):
            give_gradients(params, seed)
            if seed == 2:
                try:
                    change(params, optimizer)
                except (RuntimeError, TypeError) as error:  # this torch forbids it
                    pytest.skip(f"torch {torch.__version__} refuses to: {error}")
            if forgetful:
                optimizer._stepper.plan = None
            try:
                optimizer.step()
            except (RuntimeError, TypeError, ValueError) as error:
                outcome.append(f"{type(error).__name__}: {error}")
                break
            outcome += [tensor.detach().clone() for tensor in params]
            outcome += [optimizer.momentum(param) for param in params]
            outcome.append([optimizer.state[param]["step"] for param in params if optimizer.state.get(param)])
        results.append(outcome)
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        if isinstance(one, torch.Tensor):
            assert_same(one, other, f"result {index}")
        else:
            assert one == other


@pytest.mark.parametrize("change", [gradient_off_its_alignment, gradient_of_another_order], ids=lambda it: it.__name__)
def test_a_gradient_that_must_be_copied_does_not_cost_the_table(change: Callable[[Params, Lion8bit], None]) -> None:
    """Processors may read a misaligned one, but CUDA may not."""
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()
    plan = optimizer._stepper.plan
    (table,) = plan.tables
    seen: list[list[bool]] = []

    usual = select.select("cpu").update_

    def update(table: Any, *arguments: Any) -> None:
        assert all(grad.data_ptr() % 4 == 0 for grad in table.grads)
        seen.append([grad is param.grad for grad, param in zip(table.grads, params, strict=True)])
        usual(table, *arguments)

    for copied in (True, False, True):
        give_gradients(params, 1)
        if copied:
            change(params, optimizer)
        with override_backend(update):
            optimizer.step()
        assert optimizer._stepper.plan is plan and plan.tables == [table]
        assert seen[-1].count(False) == copied
        assert table.grads == []


# ---- What addresses do not show ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["step", "step_param", "release"])
def test_negated_views_are_read_as_what_they_are(way: str) -> None:
    """torch negates lazily (imaginary parts of conjugates): gradients, also in the kept plan, and parameters."""
    results = []
    for view in (torch._neg_view, torch.neg):
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in ((100, 200), (1,), (64, 64))]
        params = [torch.nn.Parameter(value) for value in (*values[:2], view(values[2]))]
        optimizer = Lion8bit(params, lr=1e-3, weight_decay=0.1)
        handle = fuse_into_backward(torch.nn.ParameterList(params), optimizer) if way == "release" else None
        for step in range(4):
            grads = [torch.randn(param.shape, generator=generator) for param in params]
            grads = [grad if step == 2 else view(grad) for grad in grads]
            if handle is not None:
                torch.autograd.backward(params, grads)
                optimizer.step()
                continue
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
                if way == "step_param":
                    optimizer.step_param(param, optimizer.param_groups[0])
            if way == "step":
                optimizer.step()
        results.append([*(param.detach().resolve_neg() for param in params), *map(optimizer.momentum, params)])
    assert all(map(torch.equal, *results))


def test_negated_state_is_refused() -> None:
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["scales"] = torch._neg_view(optimizer.state[params[0]]["scales"])
    give_gradients(params, 1)
    with pytest.raises(ValueError, match="state must not be a negated view, got scales"):
        optimizer.step()


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("how", ["listed twice", "tied by .data", "a part of another"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameters_on_one_memory_are_stepped_in_turn(how: str, bits: int) -> None:
    """Never at the same time by several threads, which would lose updates."""
    tables = []
    whole = torch.nn.Parameter(torch.zeros(256, 128))
    other = whole if how == "listed twice" else torch.nn.Parameter(torch.zeros(256, 128))
    if how == "tied by .data":
        other.data = whole.data
    if how == "a part of another":
        other.data = whole.data[128:]
    apart = torch.nn.Parameter(torch.zeros(64, 128))
    for param in (whole, other, apart):
        param.grad = torch.ones_like(param)
    optimizer = Lion8bit([whole, other, apart], lr=0.25, optim_bits=bits)
    update_ = select.select("cpu").update_
    with override_backend(lambda table, *more: (tables.append(table), update_(table, *more))):
        for _ in range(2):
            optimizer.step()
    expected = torch.full((256, 128), -1.0)
    expected[: 128 if how == "a part of another" else 0] = -0.5
    assert torch.equal(whole, expected) and torch.equal(apart, torch.full((64, 128), -0.5))
    assert [len(table.places) for table in tables] == [2, 1, 2, 1] and tables[:2] == tables[2:]


def test_parameters_that_share_memory_and_must_be_copied_are_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(64, 128, 2)[..., 0])
    param.grad = torch.ones_like(param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Lion8bit([param, param])
    with pytest.raises(ValueError, match=r"parameters that share memory must be dense, got two of shapes \(64, 128\)"):
        optimizer.step()
    columns = torch.zeros(64, 128, 2)
    params = [torch.nn.Parameter(columns[..., i]) for i in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    Lion8bit(params, lr=0.5).step()  # these have no element in common
    assert bool((columns == -0.5).all())


def test_groups_and_state_may_be_of_other_classes() -> None:
    """torch's own optimizers take a tuple of parameters and any mapping as their state."""
    params, optimizer = make()
    for step in range(4):
        give_gradients(params, step)
        optimizer.step()
        for group in optimizer.param_groups:
            group["params"] = tuple(group["params"])
        if step == 1:
            optimizer.state[params[0]] = UserDict(optimizer.state[params[0]])  # type: ignore[assignment]
    assert [optimizer.state[param]["step"] for param in params if optimizer.state.get(param)]
    assert optimizer.state[params[0]]["step"] == 4


def test_a_parameter_that_is_copied_does_not_cost_the_others_their_plan() -> None:
    """Its copies do not outlive the step."""
    gaps = torch.nn.Parameter(torch.zeros(64, 80, 2)[..., 0])
    params = [gaps, *(torch.nn.Parameter(torch.zeros(64, 80)) for _ in range(3))]
    optimizer = Lion8bit(params, lr=1e-3)
    plans = []
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        plans.append(optimizer._stepper.plan)
    assert plans[0] is plans[1] is plans[2]
    (table,) = plans[0].tables
    assert table.copied == [0]
    assert all(entry.param is param for entry, param in zip(table.entries, params, strict=True))
    assert all(torch.equal(param, params[1]) for param in params)


# ---- Structs of the library ------------------------------------------------------------------------------------------


@pytest.mark.skipif(isinstance(native_library.load_library(), str), reason="needs the native library")
@pytest.mark.parametrize("struct", [Hyper, TensorRow])
def test_a_library_with_other_structs_is_not_used(
    struct: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native_library.load_library()
    assert native_library._has_these_structs(library)
    wider = type(struct.__name__, (ctypes.Structure,), {"_fields_": [("lr", ctypes.c_double), *struct._fields_[1:]]})
    shorter = type(struct.__name__, (ctypes.Structure,), {"_fields_": struct._fields_[1:]})
    longer = type(struct.__name__, (ctypes.Structure,), {"_fields_": [*struct._fields_, ("more", ctypes.c_int64)]})
    for other in (shorter, longer, *([wider] if struct is Hyper else [])):
        monkeypatch.setattr(native_library, struct.__name__, other)
        assert not native_library._has_these_structs(library)
    assert not native_library._has_these_structs(ctypes.CDLL(None))
