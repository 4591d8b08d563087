"""The CUDA kernel on the emulator: how it is built, and steps beside the reference's."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    PARAM_DTYPES,
    SHAPES,
    RowsState,
    assert_same,
    make_gradient,
    roundings,
)
from filelock import FileLock

from lion8bit.backends import cuda, nvrtc
from lion8bit.layout import Hyper, TensorRow
from lion8bit.table import hyper_array

EMULATOR = Path(__file__).parent / "emulator"
CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = [*sorted(EMULATOR.iterdir()), *(CSRC / name for name in (*nvrtc.SOURCES, "export.h"))]
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++17", "-Og", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wno-unknown-pragmas", "-fvisibility=hidden"]  # one process loads several of these libraries
EMULATOR_UNITS = (0, 1, 2, 3)  # one for each dtype of parameters, and one for the functions that tests call
DEFAULT = nvrtc.Tuning()
SANITIZE = ["-O0", "-g1", "-DEMULATE_FEW", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE += ["-fno-sanitize=null,object-size"]  # much of the compiler's time; the address sanitizer reports null too

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="compiling needs cuda-bindings and nvidia-cuda-nvrtc",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ERRORS = {1: "lanes diverged at a warp-wide operation", 2: "lane outside of its own mask", 3: "barrier", 4: "no kernel"}


@dataclass
class Batch:
    """What `cuda.step_` needs of the optimizer's batches."""

    device: torch.device
    rows: Any
    cuda_cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def done(self) -> list[Any]:
        return []  # each step is a whole one


@dataclass
class Emulated:
    """Runs launches on the emulator; keeps the number of tensors and CUDA blocks of each."""

    library: ctypes.CDLL  # built for `tuning`
    order: int = 0  # in which threads go on: 0 ascending, 1 descending, else shuffled
    large: bool = False
    first: int = 0  # CUDA block to begin with
    tuning: nvrtc.Tuning = DEFAULT
    log: list[tuple[nvrtc.Kernel, int, int]] = field(default_factory=list)

    @property
    def tunings(self) -> nvrtc.Tunings:
        return nvrtc.Tunings(self.tuning, self.tuning)

    def capacity(self, tensors: int) -> nvrtc.Capacity:
        return nvrtc.LARGE if self.large else nvrtc.SMALL

    def run(self, kernel: nvrtc.Kernel, grid: int, launch: ctypes.Structure, done: list[Any]) -> None:
        self.log.append((kernel, launch.count, grid))  # type: ignore[attr-defined]
        assert ctypes.sizeof(launch) == self.library.launch_bytes(int(self.large))
        if self.large:
            error = self.library.emulate_large(ctypes.c_int64(grid), ctypes.byref(launch))
        else:
            first, last = ctypes.c_int64(self.first), ctypes.c_int64(grid)
            error = self.library.emulate(
                *map(int, kernel[:6]), int(kernel.on_device), self.order, first, last, ctypes.byref(launch)
            )
        if error:
            raise RuntimeError(f"the emulator reports: {ERRORS.get(error, error)}")
        done.append(grid)


def defined(tuning: nvrtc.Tuning) -> list[str]:
    """The macros of a tuning for the compiler."""
    return [f"-DLION8BIT_{name}={value}" for name, value in tuning.macros().items()]


