"""The CUDA backend: packs a table into launches of the kernel that `nvrtc` compiles, and launches them.

`cuda.bindings` is imported on first use, so this module can be imported anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import starmap
from typing import Any, Protocol

import numpy as np
import torch

from lion8bit.backends.nvrtc import (
    CACHE_VARIABLE,
    LARGE,
    SMALL,
    Capacity,
    Kernel,
    Tunings,
    architecture,
    check_status,
    image,
    toolchain,
    tunings_for,
)
from lion8bit.device_scalars import DeviceScalars
from lion8bit.layout import Hyper, TensorRow, blocks_per_row
from lion8bit.table import Work

INSTALL = 'pip install "lion8bit[cuda]"'


def install_nvrtc() -> str:
    """The command that installs the NVRTC of PyTorch's CUDA version."""
    version = torch.version.cuda or ""
    return f'pip install "nvidia-cuda-nvrtc{"-cu12" * version.startswith("12.")}=={version}.*"'


class Runner(Protocol):
    """Runs packed launches: the GPU, or what stands in for it in the tests."""

    tunings: Tunings

    def capacity(self, tensors: int) -> Capacity:
        """How many tensors the launches of so many tensors should hold."""

    def run(self, kernel: Kernel, grid: int, launch: ctypes.Structure, done: list[Any]) -> None:
        """Runs the kernel on ``grid`` CUDA blocks, and adds an item to ``done``; ``launch`` may change afterwards."""


# ---- Packing -------------------------------------------------------------------------------------------------------


class DeviceRateRow(ctypes.Structure):
    """`struct DeviceRate` of `cuda_kernel.cu`."""

    _fields_ = [("lr", ctypes.c_void_p), ("divisor", ctypes.c_double), ("weight_decay", ctypes.c_double)]


@cache
def launch_type(capacity: Capacity) -> type[ctypes.Structure]:
    """The ctypes mirror of ``struct Launch`` of `cuda_kernel.cu`."""
    fields = [
        ("nonfinite", ctypes.c_void_p),
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("passes", ctypes.c_int32),
        ("first_tile", ctypes.c_int32 * capacity.tensors),
        ("tensors", TensorRow * capacity.tensors),
        ("hypers", Hyper * capacity.hypers),
        ("rates", DeviceRateRow * capacity.hypers),
    ]
    return type("Launch", (ctypes.Structure,), {"_fields_": fields})


