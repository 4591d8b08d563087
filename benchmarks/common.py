"""What the benchmarks share: options, the record of the machine, parameters, timing, tables and files."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import write_whole
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lion8bit.backends import cpu
from lion8bit.tools.cli import try_to_write

PACKAGES = ("torch", "lion8bit", "numpy", "bitsandbytes", "lion-pytorch", "torch-optimi", "torchao")
PLAIN_WIDTH = 150  # columns of a table that is not read on a terminal
FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # beyond the last-level caches of current machines

Shape = tuple[int, ...]
Row = dict[str, Any]
Cell = str | Callable[[Row], str]


# ---- Parameters ------------------------------------------------------------------------------------------------------


def numel(shapes: Iterable[Shape]) -> int:
    """Parameters in a list of shapes."""
    return sum(math.prod(shape) for shape in shapes)


def make_params(
    shapes: Iterable[Shape], device: torch.device, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> list[torch.nn.Parameter]:
    """Parameters N(0, 0.02^2) with gradients N(0, 1), whose dtypes may differ.

    Raises:
        RuntimeError: this torch does not let a gradient have another dtype than its parameter.
    """
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        weight = torch.empty(shape, device=device, dtype=param_dtype).normal_(0, 0.02, generator=generator)
        param = torch.nn.Parameter(weight)
        if grad_dtype != param_dtype:
            param.grad_dtype = grad_dtype
        param.grad = torch.empty(shape, device=device, dtype=grad_dtype).normal_(generator=generator)
        params.append(param)
    return params


# ---- Measuring -------------------------------------------------------------------------------------------------------


def flush_cache(device: torch.device) -> None:
    """Evicts everything else from the device's caches, as the forward and backward pass do between two steps.

    It reads: dirty lines of a written buffer would be written back during the time that is measured.
    """
    key = device.type
    if key not in _FLUSH_BUFFERS:
        _FLUSH_BUFFERS[key] = torch.zeros(FLUSH_BYTES[key] // 4, device=device)
    _FLUSH_BUFFERS[key].sum()


_FLUSH_BUFFERS: dict[str, Tensor] = {}


def time_call(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of one call with cold caches: the device's own time, and what a caller waits; equal on the CPU."""
    flush_cache(device)
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
        return wall, wall
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    flush_cache(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device waits while the host fills the queue, so that the events enclose work and no gaps.
    torch.cuda._sleep(int(2e9 * min(wall, 0.05)))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, wall


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of each tensor that a call allocates on the CPU (positive) and frees (negative), by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


# ---- The machine -----------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    """The processor's name, or its architecture where the system has no name for it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def available(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: date, machine, threads, load and versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    kernels = cpu.available_kernels()
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_kernel": cpu.KERNELS[cpu.selected_kernel()] if kernels else None,
        "gpu": None,
        "versions": versions,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return record


def describe(record: dict[str, Any]) -> str:
    """One line about an `environment`."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    gpu = f"; {record['gpu']['name']}" if record["gpu"] else ""
    return f"{record['cpu']}, {record['cores']} cores, load {record['load_average']}{gpu}; {versions}"


# ---- The command line ------------------------------------------------------------------------------------------------


def output_file(text: str) -> Path:
    """A file to write. It is tried at once: an error after the measurement would lose the figures."""
    path = Path(text)
    try:
        try_to_write(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text} ({error})") from error
    return path


def parser(description: str, epilog: str, *, plot: bool = False, threads: bool = False) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        description: what is measured, for ``--help``.
        epilog: how to read the result, with examples.
        plot: whether the benchmark draws a figure.
        threads: whether the number of threads can be chosen.
    """
    result = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--json", type=output_file, metavar="FILE", help="write every figure and the machine's record here"
    )
    result.add_argument("--quick", action="store_true", help="dry run in seconds: the numbers are not measurements")
    if plot:
        result.add_argument(
            "--plot", type=output_file, metavar="FILE", help="draw the result (.png, .svg or .pdf; needs matplotlib)"
        )
    if threads:
        result.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    return result


