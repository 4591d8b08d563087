"""Compares memory access variants (`Tuning`) of the CUDA kernel: equal bits first, then time."""

from __future__ import annotations

import argparse
import contextlib
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
from common import FLUSH_BYTES, console, describe, environment, make_params, new_table, parser, spread, write_json

from lion8bit import Lion8bit
from lion8bit.backends import cuda, nvrtc
from lion8bit.layout import WEIGHT_ROUNDING

DESCRIPTION = """\
Which tuning of the CUDA kernel is the fastest on this GPU? Every variant must have the bits of the present choice on
whole, ragged and odd shapes. It is then timed on one large tensor in rounds: each round times every variant and a copy.
"""
EPILOG = """\
"base" is the present choice, `TUNINGS` of lion8bit/backends/nvrtc.py. Differences below its spread are noise.

examples:
  python benchmarks/gpu_tune.py --json tune.json
  python benchmarks/gpu_tune.py --case nearest --variant base "registers ahead" "load no_allocate, store cs"
  python benchmarks/gpu_tune.py --dry                   registers and spills, without a GPU
"""

CASES = {  # fp32, then bf16 by rounding
    name.rpartition(" ")[2]: sass.CASES[name] for name in ("fp32", *(f"bf16, {how}" for how in WEIGHT_ROUNDING))
}
DTYPES = {sass.FP32: torch.float32, sass.BF16: torch.bfloat16}
DRY_CAPABILITIES = (80, 89, 90, 120)
SHAPES = ((4096, 4096), (513, 8000), (7, 100_003))  # whole blocks, rows that end in short blocks, odd addresses
LARGE_COLUMNS = 32768
BYTES_EACH = 32  # of the large tensor, its gradient and state, and of the copy beside it
STEPS = 8  # between two events
SPEEDS = ("gb_per_s", "share_of_copy", "speed_over_base")
HINTS = {"no_allocate": ".L1::no_allocate", "no_allocate 256B": ".L1::no_allocate.L2::256B", "cs": ".cs"}
NAMES = [
    *(f"resident {count}" for count in (2, 3, 5, 6)), *(f"passes {count}" for count in (1, 2, 4, 16, 32)), "one wave",
    "128 threads, resident 8, passes 16", "512 threads, resident 2, passes 4",
    *(f"load {hint}" for hint in HINTS), "store no_allocate", "store cs", "load no_allocate, store cs",
    "cache ahead", "registers ahead", "registers ahead, resident 3", "registers ahead, load no_allocate, store cs",
    "8 elements, resident 4, nothing ahead", "16 elements, resident 3", "16 elements, resident 3, cache ahead",
    "16 elements, resident 2",
]  # fmt: skip


def changed(base: nvrtc.Tuning, name: str, multiprocessors: int = 132) -> nvrtc.Tuning:
    """``base`` with the comma-separated changes of a name, each as in `NAMES`; ValueError for another."""
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
        elif change == "one wave":  # all CUDA blocks stay resident; 1 % margin, because passes are whole numbers
            tuning = tuning._replace(passes=1 << 20, grid=multiprocessors * tuning.resident * 99 // 100)
        else:
            raise ValueError(f"a change must be as in {'; '.join(NAMES)}, got {change!r}")
    return tuning


def compile_one(capability: int, name: str, case: str) -> dict[str, Any]:
    """Registers and spilled bytes of one kernel, or the ``error``; the image stays in the kernel cache."""
    row: dict[str, Any] = {"capability": capability, "variant": name, "case": case}
    base = nvrtc.tunings_for(capability).of(CASES[case].dtype)
    kernel = CASES[case].kernel(changed(base, name))._replace(capacity=nvrtc.SMALL)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # of cuobjdump: it is absent, or this is PTX
        try:
            row |= sass.resources(nvrtc.image(kernel, nvrtc.architecture(capability)))
        except RuntimeError as error:
            row["error"] = str(error)[:4000]
    return row


def optimizer_of(case: str, shape: tuple[int, int], device: torch.device) -> Lion8bit:
    """An optimizer of one parameter with a gradient; the same numbers each time."""
    params = make_params([shape], device, *(DTYPES[CASES[case].dtype],) * 2)
    return Lion8bit(params, lr=1e-4, weight_decay=0.1, weight_rounding=CASES[case].rounding)


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
            (param,) = optimizer.param_groups[0]["params"]
            state = [each for each in optimizer.state[param].values() if isinstance(each, torch.Tensor)]
            bits = [tensor.flatten().view(torch.uint8) for tensor in (param.detach(), *state)]
            expected = expected or bits
            if not all(map(torch.equal, bits, expected)):
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
    tunings: dict[str, nvrtc.Tuning], case: str, gpu: cuda.Device, optimizer: Lion8bit, rounds: int, end: float
) -> dict[str, Any]:
    """Rounds over all variants on one large tensor, until the time ``end``; at least one."""
    (param,) = optimizer.param_groups[0]["params"]
    moved = CASES[case].bytes_per_element * param.numel()
    source = torch.ones(max(FLUSH_BYTES["cuda"], int(moved / 2)) // 4, device=param.device)
    target = torch.empty_like(source)
    copies: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in tunings}
    for number in range(rounds):
        copies.append(milliseconds(lambda: target.copy_(source), STEPS))
        for name in random.Random(number).sample(list(tunings), len(tunings)):
            gpu.tunings = nvrtc.Tunings(tunings[name], tunings[name])
            times[name].append(milliseconds(optimizer.step, STEPS))
        if time.monotonic() > end:
            break
    copy = 2 * source.nbytes / statistics.median(copies) / 1e6
    rows = []
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, ms in sorted(medians.items(), key=lambda item: item[1]):
        speeds = moved / ms / 1e6, moved / ms / 1e6 / copy, medians["base"] / ms
        rows.append({"variant": name, "ms": spread(times[name]), **dict(zip(SPEEDS, speeds))})
    return {"elements": param.numel(), "copy_gb_per_s": copy, "rows": rows}


