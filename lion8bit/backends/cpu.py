"""Owns the calls into the native CPU kernel: finding the library, choosing the instruction set, passing the table.

Also here, because it takes the library: Python's own arithmetic in the default floating-point environment.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib import resources
from itertools import starmap
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from lion8bit.layout import FORMAT_VERSION, Hyper

if TYPE_CHECKING:
    from lion8bit.table import Work

P = ParamSpec("P")
T = TypeVar("T")

KERNELS = ("baseline", "avx2", "avx512")  # in the order of kKernels in csrc/cpu_api.cpp
ISA_VARIABLE = "LION8BIT_ISA"


@cache
def load_library() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none."""
    name = "_cpu.dll" if os.name == "nt" else "_cpu.so"
    with resources.as_file(resources.files("lion8bit") / name) as path:
        if not path.exists():
            return f"the wheel was built without a C++ compiler ({name} is missing)"
        try:
            _provide_openmp()
            library = ctypes.CDLL(str(path))
        except OSError as error:
            return f"{name} cannot be loaded: {error}"
    library.lion8bit_format_version.restype = ctypes.c_int32
    if library.lion8bit_format_version() != FORMAT_VERSION:
        return f"{name} belongs to another version of lion8bit; reinstall it"
    library.lion8bit_kernels.restype = ctypes.c_int32
    library.lion8bit_update.restype = ctypes.c_int64
    library.lion8bit_update.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_int32,
    ]
    return library


def forget_missing() -> None:
    """Makes the next call search for the library if it was missing: it may have been installed since."""
    if isinstance(load_library(), str):
        load_library.cache_clear()


def _provide_openmp() -> None:
    """Has OpenMP's functions in sight of a library that is linked with none, so that it takes the threads of torch.

    torch's wheels bring an OpenMP under a name that differs from release to release, and show it to all libraries.
    """
    if sys.platform == "linux" and not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)


def unavailable_reason() -> str | None:
    """Why the native kernel cannot be used here, or None where it can."""
    library = load_library()
    return library if isinstance(library, str) else None


def available_kernels() -> tuple[str, ...]:
    """The instruction sets that this processor can run, the best last; empty without the native library."""
    library = load_library()
    return () if isinstance(library, str) else KERNELS[: library.lion8bit_kernels()]


@cache
def selected_kernel() -> int:
    """Index into `KERNELS`: the best one, or the one that the environment variable LION8BIT_ISA names.

    Raises:
        RuntimeError: the variable names a set that this processor or this build does not have.
    """
    available = available_kernels()
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is None:
        return len(available) - 1
    if wanted not in available:
        raise RuntimeError(f"{ISA_VARIABLE} must be one of {available} on this machine, got {wanted!r}; unset it")
    return available.index(wanted)


def in_default_environment(function: Callable[P, T]) -> Callable[P, T]:
    """The function, computing in the default floating-point environment, as the kernel does.

    It rounds to nearest and keeps subnormal numbers, whatever ``torch.set_flush_denormal`` or ``fesetround`` have set
    on this thread. Without the native library it computes in the caller's environment.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        library = load_library()
        if isinstance(library, str):
            return function(*args, **kwargs)
        locked = _locked(library)
        callers = locked.lion8bit_environment()
        try:
            locked.lion8bit_set_default_environment()
            return function(*args, **kwargs)
        finally:
            locked.lion8bit_set_environment(callers)

    return wrapped


@cache
def _locked(library: ctypes.CDLL) -> ctypes.PyDLL:
    """The library for calls that take less time than giving away Python's lock."""
    locked = ctypes.PyDLL(library._name, handle=library._handle)
    locked.lion8bit_environment.restype = ctypes.c_uint64
    locked.lion8bit_set_environment.restype = locked.lion8bit_set_default_environment.restype = None
    locked.lion8bit_set_environment.argtypes = [ctypes.c_uint64]
    return locked


def update_(batch: Work, hypers: ctypes.Array[Hyper], counter: torch.Tensor, *, kernel: int | None = None) -> None:
    """One Lion step in place for every parameter of the batch, on torch's number of threads; see `backend.update_`.

    Args:
        batch: parameters on the CPU, checked by `make_entry`.
        hypers: constants of the groups.
        counter: [1] int64; the number of skipped elements is added to it.
        kernel: index into `KERNELS` of one that is available; None for `selected_kernel`.

    Raises:
        RuntimeError: the native library is not available.
    """
    library = load_library()
    if isinstance(library, str):
        raise RuntimeError(f"the native CPU kernel is not available: {library}")
    if kernel is None:
        kernel = selected_kernel()
    done = batch.done
    if not done:
        arguments = (batch.table, len(batch.table), hypers, kernel, max(1, torch.get_num_threads()))
        done.extend(starmap(library.lion8bit_update, [arguments]))
    if len(done) == 1 and done[0]:
        done.extend(map(counter.add_, (done[0],)))
