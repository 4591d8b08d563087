"""Owns the CUDA backend: compiling `csrc/cuda_kernel.cu` for the GPU present, packing its launches, launching them.

NVRTC compiles the kernel on first use, one module for each combination of dtypes and options that occurs; images are
kept on disk. CUDA itself is reached through `cuda.bindings`, imported on first use, so this module imports anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import stat
from collections.abc import Sequence
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from lion8bit.device_scalars import DeviceScalars
from lion8bit.files import write_whole
from lion8bit.layout import Hyper, TensorRow, blocks_per_row

SOURCES = ("cuda_kernel.cu", "block_math.h")
CACHE_VARIABLE = "LION8BIT_CACHE_DIR"
NVRTC_ONLY = b"--device-as-default-execution-space"  # or NVRTC 12 and 13.0 take lambdas for functions of the host

INSTALL = 'pip install "lion8bit[cuda]"'


def install_nvrtc() -> str:
    """The command that installs the NVRTC of PyTorch's CUDA version."""
    version = torch.version.cuda or ""
    return f'pip install "nvidia-cuda-nvrtc{"-cu12" * version.startswith("12.")}=={version}.*"'


class Capacity(NamedTuple):
    """How much one launch holds: the kernel's parameters take 4 KB everywhere, and 32 KB since CUDA 12.1."""

    tensors: int
    hypers: int


SMALL = Capacity(tensors=36, hypers=14)
LARGE = Capacity(tensors=362, hypers=32)


class Tuning(NamedTuple):
    """How the kernel accesses memory. It changes times, never bits; `benchmarks/gpu_tune.py` compares choices."""

    threads: int = 256  # of a CUDA block
    per_thread: int = 8  # consecutive elements of a thread: 8 or 16
    resident: int = 4  # CUDA blocks that the registers of a multiprocessor suffice for, see Kernel.resident
    passes: int = 8  # most that a CUDA block makes over threads * per_thread elements
    grid: int = 4096  # CUDA blocks below which a launch has more of them rather than more passes
    load: str = ""  # PTX cache hint of vector loads, such as ".L1::no_allocate"
    store: str = ""  # likewise of stores, such as ".cs"
    ahead: str = "nothing"  # where the next pass's elements are loaded meanwhile: a key of AHEAD

    def macros(self) -> dict[str, int | str]:
        """What `cuda_kernel.cu` is compiled with, by the macros' names."""
        return {
            "THREADS": self.threads,
            "PER_THREAD": self.per_thread,
            "LOAD": f'"{self.load}"',
            "STORE": f'"{self.store}"',
            "AHEAD": AHEAD[self.ahead],
        }


AHEAD = {"nothing": 0, "cache": 1, "registers": 2}  # enum Ahead of cuda_kernel.cu


class Tunings(NamedTuple):
    """The choices for one GPU."""

    fp32: Tuning  # of fp32 parameters
    half: Tuning  # of bf16 and fp16 parameters

    def of(self, param_dtype: int) -> Tuning:
        """The choice for parameters of a dtype, as `Tensor.param_dtype` numbers them."""
        return self.half if param_dtype else self.fp32


# By the oldest compute capability that they are for. That of 90 was measured on an H200 with benchmarks/gpu_tune.py
# (benchmarks/results/gpu-h200-2026-11-27). No GPU has timed the others, which spill no registers (benchmarks/sass.py).
UNTIMED = Tunings(Tuning(), Tuning())
TUNINGS = {
    75: UNTIMED,
    90: Tunings(Tuning(passes=1), Tuning(per_thread=16, resident=3, ahead="cache")),
    120: UNTIMED,
}


def tunings_for(capability: int) -> Tunings:
    """The choices for a GPU.

    Args:
        capability: its compute capability, 90 for 9.0.
    """
    return TUNINGS[max((each for each in TUNINGS if each <= capability), default=min(TUNINGS))]


