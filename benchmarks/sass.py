"""Owns the count of machine instructions on the hot path of the CUDA kernel, and its registers; needs no GPU."""

from __future__ import annotations

import heapq
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common import console, environment, new_table, parser, progress, write_json
from machine import program
from rich.console import Console

from lion8bit.backends import nvrtc
from lion8bit.layout import BLOCK_SIZES, WEIGHT_ROUNDING

DESCRIPTION = """\
How many instructions does the CUDA kernel execute per element, how many registers does it take? It is compiled as on
a user's first step, for each kind of GPU, and disassembled; nothing runs. The hot path is one pass of a thread over its
elements, with aligned addresses, whole blocks and finite gradients.
"""

EPILOG = """\
The hot path is found as the shortest way around a loop of the machine code that accesses memory exactly as such a pass
does: 16 bytes at a time (8 of codes), one scale. Slow paths either access memory otherwise or are longer.

The first table has the cycles that a quarter of a multiprocessor is busy with an element of every thread of a warp, by
the throughputs in NVIDIA's programming guide: it issues one instruction in each, and of its units that for integers,
logic and comparisons takes two cycles for an instruction, that for roots and conversions eight. The second table sets
the busiest unit against what the memory leaves time for, at the peak figures of well-known cards: 100 % and more would
mean that computing takes longer than moving the bytes. That is a prediction, not a measurement.

It needs NVRTC and NVIDIA's disassembler: pip install "lion8bit[test]", or --nvcc and a CUDA toolkit. Counts depend on
the compiler, so compare only what one compiler made.

examples:
  python benchmarks/sass.py --arch 90
  python benchmarks/sass.py --spills                                  every kernel there is, minutes; only local memory
  python benchmarks/sass.py --check                                   fail if a count has grown by more than 5 %
  python benchmarks/sass.py --json benchmarks/results/sass.json
"""

HERE = Path(__file__).parent
BASELINE = HERE / "results" / "sass.json"
ALLOWED_GROWTH = 0.05
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FP32, BF16, FP16 = 0, 1, 2


@dataclass(frozen=True)
class Case:
    """A kernel to count."""

    dtype: int  # of parameter and gradient
    rounding: str = "nearest"
    block_size: int = 128
    on_device: bool = False
    general: bool = False  # with some flag

    def kernel(self, tuning: nvrtc.Tuning) -> nvrtc.Kernel:
        """What is compiled."""
        kind = (self.dtype, self.dtype, True, self.block_size, WEIGHT_ROUNDING[self.rounding])
        return nvrtc.Kernel(*kind, self.general, nvrtc.LARGE, self.on_device, tuning)

    @property
    def bytes_per_element(self) -> float:
        """What a step reads and writes."""
        number = 4 if self.dtype == FP32 else 2
        return 3 * number + 2 * (1 + 4 / self.block_size + (self.rounding == "compensated"))

    def accesses(self, per_thread: int) -> Counter[Access]:
        """The memory accesses of a thread in one pass over so many elements."""
        expected: Counter[Access] = Counter([("LDG", 4), ("STG", 4)])  # the scale
        number = 4 if self.dtype == FP32 else 2
        vectors = {"LDG": [number, number, 1], "STG": [number, 1]}  # parameter, gradient, momentum
        for name, sizes in vectors.items():
            for size in [*sizes, *([1] if self.rounding == "compensated" else [])]:
                width = min(16, size * per_thread)
                expected[name, width] += size * per_thread // width
        return expected


CASES = {
    "fp32": Case(FP32),
    "bf16, nearest": Case(BF16),
    "bf16, stochastic": Case(BF16, "stochastic"),
    "bf16, compensated": Case(BF16, "compensated"),
    "bf16, nearest, block 64": Case(BF16, block_size=64),
    "bf16, nearest, block 256": Case(BF16, block_size=256),
    "bf16, nearest, capturable": Case(BF16, on_device=True),
    "bf16, stochastic, flags": Case(BF16, "stochastic", general=True),
}

# ---- Machine code ----------------------------------------------------------------------------------------------------

