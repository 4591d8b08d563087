"""Owns the specification: the momentum format and the Lion step in plain torch, which every kernel matches bit for bit.

The functions carry the names they have in `csrc/block_math.h`. Each torch operation rounds once and none is fused, so
the order of operations written here is the definition of the result. Also here: `Lion`, the fp32 optimizer to compare
with, and the update rule that the project's original listing defines in prose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lion8bit.layout import (
    BLOCK_SIZES,
    CAUTIOUS,
    COUPLED_DECAY,
    MAXIMIZE,
    MIN_SCALE,
    UNSCALE,
    WEIGHT_ROUNDING,
    Hyper,
    blocks_per_row,
    in_memory_order,
    memory_order,
    rows_and_cols,
    scales_shape,
)
from lion8bit.loading import check_momentum, check_structure, check_tensor, keeping_dtypes, naming, pair
from lion8bit.sharding import local

RANGE_SQUARED = 126.5 * 126.5  # A * A; |A + dither| rounds to at most 127
DITHER_MASK = 0xFF  # the scale's bits that hold the dither
RECIPROCAL_RANGE = float(np.float32(1 / RANGE_SQUARED))
OVERFLOW = 2.0**120  # gradients of this magnitude and above are treated as infinite
MAX_FLOAT = float(np.finfo(np.float32).max)
# Rounding may end a schedule below 0: in double by some 1e-16 of its peak, summed up in fp32 by some 1e-5 of it, which
# is 1e-9 at a peak of 1e-4. No schedule means such a rate: it hardly moves a weight.
ROUNDED_RATE = 1e-9

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


def encode(momentum: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantizes rows: ``s = max|m|`` and ``code = rint(copysign(sqrt(|m| * A*A/s), m) + u)``.

    Args:
        momentum: [rows, cols] fp32.
        block_size: 64, 128 or 256.

    Returns:
        codes [rows, cols] int8 and scales [rows, blocks_per_row] fp32.
    """
    blocks = to_blocks(momentum, block_size)
    magnitudes = blocks.abs()
    scales = largest(magnitudes)
    scales = torch.where(scales < MIN_SCALE, torch.zeros_like(scales), scales)
    # By a tensor: torch divides a number by multiplying with a reciprocal, which rounds twice.
    gain = torch.where(scales == 0, torch.zeros_like(scales), torch.full_like(scales, RANGE_SQUARED) / scales)
    scaled = magnitudes * gain[..., None]
    level = torch.copysign(square_root(scaled), blocks) + dither(scales)[..., None]
    return from_blocks(level.round().to(torch.int8), momentum.shape[1]), scales


