"""The step of an optimizer: builds tables of its parameters, keeps them between steps, applies each step as a whole."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from lion8bit.backends.select import reads_device_memory, update_
from lion8bit.device_scalars import DeviceScalars, UpdateCounts
from lion8bit.layout import UNSCALE, Hyper
from lion8bit.options import NOT_CAPTURABLE, device_rate, group_hyper, read_on_host, to_scalar
from lion8bit.paging import Pager
from lion8bit.sharding import gradients
from lion8bit.state import as_group_asks, is_paged, new_state
from lion8bit.table import DeviceTable, Entry, hyper_array, make_entry, turns

_TABLE_OPTIONS = itemgetter("is_paged", "optim_bits", "min_8bit_size", "seed", "block_size", "weight_rounding")


@dataclass(slots=True)
class Ready:
    """What a step needs: parameters with gradients, in the order of their groups.

    A compiled graph may pass copies of parameters and state; `owners` are then the optimizer's parameters.
    """

    groups: Sequence[dict[str, Any]]
    params: list[Tensor]
    grads: list[Tensor]
    counts: list[int]  # of these parameters in each group
    grad_scale: Tensor | None = None  # GradScaler's
    found_inf: Tensor | None = None
    owners: list[Tensor] | None = None


def ready(groups: Sequence[dict[str, Any]]) -> Ready:
    """All parameters that have gradients."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    counts: list[int] = []
    for group in groups:
        here = group["params"]
        found = [grad for param in here if (grad := param.grad) is not None]
        params += here if len(found) == len(here) else [param for param in here if param.grad is not None]
        grads += found
        counts.append(len(found))
    return Ready(groups, params, grads, counts)


class _Plan:
    """The tables of a step, and what must be the same for another step to use them again."""

    def __init__(self, key: Any, states: Iterable[dict[str, Any]], tables: Sequence[DeviceTable]) -> None:
        self.key = key
        self.states = list(states)
        self.tables = tables

    def refresh(self, key: Any, states: Collection[dict[str, Any]], params: list[Tensor], grads: list[Tensor]) -> bool:
        """Updates the tables for a step with these parameters and gradients; False if a new plan is needed."""
        if key != self.key or len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return False
        return all(table.refresh(params, grads) for table in self.tables)


class _Index:
    """Finds a parameter in an optimizer's groups without a search through all of them."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.lists = [group["params"] for group in groups]
        self._sizes = [*map(len, self.lists)]
        self._ends = [*accumulate(self._sizes)]
        self._numbers = {id(param): number for number, param in enumerate(chain.from_iterable(self.lists))}

    def place(self, param: Tensor) -> tuple[int, int] | None:
        """The number of the parameter's group and its number there; None if it is in none."""
        number = self._numbers.get(id(param))
        if number is None:
            return None
        group = bisect_right(self._ends, number)
        return group, number - self._ends[group] + self._sizes[group]

    def is_valid(self, groups: Sequence[dict[str, Any]], params: Iterable[Tensor]) -> bool:
        """Whether these parameters are still where the index says."""
        lists = [group["params"] for group in groups]
        if len(lists) != len(self.lists) or not all(map(is_, lists, self.lists)) or [*map(len, lists)] != self._sizes:
            return False
        places = ((param, self.place(param)) for param in params)
        return all(at is not None and lists[at[0]][at[1]] is param for param, at in places)


