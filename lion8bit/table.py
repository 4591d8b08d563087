"""The table of parameters that a backend steps: one device's parameters, gradients and state, checked."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lion8bit.device_scalars import UpdateCounts
from lion8bit.layout import DTYPES, Hyper, TensorRow, code_bits, memory_order, unmark_order
from lion8bit.sharding import is_dtensor, local, local_state, place_in_whole
from lion8bit.state import STATE_TENSORS, check_state, step_count

_STEP = itemgetter("step")


@dataclass(slots=True)
class Entry:
    """One parameter of a step, the part of it that is in this process.

    Its tensors are dense with the same memory order of dimensions, except for scales and 4-bit codes, which are
    [rows, ...] and contiguous. They are on the same device unless ``paged``.
    """

    param: Tensor  # fp32, bf16 or fp16; outside of a step the optimizer's own, also where `is_copied`
    momentum: Tensor  # int8 codes, uint8 codes with two in a byte, or fp32 where scales is None
    scales: Tensor | None  # fp32, one for each block of [rows, cols]
    residual: Tensor | None  # int8, below a compensated bf16 parameter
    order: tuple[int, ...]  # memory order of the dimensions; row-major with 4-bit codes
    rows: int
    cols: int
    first: int  # index of the first element within the whole parameter, of which this may be a shard
    row_stride: int  # elements of the whole parameter from the start of a row to that of the next
    block_size: int
    seed: int
    hyper: int  # index into the step's Hypers
    state: dict[str, Any]
    source: Tensor  # the optimizer's own parameter
    is_copied: bool  # the parameter's memory has gaps or another order: each step works on a copy
    paged: bool  # the state is in host memory, and the parameter is not

    @property
    def momentum_bits(self) -> int:
        """4, 8, or 32 for fp32."""
        return 32 if self.scales is None else code_bits(self.momentum)


def make_entry(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    *,
    block_size: int,
    seed: int,
    hyper: int,
    paged: bool = False,
) -> Entry:
    """Checks a parameter, its gradient and its state against each other.

    Args:
        param: the optimizer's parameter, plain or a DTensor.
        grad: its gradient in this process, from `sharding.gradients`.
        state: its state, placed as the parameter.
        block_size: of the group.
        seed: distinguishes parameters in stochastic rounding.
        hyper: index of the group.
        paged: the state must be in host memory.

    Raises:
        TypeError: a dtype that the kernels do not have, or a complex gradient.
        RuntimeError: a sparse gradient, freed memory, or a device or shape that does not fit the parameter.
        ValueError: elements of the parameter share memory, or the state does not fit it.
    """
    if any(placement.is_partial() for placement in getattr(param, "placements", ())):
        raise ValueError("parameters must be sharded or replicated, got a DTensor that is a partial sum")
    source, param = param, local(param)
    _check_param(param)
    _check_grad(grad, param)
    order, (rows, cols) = check_state(state, source, block_size)
    tensors = local_state(state, STATE_TENSORS, source, block_size)
    scales = tensors.get("scales")
    _check_memory(tensors, torch.device("cpu") if paged else param.device)
    first, row_stride = 0, cols
    if is_dtensor(source) and order == (*range(param.dim()),):
        (whole_rows, whole_cols), first, distance = place_in_whole(source)
        if distance != whole_cols:  # else rows follow each other in the whole as they do here
            rows, cols, row_stride = whole_rows, whole_cols, distance
    return Entry(
        param=param,
        momentum=tensors["momentum"] if scales is None else tensors["codes"],
        scales=None if scales is None else unmark_order(scales),
        residual=tensors.get("residual"),
        order=order,
        rows=rows,
        cols=cols,
        first=first,
        row_stride=row_stride,
        block_size=block_size,
        seed=seed,
        hyper=hyper,
        state=state,
        source=source,
        is_copied=not _is_in_order(param, order),
        paged=paged,
    )


def _check_memory(tensors: dict[str, Tensor], device: torch.device) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise RuntimeError(f"state must be on the parameter's device {device}, got {tensor.device}")
        if tensor.numel() and not tensor.data_ptr():
            raise RuntimeError(f"state must have memory, got {name} without storage")
        if tensor.is_neg():
            raise ValueError(f"state must not be a negated view, got {name}; replace it by its resolve_neg()")
        if name == "scales" and not tensor.is_contiguous():
            raise ValueError(f"scales must be contiguous, got strides {tensor.stride()}")


def _check_param(param: Tensor) -> None:
    if param.layout != torch.strided or param.dtype not in DTYPES:
        raise TypeError(f"parameters must be dense float32, bfloat16 or float16, got {param.dtype} {param.layout}")
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError("parameters must not share memory between elements, got an expanded tensor; pass its .clone()")
    if param.is_meta:
        raise RuntimeError("parameters must hold data, got device 'meta'; call module.to_empty(device=...) first")
    if param.numel() and not param.data_ptr():
        raise RuntimeError(f"parameters must have memory, got a tensor without storage on {param.device}")


def _check_grad(grad: Tensor, param: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError("Lion8bit does not support sparse gradients; use nn.Embedding(..., sparse=False)")
    if grad.dtype not in DTYPES:
        raise TypeError(f"gradients must be float32, bfloat16 or float16, got {grad.dtype}")
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"gradients must have the parameter's shape {tuple(param.shape)} and device {param.device}, "
            f"got {tuple(grad.shape)} on {grad.device}"
        )
    if grad.numel() and not grad.data_ptr():
        raise RuntimeError(f"gradients must have memory, got a tensor without storage on {grad.device}")


def _is_in_order(tensor: Tensor, order: tuple[int, ...]) -> bool:
    """Whether the kernels can read a tensor's memory in this order."""
    return memory_order(tensor) == order and not tensor.is_neg() and tensor.data_ptr() % tensor.element_size() == 0


