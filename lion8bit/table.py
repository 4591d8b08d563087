"""Owns what an optimizer hands to a backend: one device's parameters, gradients and state, checked, as a table."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lion8bit.describe import describe, listed, look_again, replace
from lion8bit.device_scalars import UpdateCounts
from lion8bit.layout import DTYPES, Hyper, TensorRow, memory_order, rows_and_cols, scales_shape, unmark_order
from lion8bit.loading import step_count
from lion8bit.sharding import is_dtensor, local, local_state, place_in_whole

if TYPE_CHECKING:
    from lion8bit.paging import Load

STATE_TENSORS = ("codes", "scales", "momentum", "residual")


@dataclass(slots=True)
class Entry:
    """One parameter of a step, as much of it as lies in this process.

    Its tensors but ``scales`` are dense with the memory order of ``momentum``, and on the same device unless ``paged``.
    """

    param: torch.Tensor  # fp32, bf16 or fp16
    momentum: torch.Tensor  # int8 codes, or fp32 where scales is None
    scales: torch.Tensor | None  # fp32, one for each block of [rows, cols]
    residual: torch.Tensor | None  # int8, below a compensated bf16 parameter
    order: tuple[int, ...]  # memory order of the dimensions
    rows: int
    cols: int
    first: int  # index of the first element within the whole parameter, where this is a part of it
    row_stride: int  # elements of the whole parameter from the start of a row to that of the next
    block_size: int
    seed: int
    hyper: int  # index into the step's Hypers
    state: dict[str, Any]
    source: torch.Tensor  # the optimizer's own parameter; its local tensor is `param`, or has been copied to it
    in_place: bool  # neither parameter nor gradient is a copy
    paged: bool  # the state is in host memory, and the parameter is not


def make_entry(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    *,
    block_size: int,
    seed: int,
    hyper: int,
    paged: bool = False,
) -> tuple[Entry, torch.Tensor]:
    """Checks a parameter, its gradient and its state against each other; copies what is laid out differently in memory.

    Args:
        param: the optimizer's parameter, plain or a DTensor.
        grad: its gradient in this process, from `sharding.gradients`.
        state: its state, placed as the parameter.
        block_size: of the group.
        seed: tells parameters apart in stochastic rounding.
        hyper: index of the group.
        paged: the state is to be in host memory.

    Returns:
        The entry, and the gradient in its memory order.

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
    momentum = tensors["momentum"] if scales is None else tensors["codes"]
    home = torch.device("cpu") if paged else param.device
    for name, tensor in tensors.items():
        if tensor.device != home:
            raise RuntimeError(f"state must be on the parameter's device {home}, got {tensor.device}")
        if tensor.numel() and not tensor.data_ptr():
            raise RuntimeError(f"state must have memory, got {name} without storage")
        if tensor.is_neg():
            raise ValueError(f"state must not be a negated view, got {name}; replace it by its resolve_neg()")
    if scales is not None and not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous, got strides {scales.stride()}")
    scales = None if scales is None else unmark_order(scales)
    first, row_stride = 0, cols
    if is_dtensor(source) and order == (*range(param.dim()),):
        (tall, wide), first, apart = place_in_whole(source)
        if apart != wide:  # else rows follow each other in the whole as they do here
            rows, cols, row_stride = tall, wide, apart
    ordered, ordered_grad = _in_order(param, order, momentum), _in_order(grad, order, momentum)
    entry = Entry(
        param=ordered,
        momentum=momentum,
        scales=scales,
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
        in_place=ordered is param and ordered_grad is grad,
        paged=paged,
    )
    return entry, ordered_grad