class Kernel(NamedTuple):
    """What the kernel is compiled for: all that the tensors of one launch have in common."""

    param_dtype: int
    grad_dtype: int
    quantized: bool
    block_size: int
    weight_rounding: int
    general: bool  # some flag of the Hyper is set
    capacity: Capacity
    on_device: bool = False  # rates, GradScaler's tensors and update counts are read from device memory
    tuning: Tuning = Tuning()

    @property
    def resident(self) -> int:
        """The tuning's, or fewer for kernels that need more registers and would spill some."""
        fewer = self.general + (self.general and (self.on_device or self.block_size == 256)) + (not self.quantized)
        return max(1, self.tuning.resident - fewer)

    def macros(self) -> list[str]:
        """The definitions that select this combination in `cuda_kernel.cu`."""
        values: dict[str, int | str] = {
            "PARAM_DTYPE": self.param_dtype,
            "GRAD_DTYPE": self.grad_dtype,
            "QUANTIZED": int(self.quantized),
            "BLOCK_SIZE": self.block_size,
            "WEIGHT_ROUNDING": self.weight_rounding,
            "GENERAL": int(self.general),
            "TENSORS": self.capacity.tensors,
            "HYPERS": self.capacity.hypers,
            "ON_DEVICE": int(self.on_device),
            "RESIDENT": self.resident,
            **self.tuning.macros(),
        }
        return [f"-DLION8BIT_{name}={value}" for name, value in values.items()]


class Batch(Protocol):
    """What this backend needs of `lion8bit.table.Batch`."""

    device: torch.device
    table: Any  # ctypes array of TensorRow; only grad and step change in its lifetime
    cuda_cache: dict[Any, Any]
    done: list[Any]  # see `backend.update_`


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
    """One launch and where in the batch's table its tensors come from."""

    def __init__(self, kernel: Kernel, rows: Sequence[int], passes: Sequence[int], hypers: Sequence[int]) -> None:
        import numpy as np

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

    def refresh(self, table: Any, hypers: ctypes.Array[Hyper], nonfinite: int, control: DeviceScalars | None) -> None:
        """Takes in what changes from step to step."""
        self.launch.nonfinite = nonfinite
        self._tensors[:] = table[self.rows]
        self._tensors["hyper"] = self._local_hypers
        for i, hyper in enumerate(self.hypers):
            self.launch.hypers[i] = hypers[hyper]
        if control is not None:
            self.launch.grad_scale, self.launch.found_inf = _address(control.grad_scale), _address(control.found_inf)
            self.launch.counters = control.counts.table.data_ptr()
            for i, hyper in enumerate(self.hypers):
                rate = control.rates[hyper]
                self.launch.rates[i] = DeviceRateRow(_address(rate.lr), rate.divisor, rate.weight_decay)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pack(table: Any, hypers: ctypes.Array[Hyper], runner: Runner, on_device: bool) -> list[_Packed]:
    """Sorts tensors by the kernel they need, as many to a launch as it holds.

    Those without elements are left out, unless the device is to count their updates too.
    """
    buckets: dict[tuple[Any, ...], list[tuple[int, int, int]]] = {}
    for index, tensor in enumerate(table):
        if tensor.rows * tensor.cols == 0 and not on_device:
            continue
        hyper = hypers[tensor.hyper]
        rounding = hyper.weight_rounding if tensor.param_dtype else 0  # fp32 parameters are not rounded
        shape = (tensor.param_dtype, tensor.grad_dtype, bool(tensor.scales))
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
    batch: Batch, hypers: ctypes.Array[Hyper], nonfinite: int, runner: Runner, control: DeviceScalars | None = None
) -> list[_Packed]:
    """The launches that step a batch, packed anew only where more than gradients, steps and constants have changed."""
    import numpy as np

    on_device = control is not None
    options = ((hyper.block_size, hyper.weight_rounding, hyper.flags != 0) for hyper in hypers)
    kinds = (on_device, runner.tunings, *options)
    cached = batch.cuda_cache.get(kinds)
    if cached is None:
        batch.cuda_cache.clear()
        table = np.frombuffer(batch.table, dtype=np.dtype(TensorRow)) if len(batch.table) else None
        cached = batch.cuda_cache[kinds] = table, _pack(batch.table, hypers, runner, on_device)
    table, packed = cached
    for each in packed:
        each.refresh(table, hypers, nonfinite, control)
    return list(packed)


