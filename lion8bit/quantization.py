"""`quantize` and `dequantize` for momentum of any shape, and the values that the format has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lion8bit.layout import (
    CODES,
    DEFAULT_BLOCK_SIZE,
    MIN_SCALE,
    MOMENTUM_LIMIT,
    blocks_per_row,
    bytes_per_row,
    check_bits,
    check_block_size,
    code_bits,
    in_memory_order,
    memory_order,
    packed_shape,
    rows_and_cols,
    scales_shape,
)
from lion8bit.reference import decode, encode

_CHUNK = 1 << 20  # elements that are checked at a time


def quantize(momentum: Tensor, block_size: int | None = None, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor to codes of 8 or 4 bits with one fp32 scale per block::

        s    = max |m| over the block                 (0 if below 2^-100)
        u    = (low byte of s + 1/2)/256 - 1/2
        code = rint(sign(m) * sqrt(|m| * A*A/s) + u)  A = 126.5 for 8 bits, 7 for 4 bits

    Blocks run along each row, ``momentum[i]``, and do not cross it. A vector is one row. Where rows are shorter than a
    block, all of them are one row. With 8 bits a row is in memory order, with 4 bits in row-major order.

    Args:
        momentum: any dense shape, floating point; computed in fp32.
        block_size: 64, 128 or 256 elements; None for 128 with 8 bits and 64 with 4 bits.
        bits: of a code, 8 or 4.

    Returns:
        codes: int8, the shape and strides of ``momentum``; or uint8, two in a byte, [rows, ceil(cols/2)].
        scales: fp32, [rows, blocks_per_row].

        Where rows are shorter than a block, these are [ceil(elements/2)] and [blocks].

    Raises:
        ValueError: ``momentum`` is not dense, or has values that are not finite or reach 2^127; or an option has a
            value that the format does not have.
        TypeError: ``momentum`` is not of a real floating-point dtype.
    """
    check_bits(bits)
    block_size = DEFAULT_BLOCK_SIZE[bits] if block_size is None else block_size
    check_block_size(block_size)
    if not momentum.is_floating_point():
        raise TypeError(f"momentum must be of a floating-point dtype, got {momentum.dtype}")
    check_momentum(momentum)
    order = memory_order(momentum)
    if order is None:
        raise ValueError(
            f"momentum must be dense, got shape {tuple(momentum.shape)} with strides {momentum.stride()}; "
            "pass momentum.contiguous()"
        )
    if bits == 4:
        rows = momentum.float().reshape(rows_and_cols(momentum.shape, block_size))
        codes, scales = encode(rows, block_size, bits)
        shape = momentum.shape
        return codes.view(packed_shape(shape, block_size)), scales.view(scales_shape(shape, block_size))
    codes = torch.empty_like(momentum, dtype=torch.int8)
    ordered = [momentum.shape[dim] for dim in order]
    rows = in_memory_order(momentum.float(), order).view(rows_and_cols(ordered, block_size))
    row_codes, scales = encode(rows, block_size)
    in_memory_order(codes, order).copy_(row_codes.flatten())
    return codes, scales.view(scales_shape(ordered, block_size))


