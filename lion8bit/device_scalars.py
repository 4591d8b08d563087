"""Device-resident learning rates, loss scale and update counts, so that the host need not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lion8bit.state import step_count


@dataclass(slots=True)
class DeviceRate:
    """The learning rate of a group: the kernel computes ``decay = 1 - lr / divisor * weight_decay`` in double."""

    lr: Tensor | None  # [1] fp32 on the device; None where the host knows it
    divisor: float
    weight_decay: float


class UpdateCounts:
    """Update counts on one device, for steps where only the device knows whether the update takes place.

    ``state["step"]`` is then an int64 tensor of one element, a view of `table`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[Tensor] = []  # all are kept: a CUDA graph that was captured with an older one may run later
        self._views: list[Tensor] = []  # the counts of the last table
        self._used = 0  # of the last table
        self._index: dict[int, int] = {}  # of each used view, by its id

    @property
    def table(self) -> Tensor:
        """[counts, 2] int64: `struct Counter` of `cuda_kernel.cu`, the update count first."""
        return self._tables[-1]

    def indices(self, states: Sequence[dict[str, Any]], capacity: int) -> list[int]:
        """Where in the table these states are counted; other counts are copied into the table.

        Args:
            states: one for each parameter of a step.
            capacity: how many parameters the optimizer has in all.

        Raises:
            RuntimeError: a count would be copied in a CUDA graph, and so in each of its replays.
            ValueError: a count is not a whole number.
        """
        found = [self._index.get(id(state["step"])) for state in states]
        kept = {index for index in found if index is not None}
        if len(kept) == len(found):
            return [index for index in found if index is not None]
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the optimizer's state must exist before CUDA graph capture, got parameters without any; "
                "take one step of the same parameters before the capture"
            )
        if self._used + len(found) - len(kept) > len(self._views):
            self._add_table(2 * max(capacity, len(states)))
            found = [None] * len(states)
        taken: set[int] = set()
        for index, state in zip(found, states, strict=True):
            # Two states must not share a count.
            taken.add(self._copy_in(state) if index is None or index in taken else index)
        return [self._index[id(state["step"])] for state in states]

    def _add_table(self, size: int) -> None:
        with torch.inference_mode(False):
            self._tables.append(torch.zeros(size, 2, dtype=torch.int64, device=self._device))
            self._views = [*self.table[:, 0].unbind()]
        self._used, self._index = 0, {}

    def _copy_in(self, state: dict[str, Any]) -> int:
        index, step = self._used, state["step"]
        view = self._views[index]
        on_device = isinstance(step, Tensor) and step.device == view.device and step.numel() == 1
        view.copy_(step.view(())) if on_device else view.fill_(step_count(step))
        self._used, self._index[id(view)] = index + 1, index
        state["step"] = view
        return index


def is_device_count(step: Any) -> bool:
    """Whether ``state["step"]`` is a view of a table of `UpdateCounts`."""
    return isinstance(step, Tensor) and step.dtype == torch.int64 and step.dim() == 0 and not step.is_meta


@dataclass(slots=True)
class DeviceScalars:
    """What the kernel reads from device memory in one step: tensors of one element on the table's device."""

    rates: Sequence[DeviceRate]  # by group
    grad_scale: Tensor | None  # fp32: gradients are multiplied with fp32(1 / double(grad_scale))
    found_inf: Tensor | None  # fp32: where it is not 0, nothing is written
    counts: Tensor  # `UpdateCounts.table`
