"""How the kernels see tensors and options: [rows, cols] views, and ctypes mirrors of structs in `block_math.h`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

FORMAT_VERSION = 4
LOADED_VERSIONS = (2, 3, FORMAT_VERSION)
BLOCK_SIZES = (64, 128, 256)
CODES: dict[int, torch.dtype] = {8: torch.int8, 4: torch.uint8}  # dtype of the codes by their bits; 4: two in a byte
DEFAULT_BLOCK_SIZE = {4: 64, 8: 128}  # by bits of the codes
MIN_SCALE = 2.0**-100  # a block whose largest magnitude is below it is stored as zeros
MOMENTUM_LIMIT = 2.0**127  # magnitudes of the momentum and scales are below it

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WEIGHT_ROUNDING: dict[str, int] = {"nearest": 0, "stochastic": 1, "compensated": 2}

MAXIMIZE = 1
COUPLED_DECAY = 2
CAUTIOUS = 4
UNSCALE = 8


class Hyper(ctypes.Structure):
    """The options of one parameter group as the kernels take them: `struct Hyper` of `block_math.h`.

    Reading a field gives the float32 value, so `reference` uses the very numbers that the kernels use.
    """

    lr: float
    decay: float
    coupled_decay: float
    blend: float
    one_minus_blend: float
    beta: float
    one_minus_beta: float
    unscale: float
    flags: int
    block_size: int
    weight_rounding: int

    _fields_ = [
        ("lr", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("coupled_decay", ctypes.c_float),
        ("blend", ctypes.c_float),
        ("one_minus_blend", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("one_minus_beta", ctypes.c_float),
        ("unscale", ctypes.c_float),
        ("flags", ctypes.c_uint32),
        ("block_size", ctypes.c_int32),
        ("weight_rounding", ctypes.c_int32),
    ]


def mark_order(scales: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The scales as the state holds them: two dimensions of size 1 before the others unless ``order`` is row-major.

    torch.distributed.checkpoint saves codes element by element and forgets their strides. Scales of another order would
    have the same shape, and be taken for these; so their shapes differ.
    """
    plain = unmark_order(scales)
    return plain if order == (*range(len(order)),) else plain[None, None]


def unmark_order(scales: torch.Tensor) -> torch.Tensor:
    """[rows, blocks_per_row] of scales that `mark_order` may have marked."""
    return scales[0, 0] if scales.dim() > 2 and scales.shape[:2] == (1, 1) else scales


class TensorRow(ctypes.Structure):
    """One parameter with its gradient and state as the kernels take them: `struct TensorRow` of `block_math.h`."""

    param: int
    grad: int
    momentum: int
    scales: int
    residual: int
    rows: int
    cols: int
    first: int
    row_stride: int
    seed: int
    step: int
    param_dtype: int
    grad_dtype: int
    momentum_bits: int
    hyper: int

    _fields_ = [
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("first", ctypes.c_uint32),
        ("row_stride", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("param_dtype", ctypes.c_int8),
        ("grad_dtype", ctypes.c_int8),
        ("momentum_bits", ctypes.c_int16),
        ("hyper", ctypes.c_int32),
    ]


def is_integer(value: Any) -> bool:
    return type(value) is int or isinstance(value, np.integer)


def check_block_size(block_size: Any) -> None:
    """Raises ValueError unless the format has this block size."""
    if not is_integer(block_size) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")


def check_bits(bits: Any) -> None:
    """Raises ValueError unless codes can have so many bits."""
    if not is_integer(bits) or bits not in CODES:
        raise ValueError(f"bits must be one of {tuple(CODES)}, got {bits!r}")


def blocks_per_row(cols: int, block_size: int) -> int:
    """Number of blocks that a row of ``cols`` elements is cut into; the last may be short."""
    return -(-cols // block_size)


def is_narrow(shape: Sequence[int], block_size: int) -> bool:
    """Whether the rows of a shape, listed as for `rows_and_cols`, are shorter than a block."""
    return len(shape) > 1 and math.prod(shape[1:]) < block_size


def rows_and_cols(shape: Sequence[int], block_size: int) -> tuple[int, int]:
    """The [rows, cols] that blocks are cut from, given the dimensions from the slowest to the fastest in memory.

    A vector is one row, and so are all elements of a tensor whose own rows are shorter than a block.
    """
    if len(shape) < 2 or is_narrow(shape, block_size):
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def scales_shape(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The shape of the scales, given the dimensions as for `rows_and_cols`: [blocks] where narrow rows are joined."""
    rows, cols = rows_and_cols(shape, block_size)
    blocks = blocks_per_row(cols, block_size)
    return (blocks,) if is_narrow(shape, block_size) else (rows, blocks)


def code_bits(codes: torch.Tensor) -> int:
    """How many bits a code has, 4 or 8, by the dtype of the codes."""
    return 4 if codes.dtype == CODES[4] else 8


def bytes_per_row(cols: int, bits: int) -> int:
    """Bytes that the codes of a row take; with 4 bits an odd row ends with half a byte, which is 0."""
    return -(-cols * bits // 8)


def packed_shape(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The shape of 4-bit codes for a row-major shape: [rows, bytes], or [bytes] where narrow rows are joined."""
    rows, cols = rows_and_cols(shape, block_size)
    packed = bytes_per_row(cols, 4)
    return (packed,) if is_narrow(shape, block_size) else (rows, packed)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the slowest to the fastest in memory, or None where elements overlap or leave gaps.

    Dimensions of size 1 keep their place: their strides mean nothing.
    """
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    sizes, strides = tensor.shape, tensor.stride()
    wide = sorted((dim for dim in range(tensor.dim()) if sizes[dim] != 1), key=lambda dim: -strides[dim])
    expected = 1
    for dim in reversed(wide):
        if strides[dim] != expected:
            return None
        expected *= sizes[dim]
    queue = iter(wide)
    return tuple(dim if sizes[dim] == 1 else next(queue) for dim in range(tensor.dim()))


def in_memory_order(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The elements of a dense tensor as a vector that is a view of it, given its `memory_order`."""
    return (tensor.permute(*order) if tensor.dim() > 1 else tensor).view(-1)
