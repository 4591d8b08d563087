"""Calls of torch's GPU functions, checked without a GPU: torch's own Python above a stand-in for its C functions."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("lion8bit", "benchmarks", "examples", "scripts", "tests")
GIB = 2**30


def script(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of `benchmarks` or `examples` as a module."""
    monkeypatch.syspath_prepend(str(REPOSITORY / folder))
    return importlib.import_module(name)


@pytest.mark.parametrize(("name", "index"), [("cuda", 3), ("cuda:0", 0)])
def test_memory_limits_arrive(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that has an index, and for plain "cuda" with that of the current device, which is 3 here."""
    finetune = script("examples", "full_finetune", monkeypatch)
    arrived: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *pair: arrived.append(pair), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    device = torch.device(name)

    for limit in (20.0, 40.0, 100.0):
        finetune.limit_memory(device, limit)
    assert arrived == [(0.25, index), (0.5, index), (1.0, index)]
    with pytest.raises(ValueError, match="specified index"):  # so the checks before the stand-in are torch's
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
    assert len(arrived) == 3


def needs_index() -> set[str]:
    """Names of torch's functions that refuse a device without an index."""
    found = set()
    for module in (torch.cuda, torch.cuda.memory, torch.accelerator):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__.startswith("torch."):
                calls = re.findall(r"_get_device_index\(([^)]*)\)", inspect.getsource(function))
                if any("optional=True" not in arguments for arguments in calls):
                    found.add(name)
    return found


def test_functions_that_need_an_index_are_called_in_one_place() -> None:
    """The test above checks that place; a call elsewhere needs a separate check."""
    names = needs_index()
    assert {"set_per_process_memory_fraction", "set_device"} <= names
    calls = []
    for path in sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func).rpartition(".")[2]) in names:
                calls.append((path.name, name))
    calls = [call for call in calls if call[0] != Path(__file__).name]
    assert [name for _, name in calls] == ["set_per_process_memory_fraction"], calls


def test_peaks_of_a_run_are_kept_by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator has handed out for each kind of work, and the most that was requested of it."""
    finetune = script("examples", "full_finetune", monkeypatch)
    peaks = [(512, 400), (2048, 1300), (1024, 1000)]
    stats = [{"allocated_bytes.all.peak": one, "requested_bytes.all.peak": other} for one, other in peaks]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats.pop(0))
    place = finetune.Place(torch.device("cuda"))
    for work in ("forward", "backward", "forward"):
        with place.at(work):
            pass
    assert (place.peaks, place.requested) == ({"forward": 1024, "backward": 2048}, 1300)
    on_cpu = finetune.Place(torch.device("cpu"))
    with on_cpu.at("forward"):
        pass
    assert (on_cpu.peaks, on_cpu.requested) == ({}, None)