def begin(threads: int | None = None) -> tuple[Console, dict[str, Any]]:
    """Sets torch's threads and prints the machine. Returns the console and the `environment`."""
    if threads:
        torch.set_num_threads(threads)
    out, record = console(), environment()
    out.print(describe(record), style="dim")
    if record["load_average"] and record["load_average"] > 0.5:
        out.print(f"the machine is busy (load {record['load_average']}): times are disturbed", style="yellow")
    return out, record


def installed(contenders: dict[str, Any], out: Console) -> dict[str, Any]:
    """The contenders whose ``package`` is installed; prints the ``label`` of the others."""
    for contender in contenders.values():
        if not available(contender.package.partition(".")[0]):
            out.print(f"{contender.label} is not installed and left out", style="yellow")
    return {key: c for key, c in contenders.items() if available(c.package.partition(".")[0])}


def console() -> Console:
    """Standard output, wide enough for the tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def rows_table(title: str, rows: Sequence[Row], columns: dict[str, Cell], left: int = 1) -> Table:
    """A table with a line per row; rows of this library are green.

    Args:
        title: above the table.
        rows: with ``optimizer`` or ``format``.
        columns: by heading, a row's cell: a function of it, or a format string for its fields, which gives an empty
            cell where the row lacks the field.
        left: how many of the columns are text; the others are numbers.
    """
    headings = list(columns)
    table = new_table(title, headings[:left], headings[left:])
    for row in rows:
        ours = (row.get("optimizer") or row.get("format", "")).startswith("lion8bit")
        table.add_row(*(_text(cell, row) for cell in columns.values()), style="green" if ours else None)
    return table


def _text(cell: Cell, row: Row) -> str:
    if callable(cell):
        return cell(row)
    try:
        return cell.format_map(row)
    except (KeyError, TypeError):  # no such field, or None
        return ""


def new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with text columns and number columns."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def progress(label: str) -> Progress:
    """A progress bar on standard error, so that the tables can be piped."""
    return Progress(
        TextColumn(label, style="bold"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_json(path: Path | None, benchmark: str, settings: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes a benchmark's result completely or not at all, if a file is named. What is not finite becomes null.

    The file holds ``command``, ``machine``, ``versions``, ``date`` and the results, one row a line.

    Args:
        path: the file, or None.
        benchmark: name of the program in this folder.
        settings: its parsed command line.
        results: ``environment`` from before the measurement, ``rows``, and ``goals`` where there are any.
    """
    if path is None:
        return
    machine, rest = dict(results["environment"]), {k: v for k, v in results.items() if k != "environment"}
    versions, date = machine.pop("versions"), machine.pop("date")
    head = {"command": command(benchmark, vars(settings)), "machine": machine, "versions": versions, "date": date}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, rows_as_lines(_finite(head | rest)))


def command(benchmark: str, settings: dict[str, Any]) -> str:
    """The command line with these settings, except where the result is written."""
    words = ["python", f"benchmarks/{benchmark}.py"]
    for name, value in settings.items():
        if name not in ("json", "plot") and value not in (None, False, []):
            values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def rows_as_lines(record: dict[str, Any]) -> str:
    """JSON with one line for each scalar, each item of a list and each item of a dict of containers."""
    parts = []
    for key, value in record.items():
        text = json.dumps(value, default=str)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(item, default=str) for item in value) + "\n ]"
        elif isinstance(value, dict) and value and all(isinstance(item, (dict, list)) for item in value.values()):
            lines = (f"{json.dumps(name)}: {json.dumps(item, default=str)}" for name, item in value.items())
            text = "{\n  " + ",\n  ".join(lines) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figure(draw: Callable[[Any], Any], path: Path | None) -> None:
    """Draws into a file without a display, if one is named.

    Args:
        draw: is called with `matplotlib.pyplot` and returns the figure.
        path: the file, or None.
    """
    if path is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
