"""Owns what a step takes from device memory, so that the host need not wait: rates, GradScaler's tensors, counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lion8bit.loading import step_count


@dataclass(slots=True)
class DeviceRate:
    """The learning rate of a group: ``decay = 1 - lr / divisor * weight_decay`` is formed from it in double."""

    lr: Tensor | None  # [1] fp32 on the batch's device; None where the host knows it
    divisor: float
    weight_decay: float


@dataclass(slots=True)
class _Held:
    state: dict[str, Any]
    place: int
    known: int  # state["step"] when host and device last agreed


class UpdateCounts:
    """Counts updates in device memory, where the device alone knows whether a step takes place.

    ``state["step"]`` is then the count at the last `settle`. Memory is never given back: a CUDA graph that was captured
    with it may run later.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[Tensor] = []  # the last one is in use
        self._held: dict[int, _Held] = {}  # by identity of the state
        self._free: list[int] = []  # places of the last table

    @property
    def table(self) -> Tensor:
        """[places, 2] int64: `struct Counter` of `cuda_kernel.cu`, the update count first."""
        return self._tables[-1]

    def places(self, states: Sequence[dict[str, Any]], live: Collection[dict[str, Any]]) -> list[int]:
        """Where these states are counted; a count that is new, or was set from outside, goes to the device.

        Args:
            states: those that are stepped.
            live: all of the optimizer's, these among them; others are forgotten when new ones come.

        Raises:
            RuntimeError: a count would go to the device in a CUDA graph, and so in each of its replays.
        """
        changed = [state for state in states if not self._agrees(state)]
        if changed:
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the optimizer's state must exist before CUDA graph capture, got parameters without any; "
                    "take one step of the same parameters before the capture"
                )
            self._adopt(changed, live)
        return [self._held[id(state)].place for state in states]

    def forget(self, live: Collection[dict[str, Any]]) -> None:
        """Lets go of states that are not among these, and makes their places free."""
        for key in self._held.keys() - {*map(id, live)}:
            self._free.append(self._held.pop(key).place)

    def settle(self) -> None:
        """Brings ``state["step"]`` up to date; waits for the device."""
        if not self._held:
            return
        counts = self.table[:, 0].tolist()
        for held in self._held.values():
            if self._agrees(held.state):  # or it has been set from outside since
                held.state["step"] = held.known = counts[held.place]

    def _agrees(self, state: dict[str, Any]) -> bool:
        held = self._held.get(id(state))
        return held is not None and held.known == state["step"]

    def _adopt(self, changed: Sequence[dict[str, Any]], live: Collection[dict[str, Any]]) -> None:
        adopted = {id(state): state for state in changed}
        new = len(adopted.keys() - self._held.keys())
        if new > len(self._free) or new + len(self._held) > len(live):  # not for each: it is a pass over all
            self.forget(live)
        if new > len(self._free):
            self.settle()
            self._tables.append(torch.zeros(2 * len(live), 2, dtype=torch.int64, device=self._device))
            self._free = [*reversed(range(len(self.table)))]
            adopted |= {key: held.state for key, held in self._held.items()}
            self._held = {}
        for key, state in adopted.items():
            place = self._held[key].place if key in self._held else self._free.pop()
            state["step"] = step_count(state["step"])
            self._held[key] = _Held(state, place, state["step"])
        places = torch.tensor([self._held[key].place for key in adopted], device=self._device)
        steps = torch.tensor([state["step"] for state in adopted.values()], dtype=torch.int64, device=self._device)
        self.table[:, 0].index_copy_(0, places, steps)


@dataclass(slots=True)
class DeviceScalars:
    """What the device decides in one step of a batch, from tensors of one element on the batch's device."""

    rates: Sequence[DeviceRate]  # by group
    grad_scale: Tensor | None  # fp32: gradients are multiplied with fp32(1 / double(grad_scale))
    found_inf: Tensor | None  # fp32: where it is not 0, nothing is written
    counts: UpdateCounts
