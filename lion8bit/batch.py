"""Owns what an optimizer hands to a backend: one device's parameters, gradients and state, checked, as a table."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lion8bit.layout import DTYPES, Hyper, Tensor, blocks_per_row, memory_order, rows_and_cols

STATE_TENSORS = ("codes", "scales", "momentum", "residual")


@dataclass(slots=True)
class Entry:
    """One parameter of a step. Its tensors but ``scales`` are dense with the memory order of ``momentum``."""

    param: torch.Tensor  # fp32, bf16 or fp16
    momentum: torch.Tensor  # int8 codes, or fp32 where scales is None
    scales: torch.Tensor | None  # [rows, blocks_per_row] fp32
    residual: torch.Tensor | None  # int8, below a compensated bf16 parameter
    order: tuple[int, ...]  # memory order of the dimensions
    rows: int
    cols: int
    seed: int
    hyper: int  # index into the step's Hypers
    state: dict[str, Any]
    source: torch.Tensor  # the optimizer's own parameter, whose copy `param` is where their memory differs


def make_entry(
    param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], *, block_size: int, seed: int, hyper: int
) -> tuple[Entry, torch.Tensor]:
    """Checks a parameter, its gradient and its state against each other; copies what is laid out differently in memory.

    Returns:
        The entry, and the gradient in its memory order.

    Raises:
        TypeError: a dtype that the kernels do not have, or a complex gradient.
        RuntimeError: a sparse gradient, freed memory, or a device or shape that does not fit the parameter.
        ValueError: elements of the parameter share memory, or the state does not fit it.
    """
    _check_param(param)
    _check_grad(grad, param)
    order, (rows, cols) = check_state(state, param, block_size)
    scales: torch.Tensor | None = state.get("scales")
    momentum: torch.Tensor = state["momentum"] if scales is None else state["codes"]
    for name in state.keys() & STATE_TENSORS:
        if state[name].device != param.device:
            raise RuntimeError(f"state must be on the parameter's device {param.device}, got {state[name].device}")
    if scales is not None and not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous, got strides {scales.stride()}")
    entry = Entry(
        param=_in_order(param, order, momentum),
        momentum=momentum,
        scales=scales,
        residual=state.get("residual"),
        order=order,
        rows=rows,
        cols=cols,
        seed=seed,
        hyper=hyper,
        state=state,
        source=param,
    )
    return entry, _in_order(grad, order, momentum)


def check_state(state: dict[str, Any], param: torch.Tensor, block_size: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Checks that a parameter's state is complete and has the dtypes and shapes of the format.

    Returns:
        The memory order of the momentum, and its [rows, cols].

    Raises:
        ValueError: it does not; the message says what differs.
    """
    names = state.keys() & {*STATE_TENSORS} - {"residual"}
    if names not in ({"codes", "scales"}, {"momentum"}) or "step" not in state:
        raise ValueError(f"state must hold step with codes and scales, or with momentum; got {sorted(state)}")
    name, dtype = ("codes", torch.int8) if "codes" in state else ("momentum", torch.float32)
    momentum = state[name]
    order = memory_order(momentum)
    if momentum.dtype != dtype or momentum.shape != param.shape or order is None:
        got = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
        raise ValueError(f"{name} must be a dense {dtype} tensor of shape {tuple(param.shape)}, got {got}")
    rows, cols = rows_and_cols([param.shape[dim] for dim in order])
    if "residual" in state:
        residual = state["residual"]
        if residual.dtype != torch.int8 or residual.shape != param.shape or memory_order(residual) != order:
            got = f"{residual.dtype} of shape {tuple(residual.shape)} with strides {residual.stride()}"
            raise ValueError(f"residual must be an int8 tensor with the shape and memory order of {name}, got {got}")
        if param.dtype != torch.bfloat16:
            raise ValueError(
                f"residual must belong to a bfloat16 parameter, got {param.dtype}; "
                "delete it from the state, and take the weights from `fp32_weights` of the optimizer that saved it"
            )
    if "scales" in state:
        shape, scales = (rows, blocks_per_row(cols, block_size)), state["scales"]
        if scales.dtype != torch.float32 or tuple(scales.shape) != shape:
            got = f"{scales.dtype} {tuple(scales.shape)}"
            raise ValueError(f"scales must be float32 {shape} at block_size {block_size}, got {got}")
    return order, (rows, cols)


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
    if memory_order(tensor) == order and tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