def compile_once(
    folder: Path, name: str, units: Sequence[Sequence[str]], link: Sequence[str], inputs: Iterable[Path]
) -> Path:
    """A program or library of several units, each a source with its flags; kept in the folder while nothing changes.

    Units are compiled in parallel. The name of the result has a hash of the commands and of all `inputs`. Processes
    that ask for the same one at once wait for the first of them.
    """
    digest = hashlib.sha256(repr((COMPILER, units, link)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = folder / f"{name}-{digest.hexdigest()[:16]}"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                objects = [f"{work}/{number}.o" for number in range(len(units))]
                compiling = [["-c", *unit, "-o", object_] for unit, object_ in zip(units, objects, strict=True)]
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(run_compiler, compiling))
                run_compiler([*objects, *link, "-o", f"{work}/linked"])
                Path(f"{work}/linked").rename(target)
    return target


def run_compiler(arguments: Sequence[str]) -> None:
    done = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def build_emulator(folder: Path, tuning: nvrtc.Tuning = DEFAULT) -> ctypes.CDLL:
    """The kernel on the emulator; for other tunings than the default without what EMULATE_VARIANT leaves out."""
    source, flags = str(EMULATOR / "emulated_kernel.cpp"), [*FLAGS, *defined(tuning)]
    units = [[source, *flags, "-DEMULATE_VARIANT"]]
    if tuning == DEFAULT:
        units = [[source, *flags, f"-DEMULATE_UNIT={number}"] for number in EMULATOR_UNITS]
    return ctypes.CDLL(str(compile_once(folder, "emulated_kernel", units, ["-shared"], SOURCES)))


def shifted(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy whose memory begins that many elements beyond an aligned address."""
    storage = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    return storage[elements:].view(tensor.shape).copy_(tensor)


class Pair:
    """One parameter twice: for the kernel, on its device, and for the reference."""

    def __init__(
        self, shape: tuple[int, int], param_dtype: torch.dtype, grad_dtype: torch.dtype, block_size: int, *,
        bits: int = 8, hyper: int = 0, seed: int = 0, shifts: tuple[int, int, int] = (0, 0, 0),
        device: str = "cpu", bad: bool = True, rounding: str = "",
    ) -> None:  # fmt: skip
        self.expected, self.actual = (RowsState(shape, param_dtype, block_size, bits, seed, rounding) for _ in range(2))
        self.actual.param = shifted(self.actual.param.to(device), shifts[0])
        self.actual.momentum = shifted(self.actual.momentum.to(device), shifts[1])
        if self.actual.scales is not None:
            self.actual.scales = self.actual.scales.to(device)
        if self.actual.residual is not None:
            self.actual.residual = shifted(self.actual.residual.to(device), shifts[1])
        self.grad_dtype, self.grad_shift, self.hyper, self.bad = grad_dtype, shifts[2], hyper, bad
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.device, self.steps, self.skipped = device, 0, 0
        self.next_grad()

    def next_grad(self) -> None:
        grad = make_gradient(tuple(self.expected.param.shape), self.grad_dtype, self.generator, self.bad)  # type: ignore[arg-type]
        self.expected_grad, self.grad = grad, shifted(grad.to(self.device), self.grad_shift)

    def row(self) -> TensorRow:
        return self.actual.descriptor(self.grad, self.steps, self.hyper)


def run_steps(
    pairs: Sequence[Pair], hypers: Sequence[Hyper], step_: Callable[[Batch, Any, torch.Tensor], None], steps: int = 3
) -> None:
    """Steps all pairs both ways through one batch and compares every bit of them and the counts of skipped elements."""
    device = torch.device(pairs[0].device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    batch = Batch(device, (TensorRow * len(pairs))())
    for _ in range(steps):
        for i, pair in enumerate(pairs):
            pair.next_grad()
            pair.steps += 1
            batch.rows[i] = pair.row()
            pair.skipped += pair.expected.reference_step(pair.expected_grad, hypers[pair.hyper], pair.steps)
        step_(batch, hyper_array(hypers), counter)
    for i, pair in enumerate(pairs):
        for name, tensor in pair.actual.tensors().items():
            what = f"tensor {i} {tuple(pair.actual.param.shape)} {name} after {steps} steps"
            assert_same(tensor.cpu(), pair.expected.tensors()[name], what)
    assert int(counter) == sum(pair.skipped for pair in pairs)


def on(runner: cuda.Runner) -> Callable[[Batch, Any, torch.Tensor], None]:
    return lambda batch, hypers, counter: cuda.step_(batch, hypers, counter, runner)


ALIGNED, BY_ONE = (0, 0, 0), (1, 1, 1)
SHIFTS = (ALIGNED, BY_ONE, (1, 0, 0), (0, 1, 0), (0, 0, 1), (8, 8, 8))
LONG_SHAPES = (*SHAPES, (1, 2048), (1, 6007), (5, 2 * 256 + 24), (300, 12), (33, 136))


def many_pairs(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, block_size: int, rounding: str = "", device: str = "cpu"
) -> list[Pair]:
    """Every shape with momentum of 8, 4 and 32 bits, with pointers aligned in every way, for two hypers."""
    shifts = itertools.cycle(SHIFTS)
    return [
        Pair(shape, param_dtype, grad_dtype, block_size, bits=bits, hyper=i % 2, seed=17 * i,
             shifts=next(shifts), rounding=rounding, device=device)
        for i, (shape, bits) in enumerate(itertools.product(LONG_SHAPES, (8, 4, 8, 4, 32)))
    ]  # fmt: skip


COMBINATIONS = [
    (param, grad, rounding)
    for param, grad in itertools.product(PARAM_DTYPES, PARAM_DTYPES)
    for rounding in roundings(param)
]
