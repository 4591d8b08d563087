"""Paging: state in host memory is streamed through a small buffer on the device and back.

Each slot of the buffer holds a load: segments of state, of whole blocks. While the kernel updates one slot, the next
loads are copied in and the last ones back, on separate CUDA streams. Without streams the same happens in turn.
"""

from __future__ import annotations

import _thread
import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lion8bit.layout import Hyper, TensorRow, blocks_per_row, bytes_per_row, in_memory_order
from lion8bit.table import DeviceTable, Entry

SLOTS = 3  # one comes in, one is updated, one goes back
SLOT_BYTES = 16 << 20
BUFFER_BYTES = SLOTS * SLOT_BYTES

_ALIGNMENT = 16  # bytes: what the kernels' widest access to state asks for
_UNCOUNTED = np.uint32(1 << 31)  # kUncounted of cuda_kernel.cu


def in_thread(work: Callable[[], None], device: torch.device) -> None:
    """Runs work in another thread, on the present stream of a device, and waits for it, whatever interrupts the wait.

    Raises:
        BaseException: what the work raised, or what the caller was interrupted by.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        work()
        return
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    started: list[int] = []
    ended = threading.Event()
    failures: list[BaseException] = []

    def body() -> None:
        try:
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                work()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    interrupt: BaseException | None = None
    while not ended.is_set():
        try:
            if not started:
                started.extend(starmap(_thread.start_new_thread, [(body, ())]))
            ended.wait()
        except BaseException as error:
            if not started:
                raise
            interrupt = error
    if failures:
        raise failures[0]
    if interrupt is not None:
        raise interrupt


# ---- Queues of work --------------------------------------------------------------------------------------------------


class HostQueue:
    """Work that is done in order, here at once. `StreamQueue` does it beside the work of other queues."""

    def run(self, work: Callable[[], None]) -> None:
        """Adds work. Its copies may still be running when this returns."""
        work()

    def record(self, event: Any) -> None:
        """Sets the event to mark the end of all work that has been added so far."""

    def wait(self, event: Any) -> None:
        """Work that is added from now on waits for the event; an event that was never recorded marks nothing."""

    def finish(self) -> None:
        """Waits for all work."""


class StreamQueue(HostQueue):
    """A CUDA stream; None means the one that is current when work is added."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._given = device, stream

    @property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if self._given is None else self._given

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._given):  # None changes nothing
            work()

    def record(self, event: torch.cuda.Event) -> None:
        event.record(self._stream)

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)

    def finish(self) -> None:
        self._stream.synchronize()


def queues(device: torch.device, buffer: Tensor) -> tuple[HostQueue, HostQueue, HostQueue, Callable[[], Any]]:
    """The queues for a device, for copies in, updates and copies out; and the type of their events."""
    if device.type != "cuda":
        return HostQueue(), HostQueue(), HostQueue(), object
    inward, outward = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    for stream in (inward, outward):
        buffer.record_stream(stream)  # so that its memory is not given away before their copies are done
        stream.wait_stream(torch.cuda.current_stream(device))  # which may still work on the memory's last owner
    return (
        StreamQueue(device, inward),
        StreamQueue(device, None),
        StreamQueue(device, outward),
        torch.cuda.Event,
    )


# ---- Cutting state into loads ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """Whole blocks of one entry: whole rows, or a part of one row."""

    entry: int  # index into the table
    start: int  # first element
    rows: int
    cols: int
    first_block: int  # of the entry's blocks
    blocks: int
    last: bool  # no segment of this entry follows


