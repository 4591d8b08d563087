"""Owns the measurement of what the library takes besides a step's time: state, allocations, import, installation."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    MODELS,
    QUICK_MODELS,
    Shape,
    available,
    console,
    describe,
    environment,
    goal_table,
    make_params,
    new_table,
    numel,
    parser,
    progress,
    write_json,
)
from rich.table import Table
from step_time import CONTENDERS as TIMED
from step_time import OURS, Contender

from lion8bit import Lion, Lion8bit
from lion8bit.layout import rows_and_cols
from lion8bit.tools.demo import state_bytes

DESCRIPTION = """\
What does the library take? Four goals, each measured and judged:

  state        bytes of optimizer state per parameter: at most 1.032 at the default block size, over the parameters of
               4096 elements and more whose rows are multiples of the block; measured on the tensors in the state of
               an optimizer that has stepped, beside fp32 Lion, AdamW and bitsandbytes. Smaller parameters keep fp32
               momentum and are in the figure for the whole model.
  allocations  tensor bytes allocated by a step after the first: none. On the CPU torch's profiler counts them, on CUDA
               the allocator's own statistics. Other optimizers are counted the same way, which shows that the counting
               works. Python's own objects are reported beside (peak within a step, and what stays behind).
  import       `import lion8bit` after `import torch`, in fresh processes: below 0.2 s, and without importing rich,
               typer, matplotlib, transformers, cuda or bitsandbytes.
  install      with --install: `pip install . --no-deps` into an empty folder, built without torch: below 30 s.
"""

EPILOG = """\
The exit status is 0 whatever the verdicts: they are in the last table and in the JSON.

examples:
  python benchmarks/footprint.py
  python benchmarks/footprint.py --install --json footprint.json      (pip fetches the build tools: needs a network)
"""

STATE_GOAL = 1.032  # bytes per parameter
IMPORT_GOAL = 0.2  # seconds
INSTALL_GOAL = 30.0  # seconds
FORBIDDEN_IMPORTS = ("rich", "typer", "matplotlib", "transformers", "cuda", "bitsandbytes")
COUNTED_STEPS = 5
REPOSITORY = Path(__file__).resolve().parent.parent

CONTENDERS: dict[str, Contender] = {
    OURS: Contender("lion8bit", Lion8bit),
    "bitsandbytes": TIMED["bitsandbytes"],
    "lion": Contender("fp32 Lion", Lion),
    "adamw": TIMED["adamw"],
}


# ---- State -----------------------------------------------------------------------------------------------------------


def state_of_shape(contender: Contender, shape: Shape) -> int:
    """State bytes that one parameter of a shape gets; maps that all parameters share are not its own."""
    cpu = torch.device("cpu")
    params = make_params([shape], cpu, torch.float32, torch.float32)
    optimizer = contender.make(params)
    optimizer.step()
    total = state_bytes(optimizer)
    return total - sum(t.nbytes for name, t in optimizer.state[params[0]].items() if name.startswith("qmap"))


def measure_state(contenders: dict[str, Contender], models: dict[str, tuple[str, list[Shape]]]) -> list[dict[str, Any]]:
    """State bytes per parameter by model and optimizer, stepping one parameter of each shape."""
    block_size, smallest = (Lion8bit([torch.zeros(1)]).defaults[name] for name in ("block_size", "min_8bit_size"))
    records = []
    for name, shapes in models.values():
        counts = Counter(shapes)
        whole_blocks = [
            shape
            for shape in counts
            if numel([shape]) >= smallest and rows_and_cols(shape, block_size)[1] % block_size == 0
        ]
        rows = {}
        for key, contender in contenders.items():
            sizes = {shape: state_of_shape(contender, shape) for shape in counts}
            rows[key] = {
                "label": contender.label,
                "whole_model": _per_parameter(sizes, counts, list(counts)),
                "whole_blocks": _per_parameter(sizes, counts, whole_blocks),
                "bytes": sum(sizes[shape] * count for shape, count in counts.items()),
            }
        records.append({"model": name, "parameters": numel(shapes), "block_size": block_size, "optimizers": rows})
    return records


def _per_parameter(sizes: dict[Shape, int], counts: Counter[Shape], shapes: list[Shape]) -> float:
    return sum(sizes[s] * counts[s] for s in shapes) / sum(numel([s]) * counts[s] for s in shapes)


# ---- Allocations -----------------------------------------------------------------------------------------------------


def allocated_on_cpu(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes and number of the tensor allocations that torch's profiler sees during a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [size for size in events if size > 0]
    return sum(sizes), len(sizes)


def allocated_on_cuda(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes, before they are rounded up, and number of the allocations from torch's CUDA allocator during a call."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    call()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    names = ("requested_bytes.all.allocated", "allocation.all.allocated")
    size, number = (after[name] - before[name] for name in names)
    return size, number


def measure_allocations(
    contenders: dict[str, Contender], shapes: list[Shape], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What a step after the first allocates, by optimizer; a refused dtype becomes an ``error``."""
    count = allocated_on_cpu if device.type == "cpu" else allocated_on_cuda
    rows: dict[str, Any] = {}
    for key, contender in contenders.items():
        params = make_params(shapes, device, dtype, dtype)
        optimizer = contender.make(params)
        try:
            for _ in range(2):  # the second step may still fill caches, such as a table of addresses
                optimizer.step()
        except (RuntimeError, ValueError, TypeError) as error:
            rows[key] = {"label": contender.label, "error": str(error).splitlines()[0]}
            continue

        def steps(step: Callable[[], Any] = optimizer.step) -> None:
            for _ in range(COUNTED_STEPS):
                step()

        size, number = count(steps)
        tracemalloc.start()
        optimizer.step()
        start, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        steps()
        end, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rows[key] = {
            "label": contender.label,
            "tensor_bytes_per_step": size / COUNTED_STEPS,
            "tensor_allocations_per_step": number / COUNTED_STEPS,
            "python_peak_bytes": peak - start,
            "python_kept_bytes_per_step": (end - start) / COUNTED_STEPS,
        }
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "optimizers": rows}


