"""Counts the CPU kernel's instructions per element under valgrind, and times it in cache."""

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
How many instructions does the CPU kernel execute per element, and in how many cycles? One step of one parameter on one
thread runs under valgrind's callgrind; the count is that of the call of the C function, whole blocks (of 64 with 4
bits, else of 128), gradients of usual size. Cycles are those of a parameter that stays in the second-level cache, the
least of many steps.
"""
EPILOG = """\
Needs g++ and valgrind (Debian: apt install g++ valgrind). AVX-512 is not counted: valgrind does not know it. Compare
only counts of one compiler. With --check nothing is timed.

examples:
  python benchmarks/instructions.py --check                       fail if a count has grown by more than 5 %
  python benchmarks/instructions.py --json benchmarks/results/instructions-baseline.json
"""

HERE = Path(__file__).parent
BASELINE = HERE / "results" / "instructions-baseline.json"
ALLOWED_GROWTH = 0.05
ELEMENTS = 1 << 20  # of a step that is counted
IN_CACHE, STEPS = 1 << 16, 400  # elements of steps that are timed
CASES: dict[str, tuple[str, str, int, str, int]] = {  # parameter, gradient, momentum bits, weight rounding, flags
    "fp32": ("float32", "float32", 8, "nearest", 0),
    "fp32, bf16 gradient": ("float32", "bfloat16", 8, "nearest", 0),
    "bf16, nearest": ("bfloat16", "bfloat16", 8, "nearest", 0),
    "bf16, stochastic": ("bfloat16", "bfloat16", 8, "stochastic", 0),
    "bf16, compensated": ("bfloat16", "bfloat16", 8, "compensated", 0),
    "fp16, stochastic": ("float16", "float16", 8, "stochastic", 0),
    "fp32, cautious": ("float32", "float32", 8, "nearest", CAUTIOUS),
    "fp32, momentum in fp32": ("float32", "float32", 32, "nearest", 0),
    "4 bits: fp32": ("float32", "float32", 4, "nearest", 0),
    "4 bits: bf16, nearest": ("bfloat16", "bfloat16", 4, "nearest", 0),
    "4 bits: bf16, stochastic": ("bfloat16", "bfloat16", 4, "stochastic", 0),
}


def build(folder: Path) -> Path:
    """Compiles the program that makes the call, with the OpenMP runtime that the library finds in its process."""
    program = folder / "instructions"
    command = ["g++", "-O1", "-std=c++17", "-I", HERE.parent / "csrc", HERE / "instructions.cpp", "-o", program]
    subprocess.run([*command, "-ldl", "-Wl,--no-as-needed", "-fopenmp"], check=True)
    return program


def step(command: list[str], kernel: str, case: str, elements: int, steps: int) -> str:
    """What the program prints."""
    names = {str(dtype).removeprefix("torch."): number for dtype, number in DTYPES.items()}
    param, grad, bits, rounding, flags = CASES[case]
    numbers = [names[param], names[grad], bits, WEIGHT_ROUNDING[rounding], flags]
    numbers += [cpu.KERNELS.index(kernel), elements, steps]
    with resources.as_file(resources.files("lion8bit") / "_cpu.so") as library:
        command = [*command, str(library), *map(str, numbers)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def count(program: Path, kernel: str, case: str) -> float:
    """Instructions per element of one case."""
    output = program.with_name("callgrind.out")
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={output}", "--toggle-collect=lion8bit_update"]
    step([*valgrind, str(program)], kernel, case, ELEMENTS, 1)
    found = re.search(r"^(?:summary|totals): (\d+)", output.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / ELEMENTS


def main() -> int:
    """Counts every case, prints tables, and with ``--check`` compares with the committed counts."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--check", action="store_true", help=f"compare with {BASELINE.relative_to(HERE.parent)}")
    settings = options.parse_args()
    for tool in ("g++", "valgrind"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} must be installed, got none; install it (Debian: apt install {tool})")
    out, record = console(), environment()
    record["compiler"] = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    out.print(f"{describe(record)}; {record['compiler']}", style="dim")
    baseline = json.loads(BASELINE.read_text())["instructions_per_element"] if settings.check else {}
    present, cases = cpu.available_kernels(), list(CASES)[: 1 if settings.quick else None]
    counted = [name for name in present if name != "avx512"]
    timed = [] if settings.check else present
    counts: dict[str, dict[str, float]] = {name: {} for name in counted}
    ns: dict[str, dict[str, float]] = {name: {} for name in timed}
    cycles: dict[str, dict[str, float]] = {name: {} for name in timed}
    with tempfile.TemporaryDirectory() as folder, progress("instructions") as bar:
        program = build(Path(folder))
        for case in bar.track(cases):
            for name in counted:
                counts[name][case] = count(program, name, case)
            for name in timed:
                nanoseconds, clock = map(float, step([str(program)], name, case, IN_CACHE, STEPS).split())
                ns[name][case], cycles[name][case] = nanoseconds / IN_CACHE, nanoseconds * clock / IN_CACHE

    grown = []
    table = new_table(
        "instructions per element, then ns (cycles) per element in cache on one thread", [""], [*counted, *timed]
    )
    for case in cases:
        cells = []
        for name in counted:
            now, before = counts[name][case], baseline.get(name, {}).get(case)
            cells.append(f"{now:.2f}" + (f" ({now / before - 1:+.1%})" if before else ""))
            if before and now > before * (1 + ALLOWED_GROWTH):
                grown.append(f"more instructions than before: {name}, {case}: {before:.2f} -> {now:.2f}")
        table.add_row(case, *cells, *(f"{ns[name][case]:.3f} ({cycles[name][case]:.2f})" for name in timed))
    out.print(table, *grown, sep="\n")
    results = {"instructions_per_element": counts, "ns_per_element": ns, "cycles_per_element": cycles}
    write_json(settings.json, "instructions", settings, {"environment": record, **results})
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