class Stepper:
    """What an optimizer keeps between steps, and the step itself. It holds no reference to the optimizer."""

    def __init__(self) -> None:
        self.plan: _Plan | None = None
        self.plans: dict[Tensor, _Plan] = {}  # of the parameters that are stepped alone
        self.counters: dict[torch.device, Tensor] = {}  # of skipped elements
        self.pagers: dict[torch.device, Pager] = {}
        self._index = _Index([])
        self._lock = threading.RLock()  # autograd has a thread for each device, and each may call `step_param`
        self._update_counts: dict[torch.device, UpdateCounts] = {}

    def step(self, optimizer: torch.optim.Optimizer, step: Ready) -> None:
        """Steps parameters of all groups."""
        hypers = [*map(group_hyper, step.groups)]
        key = (step.counts, [(_TABLE_OPTIONS(group), len(group["params"])) for group in step.groups])
        grads, states = gradients(step.params, step.grads), optimizer.state
        if self.plan is None or not self.plan.refresh(key, states.values(), step.params, grads):
            self.plan = None
            self.plan = _Plan(key, (), self.build(optimizer, step, grads, hypers))
            self.plan.states = [*states.values()]
        self._run(optimizer, self.plan.tables, step, hypers)
        for pager in self.pagers.values():
            pager.turn()

    def step_param(
        self, optimizer: torch.optim.Optimizer, param: Tensor, scaler: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Steps one parameter; several threads may step different ones at the same time."""
        group = self.group_of(optimizer, param)
        grads = gradients([param], [param.grad])  # may communicate, so it must not make other threads wait
        with self._lock:
            step = Ready([group], [param], grads, [1], *scaler)
            hypers = [group_hyper(group)]
            key = (id(group), self._seed(optimizer, param), _TABLE_OPTIONS(group))
            states = [optimizer.state[param]] if param in optimizer.state else []
            plan = self.plans.get(param)
            if plan is None or not plan.refresh(key, states, [param], grads):
                self.plans.pop(param, None)
                tables = self.build(optimizer, step, grads, hypers)
                plan = self.plans[param] = _Plan(key, [optimizer.state[param]], tables)
            self._run(optimizer, plan.tables, step, hypers)

    def step_copies(self, optimizer: torch.optim.Optimizer, step: Ready, states: list[dict[str, Any]]) -> None:
        """Steps copies of parameters and of their state, which a compiled graph has made."""
        hypers = [*map(group_hyper, step.groups)]
        tables = self.build(optimizer, step, gradients(step.params, step.grads), hypers, states)
        self._run(optimizer, tables, step, hypers)

    # ---- Building --------------------------------------------------------------------------------------------------

    def build(
        self,
        optimizer: torch.optim.Optimizer,
        step: Ready,
        grads: Sequence[Tensor],
        hypers: Sequence[Hyper],
        copies: list[dict[str, Any]] | None = None,
    ) -> list[DeviceTable]:
        """Checks parameters, gradients and state; makes missing state; a table for each device.

        Args:
            optimizer: its state is completed.
            step: the parameters.
            grads: their gradients in this process.
            hypers: constants of the groups.
            copies: state to use instead of the optimizer's.
        """
        owners = step.params if step.owners is None else step.owners
        self._update_index(optimizer, owners)
        self.finish_paging()
        group_numbers = [number for number, count in enumerate(step.counts) for _ in range(count)]
        states = [optimizer.state.get(owner, {}) for owner in owners] if copies is None else copies
        entries: list[Entry] = []
        for owner, param, grad, state, number in zip(owners, step.params, grads, states, group_numbers, strict=True):
            group = step.groups[number]
            try:
                if copies is None:
                    with torch.inference_mode(False), torch.no_grad():  # or only inference mode could write to it
                        state = as_group_asks(state, param, group) if state else new_state(param, group)
                entry = make_entry(
                    param,
                    grad,
                    state,
                    block_size=hypers[number].block_size,
                    seed=self._seed(optimizer, owner),
                    hyper=number,
                    paged=is_paged(param, group),
                )
                entries.append(entry)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"{error} {self._where(optimizer, owner)}") from error
        places: dict[tuple[int, str, bool], list[int]] = {}
        for place, (turn, entry) in enumerate(zip(turns(entries), entries, strict=True)):
            places.setdefault((turn, str(entry.param.device), entry.paged), []).append(place)
        if copies is None:
            for entry in entries:
                optimizer.state[entry.source] = entry.state
        if len(places) == 1:
            return [DeviceTable(entries, grads)]
        in_turn = sorted(places.items(), key=lambda item: item[0][0])
        return [DeviceTable([entries[i] for i in at], [grads[i] for i in at], at) for _, at in in_turn]

    def group_of(self, optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
        """The group that holds a parameter; ValueError if none does."""
        self._update_index(optimizer, [param])
        place = self._index.place(param)
        if place is None:
            raise ValueError(
                f"param must be one of this optimizer's parameters, got shape {tuple(param.shape)}; "
                "call add_param_group first, or remove() of a gradient release that still steps it"
            )
        return optimizer.param_groups[place[0]]

    def _where(self, optimizer: torch.optim.Optimizer, param: Tensor) -> str:
        group, number = self._index.place(param) or (None, None)
        return f"(parameter {number} of group {group}, shape {tuple(param.shape)})"

    def _seed(self, optimizer: torch.optim.Optimizer, param: Tensor) -> int:
        group, number = self._index.place(param) or (0, 0)
        seed: int = optimizer.param_groups[group]["seed"]
        return seed + number & 0xFFFFFFFF

    def _update_index(self, optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
        with self._lock:
            if not self._index.is_valid(optimizer.param_groups, params):
                self._index = _Index(optimizer.param_groups)
                present = {*chain.from_iterable(self._index.lists)}
                self.plans = {param: plan for param, plan in self.plans.items() if param in present}

    # ---- Running ---------------------------------------------------------------------------------------------------

    def _run(
        self,
        optimizer: torch.optim.Optimizer,
        tables: Sequence[DeviceTable],
        step: Ready,
        hypers: Sequence[Hyper],
    ) -> None:
        """Applies a step whole or not at all, also if Ctrl-C interrupts it."""
        try:
            updates = self._updates(optimizer, tables, step, hypers)
            try:
                _apply(updates)
            except BaseException:
                while any(table.done for table, _ in updates):
                    try:
                        _apply(updates)  # the parts that are missing
                        break
                    except KeyboardInterrupt:  # one is enough
                        continue
                raise
        finally:
            for table in tables:
                table.release()

    def _updates(
        self,
        optimizer: torch.optim.Optimizer,
        tables: Sequence[DeviceTable],
        step: Ready,
        hypers: Sequence[Hyper],
    ) -> list[tuple[DeviceTable, Callable[[], None]]]:
        """What must be done with each table of a step; no parameter has changed yet. A repeated call continues."""
        if step.grad_scale is not None:
            for hyper in hypers:
                hyper.flags |= UNSCALE
        updates = []
        for table in tables:
            device = table.device
            counts = self._counts_on(optimizer, device, step)
            scalars: tuple[DeviceScalars, ...] = ()
            if counts is None:
                if step.found_inf is not None and step.found_inf.item():
                    continue
                read_on_host(hypers, step.groups, step.grad_scale)
                table.begin()
            else:
                table.begin_on_device(counts, sum(len(group["params"]) for group in optimizer.param_groups))
                rates = [device_rate(group, device) for group in step.groups]
                grad_scale, found_inf = to_scalar(step.grad_scale, device), to_scalar(step.found_inf, device)
                scalars = (DeviceScalars(rates, grad_scale, found_inf, counts.table),)
            updates.append((table, self._update_of(table, hyper_array(hypers), *scalars)))
        return updates

    def _update_of(self, table: DeviceTable, hypers: Any, *scalars: DeviceScalars) -> Callable[[], None]:
        device = table.device
        if device not in self.counters:
            with torch.inference_mode(False):  # or later steps outside of inference mode could not add to it
                self.counters[device] = torch.zeros(1, dtype=torch.int64, device=device)
        counter = self.counters[device]
        if not table.paged:
            return partial(update_, table, hypers, counter, *scalars)
        if device not in self.pagers:
            self.pagers[device] = Pager(device)
        return partial(
            self.pagers[device].run,
            table,
            hypers,
            lambda load: update_(load, hypers, counter, *scalars),
            on_device=bool(scalars),
        )

    def _counts_on(self, optimizer: torch.optim.Optimizer, device: torch.device, step: Ready) -> UpdateCounts | None:
        """Where the device counts this step's updates; None if the host does, and knows all that a step needs."""
        groups = optimizer.param_groups
        capturable = [group["capturable"] for group in groups]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _check_capture(groups, device)
        scaled = step.grad_scale is not None or step.found_inf is not None
        on_device = scaled or any(capturable) or any(group["fused"] for group in groups)
        if not (on_device and reads_device_memory(device)):
            return None
        if device not in self._update_counts:
            self._update_counts[device] = UpdateCounts(device)
        return self._update_counts[device]

    def finish_paging(self) -> None:
        """Waits until state in host memory is complete."""
        for pager in self.pagers.values():
            pager.settle()


def _check_capture(groups: Sequence[dict[str, Any]], device: torch.device) -> None:
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(NOT_CAPTURABLE)
    if any(group["is_paged"] for group in groups):
        raise RuntimeError("is_paged must be False while a CUDA graph is captured, got True")
    if any(isinstance(group["lr"], Tensor) and group["lr"].device.type == "cpu" for group in groups):
        raise RuntimeError(
            f"lr must be a number or a tensor on {device} while a CUDA graph is captured, got a CPU tensor; "
            "each replay would take its present value"
        )


def _apply(updates: Iterable[tuple[DeviceTable, Callable[[], None]]]) -> None:
    for table, update in updates:
        if not table.finished:
            update()
            table.finish()
