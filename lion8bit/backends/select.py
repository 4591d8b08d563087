"""Owns the choice of a backend: one `update_` that sends a batch to the kernel of its device."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch

from lion8bit.backends import cpu, portable
from lion8bit.device_scalars import DeviceScalars
from lion8bit.layout import Hyper
from lion8bit.table import Work

Update = Callable[..., None]


class SlowBackendWarning(UserWarning):
    """Says once per kind of device that a fallback costs speed; results stay the same."""


def update_(
    batch: Work, hypers: ctypes.Array[Hyper], counter: torch.Tensor, control: DeviceScalars | None = None
) -> None:
    """One Lion step in place for every parameter of the batch, by the backend of its device.

    ``batch.done`` has an item for each part of the step that has been applied, so a call that was interrupted can be
    made again and goes on with the next part. Python runs signal handlers, Ctrl-C's too, between two instructions of
    its own. There are none between a part and its item, because both happen inside of one `list.extend`.

    Args:
        batch: parameters of one device.
        hypers: constants of the groups.
        counter: [1] int64 on that device; the number of skipped elements is added to it.
        control: what the device decides by itself, where it `decides`; None where the host has decided it all.
    """
    update = select(batch.device.type)[1]
    if control is None:
        update(batch, hypers, counter)
    else:
        update(batch, hypers, counter, control)


def decides(device_type: str) -> bool:
    """Whether the kernel for such devices can read what it needs from their memory, so that the host need not wait."""
    return select(device_type)[0] == "cuda"


_missing: dict[str, str] = {}  # why, by type of device, as last warned of


def forget_missing() -> None:
    """Makes the next step search for backends that were missing; called by each new optimizer."""
    if _missing:
        cpu.forget_missing()
        select.cache_clear()


@cache
def select(device_type: str) -> tuple[str, Update]:
    """The backend for a type of device: its name ("cpu", "cuda" or "portable") and its `update_`.

    Warns `SlowBackendWarning` where the fast one is missing, once for each reason.
    """
    reason: str | None = None
    if device_type == "cpu":
        reason = cpu.unavailable_reason()
        if reason is None:
            return "cpu", cpu.update_
    elif device_type == "cuda":
        from lion8bit.backends import cuda

        reason = cuda.unavailable_reason()
        if reason is None:
            return "cuda", cuda.update_
    if reason is not None and _missing.get(device_type) != reason:
        _missing[device_type] = reason
        what = f"lion8bit steps on {device_type} in plain torch, which is slow: {reason}"
        warnings.warn(f"{what}; `lion8bit doctor` tells what to do", SlowBackendWarning, stacklevel=_outside())
    return "portable", portable.update_


def _outside() -> int:
    """The ``stacklevel`` in the caller of the first frame that is neither this package's nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("lion8bit", "torch"):
        level, frame = level + 1, frame.f_back
    return level
