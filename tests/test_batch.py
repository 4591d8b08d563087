"""The table that kernels take is kept while memory stays as it is, and made anew as soon as more has changed."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import warnings
from collections import UserDict
from collections.abc import Callable
from operator import is_
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same

import lion8bit.describe
import lion8bit.optimizer as optimizer_module
from lion8bit import Lion8bit, fuse_into_backward
from lion8bit.backends import cpu
from lion8bit.describe import describe, gradients_of, look_again, replace

LOOKS = {"native": lion8bit.describe._native(), "portable": None}
SHAPES = [(70, 70), (64, 96), (5000,), (30,), (), (1,), (0, 3)]


@pytest.fixture(params=LOOKS)
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Looks at tensors natively or in plain torch."""
    if request.param == "native" and LOOKS["native"] is None:
        pytest.skip("needs the native library")
    monkeypatch.setattr(lion8bit.describe, "_native", lambda: LOOKS[request.param])
    return request.param


# ---- The look at tensors --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="there, not every torch exports its C functions")
@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native library")
def test_this_torch_is_read_natively() -> None:
    assert LOOKS["native"] is not None


def test_a_torch_that_keeps_tensors_otherwise_is_not_read_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "_cdata", property(lambda tensor: 1))
        assert lion8bit.describe._handle() is None
    with monkeypatch.context() as patch:
        patch.delattr(torch._C._aoti, "unsafe_alloc_void_ptr_from_tensor")
        assert lion8bit.describe._handle() is None


def test_tensors_are_known_by_object_and_address(look: str) -> None:
    """Those of the first column may be other objects elsewhere; their addresses are told."""
    base = torch.zeros(100, dtype=torch.bfloat16)
    tensors = [base, base[7:], torch.nn.Parameter(torch.zeros(3, 4)), torch.zeros(()), torch.zeros(5, dtype=torch.int8)]
    copies = [tensor.clone() for tensor in tensors]
    dicts = [{"other": None, "tensor": tensor} for tensor in tensors]
    for columns in ([None], [tensors, None], [dicts, "tensor"]):
        fixed = columns if len(columns) == 2 else []
        seen = describe([tensors, None, *fixed])
        for moving in (tensors, copies):
            addresses = look_again([moving, None, *fixed], seen)
            assert addresses is not None and addresses.tolist() == [tensor.data_ptr() for tensor in moving]
    seen = describe([tensors, None, dicts, "tensor"])
    assert look_again([tensors, None, copies, None], seen) is None
    assert look_again([tensors, None, tensors[::-1], None], seen) is None
    base.data = base.data.clone()
    assert look_again([tensors, None, dicts, "tensor"], seen) is None
    assert look_again([[], None], describe([[], None])).shape == (0,)


def test_layouts_differ_in_every_property(look: str) -> None:
    variants = [
        torch.zeros(4, 6),
        torch.zeros(6, 4),
        torch.zeros(6, 4).t(),
        torch.zeros(4, 6, dtype=torch.bfloat16),
        torch.zeros(4, 6, dtype=torch.float16),
        torch.zeros(24),
        torch.zeros(4, 6, 1),
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(4, 6, device="meta"),
    ]
    first = torch.zeros(2, 2)
    lists = [[first, variant] for variant in variants] + [[first], [first, first, first]]
    for i, one in enumerate(lists):
        seen = describe([one, None])
        for j, other in enumerate(lists):
            assert (look_again([other, None], seen) is not None) == (i == j)


def test_what_has_no_memory_raises(look: str) -> None:
    tensors = [torch.zeros(3), torch.eye(3).to_sparse()]
    with pytest.raises(RuntimeError):
        describe([tensors, None])


def test_what_is_no_tensor_is_not_read(look: str) -> None:
    tensors, others = [torch.zeros(3)], [object()]
    with pytest.raises((RuntimeError, TypeError)):
        describe([tensors, None, others, None])
    for columns in ([others, None], [[*tensors, *others], None]):
        with contextlib.suppress(TypeError):
            assert look_again(columns, describe([tensors, None])) is None


def test_gradients_are_fetched(look: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(4)]
    assert gradients_of(params) == gradients_of([]) == []
    for param in params[1:]:
        param.grad = torch.ones(3)
    assert all(map(is_, gradients_of(params), [param.grad for param in params[1:]]))
    assert len(gradients_of(params)) == 3
    with pytest.raises(AttributeError, match="grad"):
        gradients_of([params[1], object()])