def step_(
    batch: Batch,
    hypers: ctypes.Array[Hyper],
    counter: torch.Tensor,
    runner: Runner,
    control: DeviceScalars | None = None,
) -> None:
    """`update_` on a runner of the caller's choice."""
    for packed in launches(batch, hypers, counter.data_ptr(), runner, control)[len(batch.done) :]:
        runner.run(packed.kernel, packed.grid, packed.launch, batch.done)


# ---- Compiling -----------------------------------------------------------------------------------------------------


def _succeed(returned: tuple[Any, ...], action: str, name: Any, log: str = "", remedy: str = "") -> Any:
    """The result of a `cuda.bindings` call, without its status; RuntimeError where that is not success."""
    status, *results = returned
    if status.value != 0:
        detail = f"\n{log}" if log else ""
        raise RuntimeError(f"{action} must succeed, got {name(status)}{'; ' + remedy if remedy else ''}{detail}")
    return results[0] if len(results) == 1 else tuple(results)


def _nvrtc(returned: tuple[Any, ...], action: str, log: str = "", remedy: str = "") -> Any:
    from cuda.bindings import nvrtc

    def name(status: Any) -> str:
        return nvrtc.nvrtcGetErrorString(status)[1].decode()  # type: ignore[no-any-return]

    return _succeed(returned, action, name, log, remedy)


def _driver(returned: tuple[Any, ...], action: str, remedy: str = "") -> Any:
    from cuda.bindings import driver

    def name(status: Any) -> str:
        text = driver.cuGetErrorName(status)[1]
        return text.decode() if text else str(status)

    return _succeed(returned, action, name, "", remedy)


@cache
def sources() -> dict[str, bytes]:
    """The kernel's source files by name: from the installed package, or from the checkout that this module lies in.

    Raises:
        RuntimeError: they are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        try:
            return {name: (folder / name).read_bytes() for name in SOURCES}
        except OSError:
            continue
    raise RuntimeError(f"the CUDA kernel's source must lie in {package / 'csrc'}, got none; reinstall lion8bit")


@cache
def toolchain() -> tuple[tuple[int, int], tuple[int, ...]]:
    """NVRTC's version and the architectures that it compiles for, such as 90 for sm_90."""
    from cuda.bindings import nvrtc

    version = _nvrtc(nvrtc.nvrtcVersion(), "nvrtcVersion")
    return version, tuple(sorted(_nvrtc(nvrtc.nvrtcGetSupportedArchs(), "nvrtcGetSupportedArchs")))


def architecture(capability: int) -> str:
    """What to compile for: ``sm_XY`` where NVRTC knows the GPU, else ``compute_XY`` of the newest older one, as PTX.

    Args:
        capability: the GPU's compute capability, 90 for 9.0.

    Raises:
        RuntimeError: the GPU is older than all that NVRTC knows.
    """
    version, known = toolchain()
    if capability in known:
        return f"sm_{capability}"
    older = [each for each in known if each < capability]
    if not older:
        raise RuntimeError(
            f"the GPU's compute capability must be {known[0] / 10:.1f} or newer for NVRTC {version[0]}.{version[1]}, "
            f"got {capability / 10:.1f}; use a PyTorch built for an older CUDA"
        )
    return f"compute_{older[-1]}"