def cut(
    shapes: Sequence[tuple[int, int]], block_sizes: Sequence[int], block_bytes: Sequence[int]
) -> list[list[Segment]]:
    """Cuts entries into segments and deals these out to loads of at most `SLOT_BYTES`, in order.

    Args:
        shapes: [rows, cols] of each entry.
        block_sizes: elements per block of each.
        block_bytes: bytes of state that a whole block has.

    Returns:
        The segments of each load.
    """
    loads: list[list[Segment]] = [[]]
    left = SLOT_BYTES
    for index, ((rows, cols), block_size, bytes_) in enumerate(zip(shapes, block_sizes, block_bytes, strict=True)):
        if cols % block_size == 0:  # blocks run on from row to row
            rows, cols = 1, rows * cols
        per_row = blocks_per_row(cols, block_size)
        block, blocks = 0, rows * per_row
        while block < blocks:
            room = (left - 3 * _ALIGNMENT) // bytes_
            if room < 1:
                loads.append([])
                left = SLOT_BYTES
                continue
            row, in_row = divmod(block, per_row)
            if in_row == 0 and room >= per_row:
                tall = min(room // per_row, rows - row)
                wide, taken = cols, tall * per_row
            else:
                tall, taken = 1, min(room, per_row - in_row)
                wide = min(taken * block_size, cols - in_row * block_size)
            start = row * cols + in_row * block_size
            loads[-1].append(Segment(index, start, tall, wide, block, taken, block + taken == blocks))
            block += taken
            left -= taken * bytes_ + 3 * _ALIGNMENT
    return loads


class Load:
    """The segments that one slot holds at a time; for backends, a table whose state is in the slot."""

    def __init__(
        self, table: DeviceTable, segments: Sequence[Segment], place: int, slot: Tensor, memory: frozenset[int]
    ) -> None:
        self.device = table.device
        self.place = place  # which slot
        self.memory = memory  # storages that this and the other loads of the table are copied from
        self.first = False  # of its table
        self.rows = (TensorRow * len(segments))()
        self.cuda_cache: dict[Any, Any] = {}
        self.entries: list[Entry] = []
        self._owner, self._segments = table, segments
        self._copies: list[tuple[Tensor, Tensor]] = []  # host, slot
        self._taken = 0
        self.done: list[Any] = []
        for number, segment in enumerate(segments):
            whole = table.entries[segment.entry]
            elements = slice(segment.start, segment.start + segment.rows * segment.cols)
            blocks = slice(segment.first_block, segment.first_block + segment.blocks)
            shape = (segment.rows, segment.cols)
            param = _flat(whole.param, whole)[elements].view(shape)
            if whole.momentum_bits == 4:
                above, left = divmod(segment.start, whole.cols)
                start, wide = above * bytes_per_row(whole.cols, 4) + left // 2, bytes_per_row(segment.cols, 4)
                codes = whole.momentum.view(-1)[start : start + segment.rows * wide]
                momentum = self._copied_to(codes, slot).view(segment.rows, wide)
            else:
                momentum = self._copied_to(_flat(whole.momentum, whole)[elements], slot).view(shape)
            residual = scales = None
            if whole.residual is not None:
                residual = self._copied_to(_flat(whole.residual, whole)[elements], slot).view(shape)
            if whole.scales is not None:
                scales = self._copied_to(whole.scales.view(-1)[blocks], slot).view(segment.rows, -1)
            first = whole.first + segment.start
            entry = replace(
                whole,
                param=param,
                momentum=momentum,
                scales=scales,
                residual=residual,
                order=(0, 1),
                rows=segment.rows,
                cols=segment.cols,
                first=first,
            )
            self.entries.append(entry)
            self.rows[number] = table.rows[segment.entry]
            row = self.rows[number]
            row.param, row.momentum = param.data_ptr(), momentum.data_ptr()
            row.scales = 0 if scales is None else scales.data_ptr()
            row.residual = 0 if residual is None else residual.data_ptr()
            row.rows, row.cols, row.first = segment.rows, segment.cols, first & 0xFFFFFFFF
        self._columns = np.frombuffer(memoryview(self.rows).cast("B"), dtype=np.dtype(TensorRow))
        self._rows = np.array([segment.entry for segment in segments])
        sizes = np.array([table.grads[segment.entry].element_size() for segment in segments])
        self._offsets = (np.array([segment.start for segment in segments]) * sizes).astype(np.uint64)
        self._unfinished = np.array([not segment.last for segment in segments]).astype(np.uint32) * _UNCOUNTED

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the segments."""
        grads, entries = self._owner.grads, self._owner.entries
        return [
            _flat(grads[p.entry], entries[p.entry])[p.start : p.start + p.rows * p.cols].view(p.rows, p.cols)
            for p in self._segments
        ]

    def refresh(self, on_device: bool) -> None:
        """Updates what changes from step to step; ``on_device``: update counts are in device memory."""
        self.done = []
        self._columns["grad"] = self._owner.columns["grad"][self._rows] + self._offsets
        steps = self._owner.columns["step"][self._rows]
        self._columns["step"] = steps | self._unfinished if on_device else steps

    def fetch(self) -> None:
        """Copies the state into the slot."""
        for host, here in self._copies:
            here.copy_(host, non_blocking=True)

    def store(self) -> None:
        """Copies the state back."""
        for host, here in self._copies:
            host.copy_(here, non_blocking=True)

    def version(self) -> int:
        """A number that changes when torch writes to the state on the host."""
        return sum(host._version for host, _ in self._copies)

    def _copied_to(self, host: Tensor, slot: Tensor) -> Tensor:
        here = slot[self._taken : self._taken + host.nbytes].view(host.dtype)
        self._taken += -(-host.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._copies.append((host, here))
        return here


def _flat(tensor: Tensor, entry: Entry) -> Tensor:
    return in_memory_order(tensor, entry.order)


# ---- Streaming -------------------------------------------------------------------------------------------------------


class _Slot:
    """A part of the buffer, with events of the work that uses it."""

    def __init__(self, buffer: Tensor, event: Callable[[], Any]) -> None:
        self.buffer = buffer
        self.loaded, self.updated, self.stored = event(), event(), event()
        self.memory: frozenset[int] = frozenset()  # storages that its last store may still be writing to


class Pager:
    """The buffer of one device, through which the state of tables on that device streams.

    An update waits for its load, a store for its update, a load for the store that empties its slot, and a table's
    first load for stores of earlier steps to the same memory. The host waits only in `settle`.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(SLOTS * SLOT_BYTES, dtype=torch.uint8, device=device)
        self._inward, self._updates, self._outward, event = queues(device, self._buffer)
        self._slots = [_Slot(part, event) for part in self._buffer.view(SLOTS, SLOT_BYTES)]
        self.buffer_bytes = self._buffer.nbytes
        self._dealt = 0  # loads that have been given a slot
        self._ahead: deque[tuple[Load, int]] = deque()  # loads in the slots that wait for their updates; their versions
        self._followers: dict[DeviceTable, DeviceTable] = {}  # the table that came after each one in the last turn
        self._seen: dict[DeviceTable, DeviceTable] = {}  # in this one
        self._latest: DeviceTable | None = None

    def run(
        self, table: DeviceTable, hypers: ctypes.Array[Hyper], update: Callable[[Load], None], *, on_device: bool
    ) -> None:
        """Updates a table whose state is on the host.

        When all of its work is queued, loads of the table that came next in the last turn are fetched too. All of this
        runs in a separate thread, where Python does not raise KeyboardInterrupt, because half an update cannot be
        undone. If it is called again for the same update, it does nothing.

        Args:
            table: on this device.
            hypers: constants of the groups; of a table that has run before, the same block sizes.
            update: one step of a load, by a backend.
            on_device: update counts are in device memory, so that only one segment of each parameter must count.
        """
        if table.done:
            return
        if self._latest is not None and not table.copied:
            self._seen[self._latest] = table
        self._latest = table
        if table.loads is None:
            table.loads = self._cut(table, hypers)
        loads = table.loads

        def stream() -> None:
            try:
                self._stream(loads, table, update, on_device)
                table.done.append(table)
            except BaseException:
                self._ahead.clear()
                raise

        in_thread(stream, table.device)

    def turn(self) -> None:
        """Ends an iteration: the tables that have run since the last call are expected again in this order."""
        self._followers, self._seen, self._latest = self._seen, {}, None

    def settle(self) -> None:
        """Waits until the state on the host is complete. What has been fetched ahead will be fetched again."""
        self._ahead.clear()
        self._outward.finish()

    def _stream(
        self, loads: Sequence[Load], table: DeviceTable, update: Callable[[Load], None], on_device: bool
    ) -> None:
        upcoming = self._upcoming(table)
        if not all(load is next(upcoming, None) and version == load.version() for load, version in self._ahead):
            self._ahead.clear()
            upcoming = self._upcoming(table)
        waiting = next(upcoming, None)
        for load in loads:
            waiting = self._fill(waiting, upcoming)
            slot = self._slots[load.place]
            load.refresh(on_device)
            self._updates.wait(slot.loaded)
            self._updates.run(lambda load=load: update(load))  # type: ignore[misc]
            self._updates.record(slot.updated)
            self._outward.wait(slot.updated)
            self._outward.run(load.store)
            self._outward.record(slot.stored)
            slot.memory = load.memory
            self._ahead.popleft()
        self._fill(waiting, upcoming)

    def _upcoming(self, table: DeviceTable | None) -> Iterator[Load]:
        """The loads of a table, then those of the tables that are expected after it."""
        while table is not None:
            yield from table.loads or ()
            table = self._followers.get(table)

    def _fill(self, waiting: Load | None, upcoming: Iterator[Load]) -> Load | None:
        """Fetches loads as long as their slots are free; returns the first one that is not."""
        while waiting is not None and all(waiting.place != load.place for load, _ in self._ahead):
            slot = self._slots[waiting.place]
            self._inward.wait(slot.stored)
            if waiting.first:
                for other in self._slots:
                    if not other.memory.isdisjoint(waiting.memory):
                        self._inward.wait(other.stored)
            self._inward.run(waiting.fetch)
            self._inward.record(slot.loaded)
            self._ahead.append((waiting, waiting.version()))
            waiting = next(upcoming, None)
        return waiting

    def _cut(self, table: DeviceTable, hypers: ctypes.Array[Hyper]) -> list[Load]:
        block_sizes = [hypers[entry.hyper].block_size for entry in table.entries]
        block_bytes = []
        for entry, block_size in zip(table.entries, block_sizes, strict=True):
            bits = entry.momentum_bits + 8 * (entry.residual is not None)
            block_bytes.append(block_size * bits // 8 + 4 * (entry.scales is not None))
        tensors = [t for e in table.entries for t in (e.momentum, e.scales, e.residual) if t is not None]
        memory = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)
        loads = []
        for segments in cut([(entry.rows, entry.cols) for entry in table.entries], block_sizes, block_bytes):
            place = self._dealt % SLOTS
            loads.append(Load(table, segments, place, self._slots[place].buffer, memory))
            self._dealt += 1
        loads[0].first = True
        return loads
