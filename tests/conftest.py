"""Owns fixtures that several test files ask for by name, and the order of the files."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import override_backend
from emulated import build_emulator
from places import ON_EMULATOR, ON_GPU, Place, Recorder

from lion8bit import Lion8bit
from lion8bit.backends import cuda, portable

LONG = tuple(
    f"test_{name}.py"
    for name in (
        "cuda",
        "fuzz",
        "visit",
        "benchmarks",
        "tuning",
        "interrupt",
        "weights",
        "amp",
        "cpu",
        "cuda_images",
        "distributed",
    )
)


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


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The CUDA kernel on the emulator."""
    return build_emulator(request.config.cache.mkdir("emulator"))


@pytest.fixture(params=["cpu", "portable", ON_EMULATOR, ON_GPU])
def place(request: pytest.FixtureRequest, use_backend: Callable[..., None]) -> Place:
    """Each place where a test can step, one after the other."""
    where = Place(request.param)
    if where.name == "portable":
        use_backend(portable.update_)
    if where.name == "emulated":
        recorder = Recorder(request.getfixturevalue("library"), where.launches)

        def step_(batch: Any, hypers: Any, counter: torch.Tensor, control: Any = None) -> None:
            cuda.step_(batch, hypers, counter, recorder, control)

        use_backend(step_, decides=True)
    return where
