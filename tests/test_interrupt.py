"""A step is applied whole or not at all, wherever Ctrl-C comes: tried between all instructions of this library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from cases import assert_same, override_backend
from emulated import Emulated, needs_compiler

import lion8bit
from lion8bit import Lion8bit
from lion8bit import state as state_module
from lion8bit.backends import cuda, portable

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCES = str(Path(lion8bit.__file__).parent)
WARMED = 2  # steps before the one that is interrupted
STRIDES = {"cpu": 7, "portable": 101, "emulated": 19, "paged": 19}  # between the instructions that are tried


class Interrupter:
    """Raises KeyboardInterrupt before the n-th instruction of this library, from `_run` on, and counts them.

    What comes before only reads, or makes state that is all zero.
    """

    def __init__(self, at: int) -> None:
        self.at, self.count, self.counting = at, 0, False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        frame.f_trace_opcodes = True
        self.counting |= frame.f_code.co_name == "_run"
        if event == "opcode" and self.counting:
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self

    def run(self, work: Callable[[], object]) -> bool:
        """Whether the work was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


@pytest.fixture(params=["cpu", "portable", pytest.param("emulated", marks=needs_compiler), "paged"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, use_backend: Callable[..., None]) -> str:
    """A way for steps to be computed on the CPU."""
    if request.param == "portable":
        use_backend(portable.update_)
        monkeypatch.setattr(portable, "PIECE", 1 << 12)
    if request.param == "emulated":
        emulated = Emulated(request.getfixturevalue("library"))
        use_backend(lambda *arguments: cuda.step_(*arguments, emulated))
    if request.param == "paged":
        monkeypatch.setattr(state_module, "PAGED_DEVICES", {"cpu"})
        monkeypatch.setattr(state_module, "MIN_PAGED_SIZE", 1000)
    return str(request.param)


def make(backend: str) -> tuple[list[torch.nn.Parameter], Lion8bit]:
    """Parameters of several kernels: plain, with gaps in memory, small, in bf16 with a residual and 4 bits."""
    gaps = torch.zeros(80, 64, 2)[..., 0]
    values = [torch.zeros(64, 80), gaps, torch.zeros(30), torch.zeros(80, 64, dtype=torch.bfloat16)]
    params = [torch.nn.Parameter(value) for value in values]
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_rounding": "compensated", "optim_bits": 4}]
    return params, Lion8bit(groups, lr=1.0, weight_decay=0.1, is_paged=backend == "paged")


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad.view(-1)[step] = torch.nan


def contents(params: list[torch.nn.Parameter], optimizer: Lion8bit) -> list[Any]:
    """All that a step changes."""
    values: list[Any] = [optimizer.nonfinite_count()]
    for param in params:
        state = optimizer.state.get(param) or {"step": 0}
        values += [param.detach().clone(), state["step"], optimizer.momentum(param)]
    return values


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def interruptions(work: Callable[[Interrupter], bool], stride: int) -> Iterator[bool]:
    """Interrupts work at every ``stride``-th instruction until it is not interrupted any more."""
    at = 1
    while True:
        interrupter = Interrupter(at)
        interrupted = work(interrupter)
        yield interrupted
        if interrupter.count < at:
            return
        at += stride


@pytest.mark.parametrize("alone", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("warmed", [0, WARMED], ids=["first", "warmed"])
def test_a_step_is_applied_whole_or_not_at_all(backend: str, warmed: int, alone: bool) -> None:
    """Weights, momentum, counts of updates and of bad gradients; and the steps after it are as without interruption."""
    params, optimizer = make(backend)
    known = []
    for step in range(warmed + 2):
        give_gradients(params, step)
        known.append(contents(params, optimizer))
        optimizer.step()
    known.append(contents(params, optimizer))
    outcomes = set()

    def attempt(interrupter: Interrupter) -> bool:
        params, optimizer = make(backend)
        for step in range(warmed):
            give_gradients(params, step)
            optimizer.step()
        give_gradients(params, warmed)
        if alone:  # one after the other: each of them is whole, so the rest can be made up for
            rest = [*params]

            def work() -> None:
                for param in params:
                    optimizer.step_param(param, optimizer.param_groups[int(param is params[3])])
        else:
            rest, work = [], optimizer.step
        interrupted = interrupter.run(work)
        for param in rest:
            if (optimizer.state.get(param) or {"step": 0})["step"] == warmed:
                optimizer.step_param(param, optimizer.param_groups[int(param is params[3])])
        found = contents(params, optimizer)
        applied = same(found, known[warmed + 1])
        assert applied or same(found, known[warmed]), f"torn by an interrupt at instruction {interrupter.at}"
        outcomes.add((interrupted, applied))
        give_gradients(params, warmed + applied)
        optimizer.step()
        for index, (a, b) in enumerate(zip(contents(params, optimizer), known[warmed + applied + 1], strict=True)):
            if isinstance(a, torch.Tensor):
                assert_same(a, b, f"value {index} one step after an interrupt at instruction {interrupter.at}")
            else:
                assert a == b
        return interrupted

    assert sum(interruptions(attempt, STRIDES[backend] * (9 if alone else 1))) > 20
    assert (True, True) in outcomes and (alone or (True, False) in outcomes)


def test_a_failed_step_lets_go_of_gradients_and_counts_nothing() -> None:
    params, optimizer = make("cpu")
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    before = contents(params, optimizer)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no memory")

    give_gradients(params, 2)
    with override_backend(fail), pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    assert same(contents(params, optimizer), before)
    assert optimizer._stepper.plan is not None
    assert [batch.grads for batch in optimizer._stepper.plan.tables] == [[]] * len(optimizer._stepper.plan.tables)


@pytest.mark.parametrize("count", [3.5, None, "2", -1, 2**63, torch.tensor(1.5), torch.tensor(torch.nan)], ids=str)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_count_that_is_none_is_refused_before_anything_is_counted(count: Any, all_of_them: bool) -> None:
    params, optimizer = make("cpu")
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    for param in params if all_of_them else params[2:]:
        optimizer.state[param]["step"] = count
    weights, counts = [param.detach().clone() for param in params], [optimizer.state[param]["step"] for param in params]
    for _ in range(2):
        give_gradients(params, 2)
        with pytest.raises(ValueError, match="step must be a whole number of updates"):
            optimizer.step()
    assert all(map(torch.equal, weights, params))
    assert all(optimizer.state[param]["step"] is count for param, count in zip(params, counts, strict=True))


def test_counts_in_tensors_are_taken() -> None:
    params, optimizer = make("cpu")
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
        for param in params:
            optimizer.state[param]["step"] = torch.tensor(float(optimizer.state[param]["step"]))
    give_gradients(params, 2)
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [3] * len(params)


def test_a_first_step_under_inference_mode() -> None:
    """What it makes must be writable outside of it, the counter of bad gradients too."""
    for update_ in (None, portable.update_):
        params, optimizer = make("cpu")
        with override_backend(update_):
            give_gradients(params, 1)
            with torch.inference_mode():
                optimizer.step()
            give_gradients(params, 2)
            versions = [param._version for param in params]
            optimizer.step()
        assert optimizer.nonfinite_count() == 8
        assert all(param._version > version for param, version in zip(params, versions, strict=True))