Access = tuple[str, int]  # LDG or STG, and bytes
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Instruction:
    """One line of nvdisasm's listing."""

    guard: str  # the predicate that it is executed under, such as @!P0; "" for always
    opcode: str  # with its modifiers, such as LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def access(self) -> Access | None:
        """What it does to global memory, if anything."""
        if self.name not in ("LDG", "STG"):
            return None
        return self.name, next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)


@dataclass
class Block:
    """Instructions that are executed one after another, and the indices of the blocks that may come next."""

    code: list[Instruction]
    next: list[int]

    @property
    def accesses(self) -> Counter[Access]:
        """All that it does to global memory."""
        return Counter(each.access for each in self.code if each.access)


def parse(listing: str) -> list[Block]:
    """The basic blocks of the first function in what ``nvdisasm -c`` prints, in their order in memory.

    A call of another function leaves its block without a successor: no path that is looked for goes through one. A call
    of a label is a jump.
    """
    label, line = (
        re.compile(r"^(\.L_\w+):"),
        re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)\s*(.*?)\s*;"),
    )
    blocks, starts = [Block([], [])], {}
    function = listing.partition(".type ")[2]  # up to the next function
    for text in re.split(r"\n\s*\.type\s", function)[0].splitlines():
        if found := label.match(text):
            if blocks[-1].code:
                blocks.append(Block([], []))
            starts[found[1]] = len(blocks) - 1
        elif found := line.match(text):
            instruction = Instruction((found[1] or "").strip(), found[2], found[3])
            blocks[-1].code.append(instruction)
            if instruction.name in ("BRA", "EXIT", "RET", "CALL"):
                blocks.append(Block([], []))
    for index, block in enumerate(blocks[:-1]):
        last = block.code[-1] if block.code else Instruction("", "NOP", "")
        target = re.search(r"`\((\.L_\w+)\)", last.operands)
        if last.name in ("BRA", "CALL") and target:
            block.next.append(starts[target[1]])
        conditional = bool(last.guard) or (last.name == "BRA" and re.search(r"\bU?[PR]+\d", last.operands) is not None)
        if last.name not in ("BRA", "EXIT", "RET", "CALL") or conditional:
            block.next.append(index + 1)
    return blocks


def shortest(
    blocks: Sequence[Block], start: int, end: int, wanted: Counter[Access] | None = None
) -> list[Instruction] | None:
    """The fewest instructions from the begin of one block to the end of another, or None where there is no way.

    Args:
        blocks: as `parse` returns them.
        start: index of the first block.
        end: index of the last.
        wanted: the accesses to global memory on the way, no more and no fewer; None for any.
    """
    kinds = sorted(wanted) if wanted else []
    ties = itertools.count()

    def after(left: tuple[int, ...], block: Block) -> tuple[int, ...] | None:
        if wanted is None:
            return left
        if not block.accesses.keys() <= wanted.keys():
            return None
        rest = tuple(amount - block.accesses[kind] for amount, kind in zip(left, kinds))
        return rest if min(rest) >= 0 else None

    first = after(tuple((wanted or {})[kind] for kind in kinds), blocks[start])
    queue = [(len(blocks[start].code), next(ties), start, first, [start])] if first is not None else []
    seen = set()
    while queue:
        length, _, at, left, path = heapq.heappop(queue)
        if at == end and not any(left):
            return [instruction for index in path for instruction in blocks[index].code]
        if (at, left) in seen:
            continue
        seen.add((at, left))
        for follower in blocks[at].next:
            rest = after(left, blocks[follower])
            if rest is not None:
                cost = length + len(blocks[follower].code)
                heapq.heappush(queue, (cost, next(ties), follower, rest, [*path, follower]))
    return None