def compile_kernel(kernel: Kernel, arch: str) -> bytes:
    """The image of a kernel for an architecture: a cubin for ``sm_XY``, PTX for ``compute_XY``. Needs no GPU.

    Raises:
        RuntimeError: NVRTC is missing or rejects the source; the message holds its log.
    """
    from cuda.bindings import nvrtc

    text = sources()
    options = [*compile_options(kernel, arch), NVRTC_ONLY]
    program = _nvrtc(
        nvrtc.nvrtcCreateProgram(text[SOURCES[0]], SOURCES[0].encode(), 1, [text[SOURCES[1]]], [SOURCES[1].encode()]),
        "nvrtcCreateProgram",
    )
    try:
        returned = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if returned[0].value != 0:
            log = bytearray(_nvrtc(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize"))
            _nvrtc(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
            action = f"compiling {SOURCES[0]} with {b' '.join(options).decode()}"
            _nvrtc(returned, action, log.rstrip(b"\0").decode(errors="replace"), "report it with the log")
        size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            if arch.startswith("sm_")
            else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        image = bytearray(_nvrtc(size(program), "reading the image's size"))
        _nvrtc(get(program, image), "reading the image")
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compile_options(kernel: Kernel, arch: str) -> list[bytes]:
    """Of every compiler. Contraction stays off: one rounding per operation is what makes results bit-identical."""
    flags = [f"--gpu-architecture={arch}", "--std=c++17", "--fmad=false", *kernel.macros()]
    return [flag.encode() for flag in flags]


def _cache_file(kernel: Kernel, arch: str) -> Path | None:
    digest = hashlib.sha256()
    parts = [*sources().values(), *compile_options(kernel, arch), repr(toolchain()).encode()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    try:
        base = os.environ.get(CACHE_VARIABLE)
        folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lion8bit"
    except RuntimeError:  # no home directory
        return None
    return folder / f"{digest.hexdigest()}.{arch}"


def image(kernel: Kernel, arch: str) -> bytes:
    """`compile_kernel` through a cache on disk, in ``$LION8BIT_CACHE_DIR`` or the user's cache directory.

    A cache that cannot be read or written is as good as none. So is one that other users may write to: an image runs
    on the GPU with this user's rights, and the checksum only finds damage.
    """
    path = _cache_file(kernel, arch)
    if path is not None:
        with contextlib.suppress(OSError):
            stored = _read(path)
            checksum, content = stored[:32], stored[32:]
            if hashlib.sha256(content).digest() == checksum:
                return content
    content = compile_kernel(kernel, arch)
    if path is not None:
        with contextlib.suppress(OSError):
            _write(path, hashlib.sha256(content).digest() + content)
    return content


def _read(path: Path) -> bytes:
    _check_folder(path.parent)
    with path.open("rb") as file:
        _check_owner(path, os.fstat(file.fileno()))
        return file.read()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _check_folder(path.parent)
    write_whole(path, lambda file: file.write(content), 0o644)


def _check_folder(folder: Path) -> None:
    """Raises PermissionError where other users can put files into a folder, or another folder in its place."""
    folder = folder.resolve(strict=True)
    _check_owner(folder, folder.stat())
    for above in folder.parents:
        mode = above.stat().st_mode
        if os.name != "nt" and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"{above} must not be writable for everyone, got mode {mode:o}")


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Raises PermissionError unless a file belongs to this user, or to root, and nobody else may write to it."""
    if os.name == "nt":  # where modes say nothing
        return
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} must be this user's own, got owner {status.st_uid}, mode {status.st_mode:o}")


# ---- Launching -----------------------------------------------------------------------------------------------------


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


def device_of(batch: Batch) -> Device:
    """The `Device` that a batch lies on."""
    index = batch.device.index
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
    batch: Batch, hypers: ctypes.Array[Hyper], counter: torch.Tensor, control: DeviceScalars | None = None
) -> None:
    """One Lion step in place for every parameter of the batch, on torch's current stream, without synchronisation.

    The first step of each combination of dtypes and options compiles its kernel; CUDA graphs may capture later ones.

    Args:
        batch: parameters of one CUDA device.
        hypers: constants of the groups.
        counter: [1] int64 on that device; the number of skipped elements is added to it.
        control: what the device decides by itself; None where the host has decided it all.

    Raises:
        RuntimeError: the kernel cannot be compiled, loaded or launched, or would have to be compiled during capture.
    """
    step_(batch, hypers, counter, device_of(batch), control)


def prepare(batch: Batch, hypers: ctypes.Array[Hyper]) -> None:
    """Compiles and loads the kernels that `update_` needs, so that a CUDA graph may capture a batch's first step.

    Raises:
        RuntimeError: as `update_`.
    """
    gpu = device_of(batch)
    with torch.cuda.device(batch.device):
        for packed in launches(batch, hypers, 0, gpu):
            gpu.load(packed.kernel)
