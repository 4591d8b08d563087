"""The table that kernels take is kept while memory stays as it is, and made anew as soon as more has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same

import lion8bit.describe
from lion8bit import Lion8bit
from lion8bit.describe import describe

LOOKS = {"native": lion8bit.describe._native(), "portable": None}
SHAPES = [(70, 70), (64, 96), (5000,), (30,), (), (1,), (0, 3)]


@pytest.fixture(params=LOOKS)
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Describes tensors natively or in plain torch."""
    if request.param == "native" and LOOKS["native"] is None:
        pytest.skip("needs torch >= 2.10 and the native library")
    monkeypatch.setattr(lion8bit.describe, "_native", lambda: LOOKS[request.param])
    return request.param


# ---- The look at tensors --------------------------------------------------------------------------------------------


def test_places_are_identities_and_addresses(look: str) -> None:
    base = torch.zeros(100, dtype=torch.bfloat16)
    tensors = [base, base[7:], torch.nn.Parameter(torch.zeros(3, 4)), torch.zeros(()), torch.zeros(5, dtype=torch.int8)]
    places, layout = describe(tensors)
    assert places.tolist() == [[id(t) for t in tensors], [t.data_ptr() for t in tensors]]
    assert describe(tensors)[1] == describe(tensors, layout)[1] == layout
    assert describe([])[0].shape == (2, 0)


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
    ]
    first = torch.zeros(2, 2)
    layouts = [describe([first, variant])[1] for variant in variants]
    layouts += [describe([first])[1], describe([first, first, first])[1]]
    for i, one in enumerate(layouts):
        assert [one == other for other in layouts] == [i == j for j in range(len(layouts))]
    like = describe([first, variants[0]])[1]
    for variant, layout in zip(variants, layouts, strict=False):
        assert describe([first, variant], like)[1] == layout


def test_what_has_no_memory_raises(look: str) -> None:
    with pytest.raises(RuntimeError):
        describe([torch.zeros(3), torch.eye(3).to_sparse()])


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
    assert optimizer._plan is None
    give_gradients(params, 1)
    optimizer.step()
    assert optimizer._plan is not None
