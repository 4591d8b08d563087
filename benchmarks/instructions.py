"""Owns the CPU kernel's budget: instructions per element, which do not depend on noise, and cycles in cache."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

from common import console, describe, environment, new_table, parser, progress, write_json

from lion8bit.backends import cpu
from lion8bit.layout import CAUTIOUS, DTYPES, WEIGHT_ROUNDING

DESCRIPTION = """\
How many instructions does the CPU kernel execute per element, and in how many cycles? One step of one parameter
on one thread runs under valgrind's callgrind; the count is that of the call of the C function, whole blocks of 128,
gradients of usual size. Cycles are those of a parameter that stays in the second-level cache, the least of many steps;
the clock is measured by additions that wait for each other.
"""

EPILOG = """\
Needs g++ and valgrind (Debian: apt install g++ valgrind). AVX-512 is not counted: valgrind does not know it. Counts
depend on the compiler, so compare only what one compiler made. With --check nothing is timed.

examples:
  python benchmarks/instructions.py                               print the counts
  python benchmarks/instructions.py --check                       and fail if one has grown by more than 5 %
  python benchmarks/instructions.py --json benchmarks/results/instructions-baseline.json
"""

HERE = Path(__file__).parent
BASELINE = HERE / "results" / "instructions-baseline.json"
ALLOWED_GROWTH = 0.05
ELEMENTS = 1 << 20  # of a step that is counted
IN_CACHE, STEPS = 1 << 16, 400  # elements of steps that are timed
CASES: dict[str, tuple[str, str, int, str, int]] = {  # parameter, gradient, 8-bit momentum, weight rounding, flags
    "fp32": ("float32", "float32", 1, "nearest", 0),
    "fp32, bf16 gradient": ("float32", "bfloat16", 1, "nearest", 0),
    "bf16, nearest": ("bfloat16", "bfloat16", 1, "nearest", 0),
    "bf16, stochastic": ("bfloat16", "bfloat16", 1, "stochastic", 0),
    "bf16, compensated": ("bfloat16", "bfloat16", 1, "compensated", 0),
    "fp16, stochastic": ("float16", "float16", 1, "stochastic", 0),
    "fp32, cautious": ("float32", "float32", 1, "nearest", CAUTIOUS),
    "fp32, momentum in fp32": ("float32", "float32", 0, "nearest", 0),
}


def build(folder: Path) -> Path:
    """Compiles the program that makes the call, with the OpenMP runtime that the library finds in its process."""
    program = folder / "instructions"
    sources = HERE.parent / "csrc"
    command = [
        "g++",
        "-O1",
        "-std=c++17",
        f"-I{sources}",
        str(HERE / "instructions.cpp"),
        "-o",
        str(program),
        "-ldl",
        "-Wl,--no-as-needed",
        "-fopenmp",
    ]
    subprocess.run(command, check=True)
    return program


def count(program: Path, kernel: int, case: str, folder: Path) -> float:
    """Instructions per element of one case."""
    output = folder / "callgrind.out"
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={output}", "--toggle-collect=lion8bit_update"]
    step([*valgrind, str(program)], kernel, case, ELEMENTS, 1)
    found = re.search(r"^(?:summary|totals): (\d+)", output.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / ELEMENTS


def time(program: Path, kernel: int, case: str) -> tuple[float, float]:
    """Nanoseconds and cycles per element of one case, in cache."""
    nanoseconds, clock = map(float, step([str(program)], kernel, case, IN_CACHE, STEPS).split())
    return nanoseconds / IN_CACHE, nanoseconds * clock / IN_CACHE


def step(command: list[str], kernel: int, case: str, elements: int, steps: int) -> str:
    """What the program prints."""
    names = {str(dtype).removeprefix("torch."): number for dtype, number in DTYPES.items()}
    param, grad, quantized, rounding, flags = CASES[case]
    numbers = [names[param], names[grad], quantized, WEIGHT_ROUNDING[rounding], flags, kernel, elements, steps]
    with resources.as_file(resources.files("lion8bit") / "_cpu.so") as library:
        command = [*command, str(library), *map(str, numbers)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Counts every case, prints a table, and with ``--check`` compares with the committed counts."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--check", action="store_true", help=f"compare with {BASELINE.relative_to(HERE.parent)}")
    settings = options.parse_args()
    for tool in ("g++", "valgrind"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is needed to count instructions; install it (Debian: apt install {tool})")
    out, record = console(), environment()
    record["compiler"] = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    out.print(f"{describe(record)}; {record['compiler']}", style="dim")
    baseline = json.loads(BASELINE.read_text())["instructions_per_element"] if settings.check else {}

    present = cpu.available_kernels()
    kernels = [name for name in present if name != "avx512"]
    cases = list(CASES)[:1] if settings.quick else list(CASES)
    counts: dict[str, dict[str, float]] = {name: {} for name in kernels}
    times: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in present}
    with tempfile.TemporaryDirectory() as folder, progress("instructions") as bar:
        task = bar.add_task("", total=len(kernels) * len(cases))
        program = build(Path(folder))
        for name in kernels:
            for case in cases:
                bar.update(task, description=f"{name}, {case}")
                counts[name][case] = count(program, cpu.KERNELS.index(name), case, Path(folder))
                bar.update(task, advance=1)
        if not settings.check:
            for name in present:
                times[name] = {case: time(program, cpu.KERNELS.index(name), case) for case in cases}

    table = new_table("instructions per element", [""], kernels)
    grown = []
    for case in cases:
        cells = []
        for name in kernels:
            before, now = baseline.get(name, {}).get(case), counts[name][case]
            cells.append(f"{now:.2f}" + (f" ({now / before - 1:+.1%})" if before else ""))
            if before and now > before * (1 + ALLOWED_GROWTH):
                grown.append(f"{name}, {case}: {before:.2f} -> {now:.2f}")
        table.add_row(case, *cells)
    out.print(table)
    if not settings.check:
        table = new_table("ns (cycles) per element in cache, one thread", [""], [*present])
        for case in cases:
            figures = [times[name][case] for name in present]
            table.add_row(case, *(f"{ns:.3f} ({cycles:.2f})" for ns, cycles in figures))
        out.print(table)
    results = {
        "environment": record,
        "instructions_per_element": counts,
        "ns_per_element": {name: {case: ns for case, (ns, _) in found.items()} for name, found in times.items()},
        "cycles_per_element": {
            name: {case: cycles for case, (_, cycles) in found.items()} for name, found in times.items()
        },
    }
    write_json(settings.json, "instructions", settings, results)
    if grown:
        out.print("more instructions than before:", style="bold red")
        for line in grown:
            out.print(f"  {line}")
        sys.exit(1)


if __name__ == "__main__":
    main()
