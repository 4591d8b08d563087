"""The step under torch.compile: one operator that gets all tensors of a step and is opaque to the compiler.

A graph can neither count updates in Python nor check memory. So it passes parameters, gradients, state and learning
rates to the operator `lion8bit::step_`, which runs the eager step with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import accumulate
from operator import is_
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lion8bit.sharding import as_part_of, gradients, is_dtensor, local
from lion8bit.state import STATE_TENSORS

_optimizers: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by the key that graphs hold


def enroll(optimizer: Any) -> int:
    """The key by which graphs refer to a `Lion8bit` while it lives."""
    if any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        _take_dtensors()
    _optimizers[id(optimizer)] = optimizer
    return id(optimizer)


def trace_step(optimizer: Any) -> None:
    """The step as torch.compile traces it: collects tensors and calls the operator."""
    key = optimizer._before_tracing()
    every = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = [number for number, param in enumerate(every) if param.grad is not None]
    params = [every[number] for number in numbers]
    torch.ops.lion8bit.step_(
        params,
        [param.grad for param in params],
        _tensors([optimizer.state[param] for param in params]),
        [_as_tensor(group["lr"]) for group in optimizer.param_groups],
        numbers,
        key,
    )


def _as_tensor(lr: float | Tensor) -> Tensor:
    # A product, because a number that changes between calls can only enter a graph as an operand of arithmetic.
    return lr if isinstance(lr, Tensor) else torch.ones((), dtype=torch.float64, device="cpu") * lr


def _tensors(states: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [state[name] for state in states for name in STATE_TENSORS if name in state]


def _step(
    params: list[Tensor], grads: list[Tensor], tensors: list[Tensor], lrs: list[Tensor], numbers: list[int], key: int
) -> None:
    """Steps some of an optimizer's parameters in the memory that a graph has given to them.

    Args:
        params: the optimizer's own, or copies.
        grads: theirs.
        tensors: of `STATE_TENSORS` what each has, the optimizer's own, or copies.
        lrs: [1] for each group.
        numbers: which parameters of the optimizer these are.
        key: from `enroll`.
    """
    optimizer = _optimizers[key]
    groups = [
        {**group, "lr": lr if isinstance(group["lr"], Tensor) else float(lr)}
        for group, lr in zip(optimizer.param_groups, lrs, strict=True)
    ]
    every = [param for group in groups for param in group["params"]]
    ends = [*accumulate(len(group["params"]) for group in groups)]
    counts = [sum(start <= number < end for number in numbers) for start, end in zip([0, *ends], ends, strict=False)]
    owners = [every[number] for number in numbers]
    states = [optimizer.state[owner] for owner in owners]
    if all(map(is_, params + tensors, map(local, owners + _tensors(states)))):
        optimizer._step_graph(groups, owners, owners, grads, counts, None)
        return
    given = iter(tensors)
    copies = [
        {**state, **{name: _as(state[name], next(given)) for name in STATE_TENSORS if name in state}}
        for state in states
    ]
    params = [_as(owner, param) for owner, param in zip(owners, params, strict=True)]
    optimizer._step_graph(groups, owners, params, grads, counts, copies)
    for state, copy in zip(states, copies, strict=True):
        state["step"] = copy["step"]


def _as(original: Tensor, piece: Tensor) -> Tensor:
    return as_part_of(original, piece, original.shape)


# Python counts updates, which a CUDA graph would not; and no tensor is to be copied for the sake of its strides, as
# PyTorch 2.6 does unasked. Some tags are newer than that.
TAGS = ("cudagraph_unsafe", "needs_exact_strides", "needs_fixed_stride_order")
_library: Any = torch.library.Library("lion8bit", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] tensors, Tensor[] lrs, int[] numbers, int key) -> ()",
    tags=[getattr(torch.Tag, name) for name in TAGS if hasattr(torch.Tag, name)],
)
_library.impl("step_", torch.no_grad()(_step), "CompositeExplicitAutograd")
torch.library.register_fake("lion8bit::step_", lambda *arguments: None, lib=_library)


@cache
def _take_dtensors() -> None:
    """Lets the operator step DTensors: their local tensors enter the graph."""
    from torch.distributed.tensor import DTensor

    def step_local_tensors(cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> None:
        params, grads, tensors, *rest = args
        func([*map(local, params)], gradients(params, grads), [*map(local, tensors)], *rest)

    torch.library.register_torch_dispatch("lion8bit::step_", DTensor, step_local_tensors, lib=_library)