def dequantize(
    codes: Tensor, scales: Tensor, block_size: int | None = None, shape: Sequence[int] | None = None
) -> Tensor:
    """Inverse of `quantize`, up to its rounding::

        8 bits:  t = code - u
                 m = t*|t| * s/(A*A)             0 for the code 0
        4 bits:  m = code * |code - 2*u| * s/(A*A)

    Args:
        codes: int8 (8 bits) or uint8 (4 bits), dense.
        scales: fp32, of the shape that `quantize` gives. Two dimensions mean that blocks do not cross rows, even where
            these are shorter than a block, as in 8-bit state of format version 2.
        block_size: the one that the codes were made with; None for the default of `quantize`.
        shape: of the momentum; needed for 4 bits only, whose codes do not say it.

    Returns:
        fp32, the shape and strides of 8-bit ``codes``, or row-major of the given ``shape``.

    Raises:
        ValueError: the shapes of ``codes`` and ``scales`` do not belong together at this block size.
        TypeError: ``codes`` is not int8 or uint8, or ``scales`` not fp32.
    """
    if codes.dtype not in CODES.values() or scales.dtype != torch.float32:
        raise TypeError(f"codes must be int8 or uint8 and scales float32, got {codes.dtype} and {scales.dtype}")
    bits = code_bits(codes)
    block_size = DEFAULT_BLOCK_SIZE[bits] if block_size is None else block_size
    check_block_size(block_size)
    if bits == 4:
        return _dequantize_4_bits(codes, scales, block_size, shape)
    order = memory_order(codes)
    if order is None:
        raise ValueError(f"codes must be dense, got shape {tuple(codes.shape)} with strides {codes.stride()}")
    if shape is not None and tuple(shape) != codes.shape:
        raise ValueError(f"shape must be that of 8-bit codes, {tuple(codes.shape)}, got {tuple(shape)}")
    ordered = [codes.shape[dim] for dim in order]
    (rows, cols), expected = rows_and_cols(ordered, block_size), scales_shape(ordered, block_size)
    if scales.dim() == 2 and len(expected) == 1:
        rows, cols = ordered[0], math.prod(ordered[1:])
        expected = (rows, blocks_per_row(cols, block_size))
    _check_shape("scales", scales, expected, tuple(codes.shape), block_size)
    momentum = torch.empty_like(codes, dtype=torch.float32)
    row_codes = in_memory_order(codes, order).view(rows, cols)
    decoded = decode(row_codes, scales.view(rows, blocks_per_row(cols, block_size)), block_size)
    in_memory_order(momentum, order).copy_(decoded.flatten())
    return momentum


def _dequantize_4_bits(codes: Tensor, scales: Tensor, block_size: int, shape: Sequence[int] | None) -> Tensor:
    if shape is None:
        raise ValueError("shape must be given for 4-bit codes, got None; pass that of the momentum")
    shape = tuple(shape)
    _check_shape("codes", codes, packed_shape(shape, block_size), shape, block_size)
    _check_shape("scales", scales, scales_shape(shape, block_size), shape, block_size)
    rows, cols = rows_and_cols(shape, block_size)
    by_row = scales.reshape(rows, blocks_per_row(cols, block_size))
    decoded = decode(codes.reshape(rows, bytes_per_row(cols, 4)), by_row, block_size, cols)
    return decoded.contiguous().view(shape)  # `decode` may return a part of padded rows


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], shape: tuple[int, ...], block_size: int) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} must be {expected} for momentum {shape} at block_size {block_size}, got {tuple(tensor.shape)}"
        )


# ---- Legal values of the format --------------------------------------------------------------------------------------


def check_momentum(momentum: Tensor) -> None:
    """Raises ValueError unless all of a tensor is finite and in the range of the format."""
    bad = _first_not(lambda piece: piece.abs() < MOMENTUM_LIMIT, momentum)
    if bad is not None:
        raise ValueError(f"momentum must be finite and below 2^127 in magnitude, got {bad}")


def check_scales(scales: Tensor) -> None:
    """Raises ValueError unless all scales are such as the format has: 0, or in [2^-100, 2^127), with any dither."""
    bad = _first_not(lambda piece: (piece == 0) | (piece >= MIN_SCALE) & (piece < MOMENTUM_LIMIT), scales)
    if bad is not None:
        raise ValueError(f"scales must be 0 or in [2^-100, 2^127), got {bad}")


def check_codes(codes: Tensor, cols: int = 0) -> None:
    """Raises ValueError where codes are none of the format, which has those from -127 to 127, or from -7 to 7.

    Args:
        codes: int8, or `packed` ones.
        cols: of packed codes; an odd row ends with half a byte, which must be 0.
    """
    if code_bits(codes) == 8:
        bad = _first_not(lambda piece: piece >= -127, codes)
        if bad is not None:
            raise ValueError(f"codes must be in [-127, 127], got {bad:.0f}")
        return
    if _first_not(lambda piece: (piece % 16 != 8) & (piece // 16 != 8), codes) is not None:
        raise ValueError("codes must be in [-7, 7], got -8")
    if cols % 2 and codes.numel() and bool((codes.view(-1, codes.shape[-1])[:, -1] > 15).any()):
        raise ValueError("codes must end an odd row with half a byte of 0, got another one")


def _first_not(legal: Callable[[Tensor], Tensor], tensor: Tensor) -> float | None:
    """The first element that is not legal, or None."""
    order = memory_order(tensor)
    flat = (tensor if order is None or tensor.dim() < 2 else tensor.permute(*order)).detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK].float()
        passed = legal(piece)
        if not bool(passed.all()):
            return float(piece[~passed][0])
    return None
