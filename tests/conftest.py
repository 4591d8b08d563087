"""Owns fixtures that several test files ask for by name, and the order of the files."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import override_backend

from lion8bit import Lion8bit

LONG = ("test_cuda.py", "test_visit.py", "test_benchmarks.py", "test_fuzz.py", "test_distributed.py", "test_tuning.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take the longest come first, so that two processes end at about the same time."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers that a test compares have the same random bits: each numbers its parameters from 0."""
    monkeypatch.setitem(Lion8bit.__init__.__kwdefaults__, "seed", 0)


@pytest.fixture
def use_backend() -> Iterator[Callable[..., None]]:
    """Calls `override_backend` for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(override_backend(*arguments, **options))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small work: threads that wait for each other slow down on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