def parse() -> argparse.Namespace:
    """The settings of the command line."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--dry", action="store_true", help="compile for several GPUs and run nothing")
    options.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--variant", nargs="+", metavar="NAME", default=NAMES, help=f"as in: {'; '.join(NAMES)}")
    options.add_argument("--log2", type=int, default=29, help="elements as a power of two, or what fits (default: 29)")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=120.0, help="after which no round begins (default: 120)")
    settings = options.parse_args()
    settings.variant = list(dict.fromkeys(["base", *settings.variant]))
    if not settings.dry and (reason := cuda.unavailable_reason()):
        options.error(f"a GPU must be there without --dry, got none: {reason}")
    if settings.quick:
        settings.variant, settings.case = settings.variant[:2], settings.case[:1]
    return settings


def print_rows(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Prints figures as a table, a row each."""
    table = new_table(title, [], columns)
    for row in rows:
        cells = (row.get(column, "-") for column in columns)
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells))
    console().print(table)


def compare(settings: argparse.Namespace, end: float, results: dict[str, Any]) -> None:
    """Checks the bits of every kernel that compiles and times it, a case at a time."""
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, free = cuda._device(device.index), torch.cuda.mem_get_info(device)[0]
    elements = 1 << max(15, min(settings.log2, (free // BYTES_EACH).bit_length() - 1))
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    for case in settings.case:
        sound = [row for row in results["kernels"] if row["case"] == case and "error" not in row]
        bases = {row["capability"]: nvrtc.tunings_for(row["capability"]).of(CASES[case].dtype) for row in sound}
        tunings = {row["variant"]: changed(bases[row["capability"]], row["variant"], multiprocessors) for row in sound}
        if "base" not in tunings:
            continue
        results["other_bits"][case] = other = differing(tunings, case, gpu, device)
        tunings = {name: tuning for name, tuning in tunings.items() if name not in other}
        shape = elements // LARGE_COLUMNS, LARGE_COLUMNS  # no name holds the optimizer: the next needs its memory
        timed = time_case(tunings, case, gpu, optimizer_of(case, shape, device), settings.rounds, end)
        results["cases"][case] = timed
        write_json(settings.json, "gpu_tune", settings, results)
        title = f"{case}: {elements / 1e6:.0f}M elements, copy {timed['copy_gb_per_s']:.0f} GB/s; ms"
        print_rows(title, [row | row["ms"] for row in timed["rows"]], ["variant", "median", "min", "max", *SPEEDS])


def main() -> int:
    """Compiles, compares and times the variants; 1 where one does not compile or has other bits."""
    settings, out = parse(), console()
    end = time.monotonic() + settings.seconds
    results: dict[str, Any] = {"environment": environment(), "cases": {}, "other_bits": {}}
    out.print(describe(results["environment"]), style="dim")
    capabilities: Sequence[int] = (90,) if settings.quick else DRY_CAPABILITIES
    if not settings.dry:
        capabilities = [int("{}{}".format(*torch.cuda.get_device_capability()))]
    with ThreadPoolExecutor(8) as pool:
        work = itertools.product(capabilities, settings.variant, settings.case)
        results["kernels"] = kernels = list(pool.map(compile_one, *zip(*work)))
    write_json(settings.json, "gpu_tune", settings, results)
    print_rows("kernels", kernels, ["case", "capability", "variant", "registers", "spilled_bytes", "error"])
    if not settings.dry:
        compare(settings, end, results)
    broken = sum("error" in row for row in kernels)
    other = [f"{name} ({case})" for case, names in results["other_bits"].items() for name in names]
    out.print(f"OTHER BITS than base: {'; '.join(other) or 'none'}")
    out.print(f"{len(settings.variant)} tunings, {broken} kernels do not compile, {len(other)} have other bits")
    return int(bool(broken or other))


if __name__ == "__main__":
    sys.exit(main())
