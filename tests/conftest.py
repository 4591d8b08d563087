"""Owns fixtures that several test files ask for by name, and the order of the files."""

from collections.abc import Iterator

import pytest
import torch

LONG = ("test_cuda.py", "test_visit.py", "test_benchmarks.py", "test_fuzz.py", "test_distributed.py", "test_tuning.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take the longest come first, so that two processes end at about the same time."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small work: threads that wait for each other slow down on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
