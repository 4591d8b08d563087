"""The formats of momentum that `fidelity.py` compares: how each stores and steps it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lion8bit import Lion8bit, dequantize, reference
from lion8bit.layout import BLOCK_SIZES, packed_shape, rows_and_cols

Map = Callable[[Tensor], Tensor]


def blend(momentum: Tensor, grad: Tensor, beta: float) -> Tensor:
    """``beta*momentum + (1-beta)*grad``: one expression for both of Lion's averages and for every format."""
    return momentum * beta + grad * (1 - beta)


class Store(ABC):
    """One format's momentum of one [rows, cols] tensor, which starts at zero. Codes have the order of their values."""

    codes: Tensor
    scales: Tensor | None = None
    levels = (-127, 127)

    def __init__(self, shape: torch.Size, betas: tuple[float, float]) -> None:
        self.betas = betas
        self.codes, self.scales = self.encode(torch.zeros(shape))

    def encode(self, momentum: Tensor) -> tuple[Tensor, Tensor | None]:
        """[rows, cols] fp32 -> codes of the same shape and scales."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes under the present scales -> [rows, cols] fp32."""

    def step(self, grad: Tensor) -> Tensor:
        """One Lion step on the stored momentum; returns the sign of the update."""
        momentum = self.decode(self.codes)
        sign = blend(momentum, grad, self.betas[0]).sign_()
        self.codes, self.scales = self.encode(blend(momentum, grad, self.betas[1]))
        return sign

    def nbytes(self) -> int:
        """What is kept between steps."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def spacing(self) -> Tensor:
        """Mean distance from the stored values to those of the neighbouring codes."""
        level = self.codes.short()
        below, above = (level - 1).clamp(min=self.levels[0]), (level + 1).clamp(max=self.levels[1])
        return (self.decode(above) - self.decode(below)) / (above - below)


class Float32(Store):
    """fp32, the control: all its figures must be exactly 0."""

    def encode(self, momentum: Tensor) -> tuple[Tensor, None]:
        return momentum, None

    def decode(self, codes: Tensor) -> Tensor:
        return codes

    def spacing(self) -> Tensor:
        return torch.zeros_like(self.codes)


class Ours(Store):
    """This library's optimizer itself. Its parameter starts each step at 0 and becomes minus the sign, as lr is 1."""

    def __init__(self, shape: torch.Size, betas: tuple[float, float], block_size: int, bits: int = 8) -> None:
        self.param = torch.nn.Parameter(torch.zeros(shape))
        options = {"block_size": block_size, "optim_bits": bits, "min_8bit_size": 0}
        self.optimizer = Lion8bit([self.param], lr=1.0, betas=betas, **options)
        self.block_size, self.bits = block_size, bits
        self.levels = {4: (-7, 7), 8: (-127, 127)}[bits]
        self.codes = torch.zeros(shape, dtype=torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        assert self.scales is not None
        codes = codes.to(torch.int8)
        if self.bits == 4:
            rows = codes.view(rows_and_cols(codes.shape, self.block_size))
            stored = reference.packed(rows).view(packed_shape(codes.shape, self.block_size))
            return dequantize(stored, self.scales, self.block_size, codes.shape)
        return dequantize(codes, self.scales, self.block_size)

    def step(self, grad: Tensor) -> Tensor:
        self.param.detach().zero_()
        self.param.grad = grad
        self.optimizer.step()
        state = self.optimizer.state[self.param]
        self.codes, self.scales = state["codes"].clone(), state["scales"]  # the next step writes into the codes
        if self.bits == 4:
            rows, cols = rows_and_cols(self.param.shape, self.block_size)
            self.codes = reference.unpacked(self.codes.view(rows, -1), cols).reshape(self.param.shape)
        return -self.param.detach()

    def nbytes(self) -> int:
        state = self.optimizer.state[self.param]
        return int(state["codes"].nbytes + state["scales"].nbytes)


class FlatBlocks(Store):
    """A format of one map and one absolute maximum per block. Blocks continue from row to row.

    Args:
        compress: [-1, 1] -> [-127, 127], before rounding.
        expand: its inverse.
    """

    def __init__(
        self,
        shape: torch.Size,
        betas: tuple[float, float],
        block_size: int,
        compress: Map,
        expand: Map,
        scale_dtype: torch.dtype = torch.float32,
        bits: int = 8,
    ) -> None:
        self.bits, self.levels = bits, (-7, 7) if bits == 4 else self.levels
        self.block_size, self.compress, self.expand, self.scale_dtype = block_size, compress, expand, scale_dtype
        super().__init__(shape, betas)

    def nbytes(self) -> int:
        assert self.scales is not None
        return self.codes.numel() * self.bits // 8 + self.scales.nbytes

    def encode(self, momentum: Tensor) -> tuple[Tensor, Tensor]:
        blocks = reference.to_blocks(momentum.reshape(1, -1), self.block_size)
        scales = blocks.abs().amax(-1, keepdim=True)
        codes = self.compress((blocks / scales).nan_to_num_(0.0)).round_().to(torch.int8)
        return reference.from_blocks(codes, momentum.numel()).reshape(momentum.shape), scales.to(self.scale_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        assert self.scales is not None
        blocks = reference.to_blocks(codes.reshape(1, -1), self.block_size)
        values = self.expand(blocks.float()).mul_(self.scales.float())
        return reference.from_blocks(values, codes.numel()).reshape(codes.shape)


LINEAR = {"block_size": 128, "compress": lambda x: x * 127, "expand": lambda level: level / 127}
# Source: arXiv 2602.23349, algorithm 2, and the behaviour of flashoptim 0.1.4, `quantize`.
SOFTSIGN = {
    "block_size": 32,
    "compress": lambda x: x * 254 / (1 + x.abs()),
    "expand": lambda level: level / (254 - level.abs()),
    "scale_dtype": torch.float16,  # of the stored scale; codes are made with the exact one
}
NEAREST_ROOT = {  # this library's map without its dither: the error of rounding to nearest by itself
    "block_size": 128,
    "compress": lambda x: torch.copysign(x.abs().sqrt_().mul_(127), x),
    "expand": lambda level: level * level.abs() / 127**2,
}
NEAREST_ROOT_4 = {  # the same with 4 bits
    "block_size": 64,
    "compress": lambda x: torch.copysign(x.abs().sqrt_().mul_(7), x),
    "expand": lambda level: level * level.abs() / 7**2,
    "bits": 4,
}


class BitsAndBytes(Store):
    """bitsandbytes' own functions with the signed dynamic map and the block size of its `Lion8bit`."""

    levels = (0, 255)

    def __init__(self, shape: torch.Size, betas: tuple[float, float], block_size: int) -> None:
        import bitsandbytes.functional

        self.functional = bitsandbytes.functional
        self.map = self.functional.create_dynamic_map(signed=True)
        self.block_size = block_size
        super().__init__(shape, betas)

    def encode(self, momentum: Tensor) -> tuple[Tensor, Tensor]:
        codes, state = self.functional.quantize_blockwise(momentum, code=self.map, blocksize=self.block_size)
        return codes, state.absmax

    def decode(self, codes: Tensor) -> Tensor:
        return self.functional.dequantize_blockwise(
            codes.to(torch.uint8), absmax=self.scales, code=self.map, blocksize=self.block_size
        )


@dataclass(frozen=True)
class Format:
    """One row of the table of formats."""

    label: str
    role: str  # "control", "ours", "peer" or "ablation"
    store: type[Store]
    options: dict[str, Any] = field(default_factory=dict)
    package: str = "torch"


FORMATS: dict[str, Format] = {
    "fp32": Format("fp32", "control", Float32),
    **{
        f"lion8bit-{size}": Format(f"lion8bit, block {size}", "ours", Ours, {"block_size": size})
        for size in BLOCK_SIZES
    },
    "lion4bit": Format("lion8bit, 4 bits, block 64", "ours", Ours, {"block_size": 64, "bits": 4}),
    "bitsandbytes": Format("bitsandbytes, block 256", "peer", BitsAndBytes, {"block_size": 256}, "bitsandbytes"),
    "flashoptim": Format("FlashOptim softsign, block 32", "peer", FlatBlocks, SOFTSIGN),
    "linear": Format("linear int8, block 128", "peer", FlatBlocks, LINEAR),
    "nearest-root": Format("square root, nearest, block 128", "ablation", FlatBlocks, NEAREST_ROOT),
    "nearest-root-4": Format("4 bits, nearest, block 64", "ablation", FlatBlocks, NEAREST_ROOT_4),
}