def _copy_in_order(tensor: Tensor, entry: Entry) -> Tensor:
    sizes = [tensor.shape[dim] for dim in entry.order]
    places = sorted(range(len(sizes)), key=entry.order.__getitem__)
    return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device).permute(places).copy_(tensor)


def turns(entries: Sequence[Entry]) -> list[int]:
    """For each entry how many others must be stepped before it because they share memory with it; usually 0.

    Threads would otherwise step the same elements at once. Parameters share memory if one is listed twice, or if
    modules are tied by ``.data``.

    Raises:
        ValueError: such a parameter is one that a step has to copy.
    """
    found = [0] * len(entries)
    places = [place for place, entry in enumerate(entries) if entry.param.numel()]
    places.sort(key=lambda place: (str(entries[place].param.device), entries[place].param.data_ptr(), place))
    group: list[int] = []  # parameters that share memory
    end = 0  # of that memory
    for place in places:
        entry = entries[place]
        first = entries[group[0]] if group else entry
        if first.param.device != entry.param.device or entry.param.data_ptr() >= end:
            group, end = [], 0
        elif entry.param.data_ptr() == first.param.data_ptr() and (entry.is_copied or first.is_copied):
            raise ValueError(
                f"parameters that share memory must be dense, got two of shapes {tuple(first.param.shape)} and "
                f"{tuple(entry.param.shape)}; list each parameter once"
            )
        found[place] = len(group)
        group.append(place)
        end = max(end, entry.param.data_ptr() + entry.param.nbytes)
    return found


