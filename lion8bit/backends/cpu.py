"""The CPU backend: the choice of instruction set, and calls into the native kernel."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from itertools import starmap

import torch

from lion8bit.backends.native_library import BackendError, load_library
from lion8bit.layout import Hyper
from lion8bit.table import Work

KERNELS = ("baseline", "avx2", "avx512")  # in the order of kKernels in csrc/cpu_api.cpp
ISA_VARIABLE = "LION8BIT_ISA"


def unavailable_reason() -> BackendError | None:
    """Why the native kernel cannot be used here, or None where it can."""
    library = load_library()
    return library if isinstance(library, BackendError) else None


def available_kernels() -> tuple[str, ...]:
    """The instruction sets that this processor can run, the best last; empty without the native library."""
    library = load_library()
    return () if isinstance(library, BackendError) else KERNELS[: library.lion8bit_kernels()]


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


def update_(table: Work, hypers: ctypes.Array[Hyper], counter: torch.Tensor, *, kernel: int | None = None) -> None:
    """One Lion step in place for every parameter of the table, on torch's number of threads; see `select.update_`.

    Args:
        table: parameters on the CPU, checked by `make_entry`.
        hypers: constants of the groups.
        counter: [1] int64; the number of skipped elements is added to it.
        kernel: index into `KERNELS` of one that is available; None for `selected_kernel`.

    Raises:
        RuntimeError: the native library is not available.
    """
    library = load_library()
    if isinstance(library, BackendError):
        raise BackendError(f"the native CPU kernel is not available: {library.problem}", library.fix)
    if kernel is None:
        kernel = selected_kernel()
    done = table.done
    if not done:
        arguments = (table.rows, len(table.rows), hypers, kernel, max(1, torch.get_num_threads()))
        done.extend(starmap(library.lion8bit_update, [arguments]))
    if len(done) == 1 and done[0]:
        done.extend(map(counter.add_, (done[0],)))