class _Packed:
    """One launch and the rows of the table that it steps."""

    def __init__(self, kernel: Kernel, rows: Sequence[int], passes: Sequence[int], hypers: Sequence[int]) -> None:
        self.kernel = kernel
        self.hypers = sorted(set(hypers))  # indices into the caller's array
        self.rows = np.array(rows)
        self.launch: Any = launch_type(kernel.capacity)()
        self.launch.count = len(rows)
        tuning = kernel.tuning
        self.launch.passes = per_tile = max(1, min(tuning.passes, sum(passes) // tuning.grid))
        self.grid = 0
        for i, amount in enumerate(passes):
            self.launch.first_tile[i] = self.grid
            self.grid += -(-amount // per_tile)
        self.grid = max(1, self.grid)  # which counts the updates of tensors without elements
        self._tensors = np.frombuffer(self.launch.tensors, dtype=np.dtype(TensorRow))[: len(rows)]
        self._local_hypers = np.array([self.hypers.index(hyper) for hyper in hypers], dtype=np.int32)

    def refresh(self, rows: Any, hypers: ctypes.Array[Hyper], nonfinite: int, scalars: DeviceScalars | None) -> None:
        """Updates what changes from step to step."""
        self.launch.nonfinite = nonfinite
        self._tensors[:] = rows[self.rows]
        self._tensors["hyper"] = self._local_hypers
        for i, hyper in enumerate(self.hypers):
            self.launch.hypers[i] = hypers[hyper]
        if scalars is not None:
            self.launch.grad_scale, self.launch.found_inf = _address(scalars.grad_scale), _address(scalars.found_inf)
            self.launch.counters = scalars.counts.data_ptr()
            for i, hyper in enumerate(self.hypers):
                rate = scalars.rates[hyper]
                self.launch.rates[i] = DeviceRateRow(_address(rate.lr), rate.divisor, rate.weight_decay)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pack(rows: Any, hypers: ctypes.Array[Hyper], runner: Runner, on_device: bool) -> list[_Packed]:
    """Sorts tensors by the kernel they need, as many to a launch as it holds.

    Those without elements are left out, unless the device is to count their updates too.
    """
    buckets: dict[tuple[Any, ...], list[tuple[int, int, int]]] = {}
    for index, tensor in enumerate(rows):
        if tensor.rows * tensor.cols == 0 and not on_device:
            continue
        hyper = hypers[tensor.hyper]
        rounding = hyper.weight_rounding if tensor.param_dtype else 0  # fp32 parameters are not rounded
        shape = (tensor.param_dtype, tensor.grad_dtype, tensor.momentum_bits)
        key = (*shape, hyper.block_size, rounding, hyper.flags != 0)
        blocks = tensor.rows * blocks_per_row(tensor.cols, hyper.block_size)
        tuning = runner.tunings.of(tensor.param_dtype)
        passes = -(-blocks * hyper.block_size // (tuning.threads * tuning.per_thread))
        buckets.setdefault(key, []).append((index, passes, tensor.hyper))
    packed = []
    for key, members in buckets.items():
        kernel = Kernel(*key, runner.capacity(len(members)), on_device, runner.tunings.of(key[0]))
        part: list[tuple[int, int, int]] = []
        seen: set[int] = set()
        for member in members:
            seen.add(member[2])
            if len(part) == kernel.capacity.tensors or len(seen) > kernel.capacity.hypers:
                packed.append(_Packed(kernel, *zip(*part)))
                part, seen = [], {member[2]}
            part.append(member)
        packed.append(_Packed(kernel, *zip(*part)))
    return packed


def launches(
    table: Work, hypers: ctypes.Array[Hyper], nonfinite: int, runner: Runner, scalars: DeviceScalars | None = None
) -> list[_Packed]:
    """The launches that step a table, packed again only if more than gradients, steps and constants has changed."""
    on_device = scalars is not None
    options = ((hyper.block_size, hyper.weight_rounding, hyper.flags != 0) for hyper in hypers)
    kinds = (on_device, runner.tunings, *options)
    cached = table.cuda_cache.get(kinds)
    if cached is None:
        table.cuda_cache.clear()
        rows = np.frombuffer(table.rows, dtype=np.dtype(TensorRow)) if len(table.rows) else None
        cached = table.cuda_cache[kinds] = rows, _pack(table.rows, hypers, runner, on_device)
    rows, packed = cached
    for each in packed:
        each.refresh(rows, hypers, nonfinite, scalars)
    return list(packed)


def step_(
    table: Work,
    hypers: ctypes.Array[Hyper],
    counter: torch.Tensor,
    runner: Runner,
    scalars: DeviceScalars | None = None,
) -> None:
    """`update_` on a runner of the caller's choice."""
    for packed in launches(table, hypers, counter.data_ptr(), runner, scalars)[len(table.done) :]:
        runner.run(packed.kernel, packed.grid, packed.launch, table.done)


# ---- Launching -----------------------------------------------------------------------------------------------------


def _driver(returned: tuple[Any, ...], action: str, fix: str = "") -> Any:
    from cuda.bindings import driver

    def name(status: Any) -> str:
        text = driver.cuGetErrorName(status)[1]
        return text.decode() if text else str(status)

    return check_status(returned, action, name, "", fix)


class Device:
    """One GPU: its compiled kernels, and launches on torch's current stream."""

    def __init__(self, index: int) -> None:
        from cuda.bindings import driver

        self._index = index
        _driver(driver.cuInit(0), "cuInit")
        major, minor = torch.cuda.get_device_capability(index)
        self._arch = architecture(10 * major + minor)
        self.tunings = tunings_for(10 * major + minor)
        self._large = toolchain()[0] >= (12, 1) and _driver(driver.cuDriverGetVersion(), "cuDriverGetVersion") >= 12010
        self._functions: dict[Kernel, Any] = {}
        # torch computes in the device's primary context, which a new thread may not have entered yet.
        self._context = _driver(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index)), "cuDevicePrimaryCtxRetain")

    def capacity(self, tensors: int) -> Capacity:
        """The large launch where it is worth its longer parameters and the driver takes it."""
        return LARGE if self._large and tensors > SMALL.tensors else SMALL

    def run(self, kernel: Kernel, grid: int, launch: ctypes.Structure, done: list[Any]) -> None:
        """Launches without synchronising; the driver copies ``launch`` before it returns."""
        from cuda.bindings import driver

        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(launch))
        with torch.cuda.device(self._index):
            function = self.load(kernel)
            stream = torch.cuda.current_stream(self._index).cuda_stream
            address = ctypes.addressof(arguments)
            threads = kernel.tuning.threads
            call = (function, grid, 1, 1, threads, 1, 1, 0, stream, address, 0)
            done.extend(starmap(driver.cuLaunchKernel, [call]))
            if done[-1][0].value != 0:
                _driver(done.pop(), "cuLaunchKernel")

    def load(self, kernel: Kernel) -> Any:
        """The kernel as a function of the driver's, compiled and loaded the first time; the device must be current."""
        from cuda.bindings import driver

        if int(_driver(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")) != int(self._context):
            _driver(driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
        if kernel in self._functions:
            return self._functions[kernel]
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernel for {kernel} must be loaded before CUDA graph capture, got a first step inside of it; "
                "take one step of the same parameters before the capture"
            )
        content = image(kernel, self._arch)
        module = _driver(
            driver.cuModuleLoadData(content),
            f"loading the {self._arch} kernel",
            f"update the NVIDIA driver, or use a PyTorch built for its CUDA version; delete ${CACHE_VARIABLE} if set",
        )
        function = _driver(driver.cuModuleGetFunction(module, b"lion8bit_update"), "cuModuleGetFunction")
        self._functions[kernel] = function
        return function


@cache
def _device(index: int) -> Device:
    return Device(index)


def device_of(table: Work) -> Device:
    """The `Device` that a table lies on."""
    index = table.device.index
    return _device(torch.cuda.current_device() if index is None else index)


@cache
def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None where it can."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, which the CUDA kernel does not support"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError as error:
        return f"cuda-bindings is not installed ({error}); {INSTALL}"
    try:
        toolchain()
    except (RuntimeError, OSError) as error:
        return f"NVRTC cannot be loaded ({error}); {install_nvrtc()}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return None


def update_(
    table: Work, hypers: ctypes.Array[Hyper], counter: torch.Tensor, scalars: DeviceScalars | None = None
) -> None:
    """One Lion step in place for every parameter of the table, on torch's current stream, without synchronisation.

    The first step of each combination of dtypes and options compiles its kernel; CUDA graphs may capture later ones.

    Args:
        table: parameters of one CUDA device.
        hypers: constants of the groups.
        counter: [1] int64 on that device; the number of skipped elements is added to it.
        scalars: what the device decides by itself; None where the host has decided it all.

    Raises:
        RuntimeError: the kernel cannot be compiled, loaded or launched, or would have to be compiled during capture.
    """
    step_(table, hypers, counter, device_of(table), scalars)


def prepare(table: Work, hypers: ctypes.Array[Hyper]) -> None:
    """Compiles and loads the kernels that `update_` needs, so that a CUDA graph may capture a table's first step.

    Raises:
        RuntimeError: as `update_`.
    """
    gpu = device_of(table)
    with torch.cuda.device(table.device):
        for packed in launches(table, hypers, 0, gpu):
            gpu.load(packed.kernel)
