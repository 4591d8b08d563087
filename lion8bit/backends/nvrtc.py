"""Compiles `csrc/cuda_kernel.cu` with NVRTC for one combination of dtypes and options, and caches images on disk.

`cuda.bindings` is imported on first use, so this module can be imported anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lion8bit.backends.native_library import BackendError
from lion8bit.files import write_whole

SOURCES = ("cuda_kernel.cu", "block_math.h")
CACHE_VARIABLE = "LION8BIT_CACHE_DIR"
NVRTC_ONLY = b"--device-as-default-execution-space"  # or NVRTC 12 and 13.0 take lambdas for functions of the host


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
    momentum_bits: int
    block_size: int
    weight_rounding: int
    general: bool  # some flag of the Hyper is set
    capacity: Capacity
    on_device: bool = False  # rates, GradScaler's tensors and update counts are read from device memory
    tuning: Tuning = Tuning()

    @property
    def resident(self) -> int:
        """The tuning's, or fewer for kernels that need more registers and would spill some."""
        fewer = (
            self.general + (self.general and (self.on_device or self.block_size == 256)) + (self.momentum_bits == 32)
        )
        return max(1, self.tuning.resident - fewer)

    def macros(self) -> list[str]:
        """The definitions that select this combination in `cuda_kernel.cu`."""
        values: dict[str, int | str] = {
            "PARAM_DTYPE": self.param_dtype,
            "GRAD_DTYPE": self.grad_dtype,
            "MOMENTUM_BITS": self.momentum_bits,
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


# ---- Compiling -----------------------------------------------------------------------------------------------------


def check_status(returned: tuple[Any, ...], action: str, name: Any, log: str = "", fix: str = "") -> Any:
    """The result of a `cuda.bindings` call, without its status; BackendError if that is not success."""
    status, *results = returned
    if status.value != 0:
        raise BackendError(f"{action} must succeed, got {name(status)}", fix, log)
    return results[0] if len(results) == 1 else tuple(results)


def _nvrtc(returned: tuple[Any, ...], action: str, log: str = "", fix: str = "") -> Any:
    from cuda.bindings import nvrtc

    def name(status: Any) -> str:
        return nvrtc.nvrtcGetErrorString(status)[1].decode()  # type: ignore[no-any-return]

    return check_status(returned, action, name, log, fix)


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
    raise BackendError(f"the CUDA kernel's source must be in {package / 'csrc'}, got none", "reinstall lion8bit")


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
        raise BackendError(
            f"the GPU's compute capability must be {known[0] / 10:.1f} or newer for NVRTC {version[0]}.{version[1]}, "
            f"got {capability / 10:.1f}",
            "use a PyTorch built for an older CUDA",
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
