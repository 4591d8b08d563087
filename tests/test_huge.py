"""A tensor of more than 2^31 elements on the CPU: offsets are 64 bits wide in the native kernel."""

from __future__ import annotations

import os
import time

import pytest
import torch
from cases import assert_same

from lion8bit import Lion8bit, reference
from lion8bit.backends import cpu
from lion8bit.options import make_hyper

COLS = 1 << 16
PERIOD = 11  # rows; no divisor of a power of two, so that a wrapped offset meets other values
ROWS = (1 << 15) + 5  # row 2^15 begins at element 2^31
NEEDED_GB = 20
SECONDS = 20


def free_gb() -> float:
    """What the system can give without swapping, in 10^9 bytes; 0 where that is unknown."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e9
    except OSError:
        return 0.0


def pattern(size: float, seed: int) -> torch.Tensor:
    """`PERIOD` random rows of different magnitudes, which the tensor repeats."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(PERIOD, COLS, generator=generator) * 2.0 ** -torch.arange(PERIOD)[:, None]
    return (rows * size).bfloat16()


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native library")
@pytest.mark.skipif(free_gb() < NEEDED_GB, reason=f"needs {NEEDED_GB} GB of free memory, here are {free_gb():.0f}")
def test_more_than_2_to_the_31_elements() -> None:
    """Stochastic rounding, whose counters are 64 bits too: rows at the start, around 2^31 and at the end are right."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        begin = time.perf_counter()
        tiles = [pattern(0.02, 0), pattern(1.0, 1)]
        param, grad = (torch.empty(ROWS, COLS, dtype=torch.bfloat16) for _ in tiles)
        for top in range(0, ROWS, PERIOD):
            for whole, tile in zip((param, grad), tiles, strict=True):
                whole[top : top + PERIOD] = tile[: ROWS - top]
            if time.perf_counter() - begin > SECONDS:
                pytest.skip(f"needs {NEEDED_GB} GB of memory that is faster than 8.6 GB in {SECONDS} s")
        step_and_check(param, grad, tiles, 8)
        for rows in CHECKED:
            param[rows] = tiles[0][torch.arange(rows.start, rows.stop) % PERIOD]
        step_and_check(param, grad, tiles, 4)
    finally:
        torch.set_num_threads(before)


CHECKED = (slice(0, 2), slice(16383, 16386), slice(32766, 32770), slice(ROWS - 2, ROWS))


def step_and_check(param: torch.Tensor, grad: torch.Tensor, tiles: list[torch.Tensor], bits: int) -> None:
    leaf = torch.nn.Parameter(param)
    leaf.grad = grad
    optimizer = Lion8bit([leaf], lr=1e-3, weight_decay=0.1, optim_bits=bits, block_size=128)
    optimizer.step()
    codes, scales = optimizer.state[leaf]["codes"], optimizer.state[leaf]["scales"]
    hyper = make_hyper(lr=1e-3, weight_decay=0.1, weight_rounding="stochastic")
    for rows in CHECKED:
        index = torch.arange(rows.start, rows.stop) % PERIOD
        expected, gradient = (tile[index] for tile in tiles)
        shape = (rows.stop - rows.start, COLS)
        expected_codes, expected_scales = reference.encode(torch.zeros(shape), 128, bits)
        reference.lion_step_(expected, gradient, expected_codes, expected_scales, hyper, seed=0, step=1,
                             first=rows.start * COLS)  # fmt: skip
        assert_same(param[rows], expected, f"param, rows {rows}")
        assert_same(codes[rows], expected_codes, f"codes, rows {rows}")
        assert_same(scales[rows], expected_scales, f"scales, rows {rows}")