def check_state(state: dict[str, Any], param: torch.Tensor, block_size: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Checks that a parameter's state is complete and has the dtypes and shapes of the format.

    Returns:
        The memory order of the momentum in this process, and its [rows, cols] as `rows_and_cols` defines them.

    Raises:
        ValueError: it does not; the message says what differs.
    """
    names = state.keys() & STATE_TENSORS
    known = names - {"residual"} in ({"codes", "scales"}, {"momentum"}) and "step" in state
    if not known or not all(isinstance(state[name], torch.Tensor) for name in names):
        raise ValueError(f"state must hold step with codes and scales, or with momentum; got {sorted(map(str, state))}")
    tensors, param = local_state(state, STATE_TENSORS, param, block_size), local(param)
    name, dtype = ("codes", torch.int8) if "codes" in state else ("momentum", torch.float32)
    momentum = tensors[name]
    order = memory_order(momentum)
    if momentum.dtype != dtype or momentum.shape != param.shape or order is None:
        got = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
        raise ValueError(f"{name} must be a dense {dtype} tensor of shape {tuple(param.shape)}, got {got}")
    ordered_shape = [param.shape[dim] for dim in order]
    if "residual" in tensors:
        residual = tensors["residual"]
        if residual.dtype != torch.int8 or residual.shape != param.shape or memory_order(residual) != order:
            got = f"{residual.dtype} of shape {tuple(residual.shape)} with strides {residual.stride()}"
            raise ValueError(f"residual must be an int8 tensor with the shape and memory order of {name}, got {got}")
        if param.dtype != torch.bfloat16:
            raise ValueError(
                f"residual must belong to a bfloat16 parameter, got {param.dtype}; "
                "delete it from the state, and take the weights from `fp32_weights` of the optimizer that saved it"
            )
    if "scales" in tensors:
        shape, scales = scales_shape(ordered_shape, block_size), tensors["scales"]
        if order != (*range(len(order)),):
            scales = unmark_order(scales)
        elif scales is not unmark_order(scales):
            raise ValueError(
                "codes must have the order in memory that their scales were made for, got contiguous codes and scales "
                f"{tuple(scales.shape)}, which belong to another order such as channels_last; load a file of "
                "torch.save, which keeps strides, or into a model and an optimizer in the memory format that was saved"
            )
        if scales.dtype != torch.float32 or tuple(scales.shape) != shape:
            got = f"{scales.dtype} {tuple(scales.shape)}"
            raise ValueError(f"scales must be float32 {shape} at block_size {block_size}, got {got}")
    return order, rows_and_cols(ordered_shape, block_size)


def _check_param(param: torch.Tensor) -> None:
    if param.layout != torch.strided or param.dtype not in DTYPES:
        raise TypeError(f"parameters must be dense float32, bfloat16 or float16, got {param.dtype} {param.layout}")
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError("parameters must not share memory between elements, got an expanded tensor; pass its .clone()")
    if param.is_meta:
        raise RuntimeError("parameters must hold data, got device 'meta'; call module.to_empty(device=...) first")
    if param.numel() and not param.data_ptr():
        raise RuntimeError(f"parameters must have memory, got a tensor without storage on {param.device}")


def _check_grad(grad: torch.Tensor, param: torch.Tensor) -> None:
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


def _in_order(tensor: torch.Tensor, order: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    if memory_order(tensor) == order and not tensor.is_neg() and tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def turns(entries: Sequence[Entry]) -> list[int]:
    """For each entry how many others must be stepped before it, because they share memory with it; as a rule 0.

    Threads would step the same elements at once. Parameters share memory where one is listed twice, or where modules
    are tied by ``.data``.

    Raises:
        ValueError: such a parameter is one that a step has to copy.
    """
    found = [0] * len(entries)
    places = [place for place, entry in enumerate(entries) if entry.param.numel()]
    places.sort(key=lambda place: (str(entries[place].param.device), local(entries[place].source).data_ptr(), place))
    group: list[int] = []  # parameters that share memory
    end = 0  # of that memory
    for place in places:
        entry, source = entries[place], local(entries[place].source)
        first = entries[group[0]] if group else entry
        if first.param.device != entry.param.device or source.data_ptr() >= end:
            group, end = [], 0
        elif source.data_ptr() == local(first.source).data_ptr() and not (entry.in_place and first.in_place):
            raise ValueError(
                f"parameters that share memory must be dense, got two of shapes {tuple(first.param.shape)} and "
                f"{tuple(entry.param.shape)}; list each parameter once"
            )
        found[place] = len(group)
        group.append(place)
        end = max(end, source.data_ptr() + source.nbytes)
    return found


class Work(Protocol):
    """What backends need of a batch, or of a part of one."""

    device: torch.device
    table: Any  # ctypes array of `layout.Tensor`
    cuda_cache: dict[Any, Any]
    entries: list[Entry]  # row by row as the table
    done: list[Any]  # of the present update, see `backend.update_`

    @property
    def grads(self) -> list[torch.Tensor]:
        """The gradients of the entries."""


class DeviceTable:
    """The entries of one device and the kernels' table of them, kept while memory stays where it is."""

    def __init__(
        self,
        device: torch.device,
        entries: Sequence[Entry],
        grads: Sequence[torch.Tensor],
        places: Sequence[int] | None = None,
    ) -> None:
        """Describes entries with their gradients.

        Args:
            device: the one that all of them are on.
            entries: as `make_entry` returned them, at least one; all or none of them paged, all or none in place.
            grads: their gradients, likewise.
            places: which gradients of a step are these entries'; None where all are.
        """
        self.device = device
        self.places = places
        self.cuda_cache: dict[Any, Any] = {}
        self.done: list[Any] = []
        self.finished = False
        self.paged = entries[0].paged
        self.in_place = entries[0].in_place  # otherwise the entries hold copies, which `finish` lets go of
        self.loads: list[Load] | None = None  # what `Pager` has cut it into
        self._params = [entry.source for entry in entries]
        self._states = [entry.state for entry in entries]
        self._made_with: list[dict[str, Any]] = [
            {"block_size": e.block_size, "seed": e.seed, "hyper": e.hyper, "paged": e.paged} for e in entries
        ]
        self._held: list[Any] = []
        for name in STATE_TENSORS:
            self._held += [[state for state in self._states if name in state], name]
        self.sharded = [entry.param for entry in entries if is_dtensor(entry.source)]
        self._changed = [tensor for tensor in self._params + self.sharded if not tensor.is_inference()]
        self._counts: list[int] = []  # of updates before the present one: one for all, or one of each
        self._following: list[int] = []  # likewise, after it
        self._tabulate(entries, grads)
        if self.in_place:
            self._seen = describe(self._columns(self._params, self.grads))
            self._misaligned = np.array([grad.element_size() - 1 for grad in self.grads], np.uint64)
            self._nonempty = np.array([grad.numel() > 0 for grad in self.grads], np.bool_)

    def _tabulate(self, entries: Sequence[Entry], grads: Sequence[torch.Tensor]) -> None:
        self.entries = list(entries)
        self.grads = list(grads)  # let go of by `finish`, so that zero_grad frees them
        self.table = (TensorRow * len(self.entries))()
        for row, entry, grad in zip(self.table, self.entries, self.grads, strict=True):
            row.param = entry.param.data_ptr()
            row.grad = grad.data_ptr()
            row.momentum = entry.momentum.data_ptr()
            row.scales = 0 if entry.scales is None else entry.scales.data_ptr()
            row.residual = 0 if entry.residual is None else entry.residual.data_ptr()
            row.rows, row.cols = entry.rows, entry.cols
            row.first, row.row_stride = entry.first & 0xFFFFFFFF, entry.row_stride & 0xFFFFFFFF
            row.seed, row.hyper = entry.seed, entry.hyper
            row.param_dtype, row.grad_dtype = DTYPES[entry.param.dtype], DTYPES[grad.dtype]
        self.columns = np.frombuffer(memoryview(self.table).cast("B"), dtype=np.dtype(TensorRow))

    def refresh(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
        """Takes in a step's parameters and gradients; False where more than gradients has changed.

        All that the kernels are told of a tensor is compared: address, dtype, device, shape and strides. State is
        looked up again, for code outside may put other tensors there or move these.
        """
        if self.places is not None:
            params, grads = ([tensors[place] for place in self.places] for tensors in (params, grads))
        compared = self.sharded or not self.in_place  # elsewhere, below
        if compared and not all(map(is_, params, self._params)):
            return False
        try:
            if not self.in_place:
                return self._copy_again(grads)
            addresses = look_again(self._columns(params, grads), self._seen)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            return False  # `make_entry` says better what is wrong
        if addresses is None:
            return False
        if (addresses & self._misaligned).any() or (self._nonempty & (addresses == 0)).any():
            return False
        self.grads = grads
        self.columns["grad"] = addresses
        return True

    def _copy_again(self, grads: list[torch.Tensor]) -> bool:
        made = [
            make_entry(param, grad, state, **options)
            for param, grad, state, options in zip(self._params, grads, self._states, self._made_with, strict=True)
        ]
        self.cuda_cache, self.loads = {}, None
        self._tabulate(*zip(*made, strict=True))
        return not any(entry.in_place for entry in self.entries)

    def begin(self) -> None:
        """Begins an update: the table has its number for each parameter; the state will when it has been applied.

        Raises:
            ValueError: a count of updates is no count.
        """
        self.done, self.finished = [], False
        first = self._states[0]["step"]
        uniform = replace(self._states, "step", first, first)  # as a rule: one number for all
        self._counts = [first] if uniform else [*map(itemgetter("step"), self._states)]
        following = {count: count + 1 for count in map(step_count, self._counts)}  # one object for all that are equal
        self._following = [following[step_count(count)] for count in self._counts]
        self.columns["step"] = np.array(self._following, np.int64)  # modulo 2^32

    def begin_on(self, counts: UpdateCounts, live: Collection[dict[str, Any]]) -> None:
        """Begins an update that the device counts; ``live`` is the state of all parameters."""
        self.done, self.finished, self._counts, self._following = [], False, [], []
        self.columns["step"] = counts.places(self._states, live)

    def finish(self) -> None:
        """Counts the update, writes copied parameters back, tells autograd, lets go of the gradients.

        Where it was interrupted, it may be called again.
        """
        if len(self._counts) == 1:
            replace(self._states, "step", *self._counts, *self._following)
        else:
            for state, count in zip(self._states, self._following):
                state["step"] = count
        if not self.in_place:
            for entry in self.entries:
                if entry.param is not local(entry.source):
                    local(entry.source).copy_(entry.param)
        torch.autograd.graph.increment_version(self._changed)
        self.finished = True
        self.grads = []
        if not self.in_place:
            self.entries = []

    def _columns(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> list[Any]:
        """All tensors of a step as `describe` takes them, gradients first."""
        columns = [grads, None, params, None, *self._held]
        if self.sharded:
            return [part for tensors in listed(columns) for part in ([*map(local, tensors)], None)]
        return columns


def hyper_array(hypers: Sequence[Hyper]) -> ctypes.Array[Hyper]:
    """The groups' constants side by side in memory, as the kernels index them."""
    return (Hyper * len(hypers))(*hypers)