# ---- Import and installation -----------------------------------------------------------------------------------------


IMPORT_PROGRAM = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
before = set(sys.modules)
import lion8bit
end = time.perf_counter()
print(json.dumps([middle - start, end - middle, sorted(set(sys.modules) - before)]))
"""


def measure_import(repeats: int) -> dict[str, Any]:
    """Imports torch, then lion8bit, in fresh processes; both halves are timed within one process."""
    torch_seconds, own_seconds, modules = [], [], []
    with tempfile.TemporaryDirectory() as folder:  # away from the sources, so that the installed package is imported
        for _ in range(repeats + 1):
            done = subprocess.run(
                [sys.executable, "-c", IMPORT_PROGRAM], cwd=folder, capture_output=True, text=True, check=True
            )
            first, second, modules = json.loads(done.stdout)
            torch_seconds.append(first)
            own_seconds.append(second)
    # The first process reads the files from the disk.
    top_level = sorted({module.partition(".")[0] for module in modules})
    return {
        "torch_seconds": statistics.median(torch_seconds[1:]),
        "seconds": statistics.median(own_seconds[1:]),
        "new_modules": len(modules),
        "new_packages": top_level,
        "forbidden": [name for name in FORBIDDEN_IMPORTS if name in top_level],
    }


def measure_install() -> dict[str, Any]:
    """Installs the sources into an empty folder, built in pip's own isolated environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir", "--target", folder]
        environment_ = {name: value for name, value in os.environ.items() if name != "PIP_NO_BUILD_ISOLATION"}
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "."], cwd=REPOSITORY, env=environment_, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {
            "seconds": seconds,
            "succeeded": done.returncode == 0,
            "error": done.stderr.strip().splitlines()[-1:] if done.returncode else None,
            "native_library": any(path.stem == "_cpu" for path in files),
            "installed_bytes": sum(path.stat().st_size for path in files),
        }


