"""Owns what the benchmarks share: options, the record of the machine, model shapes, timing, files; no measurement."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
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

SCHEMA = 1
PACKAGES = ("torch", "lion8bit", "numpy", "bitsandbytes", "lion-pytorch", "torch-optimi", "torchao")
PLAIN_WIDTH = 150  # columns of a table that is not read on a terminal
FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # beyond the last-level caches of current machines

Shape = tuple[int, ...]


# ---- Models, as the shapes of their parameters -----------------------------------------------------------------------


def gpt2_shapes(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """Parameters of GPT-2, in the orientation of its published checkpoint; the default is the 124M model."""
    block: list[Shape] = [
        (width,),
        (width,),
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


def minilm_shapes(layers: int = 6, width: int = 384, vocabulary: int = 30522, context: int = 512) -> list[Shape]:
    """Parameters of a BERT encoder with a pooler; the default is all-MiniLM-L6, 22.7M."""
    linear: list[Shape] = [(width, width), (width,)]
    norm: list[Shape] = [(width,), (width,)]
    feed_forward: list[Shape] = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block = linear * 4 + norm + feed_forward + norm
    return [(vocabulary, width), (context, width), (2, width), *norm, *(block * layers), *linear]


MODELS: dict[str, tuple[str, list[Shape]]] = {
    "64M": ("one tensor of 64M", [(8192, 8192)]),
    "gpt2": ("GPT-2 124M", gpt2_shapes()),
    "minilm": ("all-MiniLM-L6", minilm_shapes()),
}
QUICK_MODELS: dict[str, tuple[str, list[Shape]]] = {
    "64M": ("one tensor of 1M", [(1024, 1024)]),
    "gpt2": ("GPT-2, 1 layer, small vocabulary", gpt2_shapes(layers=1, width=256, vocabulary=512, context=64)),
    "minilm": ("MiniLM, 1 layer, small vocabulary", minilm_shapes(layers=1, width=128, vocabulary=512, context=64)),
}


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


# ---- Timing ----------------------------------------------------------------------------------------------------------


def flush_cache(device: torch.device) -> None:
    """Pushes everything else out of the device's caches, as the forward and backward pass do between two steps.

    By reading: what was written would have to go back to memory in the time that is measured.
    """
    key = device.type
    if key not in _FLUSH_BUFFERS:
        _FLUSH_BUFFERS[key] = torch.zeros(FLUSH_BYTES[key] // 4, device=device)
    _FLUSH_BUFFERS[key].sum()


_FLUSH_BUFFERS: dict[str, Tensor] = {}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


# ---- The machine -----------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
    """One line about an `environment` for people."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    gpu = f"; {record['gpu']['name']}" if record["gpu"] else ""
    return f"{record['cpu']}, {record['cores']} cores, load {record['load_average']}{gpu}; {versions}"


# ---- The command line ------------------------------------------------------------------------------------------------


def output_file(text: str) -> Path:
    """A file to write, which is tried at once: after the measurement it would be too late."""
    path = Path(text)
    try:
        try_to_write(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text} ({error})") from error
    return path


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        description: what is measured, for ``--help``.
        epilog: how to read the result, with examples.
    """
    result = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--json", type=output_file, metavar="FILE", help="write every figure and the machine's record here"
    )
    result.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes: proves the script, not the figures"
    )
    return result


def plot_option(result: argparse.ArgumentParser) -> None:
    """Adds ``--plot`` to the parser of a benchmark that has something to see."""
    result.add_argument(
        "--plot", type=output_file, metavar="FILE", help="draw the result (.png, .svg or .pdf; needs matplotlib)"
    )


def console() -> Console:
    """Standard output, wide enough for the tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with text columns and number columns."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def goal_table(goals: Sequence[dict[str, Any]], quick: bool) -> Table:
    """Goals with ``goal``, ``requirement``, ``measured`` and ``met``, which is None where nothing was measured."""
    title = "Goals, judged by figures of --quick, which prove nothing" if quick else "Goals"
    table = new_table(title, ["goal", "requirement", "measured", "verdict"], [])
    words = {True: "[green]met[/]", False: "[red]NOT MET[/]", None: "-"}
    for goal in goals:
        table.add_row(goal["goal"], goal["requirement"], goal["measured"], words[goal["met"]])
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


def write_json(path: Path | None, benchmark: str, settings: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes a benchmark's result whole or not at all, if a file is asked for. What is not finite becomes null.

    Args:
        path: the file, or None.
        benchmark: name of the benchmark.
        settings: the parsed command line.
        results: the figures, which bring ``environment`` from before the measurement.
    """
    if path is None:
        return
    options = {name: value for name, value in vars(settings).items() if name not in ("json", "plot")}
    record = {"schema": SCHEMA, "benchmark": benchmark, "settings": options, **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_finite(record), indent=1, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figure(draw: Callable[[Any], Any], path: Path | None) -> None:
    """Draws into a file without a display, if one is asked for.

    Args:
        draw: is given `matplotlib.pyplot` and returns the figure.
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