class Work(Protocol):
    """What backends need of a table, or of a part of one."""

    device: torch.device
    rows: Any  # ctypes array of `TensorRow`
    cuda_cache: dict[Any, Any]
    entries: list[Entry]  # row by row
    done: list[Any]  # of the present update, see `backends.select.update_`

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the entries."""


class DeviceTable:
    """The entries of one device and their `TensorRow`s, kept while memory stays where it is."""

    def __init__(self, entries: Sequence[Entry], grads: Sequence[Tensor], places: Sequence[int] | None = None) -> None:
        """Makes the table.

        Args:
            entries: of one device, as `make_entry` returned them, at least one; all or none of them paged.
            grads: their gradients, checked by `make_entry`.
            places: which gradients of a step belong to these entries; None if all do.
        """
        self.device = entries[0].param.device
        self.paged = entries[0].paged
        self.entries = list(entries)
        self.places = places
        self.cuda_cache: dict[Any, Any] = {}
        self.loads: list[Any] | None = None  # `paging.Load`s of a paged table
        self.done: list[Any] = []
        self.finished = False
        self.grads: list[Tensor] = []  # in a step only, so that zero_grad frees them
        self.copied = [number for number, entry in enumerate(entries) if entry.is_copied]
        self.is_sharded = any(is_dtensor(entry.source) for entry in entries)
        self._params = [entry.source for entry in entries]
        self._states = [entry.state for entry in entries]
        self._holders = [
            ([state for state in self._states if name in state], itemgetter(name)) for name in STATE_TENSORS
        ]
        self._written = self._params + [entry.param for entry in entries if is_dtensor(entry.source)]
        self._written = [tensor for tensor in self._written if not tensor.is_inference()]
        self._counts: list[int] = []  # updates of each parameter after the present one; empty where the device counts
        self.rows = (TensorRow * len(entries))()
        for row, entry, grad in zip(self.rows, self.entries, grads, strict=True):
            row.param = entry.param.data_ptr()
            row.momentum = entry.momentum.data_ptr()
            row.scales = 0 if entry.scales is None else entry.scales.data_ptr()
            row.residual = 0 if entry.residual is None else entry.residual.data_ptr()
            row.rows, row.cols = entry.rows, entry.cols
            row.first, row.row_stride = entry.first & 0xFFFFFFFF, entry.row_stride & 0xFFFFFFFF
            row.seed, row.hyper = entry.seed, entry.hyper
            row.param_dtype, row.grad_dtype = DTYPES[entry.param.dtype], DTYPES[grad.dtype]
            row.momentum_bits = entry.momentum_bits
        self.columns = np.frombuffer(memoryview(self.rows).cast("B"), dtype=np.dtype(TensorRow))
        self._tensors = self._held(self._params)
        self._memory = _memory_of(self._tensors)
        self._layouts = _layouts_of(self._tensors[: len(entries)])
        self._grad_dtypes = [grad.dtype for grad in grads]
        self._grad_sizes = [*map(Tensor.numel, grads)]
        self._grad_devices = [*map(Tensor.get_device, grads)]
        self._grad_strides: list[Any] = [None] * len(entries)  # of gradients that need no copy
        self._alignments = np.array([grad.element_size() - 1 for grad in grads], np.uint64)
        self._set_grads(list(grads))

    def refresh(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Updates the table for a step with these parameters and gradients; False if it must be made again.

        Other code may change state and parameters between steps. So objects, addresses and sizes of all tensors are
        compared with those of the table, dtypes, strides and lazy negation of parameters and gradients, and the devices
        of gradients.
        """
        if self.places is not None:
            params, grads = ([tensors[place] for place in self.places] for tensors in (params, grads))
        if self.is_sharded and not all(map(is_, params, self._params)):
            return False
        try:
            tensors = self._held(params)
            if not all(map(is_, tensors, self._tensors)) or _memory_of(tensors) != self._memory:
                return False
            return _layouts_of(tensors[: len(params)]) == self._layouts and self._set_grads(grads)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            return False  # `make_entry` will report what is wrong

    def _held(self, params: list[Tensor]) -> list[Tensor]:
        """All tensors of the entries in this process, parameters first."""
        held = list(params)
        for states, get in self._holders:
            held += map(get, states)
        return [*map(local, held)] if self.is_sharded else held

    def _set_grads(self, grads: list[Tensor]) -> bool:
        """Puts gradients into the table, copies of those in another memory order; False if it must be made again."""
        if [grad.dtype for grad in grads] != self._grad_dtypes or [*map(Tensor.numel, grads)] != self._grad_sizes:
            return False
        if [*map(Tensor.get_device, grads)] != self._grad_devices:  # by number; of those alike, "meta" has no address
            return False
        strides, negated = [*map(Tensor.stride, grads)], [*map(Tensor.is_neg, grads)]
        addresses = np.array([*map(Tensor.data_ptr, grads)], np.uint64)
        misaligned = addresses & self._alignments
        if strides != self._grad_strides or True in negated or misaligned.any():
            grads = list(grads)
            for i, entry in enumerate(self.entries):
                if strides[i] == self._grad_strides[i] and not negated[i] and not misaligned[i]:
                    continue
                if grads[i].shape != entry.param.shape:
                    return False
                if _is_in_order(grads[i], entry.order):
                    self._grad_strides[i] = strides[i]
                else:
                    grads[i] = _copy_in_order(grads[i], entry)
                    addresses[i] = grads[i].data_ptr()
        if not addresses.all() and any(grad.numel() and not grad.data_ptr() for grad in grads):
            return False
        self.grads = grads
        self.columns["grad"] = addresses
        return True

    def begin(self) -> None:
        """Begins an update that the host counts; the state has the new counts when it has been applied.

        Raises:
            ValueError: a count of updates is not a whole number.
        """
        counts = [*map(_STEP, self._states)]
        if type(counts[0]) is int and counts.count(counts[0]) == len(counts):  # usually
            self._counts = [step_count(counts[0]) + 1] * len(counts)
        else:
            self._counts = [step_count(count) + 1 for count in counts]
        self.columns["step"] = np.array(self._counts, np.int64)  # modulo 2^32
        self._begin()

    def begin_on_device(self, counts: UpdateCounts, capacity: int) -> None:
        """Begins an update that the device counts; ``capacity``: how many parameters the optimizer has."""
        self._counts = []
        self.columns["step"] = counts.indices(self._states, capacity)
        self._begin()

    def _begin(self) -> None:
        self.done, self.finished = [], False
        for number in self.copied:
            entry = self.entries[number]
            entry.param = _copy_in_order(local(entry.source), entry)
            self.columns["param"][number] = entry.param.data_ptr()
        if self.copied:
            self.loads = None  # which refer to former copies

    def finish(self) -> None:
        """Writes update counts and copied parameters back, and increments autograd's version counters.

        If it was interrupted, it may be called again.
        """
        for state, count in zip(self._states, self._counts):
            state["step"] = count
        for number in self.copied:
            entry = self.entries[number]
            if entry.param is not local(entry.source):
                local(entry.source).copy_(entry.param)
        torch.autograd.graph.increment_version(self._written)
        self.finished = True

    def release(self) -> None:
        """Drops gradients and copies, which belong to one step."""
        self.grads = []
        for number in self.copied:
            self.entries[number].param = local(self.entries[number].source)


def _memory_of(tensors: list[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]


def _layouts_of(tensors: list[Tensor]) -> list[Any]:
    return [[tensor.dtype for tensor in tensors], [*map(Tensor.stride, tensors)], [*map(Tensor.is_neg, tensors)]]


def hyper_array(hypers: Sequence[Hyper]) -> ctypes.Array[Hyper]:
    """The groups' constants side by side in memory, as the kernels index them."""
    return (Hyper * len(hypers))(*hypers)