# ---- The report ------------------------------------------------------------------------------------------------------


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals with what was measured; ``met`` is None where nothing was."""
    worst = max(record["optimizers"][OURS]["whole_blocks"] for record in results["state"])
    found = [record["optimizers"][OURS] for record in results["allocations"]]
    allocated = None if any("error" in row for row in found) else max(row["tensor_bytes_per_step"] for row in found)
    imported, installed = results["import"], results["install"]
    table = [
        ("state", f"at most {STATE_GOAL} bytes per parameter", f"{worst:.5f}", worst <= STATE_GOAL),
        (
            "allocations",
            "0 tensor bytes per step after the first",
            "refused" if allocated is None else f"{allocated:.0f}",
            allocated == 0,
        ),
        (
            "import",
            f"below {IMPORT_GOAL} s beyond torch's",
            f"{imported['seconds']:.3f} s",
            imported["seconds"] < IMPORT_GOAL,
        ),
        (
            "light import",
            "none of " + ", ".join(FORBIDDEN_IMPORTS),
            ", ".join(imported["forbidden"]) or "none",
            not imported["forbidden"],
        ),
        (
            "install",
            f"below {INSTALL_GOAL:.0f} s, built without torch",
            _install_words(installed),
            installed["succeeded"] and installed["native_library"] and installed["seconds"] < INSTALL_GOAL
            if installed
            else None,
        ),
    ]
    return [dict(zip(("goal", "requirement", "measured", "met"), row, strict=True)) for row in table]


def _install_words(installed: dict[str, Any] | None) -> str:
    if installed is None:
        return "not measured (--install)"
    if not installed["succeeded"]:
        return f"failed: {installed['error']}"
    return f"{installed['seconds']:.1f} s" + ("" if installed["native_library"] else ", without the native library")


def tables(results: dict[str, Any], quick: bool) -> list[Table]:
    """All tables, the verdicts last."""
    state = new_table("Optimizer state", ["model", "optimizer"], ["bytes/param", "8-bit parameters alone", "MB"])
    for record in results["state"]:
        for key, row in record["optimizers"].items():
            state.add_row(
                record["model"] if key == OURS else "",
                row["label"],
                f"{row['whole_model']:.4f}",
                f"{row['whole_blocks']:.4f}",
                f"{row['bytes'] / 1e6:.1f}",
                style="green" if key == OURS else None,
            )
        state.add_section()
    allocations = new_table(
        "Allocated by one step after the first",
        ["parameters", "optimizer"],
        ["tensor bytes", "tensor allocations", "Python peak bytes", "Python bytes kept per step"],
    )
    for record in results["allocations"]:
        for key, row in record["optimizers"].items():
            cells = (
                [row["error"][:40], "", "", ""]
                if "error" in row
                else [
                    f"{row['tensor_bytes_per_step']:,.0f}",
                    f"{row['tensor_allocations_per_step']:,.1f}",
                    f"{row['python_peak_bytes']:,}",
                    f"{row['python_kept_bytes_per_step']:,.0f}",
                ]
            )
            where = f"{record['device']}, {record['dtype']}" if key == OURS else ""
            allocations.add_row(where, row["label"], *cells, style="green" if key == OURS else None)
        allocations.add_section()
    return [state, allocations, goal_table(results["goals"], quick)]


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures everything that is asked for, prints the tables and writes the file."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--install", action="store_true", help="also time an installation (needs a network)")
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    settings: argparse.Namespace = options.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)

    out = console()
    record = environment()
    out.print(describe(record), style="dim")
    contenders = {key: c for key, c in CONTENDERS.items() if available(c.package)}
    models = QUICK_MODELS if settings.quick else MODELS
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    dtypes = (torch.float32, torch.bfloat16)
    results: dict[str, Any] = {"environment": record, "allocations": [], "install": None}
    with progress("footprint") as bar:
        task = bar.add_task("state", total=2 + len(devices) * len(dtypes) + settings.install)
        results["state"] = measure_state(contenders, models)
        for device in devices:
            for dtype in dtypes:
                bar.update(task, advance=1, description=f"allocations, {device.type}")
                results["allocations"].append(measure_allocations(contenders, models["minilm"][1], device, dtype))
        bar.update(task, advance=1, description="import")
        results["import"] = measure_import(1 if settings.quick else 7)
        if settings.install:
            bar.update(task, advance=1, description="install")
            results["install"] = measure_install()
    results["goals"] = goals(results)
    for table in tables(results, settings.quick):
        out.print(table)
    out.print(
        f"import torch takes {results['import']['torch_seconds']:.2f} s; lion8bit then adds "
        f"{results['import']['seconds']:.3f} s and {results['import']['new_modules']} modules of "
        + ", ".join(results["import"]["new_packages"]),
        style="dim",
    )
    write_json(settings.json, "footprint", settings, results)


if __name__ == "__main__":
    main()