def hot_path(blocks: Sequence[Block], accesses: Counter[Access]) -> tuple[list[Instruction], list[Instruction]]:
    """The instructions of one pass, and those before the first and after the last one.

    Raises:
        ValueError: no loop accesses memory in this way.
    """
    backward = [(end, start) for end, block in enumerate(blocks) for start in block.next if start <= end]
    ways = [(way, start, end) for end, start in backward if (way := shortest(blocks, start, end, accesses))]
    if not ways:
        raise ValueError(f"the machine code must have a loop with the accesses {dict(accesses)}, got none")
    way, start, end = min(ways, key=lambda each: len(each[0]))
    before = (shortest(blocks, 0, index) for index, block in enumerate(blocks) if start in block.next and index < start)
    exits = [index for index, block in enumerate(blocks) if block.code and block.code[-1].name == "EXIT"]
    out = {follower for block in blocks[start : end + 1] for follower in block.next if follower > end}
    after = (shortest(blocks, follower, last) for follower in out for last in exits)
    around = [min((each for each in found if each), key=len, default=[]) for found in (before, after)]
    return way, around[0] + around[1]


# ---- Units -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """What bounds a kernel on one kind of multiprocessor, from the CUDA programming guide's tables."""

    float_cycles: int  # of a quarter multiprocessor for fp32 arithmetic of a warp
    warps: int  # that a multiprocessor holds


CHIPS = {
    75: Chip(2, 32),
    80: Chip(2, 64),
    86: Chip(1, 48),
    89: Chip(1, 48),
    90: Chip(1, 64),
    100: Chip(1, 64),
    120: Chip(1, 48),
}
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Card:
    """A product's public peak figures."""

    capability: int
    flops: float  # fp32 operations per second, two for a multiply-add
    bandwidth: float  # bytes per second

    def cycles(self, bytes_per_element: float) -> float:
        """What the memory leaves of a quarter multiprocessor's cycles to an element of each thread of a warp."""
        lanes_per_second = self.flops / 2 * CHIPS[self.capability].float_cycles  # a warp's instruction has 32 lanes
        return lanes_per_second / (self.bandwidth / bytes_per_element)


CARDS = {
    "T4": Card(75, 8.1e12, 320e9),
    "A100 80 GB": Card(80, 19.5e12, 2039e9),
    "RTX 3090": Card(86, 35.6e12, 936e9),
    "RTX 4090": Card(89, 82.6e12, 1008e9),
    "H200": Card(90, 67e12, 4800e9),
    "B200": Card(100, 75e12, 8000e9),
    "RTX 5090": Card(120, 104.8e12, 1792e9),
}
FLOATS = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"}
MULTIPLIES = {"IMAD", "IDP", "IMUL", "HFMA2", "HADD2", "HMUL2"}
SLOW = {"MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV", "FRND"}
MEMORY = {"LDG", "STG", "SHFL", "LDS", "STS", "LDL", "STL", "ATOMG", "REDG", "RED", "ATOMS"}
CONTROL = {
    "BRA",
    "BSSY",
    "BSYNC",
    "BREAK",
    "EXIT",
    "NOP",
    "WARPSYNC",
    "LDC",
    "S2R",
    "CS2R",
    "BAR",
    "CALL",
    "RET",
    "YIELD",
}


def unit_cycles(instruction: Instruction, chip: Chip) -> tuple[str, int]:
    """The unit that executes an instruction, and for how long one warp keeps it busy."""
    name = instruction.name
    if name in MEMORY:
        return "memory", instruction.access[1] if instruction.access else 4
    if name in FLOATS:
        return "float", chip.float_cycles
    if name in MULTIPLIES:
        return "float", 2
    if name in SLOW:
        return "special", 8
    if name in CONTROL or name.startswith("U") or name.startswith("R2U") or name.startswith("S2U"):
        return "uniform", 0
    return "integer", 2


def busy(path: Iterable[Instruction], chip: Chip) -> dict[str, int]:
    """Cycles of each unit for one path through a warp; ``issue`` is that of issuing, one per instruction."""
    cycles = Counter(issue=0, float=0, integer=0, special=0, memory=0)
    for instruction in path:
        unit, amount = unit_cycles(instruction, chip)
        cycles["issue"] += 1
        if amount:
            cycles[unit] += amount
    return dict(cycles)