class Batch:
    """The entries of one device and the kernels' table of them, kept while memory stays where it is."""

    def __init__(
        self, device: torch.device, entries: Sequence[Entry], grads: Sequence[torch.Tensor], identity: list[int]
    ) -> None:
        self.device = device
        self.entries = list(entries)
        self.grads = list(grads)  # let go of by `finish`, so that zero_grad frees them
        self.identity = identity
        self.states = [entry.state for entry in self.entries]
        self._compensated = [entry.state for entry in self.entries if entry.residual is not None]
        self.table = (Tensor * len(self.entries))()
        self.cuda_cache: dict[Any, Any] = {}
        self._columns = None
        if self.entries:
            self._columns = np.frombuffer(memoryview(self.table).cast("B"), dtype=np.dtype(Tensor))
        for row, entry, grad in zip(self.table, self.entries, self.grads, strict=True):
            row.param = entry.param.data_ptr()
            row.grad = grad.data_ptr()
            row.momentum = entry.momentum.data_ptr()
            row.scales = 0 if entry.scales is None else entry.scales.data_ptr()
            row.residual = 0 if entry.residual is None else entry.residual.data_ptr()
            row.rows, row.cols = entry.rows, entry.cols
            row.seed, row.step, row.hyper = entry.seed, entry.state["step"], entry.hyper
            row.param_dtype, row.grad_dtype = DTYPES[entry.param.dtype], DTYPES[grad.dtype]
        self._copied = [entry for entry in self.entries if entry.param is not entry.source]
        self.reusable = not self._copied and all(
            grad is entry.source.grad for entry, grad in zip(self.entries, self.grads, strict=True)
        )
        self._fingerprint = self._fingerprint_of(self.grads)

    def refresh(self, params: Sequence[torch.Tensor], identity: list[int]) -> bool:
        """Takes in the parameters' new gradients; False where anything else has changed and a new batch is needed."""
        if identity != self.identity:
            return False
        grads: list[torch.Tensor] = [param.grad for param in params]  # type: ignore[misc]
        if self._fingerprint_of(grads) != self._fingerprint:
            return False
        pointers = [grad.data_ptr() for grad in grads]
        if 0 in pointers:
            return False
        self.grads = grads
        if self._columns is not None:
            self._columns["grad"] = pointers
        return True

    def advance(self) -> None:
        """Counts an update of every parameter, in the state and in the table."""
        steps = []
        for state in self.states:
            state["step"] = step = state["step"] + 1
            steps.append(step & 0xFFFFFFFF)
        if self._columns is not None:
            self._columns["step"] = steps

    def finish(self) -> None:
        """Writes copied parameters back, tells autograd that the parameters have changed, lets go of the gradients."""
        for entry in self._copied:
            entry.source.copy_(entry.param)
        torch.autograd.graph.increment_version([entry.source for entry in self.entries])
        self.grads = []

    def _fingerprint_of(self, grads: Sequence[torch.Tensor]) -> list[Any]:
        # State is compared by identity and by address: code outside may put other tensors there or move these.
        entries = self.entries
        momenta = [state.get("codes", state.get("momentum")) for state in self.states]
        scales = [state.get("scales") for state in self.states]
        scales += [state.get("residual") for state in self._compensated]
        return [
            [entry.param.data_ptr() for entry in entries],
            [entry.param.numel() for entry in entries],
            [entry.param.dtype for entry in entries],
            [entry.param.is_contiguous() or entry.param.stride() for entry in entries],
            [*map(id, momenta)],
            [*map(id, scales)],
            [None if tensor is None else tensor.data_ptr() for tensor in momenta],
            [None if tensor is None else tensor.data_ptr() for tensor in scales],
            [grad.dtype for grad in grads],
            [grad.numel() for grad in grads],
            [grad.is_contiguous() or grad.stride() for grad in grads],
        ]


def hyper_array(hypers: Sequence[Hyper]) -> ctypes.Array[Hyper]:
    """The groups' constants side by side in memory, as the kernels index them."""
    return (Hyper * len(hypers))(*hypers)
