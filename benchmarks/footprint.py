"""Measures what the library takes besides a step's time: state, allocations, import and installation."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    Cell,
    Row,
    Shape,
    allocations,
    begin,
    installed,
    make_params,
    numel,
    parser,
    progress,
    rows_table,
    write_json,
)
from contenders import CONTENDERS as TIMED
from contenders import OURS, Contender, optimizer, ours
from models import MODELS, QUICK_MODELS

from lion8bit import Lion8bit
from lion8bit.layout import rows_and_cols
from lion8bit.tools.memory import state_bytes

DESCRIPTION = """\
What does the library take?

  state        bytes of optimizer state per parameter: over the parameters of 4096 elements and more whose rows are
               multiples of the block, and over the whole model, where smaller parameters have fp32 momentum; measured
               on the state of optimizers that have stepped
  allocations  tensor bytes allocated by a step after the first, by torch's profiler, by optimizer
  import       `import lion8bit` after `import torch`, in fresh processes: the time, the packages that it imports, and
               which of these are too heavy for it
  install      with --install: `pip install . --no-deps` into an empty folder, built without torch
"""

EPILOG = """\
examples:
  python benchmarks/footprint.py
  python benchmarks/footprint.py --install --json footprint.json      (pip downloads the build tools)
"""

FORBIDDEN_IMPORTS = ("rich", "matplotlib", "transformers", "cuda", "bitsandbytes")
COUNTED_STEPS = 5
REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

CONTENDERS: dict[str, Contender] = {
    OURS: Contender("lion8bit", ours()),
    "lion8bit-4bit": Contender("lion8bit, 4 bits", ours(optim_bits=4)),
    "bitsandbytes": TIMED["bitsandbytes"],
    "lion": Contender("fp32 Lion", optimizer("lion8bit", "Lion")),
    "adamw": TIMED["adamw"],
}


# ---- State and allocations -------------------------------------------------------------------------------------------


def state_of_shape(contender: Contender, shape: Shape) -> int:
    """State bytes for one parameter of a shape, without the maps that all parameters share."""
    params = make_params([shape], CPU, torch.float32, torch.float32)
    optimizer = contender.make(params)
    optimizer.step()
    state = optimizer.state[params[0]]
    return state_bytes(optimizer) - sum(t.nbytes for name, t in state.items() if name.startswith("qmap"))


def measure_state(contenders: dict[str, Contender], models: dict[str, tuple[str, list[Shape]]]) -> list[Row]:
    """State bytes per parameter by model and optimizer, stepping one parameter of each shape."""
    block_size, smallest = (
        Lion8bit([torch.zeros(1)]).param_groups[0][name] for name in ("block_size", "min_8bit_size")
    )
    rows = []
    for model, (_, shapes) in models.items():
        counts = Counter(shapes)
        large = [s for s in counts if numel([s]) >= smallest and rows_and_cols(s, block_size)[1] % block_size == 0]
        for key, contender in contenders.items():
            sizes = {shape: state_of_shape(contender, shape) for shape in counts}
            whole, blocks = (
                sum(sizes[s] * counts[s] for s in some) / sum(numel([s]) * counts[s] for s in some)
                for some in (counts, large)
            )
            total = sum(sizes[shape] * count for shape, count in counts.items())
            row = {"optimizer": key, "whole_model": whole, "whole_blocks": blocks, "bytes": total}
            rows.append({"table": "state", "model": model, "parameters": numel(shapes), **row})
    return rows


def measure_allocations(contenders: dict[str, Contender], shapes: list[Shape], dtype: torch.dtype) -> list[Row]:
    """The tensors that a step after the first allocates, by optimizer."""
    rows = []
    for key, contender in contenders.items():
        optimizer = contender.make(make_params(shapes, CPU, dtype, dtype))
        for _ in range(2):  # the second step may still fill caches, such as a table of addresses
            optimizer.step()

        def steps(step: Callable[[], Any] = optimizer.step) -> None:
            for _ in range(COUNTED_STEPS):
                step()

        sizes = [size for size in allocations(steps) if size > 0]
        row = {
            "tensor_bytes_per_step": sum(sizes) / COUNTED_STEPS,
            "tensor_allocations_per_step": len(sizes) / COUNTED_STEPS,
        }
        rows.append({"table": "allocations", "dtype": str(dtype).removeprefix("torch."), "optimizer": key, **row})
    return rows


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


def measure_import(repeats: int) -> Row:
    """Imports torch, then lion8bit, in fresh processes; both are timed within one process."""
    found = []
    with tempfile.TemporaryDirectory() as folder:  # away from the sources, so that the installed package is imported
        for _ in range(repeats + 1):
            done = subprocess.run(
                [sys.executable, "-c", IMPORT_PROGRAM], cwd=folder, capture_output=True, text=True, check=True
            )
            found.append(json.loads(done.stdout))
    torch_seconds, seconds, modules = zip(*found[1:])  # the first process reads the files from the disk
    packages = sorted({module.partition(".")[0] for module in modules[-1]})
    return {
        "table": "import",
        "torch_seconds": statistics.median(torch_seconds),
        "seconds": statistics.median(seconds),
        "new_modules": len(modules[-1]),
        "new_packages": packages,
        "forbidden": [name for name in FORBIDDEN_IMPORTS if name in packages],
    }


def measure_install() -> Row:
    """Installs the sources into an empty folder, built in pip's own isolated environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir", "--target", folder]
        isolated = {name: value for name, value in os.environ.items() if name != "PIP_NO_BUILD_ISOLATION"}
        start = time.perf_counter()
        done = subprocess.run([*command, "."], cwd=REPOSITORY, env=isolated, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {
            "table": "install",
            "seconds": seconds,
            "error": done.stderr.strip().splitlines()[-1:] if done.returncode else None,
            "native_library": any(path.stem == "_cpu" for path in files),
            "installed_bytes": sum(path.stat().st_size for path in files),
        }


# ---- The report ------------------------------------------------------------------------------------------------------


def label(row: Row) -> str:
    """The name of a row's optimizer."""
    return CONTENDERS[row["optimizer"]].label


STATE_COLUMNS: dict[str, Cell] = {
    "model": "{model}",
    "optimizer": label,
    "bytes/param": "{whole_model:.4f}",
    "8-bit parameters alone": "{whole_blocks:.4f}",
    "bytes": "{bytes:,}",
}
ALLOCATION_COLUMNS: dict[str, Cell] = {
    "parameters": "{dtype}",
    "optimizer": label,
    "tensor bytes": "{tensor_bytes_per_step:,.0f}",
    "tensor allocations": "{tensor_allocations_per_step:,.1f}",
}


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures everything, prints the tables and writes the file."""
    options = parser(DESCRIPTION, EPILOG, threads=True)
    options.add_argument("--install", action="store_true", help="also time an installation (needs a network)")
    settings = options.parse_args()
    out, record = begin(settings.threads)
    contenders = installed(CONTENDERS, out)
    models = QUICK_MODELS if settings.quick else MODELS
    with progress("footprint") as bar:
        task = bar.add_task("state", total=3 + settings.install)
        state = measure_state(contenders, models)
        bar.update(task, advance=1, description="allocations")
        dtypes = (torch.float32, torch.bfloat16)
        allocated = [r for dtype in dtypes for r in measure_allocations(contenders, models["minilm"][1], dtype)]
        bar.update(task, advance=1, description="import")
        imported = measure_import(1 if settings.quick else 7)
        bar.update(task, advance=1, description="install")
        others = [imported, *([measure_install()] if settings.install else [])]
    out.print(rows_table("Optimizer state", state, STATE_COLUMNS, left=2))
    out.print(rows_table("Allocated by one step after the first", allocated, ALLOCATION_COLUMNS, left=2))
    for row in others:
        out.print(", ".join(f"{name}: {value}" for name, value in row.items() if name != "table"))
    write_json(settings.json, "footprint", settings, {"environment": record, "rows": [*state, *allocated, *others]})


if __name__ == "__main__":
    main()
