"""Owns the comparison of ways in which the CUDA kernel can access memory: equal bits first, then time."""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sass
import torch
from common import FLUSH_BYTES, console, describe, environment, new_table, parser, spread, write_json
from rich.table import Table

from lion8bit import Lion8bit
from lion8bit.backends import cuda, nvrtc

DESCRIPTION = """\
Which tuning of the CUDA kernel is the fastest on this GPU? Each variant changes how the kernel accesses memory
(threads, CUDA blocks per multiprocessor, passes, cache hints, loading ahead) and never what it computes. All are
compiled. They must have the bits of the present choice on whole, ragged and odd shapes, and are then timed on one large
tensor in rounds: each round times every variant and a copy once.
"""

EPILOG = """\
The present choice is `TUNINGS` of lion8bit/backends/cuda.py; name there what measured it when you change it. Differences below
the spread of "base" between rounds are noise.

examples:
  python benchmarks/gpu_tune.py --json tune.json
  python benchmarks/gpu_tune.py --case nearest --variant base "registers ahead" "no_allocate, cs"
  python benchmarks/gpu_tune.py --dry                         registers and spills of all variants, without a GPU
"""

CASES = {
    "fp32": sass.CASES["fp32"],
    "nearest": sass.CASES["bf16, nearest"],
    "stochastic": sass.CASES["bf16, stochastic"],
    "compensated": sass.CASES["bf16, compensated"],
}
DTYPES = {sass.FP32: torch.float32, sass.BF16: torch.bfloat16}
DRY_CAPABILITIES = (80, 89, 90, 120)
SHAPES = ((4096, 4096), (513, 8000), (7, 100_003))  # whole blocks, rows that end in short blocks, odd addresses
LARGE_COLUMNS = 32768
BYTES_EACH = 32  # of the large tensor, its gradient and state, and of the copy beside it
STEPS = 8  # between two events


HINTS = {"no_allocate": ".L1::no_allocate", "no_allocate 256B": ".L1::no_allocate.L2::256B", "cs": ".cs"}
NAMES = [
    *(f"resident {count}" for count in (2, 3, 5, 6)),
    *(f"passes {count}" for count in (1, 2, 4, 16, 32)),
    "one wave",
    "128 threads, resident 8, passes 16",
    "512 threads, resident 2, passes 4",
    *(f"load {hint}" for hint in HINTS),
    "store no_allocate",
    "store cs",
    "load no_allocate, store cs",
    "cache ahead",
    "registers ahead",
    "registers ahead, resident 3",
    "registers ahead, load no_allocate, store cs",
    "8 elements, resident 4, nothing ahead",
    "16 elements, resident 3",
    "16 elements, resident 3, cache ahead",
    "16 elements, resident 2",
]


def changed(base: nvrtc.Tuning, name: str, multiprocessors: int = 132) -> nvrtc.Tuning:
    """The tuning that a name stands for: the changes to ``base`` that it lists.

    Args:
        base: the present choice.
        name: "base", or changes with commas between them, each as in `NAMES`.
        multiprocessors: of the GPU, for "one wave": every CUDA block is resident from the begin to the end. The grid
            becomes up to 1 % larger than asked for, because passes are whole numbers.

    Raises:
        ValueError: it lists something else.
    """
    tuning = base
    for change in [] if name == "base" else name.split(", "):
        word, _, rest = change.partition(" ")
        if word in ("load", "store") and rest in HINTS:
            tuning = tuning._replace(**{word: HINTS[rest]})
        elif word in ("resident", "passes", "grid") and rest.isdigit():
            tuning = tuning._replace(**{word: int(rest)})
        elif word.isdigit() and rest in ("threads", "elements"):
            tuning = tuning._replace(**{{"threads": "threads", "elements": "per_thread"}[rest]: int(word)})
        elif rest == "ahead" and word in nvrtc.AHEAD:
            tuning = tuning._replace(ahead=word)
        elif change == "one wave":
            tuning = tuning._replace(passes=1 << 20, grid=multiprocessors * tuning.resident * 99 // 100)
        else:
            raise ValueError(f"a change must be as in {'; '.join(NAMES)}, got {change!r}")
    return tuning


def base_of(case: str, capability: int) -> nvrtc.Tuning:
    """The present choice."""
    return nvrtc.tunings_for(capability).of(CASES[case].dtype)


def compile_all(names: Sequence[str], cases: Sequence[str], capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """Registers and local memory of every kernel, or the ``error``; images stay in the kernel cache."""

    def one(capability: int, name: str, case: str) -> dict[str, Any]:
        row: dict[str, Any] = {"capability": capability, "variant": name, "case": case}
        kernel = CASES[case].kernel(changed(base_of(case, capability), name))._replace(capacity=nvrtc.SMALL)
        try:
            image = nvrtc.image(kernel, nvrtc.architecture(capability))
        except RuntimeError as error:
            return {**row, "error": str(error)[:4000]}
        try:
            used = sass.resources(image)
        except (SystemExit, OSError, subprocess.CalledProcessError):  # no cuobjdump, or PTX
            return row
        return {**row, "registers": used["REG"], "local_bytes": used["STACK"] + used["LOCAL"]}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, *zip(*itertools.product(capabilities, names, cases))))


