"""The specification: the momentum format and the Lion step in plain torch, which every kernel matches bit for bit.

Functions have the names they have in `csrc/block_math.h`. Each torch operation rounds once and none is fused, so the
order of operations written here defines the result.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lion8bit.layout import (
    CAUTIOUS,
    COUPLED_DECAY,
    MAXIMIZE,
    MIN_SCALE,
    UNSCALE,
    WEIGHT_ROUNDING,
    Hyper,
    blocks_per_row,
    code_bits,
)

RANGE_SQUARED = {4: 7.0 * 7.0, 8: 126.5 * 126.5}  # A * A by bits; |A + dither| rounds to at most 7 and 127
DITHER_MASK = 0xFF  # the scale's bits that hold the dither
RECIPROCAL_RANGE = {bits: float(np.float32(1 / squared)) for bits, squared in RANGE_SQUARED.items()}
OVERFLOW = 2.0**120  # gradients of this magnitude and above are treated as infinite

_STOCHASTIC = WEIGHT_ROUNDING["stochastic"]
_MASK32 = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, Tensor)


def fmix32(h: _Bits) -> _Bits:
    """MurmurHash3's 32-bit finaliser on values in [0, 2^32): Python integers or int64 tensors.

    Source: Austin Appleby, MurmurHash3 (public domain), `fmix32`.
    """
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK32
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)


def square_root(x: Tensor) -> Tensor:
    """The fp32 square root rounded to nearest, as IEEE 754 demands.

    `torch.sqrt` on the CPU may be one unit off in the last place (MKL's vector library), so the root is taken in
    double: no root of a single comes close enough to the middle between two singles for an error of one unit in double
    to matter. A device without float64 gets its own square root.
    """
    return x.sqrt() if x.device.type == "mps" else x.double().sqrt().float()


# ---- The momentum code ---------------------------------------------------------------------------------------------


def to_blocks(x: Tensor, block_size: int) -> Tensor:
    """[rows, cols] -> [rows, blocks_per_row, block_size], the last block of a row padded with zeros."""
    rows, cols = x.shape
    blocks = blocks_per_row(cols, block_size)
    missing = blocks * block_size - cols
    return (F.pad(x, (0, missing)) if missing else x).reshape(rows, blocks, block_size)


def from_blocks(blocks: Tensor, cols: int) -> Tensor:
    """[rows, blocks_per_row, block_size] -> [rows, cols], the padding dropped."""
    return blocks.flatten(1)[:, :cols]


def largest(magnitudes: Tensor) -> Tensor:
    """[rows, blocks_per_row, block_size] -> [rows, blocks_per_row]: the largest of a block, NaN where it holds one."""
    return magnitudes.amax(-1) if magnitudes.numel() else magnitudes.new_zeros(magnitudes.shape[:-1])


def dither(scales: Tensor) -> Tensor:
    """u in (-1/2, 1/2): the low byte of the scale's own bits, (byte + 1/2)/256 - 1/2. fp32 -> fp32, any shape."""
    return (scales.view(torch.int32) & DITHER_MASK).float() * 2.0**-8 - 127.5 * 2.0**-8


def decayed_scale(scales: Tensor, beta: float) -> Tensor:
    """``s*beta`` rounded to the nearest scale with the same dither: what decays a block without touching its codes."""
    byte = scales.view(torch.int32) & DITHER_MASK
    wanted = (scales * beta).view(torch.int32) - byte + (DITHER_MASK + 1) // 2
    return ((wanted & ~DITHER_MASK) | byte).view(torch.float32)


def encode(momentum: Tensor, block_size: int, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantizes rows: ``s = max|m|`` and ``code = rint(copysign(sqrt(|m| * A*A/s), m) + u)``.

    Args:
        momentum: [rows, cols] fp32.
        block_size: 64, 128 or 256.
        bits: of a code, 8 (A = 126.5) or 4 (A = 7).

    Returns:
        codes [rows, cols] int8, or `packed` ones; and scales [rows, blocks_per_row] fp32.
    """
    blocks = to_blocks(momentum, block_size)
    magnitudes = blocks.abs()
    scales = largest(magnitudes)
    scales = torch.where(scales < MIN_SCALE, torch.zeros_like(scales), scales)
    # By a tensor: torch divides a number by multiplying with a reciprocal, which rounds twice.
    squared = torch.full_like(scales, RANGE_SQUARED[bits])
    gain = torch.where(scales == 0, torch.zeros_like(scales), squared / scales)
    scaled = magnitudes * gain[..., None]
    level = torch.copysign(square_root(scaled), blocks) + dither(scales)[..., None]
    codes = from_blocks(level.round().to(torch.int8), momentum.shape[1])
    return codes if bits == 8 else packed(codes), scales


def decode(codes: Tensor, scales: Tensor, block_size: int, cols: int | None = None) -> Tensor:
    """The momentum that codes and scales stand for::

        8 bits:  t = code - u;  m = t*|t| * (s * 1/(A*A)), and 0 for the code 0
        4 bits:  m = code*|code - 2*u| * (s * 1/(A*A))

    Over the dither, the mean of the second is the momentum that was encoded, exactly. That of the first is larger in
    magnitude by s/(12*A*A). With 4 bits this would be s/588 in every step.

    Args:
        codes: [rows, cols] int8, or `packed` ones.
        scales: [rows, blocks_per_row] fp32.
        block_size: the one that `encode` was given.
        cols: of packed codes, which do not say whether it is odd.

    Returns:
        [rows, cols] fp32.
    """
    cols = codes.shape[1] if cols is None else cols
    u = dither(scales)[..., None]
    if code_bits(codes) == 4:
        blocks = to_blocks(unpacked(codes, cols), block_size).float()
        return from_blocks(blocks * (blocks - 2 * u).abs() * (scales * RECIPROCAL_RANGE[4])[..., None], cols)
    blocks = to_blocks(codes, block_size)
    t = blocks.float() - u
    value = t * t.abs() * (scales * RECIPROCAL_RANGE[8])[..., None]
    return from_blocks(torch.where(blocks == 0, torch.zeros_like(value), value), cols)


def packed(codes: Tensor) -> Tensor:
    """Codes in [-7, 7], two in a byte: [rows, cols] int8 -> [rows, ceil(cols/2)] uint8.

    The first of two is in the low half, in two's complement. The last byte of an odd row has 0 in the high half.
    """
    pairs = F.pad(codes, (0, codes.shape[1] % 2)).view(codes.shape[0], (codes.shape[1] + 1) // 2, 2)
    both: Tensor = pairs[..., 0] & 0xF | pairs[..., 1] << 4
    return both.view(torch.uint8)


def unpacked(codes: Tensor, cols: int) -> Tensor:
    """Inverse of `packed`: [rows, ceil(cols/2)] uint8 -> [rows, cols] int8."""
    pairs = codes.view(torch.int8)
    return torch.stack((pairs << 4 >> 4, pairs >> 4), -1).flatten(1)[:, :cols]


# ---- 16-bit weights ------------------------------------------------------------------------------------------------


def random_bits(
    shape: tuple[int, int], *, seed: int, step: int, first: int, row_stride: int, device: torch.device | None = None
) -> Tensor:
    """16 uniform bits per element, a function of (seed, step, element) alone::

        e    = first + row*row_stride + column, modulo 2^32
        word = fmix32((e - e%2) ^ fmix32(fmix32(seed) + step))
        bits = low half of word for an even e, high half for an odd one

    Args:
        shape: [rows, cols].
        seed: of the parameter.
        step: the parameter's update count, from 1.
        first: index of the first element within the whole parameter.
        row_stride: elements of the whole parameter from the start of a row to that of the next.

    Returns:
        [rows, cols] int64 in [0, 2^16).
    """
    rows, cols = (torch.arange(size, device=device) for size in shape)
    element = (first + rows[:, None] * row_stride + cols) & _MASK32
    word = fmix32((element & ~1) ^ fmix32((fmix32(seed) + step) & _MASK32))
    return word >> (element & 1) * 16 & 0xFFFF


def to_bfloat16(x: Tensor, random: Tensor | None) -> Tensor:
    """fp32 -> bf16, to nearest even, or stochastically where ``random`` holds 16 bits per element."""
    if random is None:
        return x.bfloat16()
    pattern = x.view(torch.int32)
    size = pattern & 0x7FFFFFFF
    rounded = torch.where(size >= 0x7F800000, pattern, pattern + random.int()) >> 16
    return torch.where(size > 0x7F800000, 0x7FC0, rounded).to(torch.int16).view(torch.bfloat16)


def to_float16(x: Tensor, random: Tensor | None) -> Tensor:
    """fp32 -> fp16, to nearest even, or stochastically where ``random`` holds 16 bits per element."""
    if random is None:
        return x.half()
    pattern = x.view(torch.int32)
    size = pattern & 0x7FFFFFFF
    units = x.abs() * 2.0**24  # in steps of the smallest subnormal
    subnormal = (torch.where(units < 1024, units, torch.zeros_like(units)) + (random >> 2).float() * 2.0**-14).int()
    normal = ((size.clamp(max=0x7F800000) + (random.int() >> 3) >> 13) - (112 << 10)).clamp(max=0x7C00)
    result = torch.where(size < 113 << 23, subnormal, normal)
    result = torch.where(size > 0x7F800000, 0x7E00, result)
    return (result | ((pattern >> 16) & ~0x7FFF)).to(torch.int16).view(torch.float16)


def from_compensated(param: Tensor, residual: Tensor) -> Tensor:
    """The weights that a bf16 parameter and its residual stand for: ``bits = (bf16 bits << 16) + (residual << 8)``.

    Zero, infinity and NaN have no residual: there it is not read.

    Args:
        param: bf16.
        residual: int8, the same shape.

    Returns:
        fp32, whose low 8 mantissa bits are 0.
    """
    pattern = param.view(torch.int16).int()
    size = pattern & 0x7FFF
    below = torch.where((size > 0) & (size < 0x7F80), residual.int() << 8, 0)
    return ((pattern << 16) + below).view(torch.float32)


def to_compensated(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> 24 bits, to nearest even, split into a bf16 parameter and its residual: inverse of `from_compensated`.

    The parameter alone is a nearest bf16 number (of two the larger in magnitude), which leaves the residual in
    [-128, 127]. A number that is too large for it is infinite, one below 2^-134 is 0, NaN is 0x7fc0 with residual 0.
    """
    pattern = x.view(torch.int32)
    nan = (pattern & 0x7FFFFFFF) > 0x7F800000
    rounded = torch.where(nan, 0x7FC00000, pattern + (((pattern >> 8) & 1) + 0x7F))
    residual = ((rounded >> 8) + 0x80 & 0xFF) - 0x80
    return ((rounded + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), residual.to(torch.int8)


# ---- The Lion step -------------------------------------------------------------------------------------------------


def lion_step_(
    param: Tensor, grad: Tensor, momentum: Tensor, scales: Tensor | None, hyper: Hyper, **more: Any
) -> Tensor:
    """`lion_step` in place; returns the number of elements skipped, a 0-dim int64 tensor."""
    skipped, targets, values = lion_step(param, grad, momentum, scales, hyper, **more)
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
    return skipped


def lion_step(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    scales: Tensor | None,
    hyper: Hyper,
    *,
    residual: Tensor | None = None,
    seed: int = 0,
    step: int = 1,
    first: int = 0,
    row_stride: int | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What one Lion step makes of rows of a parameter::

        g    = grad, times unscale, negated with maximize, plus weight_decay*param where decay is coupled
        c    = blend*m + (1-blend)*g
        p   <- p*decay - lr*sign(c)
        m   <- beta*m + (1-beta)*g

    An element whose gradient is NaN, infinite or at least 2^120 in magnitude keeps its parameter and its momentum. A
    block whose gradients are all zero keeps its codes: its scale decays in their place, see `decayed_scale`.

    Args:
        param: [rows, cols] fp32, bf16 or fp16.
        grad: [rows, cols] fp32, bf16 or fp16.
        momentum: [rows, cols] int8 codes, `packed` ones, or fp32 where ``scales`` is None.
        scales: [rows, blocks_per_row] fp32 or None.
        hyper: the group's constants.
        residual: [rows, cols] int8, what compensated weights hold below a bf16 ``param``.
        seed, step, first, row_stride: what stochastic rounding is a function of, see `random_bits`; by default these
            rows are a whole parameter.

    Returns:
        The number of elements skipped, a 0-dim int64 tensor; those of the tensors above that change; and in the same
        order their new values, which `torch.Tensor.copy_` is to write.
    """
    p, g = param.float() if residual is None else from_compensated(param, residual), grad.float()
    cols = param.shape[1]
    m = momentum if scales is None else decode(momentum, scales, hyper.block_size, cols)
    if hyper.flags & UNSCALE:
        g = g * hyper.unscale
    if hyper.flags & MAXIMIZE:
        g = -g
    if hyper.flags & COUPLED_DECAY:
        g = g + p * hyper.coupled_decay
    steepest = largest(to_blocks(g.abs(), hyper.block_size))
    c = m * hyper.blend + g * hyper.one_minus_blend
    averaged = m * hyper.beta + g * hyper.one_minus_beta
    update = torch.where(c == 0, torch.zeros_like(c), torch.copysign(torch.full_like(c, hyper.lr), c))
    if hyper.flags & CAUTIOUS:
        agrees = (torch.signbit(c) == torch.signbit(g)) & (g != 0)
        update = torch.where(agrees, update, torch.zeros_like(update))
    moved = p * hyper.decay - update
    skipped = torch.zeros((), dtype=torch.int64, device=param.device)
    if not bool((steepest < OVERFLOW).all()):  # false for NaN
        finite = g.abs() < OVERFLOW
        moved = torch.where(finite, moved, p)
        averaged = torch.where(finite, averaged, m)
        skipped = (~finite).sum()

    targets, values = [param], [moved]
    if residual is not None:
        targets, values = [param, residual], [*to_compensated(moved)]
    elif param.dtype != torch.float32:
        random = None
        if hyper.weight_rounding == _STOCHASTIC:
            stride = cols if row_stride is None else row_stride
            shape = (param.shape[0], cols)
            random = random_bits(shape, seed=seed, step=step, first=first, row_stride=stride, device=param.device)
        values = [(to_bfloat16 if param.dtype == torch.bfloat16 else to_float16)(moved, random)]
    if scales is None:
        targets, values = [*targets, momentum], [*values, averaged]
    else:
        bits = code_bits(momentum)
        new_codes, new_scales = encode(averaged, hyper.block_size, bits)
        decayed = decayed_scale(scales, hyper.beta)
        idle = (steepest == 0) & (decayed >= MIN_SCALE)
        if bool(idle.any()):
            spread = idle.repeat_interleave(hyper.block_size * bits // 8, dim=1)[:, : momentum.shape[1]]
            new_codes = torch.where(spread, momentum, new_codes)
        targets, values = [*targets, momentum, scales], [*values, new_codes, torch.where(idle, decayed, new_scales)]
    return skipped, targets, values
