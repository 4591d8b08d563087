"""Owns the cases that several test files share: sizes, options, gradients, exact comparison."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lion8bit import reference
from lion8bit.backends import select
from lion8bit.layout import COUPLED_DECAY, DTYPES, UNSCALE, Hyper, TensorRow
from lion8bit.options import make_hyper

PARAM_DTYPES = tuple(DTYPES)

# [rows, cols] around block (64, 128, 256) and vector (4, 8, 16) widths; rows shorter than a block; ragged rows.
SHAPES = (
    (0, 0),
    (1, 1),
    (3, 7),
    (1, 63),
    (2, 64),
    (1, 65),
    (2, 127),
    (3, 128),
    (2, 129),
    (1, 255),
    (2, 256),
    (2, 257),
    (1, 128 * 40 + 37),
    (40, 24),
    (7, 1000),
)

HALF_STEP = {4: 0.5 / 7.0, 8: 0.5 / 126.5}  # of codes by their bits, see docs/numerics.md
MOMENTUM_BITS = (4, 8, 32)
ROUNDING = 16 * 2.0**-24

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "cautious": {"cautious": True},
    "listing": {"momentum_first": True, "decoupled_weight_decay": False, "weight_decay": 0.1},
    "everything": {"maximize": True, "cautious": True, "decoupled_weight_decay": False, "weight_decay": 0.3},
}


def roundings(param_dtype: torch.dtype) -> tuple[str, ...]:
    """Those that make a difference to a parameter of this dtype."""
    if param_dtype == torch.float32:
        return ("nearest",)
    return ("nearest", "stochastic", "compensated") if param_dtype == torch.bfloat16 else ("nearest", "stochastic")


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Fails unless both tensors have equal bits, naming the first differing element and both values."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differs = actual.contiguous().view(width) != expected.contiguous().view(width)
    differs &= ~(actual.isnan() & expected.isnan())  # the bits of a NaN are the hardware's choice
    if differs.any():
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} differ, first at {where}: "
            f"{actual[where].item()!r} != {expected[where].item()!r}"
        )


def assert_same_tree(one: Any, other: Any) -> None:
    """Fails unless both, such as two state dicts, hold equal values and tensors of the same order in memory."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_tree(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.stride() == other.stride()
    else:
        assert one == other


@contextlib.contextmanager
def override_backend(update_: Callable[..., None] | None, decides: bool = False) -> Iterator[None]:
    """Lets `update_` step all parameters; None leaves the usual backend. `decides`: it reads device memory."""
    if update_ is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            stack.enter_context(select.override(device_type, select.Backend("test", update_, decides)))
        yield


def scale_of_each(scales: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """Each element's scale, for codes of this shape that are contiguous."""
    by_row = scales if scales.dim() == 2 else scales[None]
    cols = shape.numel() // max(1, len(by_row))
    return by_row.repeat_interleave(block_size, 1)[:, :cols].reshape(shape)


def error_bound(momentum: torch.Tensor, scales: torch.Tensor, block_size: int, bits: int = 8) -> torch.Tensor:
    """Per element, in double: [rows, cols]."""
    wide = scale_of_each(scales, momentum.shape, block_size).double()
    root = torch.where(wide > 0, momentum.double().abs() / wide, torch.zeros_like(wide)).sqrt()
    half = HALF_STEP[bits]
    return wide * (2 * root * half + half**2 + ROUNDING) + reference.MIN_SCALE * (wide == 0)


def make_gradient(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, bad: bool) -> torch.Tensor:
    """Normal values over many magnitudes with some exact zeros and, if `bad`, some NaN, infinite and huge elements.

    A third of the rows have no more than a short run of other values than zero, so that there are idle blocks.
    """
    grad = torch.randn(shape, generator=generator)
    grad *= 10.0 ** torch.randint(-6, 3, (max(1, shape[0]), 1), generator=generator)[: shape[0]]
    grad[torch.rand(shape, generator=generator) < 0.05] = 0.0
    idle = torch.rand(shape[0], 1, generator=generator) < 1 / 3
    run = torch.arange(shape[1]) // 70 == torch.randint(4, (1,), generator=generator)
    grad[idle & ~run] *= 0.0  # some of them negative zeros
    if bad:
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0**120, -(2.0**127), 2.0**119])
        mask = torch.rand(shape, generator=generator) < 0.03
        grad[mask] = values[torch.randint(len(values), (int(mask.sum()),), generator=generator)]
    return grad.to(dtype)