def occupancy(registers: int, chip: Chip, threads: int) -> float:
    """The share of a multiprocessor's warps that can be resident, by registers."""
    warps = threads // 32
    fitting = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(fitting * warps, chip.warps // warps * warps) / chip.warps


# ---- The tools -------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """The path of one of NVIDIA's programs, from its Python package or the toolkit."""
    for package in ("nvidia-cuda-nvdisasm", "nvidia-cuda-cuobjdump"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        found = [file for file in files if file.name == name]
        if found:
            return str(found[0].locate())
    if path := program(name):
        return path
    raise SystemExit(
        f'{name} is needed to read the machine code; pip install "lion8bit[test]" or install CUDA\'s toolkit'
    )


def inspect(image: bytes, name: str, option: str) -> str:
    """What one of NVIDIA's programs prints about an image."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([tool(name), option, file.name], check=True, capture_output=True, text=True).stdout


def resources(image: bytes) -> dict[str, int]:
    """What a kernel takes: ``REG`` registers, ``STACK``, ``LOCAL`` and ``SHARED`` bytes."""
    usage = inspect(image, "cuobjdump", "-res-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def compile_by_nvcc(kernel: nvrtc.Kernel, arch: str, folder: Path) -> bytes:
    """What `nvrtc.compile_kernel` returns, by the toolkit's compiler."""
    target = folder / "kernel.cubin"
    options = [option.decode() for option in nvrtc.compile_options(kernel, arch)]
    for name, content in nvrtc.sources().items():
        (folder / name).write_bytes(content)
    subprocess.run(
        ["nvcc", "-cubin", *options, "-o", target, folder / nvrtc.SOURCES[0]], check=True, capture_output=True
    )
    return target.read_bytes()


def compiler(nvcc: bool) -> str:
    """Its name and version."""
    if nvcc:
        said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
        found = re.search(r"release [\d.]+, V([\d.]+)", said)
        return f"nvcc {found[1] if found else '?'}"
    try:
        return f"NVRTC {metadata.version('nvidia-cuda-nvrtc')}"
    except metadata.PackageNotFoundError:
        return "NVRTC {}.{}".format(*nvrtc.toolchain()[0])


def examine(case: Case, capability: int, nvcc: bool) -> dict[str, Any]:
    """All figures of one kernel for one kind of GPU."""
    arch, chip = f"sm_{capability}", CHIPS[capability]
    kernel = case.kernel(tuning := nvrtc.tunings_for(capability).of(case.dtype))
    if nvcc:
        with tempfile.TemporaryDirectory() as folder:
            image = compile_by_nvcc(kernel, arch, Path(folder))
    else:
        image = nvrtc.compile_kernel(kernel, arch)
    used = resources(image)
    path, around = hot_path(parse(inspect(image, "nvdisasm", "-c")), case.accesses(tuning.per_thread))
    cycles = busy(path, chip)
    return {
        "instructions_per_element": len(path) / tuning.per_thread,
        "busy_per_element": max(cycles.values()) / tuning.per_thread,
        "cycles_per_element": {unit: each / tuning.per_thread for unit, each in cycles.items()},
        "instructions_around_the_passes": len(around),
        "registers": used["REG"],
        "local_memory": used["STACK"] + used["LOCAL"],
        "shared_memory": used["SHARED"],
        "occupancy": occupancy(used["REG"], chip, tuning.threads),
    }


def every_kernel(capability: int) -> Iterator[nvrtc.Kernel]:
    """All kernels that a GPU may need, by dtypes, rounding, momentum, block size, flags and what the device decides."""
    roundings = {FP32: ["nearest"], BF16: list(WEIGHT_ROUNDING), FP16: ["nearest", "stochastic"]}
    for param, grad in itertools.product(roundings, roundings):
        momenta = [(False, 128), *((True, size) for size in BLOCK_SIZES)]
        for rounding, momentum in itertools.product(roundings[param], momenta):
            for general, on_device in itertools.product((False, True), (False, True)):
                kind = (param, grad, *momentum, WEIGHT_ROUNDING[rounding], general)
                yield nvrtc.Kernel(*kind, nvrtc.LARGE, on_device, nvrtc.tunings_for(capability).of(param))


def spills(kernel: nvrtc.Kernel, capability: int) -> int:
    """Bytes of local memory that a kernel takes, for registers that did not suffice."""
    used = resources(nvrtc.compile_kernel(kernel, f"sm_{capability}"))
    return used["STACK"] + used["LOCAL"]


def report_spills(capabilities: Sequence[int], out: Console) -> int:
    """Prints the kernels that spill; returns how many."""
    work = [(kernel, capability) for capability in capabilities for kernel in every_kernel(capability)]
    with progress("kernels") as bar, ThreadPoolExecutor() as pool:
        done = list(bar.track(pool.map(spills, *zip(*work)), total=len(work)))
    bad = [(capability, kernel, amount) for (kernel, capability), amount in zip(work, done) if amount]
    for capability, kernel, amount in bad:
        out.print(f"sm_{capability}: {amount} bytes, {kernel}")
    out.print(f"{len(bad)} of {len(work)} kernels spill registers ({compiler(False)})")
    return len(bad)


def grown(figures: dict[str, dict[str, Any]], baseline: dict[str, dict[str, Any]]) -> list[str]:
    """What has become larger than the committed counts allow, for people to read."""
    lines = []
    for arch, cases in figures.items():
        for case, now in cases.items():
            before = baseline.get(arch, {}).get(case)
            for name in ("instructions_per_element", "busy_per_element", "registers") if before else ():
                if now[name] > before[name] * (1 + ALLOWED_GROWTH):
                    lines.append(f"sm_{arch}, {case}, {name.replace('_', ' ')}: {before[name]:g} -> {now[name]:g}")
            if before and now["local_memory"] > before["local_memory"]:
                lines.append(
                    f"sm_{arch}, {case}, local memory: {before['local_memory']} -> {now['local_memory']} bytes"
                )
    return lines


def main() -> None:
    """Counts every case for every architecture, and with ``--check`` compares with the committed counts."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options.add_argument("--nvcc", action="store_true", help="compile with the CUDA toolkit instead of NVRTC")
    options.add_argument("--check", action="store_true", help=f"compare with {BASELINE.relative_to(HERE.parent)}")
    options.add_argument("--spills", action="store_true", help="only: which of all kernels spill registers; 1 if any")
    settings = options.parse_args()
    if settings.spills:
        sys.exit(1 if report_spills(settings.arch, console()) else 0)
    cases = dict(list(CASES.items())[:2]) if settings.quick else CASES
    figures: dict[str, dict[str, Any]] = {str(arch): {} for arch in settings.arch}
    with progress("kernels") as bar:
        task = bar.add_task("", total=len(settings.arch) * len(cases))
        for arch in settings.arch:
            for name, case in cases.items():
                bar.update(task, description=f"sm_{arch}, {name}")
                figures[str(arch)][name] = examine(case, arch, settings.nvcc)
                bar.update(task, advance=1)
    version, out = compiler(settings.nvcc), console()
    units = ["float", "integer", "special", "memory"]
    table = new_table(version, ["", ""], ["instructions", *units, "registers", "occupancy", "local bytes"])
    for arch, rows in figures.items():
        for name, row in rows.items():
            cycles = [f"{row['cycles_per_element'][unit]:.1f}" for unit in ("issue", *units)]
            last = [str(row["registers"]), f"{row['occupancy']:.0%}", str(row["local_memory"])]
            table.add_row(f"sm_{arch}", name, *cycles, *last)
    out.print(table)
    table = new_table(
        "Prediction, not a measurement: time of computing over time of moving the bytes", [""], list(cases)
    )
    for card, peak in CARDS.items():
        if rows := figures.get(str(peak.capability)):
            shares = [
                rows[name]["busy_per_element"] / peak.cycles(case.bytes_per_element) for name, case in cases.items()
            ]
            table.add_row(card, *(f"{share:.0%}" for share in shares))
    out.print(table)
    record = {"environment": environment(), "compiler": version, "architectures": figures}
    write_json(settings.json, "sass", settings, record)
    if settings.check:
        stored = json.loads(BASELINE.read_text())
        lines = grown(figures, stored["architectures"])
        out.print(f"compared with {stored['compiler']}'s counts: {'more than before' if lines else 'none has grown'}")
        for line in lines:
            out.print(f"  {line}")
        sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