def test_items_are_replaced_together_or_not_at_all(look: str) -> None:
    former, dicts = object(), [{"step": None} for _ in range(3)]
    for each in dicts[:2]:
        each["step"] = former
    assert not replace(dicts, "step", former, 1)
    assert [each["step"] for each in dicts] == [former, former, None]
    dicts[2]["step"] = former
    assert replace(dicts, "step", former, 1)
    assert [each["step"] for each in dicts] == [1, 1, 1]


def test_no_reference_is_kept_or_lost(look: str) -> None:
    """Parameters, gradients, state and step counts are referred to as often after many steps, and failed ones."""
    params, optimizer = make()
    give_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    states = [optimizer.state[param] for param in params]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    own = [*params, *(param.grad for param in params), *tensors, *states]
    shared = [None, torch.Tensor, "grad", "step", "codes"]  # other code refers to them too

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(each) for each in own + shared]

    before = counts()
    for _ in range(50):
        optimizer.step()
    held, params[2].grad = params[2].grad, params[2].grad.to_sparse()
    for _ in range(50):
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
    params[2].grad = held
    for _ in range(3):
        optimizer.step()
    assert [state["step"] for state in states] == [56] * len(states)
    del held
    changes = [after - count for after, count in zip(counts(), before, strict=True)]
    assert changes[: len(own)] == [0] * len(own)
    assert all(abs(change) < 50 for change in changes[len(own) :])  # fewer than there were steps


# ---- Batches --------------------------------------------------------------------------------------------------------

Params = list[torch.nn.Parameter]


def make(dtype: torch.dtype = torch.float32, weight_rounding: str = "auto") -> tuple[Params, Lion8bit]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-2}]
    return params, Lion8bit(groups, lr=1e-3, weight_decay=0.1, weight_rounding=weight_rounding)


def give_gradients(params: Params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def test_a_batch_is_taken_again(look: str) -> None:
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()
    plan = optimizer._plan
    assert plan is not None
    for seed in range(3):
        give_gradients(params, seed)
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        assert optimizer._plan is plan


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
    rounding_changed,
    parameter_moved_to_another_group,
    parameter_replaced,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "storage", [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "compensated")], ids=str
)
def test_every_change_is_noticed(
    change: Callable[[Params, Lion8bit], None], storage: tuple[torch.dtype, str], look: str
) -> None:
    """A warmed optimizer does what one does that describes everything anew at every step, down to the error."""
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
                optimizer._plan = None
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


def test_a_gradient_off_its_alignment_is_copied(look: str) -> None:
    """Processors may read it, but CUDA may not."""
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()
    gradient_off_its_alignment(params, optimizer)
    assert params[2].grad.data_ptr() % 4
    optimizer.step()
    assert [len(batch.places or ()) for batch in optimizer._plan.batches if not batch.in_place] == [1], "it alone"
    give_gradients(params, 1)
    optimizer.step()
    assert all(batch.in_place for batch in optimizer._plan.batches)


# ---- What memory does not tell ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["step", "step_param", "release"])
def test_negated_views_are_read_as_what_they_are(look: str, way: str) -> None:
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


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("how", ["listed twice", "tied by .data", "a part of another"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameters_on_one_memory_are_stepped_in_turn(how: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never at the same time by several threads, which would lose updates."""
    batches = []
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
    update_ = optimizer_module.update_
    monkeypatch.setattr(optimizer_module, "update_", lambda batch, *a: (batches.append(batch), update_(batch, *a)))
    for _ in range(2):
        optimizer.step()
    expected = torch.full((256, 128), -1.0)
    expected[: 128 if how == "a part of another" else 0] = -0.5
    assert torch.equal(whole, expected) and torch.equal(apart, torch.full((64, 128), -0.5))
    assert [len(batch.places) for batch in batches] == [2, 1, 2, 1] and batches[:2] == batches[2:]


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


def test_groups_and_state_may_be_of_other_classes(look: str) -> None:
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


def test_a_parameter_that_is_copied_does_not_cost_the_others_their_plan(look: str) -> None:
    """Only its own table is made anew in each step, and its copies do not outlive the step."""
    gaps = torch.nn.Parameter(torch.zeros(64, 80, 2)[..., 0])
    params = [gaps, *(torch.nn.Parameter(torch.zeros(64, 80)) for _ in range(3))]
    optimizer = Lion8bit(params, lr=1e-3)
    plans = []
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        plans.append(optimizer._plan)
    assert plans[0] is plans[1] is plans[2]
    assert [(len(batch.places), batch.in_place, len(batch.entries)) for batch in plans[0].batches] == [
        (1, False, 0),
        (3, True, 3),
    ]
    assert all(torch.equal(param, params[1]) for param in params)