# ---- On a GPU --------------------------------------------------------------------------------------------------------


def optimizer_of(case: str, shape: tuple[int, int], device: torch.device) -> Lion8bit:
    """An optimizer of one parameter with a gradient; the same numbers each time."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[CASES[case].dtype]
    param = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02, generator=generator))
    param.grad = torch.empty_like(param).normal_(generator=generator)
    return Lion8bit([param], lr=1e-4, weight_decay=0.1, weight_rounding=CASES[case].rounding)


def tensors_of(optimizer: Lion8bit) -> list[torch.Tensor]:
    """The parameter and its state, as bytes."""
    (param,) = optimizer.param_groups[0]["params"]
    tensors = [param.detach(), *(each for each in optimizer.state[param].values() if isinstance(each, torch.Tensor))]
    return [tensor.flatten().view(torch.uint8) for tensor in tensors]


def differing(tunings: dict[str, nvrtc.Tuning], case: str, gpu: cuda.Device, device: torch.device) -> list[str]:
    """The variants whose bits are not those of the first, on some shape."""
    found = []
    for shape in SHAPES:
        expected = None
        for name, tuning in tunings.items():
            gpu.tunings = nvrtc.Tunings(tuning, tuning)
            optimizer = optimizer_of(case, shape, device)
            for _ in range(3):
                optimizer.step()
            expected = expected or tensors_of(optimizer)
            if not all(map(torch.equal, tensors_of(optimizer), expected)):
                found.append(name)
    return list(dict.fromkeys(found))


def milliseconds(work: Any, times: int) -> float:
    """Of one call, by the device's clock, while its queue is full."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    torch.cuda._sleep(2_000_000)
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def time_case(
    tunings: dict[str, nvrtc.Tuning], case: str, gpu: cuda.Device, device: torch.device, settings: argparse.Namespace
) -> dict[str, Any]:
    """Rounds over all variants on one large tensor, as many as the time allows; at least one."""
    elements = 1 << settings.log2
    while elements * BYTES_EACH > settings.memory and elements > LARGE_COLUMNS:
        elements //= 2
    optimizer = optimizer_of(case, (elements // LARGE_COLUMNS, LARGE_COLUMNS), device)
    moved = CASES[case].bytes_per_element * elements
    source = torch.ones(max(FLUSH_BYTES["cuda"], int(moved / 2)) // 4, device=device)
    target = torch.empty_like(source)
    copies: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in tunings}
    for number in range(settings.rounds):
        copies.append(milliseconds(lambda: target.copy_(source), STEPS))
        order = list(tunings)
        random.Random(number).shuffle(order)
        for name in order:
            gpu.tunings = nvrtc.Tunings(tunings[name], tunings[name])
            times[name].append(milliseconds(optimizer.step, STEPS))
        if time.monotonic() > settings.end:
            break
    copy = 2 * source.nbytes / statistics.median(copies) / 1e6  # GB/s
    base = statistics.median(times["base"])
    rows = [
        {
            "variant": name,
            "ms": spread(each),
            "gb_per_s": moved / statistics.median(each) / 1e6,
            "share_of_copy": moved / statistics.median(each) / 1e6 / copy,
            "speed_over_base": base / statistics.median(each),
        }
        for name, each in times.items()
    ]
    rows.sort(key=lambda row: row["ms"]["median"])
    return {"elements": elements, "copy_gb_per_s": copy, "copy_ms": spread(copies), "rows": rows}


# ---- The command line ------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The settings of the command line."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--dry", action="store_true", help="compile for several GPUs and run nothing")
    options.add_argument("--arch", type=int, nargs="+", help=f"for --dry (default: {DRY_CAPABILITIES})")
    options.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument(
        "--variant", nargs="+", metavar="NAME", default=NAMES, help=f"changes as in: {'; '.join(NAMES)}"
    )
    options.add_argument(
        "--log2",
        type=int,
        default=29,
        help="elements of the tensor, as a power of two; fewer where the memory is too small for it (default: 29)",
    )
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=120.0, help="after which no round begins (default: 120)")
    settings = options.parse_args()
    for name in ("rounds", "seconds"):
        if getattr(settings, name) <= 0:
            options.error(f"--{name} must be positive, got {getattr(settings, name)}")
    if settings.log2 < LARGE_COLUMNS.bit_length() - 1:
        options.error(f"--log2 must be at least {LARGE_COLUMNS.bit_length() - 1}, got {settings.log2}")
    settings.variant = list(dict.fromkeys(["base", *settings.variant]))
    try:
        for name in settings.variant:
            changed(nvrtc.Tuning(), name)
    except ValueError as error:
        options.error(f"--variant: {error}")
    if not settings.dry and (reason := cuda.unavailable_reason()):
        options.error(f"a GPU must be there without --dry, got none: {reason}")
    if settings.quick:
        settings.variant, settings.case, settings.arch = settings.variant[:2], settings.case[:1], settings.arch or [90]
    return settings


def register_table(kernels: Sequence[dict[str, Any]]) -> Table:
    """A row per variant, a column per case and GPU."""
    columns = list(dict.fromkeys(f"{row['case']}, sm_{row['capability']}" for row in kernels))
    table = new_table("Registers/bytes of local memory; 0 bytes: nothing is spilled", ["variant"], columns)
    for name in dict.fromkeys(row["variant"] for row in kernels):
        table.add_row(name, *(used(row) for row in kernels if row["variant"] == name))
    return table


def used(row: dict[str, Any]) -> str:
    """Registers and local bytes for people."""
    return "error" if "error" in row else f"{row['registers']}/{row['local_bytes']}" if "registers" in row else "-"


def time_table(case: str, timed: dict[str, Any], kernels: Sequence[dict[str, Any]]) -> Table:
    """The variants of a case, the fastest first."""
    resources = {row["variant"]: used(row) for row in kernels if row["case"] == case}
    base = next(row["ms"] for row in timed["rows"] if row["variant"] == "base")
    title = f"{case}: {timed['elements'] / 1e6:.0f}M elements, copy {timed['copy_gb_per_s']:.0f} GB/s"
    title += f"; base varied by {(base['max'] - base['min']) / base['median']:.1%}"
    table = new_table(title, ["variant"], ["registers/local", "ms", "GB/s", "of copy", "speed over base"])
    for row in timed["rows"]:
        share, speed = f"{row['share_of_copy']:.1%}", f"{row['speed_over_base']:.3f}"
        figures = f"{row['ms']['median']:.4f}", f"{row['gb_per_s']:.0f}", share, speed
        table.add_row(row["variant"], resources[row["variant"]], *figures)
    return table


def main() -> int:
    """Compiles, compares and times what is asked for; 1 where a variant does not compile or has other bits."""
    settings, out = parse(), console()
    settings.end = time.monotonic() + settings.seconds
    record = environment()
    out.print(describe(record), style="dim")
    results: dict[str, Any] = {"environment": record, "cases": {}, "other_bits": {}}
    if settings.dry:
        capabilities = settings.arch or DRY_CAPABILITIES
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        capabilities = [10 * properties.major + properties.minor]
        settings.memory = torch.cuda.mem_get_info(device)[0]
    results["kernels"] = kernels = compile_all(settings.variant, settings.case, capabilities)
    write_json(settings.json, "gpu_tune", settings, results)
    broken = {(row["variant"], row["case"]): row["error"] for row in kernels if "error" in row}
    for (name, case), error in broken.items():
        out.print(f"DOES NOT COMPILE: {name}, {case}: {error}", style="red")
    if settings.dry:
        out.print(register_table(kernels))
        out.print(f"{len(settings.variant)} tunings, {len(broken)} kernels do not compile")
        return 1 if broken else 0
    gpu = cuda._device(device.index)
    for case in settings.case:
        if ("base", case) in broken:
            continue
        sound = {
            name: changed(base_of(case, capabilities[0]), name, properties.multi_processor_count)
            for name in settings.variant
            if (name, case) not in broken
        }
        results["other_bits"][case] = other = differing(sound, case, gpu, device)
        if other:
            out.print(f"OTHER BITS than base, {case}: {'; '.join(other)}", style="red")
        sound = {name: tuning for name, tuning in sound.items() if name not in other}
        results["cases"][case] = time_case(sound, case, gpu, device, settings)
        write_json(settings.json, "gpu_tune", settings, results)
        out.print(time_table(case, results["cases"][case], kernels))
    count = sum(map(len, results["other_bits"].values()))
    out.print(f"{len(settings.variant)} tunings, {len(broken)} kernels do not compile, {count} have other bits")
    return 1 if broken or any(results["other_bits"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