def decode(codes: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """The momentum that codes and scales stand for: ``t = code - u; m = t*|t| * (s * 1/(A*A))``; 0 for the code 0.

    Args:
        codes: [rows, cols] int8.
        scales: [rows, blocks_per_row] fp32.
        block_size: the one that `encode` was given.

    Returns:
        [rows, cols] fp32.
    """
    blocks = to_blocks(codes, block_size)
    t = blocks.float() - dither(scales)[..., None]
    value = t * t.abs() * (scales * RECIPROCAL_RANGE)[..., None]
    return from_blocks(torch.where(blocks == 0, torch.zeros_like(value), value), codes.shape[1])


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
        seed: tells parameters apart.
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
        momentum: [rows, cols] int8 codes, or fp32 where ``scales`` is None.
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
    m = momentum if scales is None else decode(momentum, scales, hyper.block_size)
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
            rows, cols = param.shape
            stride = cols if row_stride is None else row_stride
            random = random_bits(
                (rows, cols), seed=seed, step=step, first=first, row_stride=stride, device=param.device
            )
        values = [(to_bfloat16 if param.dtype == torch.bfloat16 else to_float16)(moved, random)]
    if scales is None:
        targets, values = [*targets, momentum], [*values, averaged]
    else:
        new_codes, new_scales = encode(averaged, hyper.block_size)
        decayed = decayed_scale(scales, hyper.beta)
        idle = (steepest == 0) & (decayed >= MIN_SCALE)
        if bool(idle.any()):
            spread = idle.repeat_interleave(hyper.block_size, dim=1)[:, : momentum.shape[1]]
            new_codes = torch.where(spread, momentum, new_codes)
        targets, values = [*targets, momentum, scales], [*values, new_codes, torch.where(idle, decayed, new_scales)]
    return skipped, targets, values


# ---- Public faces of the format -------------------------------------------------------------------------------------


def quantize(momentum: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor to int8 codes with one fp32 scale per block::

        s    = max |m| over the block                 (0 if below 2^-100)
        u    = (low byte of s + 1/2)/256 - 1/2
        code = rint(sign(m) * sqrt(|m| * A*A/s) + u)  A = 126.5

    Blocks run along the memory order of each row, ``momentum[i]``, and do not cross it. A vector is one row. Where rows
    are shorter than a block, all of them are one row.

    Args:
        momentum: any dense shape, floating point; computed in fp32.
        block_size: 64, 128 or 256 elements.

    Returns:
        codes: int8, the shape and strides of ``momentum``.
        scales: fp32, [rows, blocks_per_row], or [blocks] where rows are shorter than a block.

    Raises:
        ValueError: ``momentum`` is not dense, or has values that are not finite or reach 2^127.
        TypeError: ``momentum`` is not of a real floating-point dtype.
    """
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
    codes = torch.empty_like(momentum, dtype=torch.int8)
    shape = [momentum.shape[dim] for dim in order]
    rows = in_memory_order(momentum.float(), order).view(rows_and_cols(shape, block_size))
    row_codes, scales = encode(rows, block_size)
    in_memory_order(codes, order).copy_(row_codes.flatten())
    return codes, scales.view(scales_shape(shape, block_size))


def dequantize(codes: Tensor, scales: Tensor, block_size: int = 128) -> Tensor:
    """Inverse of `quantize`, up to its rounding::

        t = code - u
        m = t*|t| * s/(A*A)          0 for the code 0

    Args:
        codes: int8, dense.
        scales: fp32, of the shape that `quantize` gives. Two dimensions mean that blocks do not cross rows, even where
            these are shorter than a block, as in state of format version 2.
        block_size: the one that the codes were made with.

    Returns:
        fp32, the shape and strides of ``codes``.

    Raises:
        ValueError: the shapes of ``codes`` and ``scales`` do not belong together at this block size.
        TypeError: ``codes`` is not int8 or ``scales`` not fp32.
    """
    check_block_size(block_size)
    if codes.dtype != torch.int8 or scales.dtype != torch.float32:
        raise TypeError(f"codes must be int8 and scales float32, got {codes.dtype} and {scales.dtype}")
    order = memory_order(codes)
    if order is None:
        raise ValueError(f"codes must be dense, got shape {tuple(codes.shape)} with strides {codes.stride()}")
    shape = [codes.shape[dim] for dim in order]
    (rows, cols), expected = rows_and_cols(shape, block_size), scales_shape(shape, block_size)
    if scales.dim() == 2 and len(expected) == 1:
        rows, cols = shape[0], math.prod(shape[1:])
        expected = (rows, blocks_per_row(cols, block_size))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"scales must be {expected} for codes {tuple(codes.shape)} at block_size {block_size}, "
            f"got {tuple(scales.shape)}"
        )
    momentum = torch.empty_like(codes, dtype=torch.float32)
    row_codes = in_memory_order(codes, order).view(rows, cols)
    decoded = decode(row_codes, scales.view(rows, blocks_per_row(cols, block_size)), block_size)
    in_memory_order(momentum, order).copy_(decoded.flatten())
    return momentum


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless the format has this block size."""
    if not is_integer(block_size) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")


def as_number(name: str, value: Any) -> float:
    """The value as a float; ValueError where it is text, a truth value or no number."""
    if type(value) is float:
        return value
    if isinstance(value, str):
        raise ValueError(f"{name} must be a number, got the text {value!r}; YAML reads 1e-4 as text: write 1.0e-4")
    real = not isinstance(value, (bool, np.bool_))
    if isinstance(value, Tensor):
        real = value.is_floating_point() and value.numel() == 1
    try:
        if real:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def is_integer(value: Any) -> bool:
    return type(value) is int or isinstance(value, np.integer)


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless the value is True or False; the text "False" would count as true."""
    if value not in (True, False):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_rates(options: dict[str, Any]) -> float:
    """Raises ValueError unless lr, betas and weight_decay are in their ranges.

    Returns:
        lr as a number; 0 where rounding alone has made it negative.
    """
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    rate = as_number("lr", lr)
    if not -ROUNDED_RATE < rate <= MAX_FLOAT:
        raise ValueError(f"Invalid learning rate: {rate} (lr must be at least 0, and finite in float32)")
    pair = type(betas) is tuple or (isinstance(betas, (Sequence, np.ndarray)) and not isinstance(betas, str))
    if not pair or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0.0 <= as_number(name, beta) < 1.0:
            raise ValueError(f"Invalid {name}: {beta} (it must be in [0, 1))")
    weight_decay = as_number("weight_decay", options["weight_decay"])
    if not 0.0 <= weight_decay <= MAX_FLOAT:
        raise ValueError(f"Invalid weight_decay: {weight_decay} (it must be at least 0, and finite in float32)")
    return rate if rate > 0.0 else 0.0


def check_decay(decay: float, lr: float, weight_decay: float, peak_lr: float | None = None) -> None:
    """Raises ValueError unless the factor on the parameter is in [0, 1]: another one flips or blows up all weights."""
    if not 0.0 <= decay <= 1.0:
        formula, peak = ("lr", "") if peak_lr is None else ("lr/peak_lr", f", peak_lr {peak_lr}")
        raise ValueError(
            f"Invalid weight_decay: {weight_decay} ({formula}*weight_decay must be at most 1, got {1.0 - decay} with "
            f"lr {lr}{peak}; a step multiplies weights by 1 - {formula}*weight_decay)"
        )


# ---- Optimizers to compare with -------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    r"""Lion with fp32 momentum in plain torch: what `Lion8bit` is measured against.

    .. math::
        c &= \beta_1 m + (1-\beta_1) g \\
        p &\leftarrow p\,(1 - \mathrm{lr}\,\lambda) - \mathrm{lr}\,\mathrm{sign}(c) \\
        m &\leftarrow \beta_2 m + (1-\beta_2) g

    Args:
        params: parameters, named parameters or groups of either. Every option below may be set per group.
        lr: step length, in units of the parameters; a float or a tensor of one element.
        betas: (beta1, beta2), each in [0, 1).
        weight_decay: the lambda above, at least 0.
        maximize: ascend.

    Raises:
        ValueError: an option out of its range.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, program 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        check_rates(defaults)
        check_flag("maximize", maximize)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with options of its own; see `torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_rates(options)
            check_flag("maximize", options["maximize"])
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it to every optimizer's, whatever its arguments are
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; ``closure`` re-evaluates the model and returns the loss.

        Raises:
            ValueError: an option out of its range; no parameter has been changed.
            RuntimeError: a gradient is sparse or complex; the parameters before it have been stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = []
        for group in self.param_groups:
            lr = check_rates(group)
            check_flag("maximize", group["maximize"])
            decay = 1 - lr * float(group["weight_decay"])
            check_decay(decay, lr, group["weight_decay"])
            rates.append((lr, decay))
        for group, (lr, decay) in zip(self.param_groups, rates, strict=True):
            beta1, beta2 = map(float, group["betas"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    raise RuntimeError(f"Lion does not support sparse or complex gradients, got {p.grad.layout}")
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                g, m = p.grad.float() * (-1 if group["maximize"] else 1), state["momentum"]
                c = m * beta1 + g * (1 - beta1)
                p.copy_(p.float() * decay - lr * c.sign())
                m.copy_(m * beta2 + g * (1 - beta2))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; the momentum stays in fp32, whatever the parameter's dtype is.

        Raises:
            ValueError: the momentum does not fit its parameter or is not finite, or an option is out of its range;
                nothing has changed.
        """
        with keeping_dtypes(self, ("momentum",), self._loadable):
            super().load_state_dict(state_dict)

    def _loadable(self, incoming: dict[str, Any]) -> dict[str, Any]:
        check_structure(incoming)
        for saved in incoming["param_groups"]:
            check_rates({**self.defaults, **saved})
        for number, param, _saved in pair(self.param_groups, incoming["param_groups"]):
            state = incoming["state"].get(number)
            if state:
                with naming(number, param):
                    check_tensor("momentum", state.get("momentum"))
                    if state["momentum"].shape != param.shape:
                        raise ValueError(
                            f"momentum must have the parameter's shape, got {tuple(state['momentum'].shape)}"
                        )
                    check_momentum(local(state["momentum"]))
        return incoming


def listing_definition(
    grads: Iterable[float], theta: float = 0.0, *, beta1: float, beta2: float, gamma: float, lr: float, eps: float
) -> list[dict[str, float]]:
    """The rule that the project's original listing defines in prose, kept to show that it is not Lion::

        m   = beta1*m + (1-beta1)*g
        n   = gamma*sign(g)*sqrt(|g|^2) + (1-beta2)*sign(g)
        theta <- theta - lr * (m / (1-beta1^t)) / (sqrt(n / (1-beta2^t)) + eps)

    ``n`` has the sign of ``g`` and no memory, so every negative gradient takes the root of a negative number: NaN.

    Returns:
        One record per step with ``m``, ``n``, ``m_hat``, ``n_hat`` and ``theta``.
    """
    m, records = 0.0, []
    for t, g in enumerate(grads, start=1):
        sign = (g > 0) - (g < 0)
        m = beta1 * m + (1 - beta1) * g
        n = gamma * sign * abs(g) + (1 - beta2) * sign
        m_hat, n_hat = m / (1 - beta1**t), n / (1 - beta2**t)
        root = n_hat**0.5 if n_hat >= 0 else float("nan")
        theta = theta - lr * m_hat / (root + eps)
        records.append({"m": m, "n": n, "m_hat": m_hat, "n_hat": n_hat, "theta": theta})
    return records