class RowsState:
    """A [rows, cols] parameter with its state, steppable by the reference, or by a kernel through `descriptor`."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        block_size: int,
        bits: int,
        seed: int,
        rounding: str = "",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.param = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        self.residual: torch.Tensor | None = None
        if rounding == "compensated" and dtype == torch.bfloat16:
            self.residual = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
            self.param[self.residual % 16 == 0] = 0.0  # where it must not be read
        self.scales: torch.Tensor | None = None
        self.bits = bits
        if bits < 32:
            codes, self.scales = reference.encode(torch.zeros(shape), block_size, bits)
            self.momentum = codes.contiguous()
        else:
            self.momentum = torch.zeros(shape)
        self.seed = seed
        cols = shape[1]  # every other one is a part of a larger parameter
        self.first, self.row_stride = ((0, cols), (7, cols), (2**32 - 9, cols + 1), (64, cols + 128))[seed % 4]

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"param": self.param, "momentum": self.momentum, "scales": self.scales, "residual": self.residual}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def reference_step(self, grad: torch.Tensor, hyper: Hyper, step: int) -> int:
        skipped = reference.lion_step_(
            self.param, grad, self.momentum, self.scales, hyper, residual=self.residual, seed=self.seed, step=step,
            first=self.first, row_stride=self.row_stride,
        )  # fmt: skip
        return int(skipped)

    def descriptor(self, grad: torch.Tensor, step: int, hyper: int = 0) -> TensorRow:
        return TensorRow(
            param=self.param.data_ptr(),
            grad=grad.data_ptr(),
            momentum=self.momentum.data_ptr(),
            scales=0 if self.scales is None else self.scales.data_ptr(),
            residual=0 if self.residual is None else self.residual.data_ptr(),
            rows=self.param.shape[0],
            cols=self.param.shape[1],
            first=self.first,
            row_stride=self.row_stride,
            seed=self.seed,
            step=step,
            param_dtype=DTYPES[self.param.dtype],
            grad_dtype=DTYPES[grad.dtype],
            momentum_bits=self.bits,
            hyper=hyper,
        )


def hyper_for(option: str, block_size: int, weight_rounding: str = "nearest", lr: float = 1e-3) -> Hyper:
    return make_hyper(lr=lr, block_size=block_size, weight_rounding=weight_rounding, **OPTIONS[option])


def extreme_hypers(block_size: int, weight_rounding: str) -> list[tuple[str, Hyper]]:
    """Every option with each constant zero, tiny, huge, infinite and NaN in turn, and what that is."""
    made = []
    for option, (name, flag) in itertools.product(
        OPTIONS, (("unscale", UNSCALE), ("coupled_decay", COUPLED_DECAY), ("decay", 0), ("lr", 0))
    ):
        for value in (0.0, 1e-45, 3e38, math.inf, math.nan, -math.inf):
            if name == "lr" and value < 0:
                continue  # no group has it
            hyper = hyper_for(option, block_size, weight_rounding)
            hyper.flags |= flag
            setattr(hyper, name, value)
            made.append((f"{option}, {name} {value}", hyper))
    return made


# ---- Parameters of optimizers ---------------------------------------------------------------------------------------

LAYOUTS = {
    "vector": lambda: torch.randn(5000),
    "matrix": lambda: torch.randn(70, 90),
    "ragged rows": lambda: torch.randn(50, 131),
    "narrow rows": lambda: torch.randn(1700, 3),
    "rows of one element": lambda: torch.randn(5001, 1),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 7),
    "one row": lambda: torch.randn(1, 6000),
    "channels last": lambda: torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last),
    "narrow channels last": lambda: torch.randn(80, 7, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(80, 70).t(),
    "strided": lambda: torch.randn(80, 140)[:, ::2],
    "misaligned": lambda: torch.randn(6001)[1:],
}


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def gradient_like(param: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    for state in optimizer.state.values():
        tensors += [
            value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value) for value in state.values()
        ]
    return tensors


def assert_same_all(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert_same(a, b, f"tensor {index}")


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
