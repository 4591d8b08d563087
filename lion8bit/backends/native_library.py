"""The native CPU library: finding, loading and checking it; Python arithmetic in its floating-point environment."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib import resources
from typing import ParamSpec, TypeVar

from lion8bit.layout import FORMAT_VERSION, Hyper, TensorRow

P = ParamSpec("P")
T = TypeVar("T")


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
    if library.lion8bit_format_version() != FORMAT_VERSION or not _has_these_structs(library):
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


def _has_these_structs(library: ctypes.CDLL) -> bool:
    """Whether the library's structs have the sizes and offsets of their ctypes mirrors in `layout`."""
    expected = [number for struct in (Hyper, TensorRow) for number in layout_of(struct)]
    found = (ctypes.c_int32 * len(expected))()
    try:
        count = library.lion8bit_struct_layouts(found, len(expected))
    except AttributeError:  # an older library
        return False
    return count == len(expected) and [*found] == expected


def layout_of(struct: type[ctypes.Structure]) -> list[int]:
    """The size of a ctypes structure, then the offsets of its fields."""
    return [ctypes.sizeof(struct), *(getattr(struct, field[0]).offset for field in struct._fields_)]


def forget_missing() -> None:
    """Makes the next call search for the library if it was missing: it may have been installed since."""
    if isinstance(load_library(), str):
        load_library.cache_clear()


def _provide_openmp() -> None:
    """Makes OpenMP symbols visible: the library is not linked with a runtime, and must share torch's thread pool.

    torch's wheels contain an OpenMP whose file name differs from release to release, and export its symbols.
    """
    if sys.platform == "linux" and not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)


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
    """The library for calls that take less time than releasing Python's lock."""
    locked = ctypes.PyDLL(library._name, handle=library._handle)
    locked.lion8bit_environment.restype = ctypes.c_uint64
    locked.lion8bit_set_environment.restype = locked.lion8bit_set_default_environment.restype = None
    locked.lion8bit_set_environment.argtypes = [ctypes.c_uint64]
    return locked
