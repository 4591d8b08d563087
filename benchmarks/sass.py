"""Counts machine instructions per element, registers and spilled bytes of the CUDA kernel; needs no GPU."""

from __future__ import annotations

import heapq
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from common import console, environment, new_table, parser, progress, write_json
from machine import program

from lion8bit.backends import nvrtc
from lion8bit.layout import WEIGHT_ROUNDING

DESCRIPTION = """\
Compiles the CUDA kernel as on a user's first step, for each kind of GPU, and disassembles it. Nothing runs. Counted is
one pass of a thread over its elements, with aligned addresses, whole blocks and finite gradients: the shortest way
around a loop that accesses memory exactly as such a pass does, 16 bytes at a time (fewer of codes), one scale.
"""
EPILOG = """\
It needs NVRTC and NVIDIA's disassembler: pip install "lion8bit[test]". Compare only counts of one compiler.

examples:
  python benchmarks/sass.py --check                       fail if a count has grown by more than 5 %
  python benchmarks/sass.py --json benchmarks/results/sass.json
"""

BASELINE = Path(__file__).parent / "results" / "sass.json"
ALLOWED_GROWTH = {"instructions": 0.05, "registers": 0.05, "spilled_bytes": 0.0}
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FP32, BF16 = 0, 1  # numbers of layout.DTYPES
Access = tuple[str, int]  # LDG or STG, and bytes
Instruction = tuple[str, Access | None]  # the opcode without modifiers, and the access to global memory


@dataclass(frozen=True)
class Case:
    """A kernel to count."""

    dtype: int  # of parameter and gradient
    rounding: str = "nearest"
    block_size: int = 128
    on_device: bool = False
    general: bool = False  # with some flag
    bits: int = 8  # of the momentum

    def kernel(self, tuning: nvrtc.Tuning) -> nvrtc.Kernel:
        """What is compiled."""
        kind = (self.dtype, self.dtype, self.bits, self.block_size, WEIGHT_ROUNDING[self.rounding])
        return nvrtc.Kernel(*kind, self.general, nvrtc.LARGE, self.on_device, tuning)

    @property
    def bytes_per_element(self) -> float:
        """What a step reads and writes."""
        number = 4 if self.dtype == FP32 else 2
        return 3 * number + 2 * (self.bits / 8 + 4 / self.block_size + (self.rounding == "compensated"))

    def accesses(self, per_thread: int) -> Counter[Access]:
        """The memory accesses of a thread in one pass over ``per_thread`` elements."""
        number, residual = (4 if self.dtype == FP32 else 2), [1.0] * (self.rounding == "compensated")
        expected: Counter[Access] = Counter([("LDG", 4), ("STG", 4)])  # the scale
        for name, sizes in (
            ("LDG", [number, number, self.bits / 8]),
            ("STG", [number, self.bits / 8]),
        ):  # parameter, gradient, momentum
            for size in sizes + residual:
                width = min(16, int(size * per_thread))
                expected[name, width] += int(size * per_thread) // width
        return expected


CASES = {
    "fp32": Case(FP32),
    "bf16, nearest": Case(BF16),
    "4 bits: bf16, nearest": Case(BF16, block_size=64, bits=4),
    "bf16, stochastic": Case(BF16, "stochastic"),
    "bf16, compensated": Case(BF16, "compensated"),
    "bf16, nearest, block 64": Case(BF16, block_size=64),
    "bf16, nearest, block 256": Case(BF16, block_size=256),
    "bf16, nearest, capturable": Case(BF16, on_device=True),
    "bf16, stochastic, flags": Case(BF16, "stochastic", general=True),
    "4 bits: fp32": Case(FP32, block_size=64, bits=4),
    "4 bits: bf16, stochastic": Case(BF16, "stochastic", block_size=64, bits=4),
    "4 bits: bf16, compensated": Case(BF16, "compensated", block_size=64, bits=4),
}

JUMPS = ("BRA", "EXIT", "RET", "CALL")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
LABEL = re.compile(r"^(\.L_\w+):")
LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)\s*(.*?)\s*;")


@dataclass
class Block:
    """Instructions without a jump between them, and the indices of the blocks that may come next."""

    code: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


def parse(listing: str) -> list[Block]:
    """The basic blocks of the first function in the output of ``nvdisasm -c``; a call of a label is a jump."""
    blocks, starts = [Block()], {}
    ends: dict[int, tuple[str, bool]] = {}  # by block: the label of a jump, and whether the next block may follow
    for text in re.split(r"\n\s*\.type\s", listing.partition(".type ")[2])[0].splitlines():
        if found := LABEL.match(text):
            if blocks[-1].code:
                blocks.append(Block())
            starts[found[1]] = len(blocks) - 1
        elif found := LINE.match(text):
            guard, opcode, operands = found.groups()
            name, *modifiers = opcode.split(".")
            width = next((WIDTHS[each] for each in modifiers if each in WIDTHS), 4)
            blocks[-1].code.append((name, (name, width) if name in ("LDG", "STG") else None))
            if name in JUMPS:
                label = re.search(r"`\((\.L_\w+)\)", operands) if name in ("BRA", "CALL") else None
                conditional = bool(guard) or (name == "BRA" and re.search(r"\bU?[PR]+\d", operands) is not None)
                ends[len(blocks) - 1] = label[1] if label else "", conditional
                blocks.append(Block())
    for index, block in enumerate(blocks[:-1]):
        target, falls_through = ends.get(index, ("", True))
        block.next = [*([starts[target]] if target else []), *([index + 1] if falls_through else [])]
    return blocks


