"""The choice of a backend by type of device, and the one `update_` that every step calls."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from lion8bit.backends import cpu, native_library, portable
from lion8bit.device_scalars import DeviceScalars
from lion8bit.layout import Hyper
from lion8bit.table import Work


class Backend(NamedTuple):
    """A way to compute steps."""

    name: str  # "cpu", "cuda" or "portable"
    update_: Callable[..., None]
    reads_device_memory: bool = False  # the kernel takes rates, loss scale and update counts from `DeviceScalars`


class SlowBackendWarning(UserWarning):
    """Warns once per type of device that a fallback costs speed; results stay the same."""


def update_(
    table: Work, hypers: ctypes.Array[Hyper], counter: torch.Tensor, scalars: DeviceScalars | None = None
) -> None:
    """One Lion step in place for every parameter of the table, by the backend of its device.

    ``table.done`` has an item for each part of the step that has been applied, so a call that was interrupted can be
    repeated and continues with the next part. Python runs signal handlers, including Ctrl-C's, between two of
    its instructions. There are none between a part and its item, because both happen inside one `list.extend`.

    Args:
        table: parameters of one device.
        hypers: constants of the groups.
        counter: [1] int64 on that device; the number of skipped elements is added to it.
        scalars: what the kernel reads from device memory; None where the host has read all of it.
    """
    update = select(table.device.type).update_
    if scalars is None:
        update(table, hypers, counter)
    else:
        update(table, hypers, counter, scalars)


def reads_device_memory(device: torch.device) -> bool:
    """Whether the kernel for this device can read rates and counts there, so that the host need not wait."""
    return select(device.type).reads_device_memory


_overrides: dict[str, Backend] = {}
_missing: dict[str, str] = {}  # the last reason that was warned of, by type of device


@contextmanager
def override(device_type: str, backend: Backend) -> Iterator[None]:
    """Within this context, devices of a type have the given backend: for tests and comparisons."""
    before = dict(_overrides)
    _overrides[device_type] = backend
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def select(device_type: str) -> Backend:
    """The backend for a type of device.

    Warns `SlowBackendWarning` where the fast one is missing, once for each reason.
    """
    return _overrides.get(device_type) or _fastest(device_type)


@cache
def _fastest(device_type: str) -> Backend:
    reason: object = None
    if device_type == "cpu":
        reason = cpu.unavailable_reason()
        if reason is None:
            return Backend("cpu", cpu.update_)
    elif device_type == "cuda":
        from lion8bit.backends import cuda

        reason = cuda.unavailable_reason()
        if reason is None:
            return Backend("cuda", cuda.update_, reads_device_memory=True)
    if reason is not None and _missing.get(device_type) != str(reason):
        _missing[device_type] = str(reason)
        what = f"lion8bit steps on {device_type} in plain torch, which is slow: {reason}"
        warnings.warn(f"{what}; run `lion8bit doctor`", SlowBackendWarning, stacklevel=_outside())
    return Backend("portable", portable.update_)


def forget_missing() -> None:
    """Makes the next step search for backends that were missing; called by each new optimizer."""
    if _missing:
        native_library.forget_missing()
        _fastest.cache_clear()


def _outside() -> int:
    """The ``stacklevel`` in the caller of the first frame that is neither this package's nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("lion8bit", "torch"):
        level, frame = level + 1, frame.f_back
    return level