def shortest(blocks: Sequence[Block], start: int, end: int, wanted: Counter[Access]) -> list[Instruction] | None:
    """The fewest instructions from block ``start`` to the end of block ``end`` that access memory exactly as wanted."""
    ties = itertools.count()
    queue: list[tuple[int, int, int, Counter[Access], list[int]]] = [(0, next(ties), start, wanted, [])]
    seen = set()
    while queue:
        length, _, at, left, path = heapq.heappop(queue)
        accesses = Counter(access for _, access in blocks[at].code if access)
        if accesses - left:
            continue
        left, path = left - accesses, [*path, at]
        if at == end and not left:
            return [instruction for index in path for instruction in blocks[index].code]
        if (key := (at, frozenset(left.items()))) not in seen:
            seen.add(key)
            for follower in blocks[at].next:
                heapq.heappush(queue, (length + len(blocks[at].code), next(ties), follower, left, path))
    return None


def hot_path(blocks: Sequence[Block], accesses: Counter[Access]) -> list[Instruction]:
    """The instructions of one pass; ValueError where no loop accesses memory in this way."""
    backward = [(start, end) for end, block in enumerate(blocks) for start in block.next if start <= end]
    paths = [path for start, end in backward if (path := shortest(blocks, start, end, accesses))]
    if not paths:
        raise ValueError(f"the machine code must have a loop with the accesses {dict(accesses)}, got none")
    return min(paths, key=len)


def inspect(image: bytes, name: str, option: str) -> str:
    """The output of one of NVIDIA's programs, from its Python package or the CUDA toolkit, about an image."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
        path = next((str(file.locate()) for file in files if file.name == name), name)
    except metadata.PackageNotFoundError:
        path = program(name) or name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


def resources(image: bytes) -> dict[str, int]:
    """Registers of a kernel, and bytes of local memory for those that did not suffice."""
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", inspect(image, "cuobjdump", "-res-usage")))
    return {"registers": int(used["REG"]), "spilled_bytes": int(used["STACK"]) + int(used["LOCAL"])}


def examine(capability: int, name: str) -> dict[str, Any]:
    """All figures of one kernel for one kind of GPU."""
    case, tuning = CASES[name], nvrtc.tunings_for(capability).of(CASES[name].dtype)
    image = nvrtc.compile_kernel(case.kernel(tuning), f"sm_{capability}")
    path = hot_path(parse(inspect(image, "nvdisasm", "-c")), case.accesses(tuning.per_thread))
    return {"arch": capability, "case": name, "instructions": len(path) / tuning.per_thread, **resources(image)}


def grown(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> list[str]:
    """The counts that have grown by more than is allowed."""
    stored = {(row["arch"], row["case"]): row for row in baseline}
    return [
        f"sm_{now['arch']}, {now['case']}, {name}: {before[name]:g} -> {now[name]:g}"
        for now in rows
        for name, growth in ALLOWED_GROWTH.items()
        if (before := stored.get((now["arch"], now["case"]))) and now[name] > before[name] * (1 + growth)
    ]


def main() -> int:
    """Counts every case for every architecture, and with ``--check`` compares with the committed counts."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options.add_argument("--check", action="store_true", help="compare with benchmarks/results/sass.json")
    settings, compiler = options.parse_args(), f"NVRTC {metadata.version('nvidia-cuda-nvrtc')}"
    work = list(itertools.product(settings.arch, list(CASES)[: 3 if settings.quick else None]))
    with progress("kernels") as bar, ThreadPoolExecutor() as pool:
        rows = list(bar.track(pool.map(examine, *zip(*work)), total=len(work)))
    table = new_table(compiler, ["", ""], ["instructions per element", "registers", "spilled bytes"])
    for row in rows:
        table.add_row(f"sm_{row['arch']}", row["case"], *(f"{row[count]:g}" for count in ALLOWED_GROWTH))
    console().print(table)
    write_json(settings.json, "sass", settings, {"environment": environment(), "compiler": compiler, "rows": rows})
    lines = []
    if settings.check:
        stored = json.loads(BASELINE.read_text())
        lines = grown(rows, stored["rows"])
        verdict = "more than before" if lines else "none has grown"
        console().print(f"compared with {stored['compiler']}'s counts: {verdict}", *lines, sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
