"""Measures the time of an optimizer step, by optimizer, model, dtype and number of threads."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import (
    Cell,
    Row,
    Shape,
    begin,
    installed,
    make_params,
    numel,
    parser,
    progress,
    rows_table,
    spread,
    time_call,
    write_json,
)
from contenders import CONTENDERS, DTYPES, LR, OURS, Contender, Params  # noqa: F401 (gpu_step.py imports them from here)
from machine import process_bytes, reset_process_peak
from models import MODELS, QUICK_MODELS

from lion8bit.tools.memory import state_bytes

DESCRIPTION = """\
How long does a step take, and how near is that to what the memory allows? Every contender steps the same parameters and
gradients in turn, again and again; the caches are flushed before each step. Medians are reported. Ratios are medians of
ratios within one round, so that a busy machine disturbs both sides alike. Reported per contender:

  ms, ns/param    one step, and that over the number of parameters
  bytes/param     what a step has to move at least: parameter and state read and written, gradient read
  of the ceiling  time that those bytes take at the stream bandwidth, over the time of the step. The bandwidth is the
                  best of x.mul_(c), x.add_(y) and x.copy_(y) on as many bytes as lion8bit touches, timed in the same
                  rounds
  time over ours  above 1: slower than lion8bit (rounding to nearest, as the others do)
  extra bytes     peak memory of a step above what is held before it (Linux: of the process's resident memory)

Then lion8bit alone: time per parameter from 1M to 1B parameters in one fp32 tensor, beyond what a step of 1024 takes
(with cold caches that is the code of Python and torch, fetched from memory). The last table has a verdict on each goal.
"""

EPILOG = """\
A contender whose step would take longer than the budget is not run; its time is extrapolated from 1M parameters.
torch.compile'd contenders need g++. The goals are judged on the tensor of 64M at the most threads.

examples:
  python benchmarks/step_time.py                                  everything
  python benchmarks/step_time.py --model 64M --dtype bf16 --threads 1 2
  python benchmarks/step_time.py --skip torchao compiled-lion --json t.json
"""

PROBE_SHAPES: list[Shape] = [(1024, 1024)]
SIZES = tuple(1 << log for log in (20, 22, 24, 26, 28, 30))  # parameters, to see whether time is linear in them
FEW = 1024  # parameters of a step that costs what any step does
SHARE_OF_MEMORY = 0.6  # of the machine's, that one of them may take
DTYPE_KEYS = {"fp32": "fp32", "bf16": "bf16", "mixed": "fp32/bf16"}

ALL, NO_LIMIT = tuple(DTYPES), math.inf
GOALS: tuple[tuple[str, str, str, tuple[str, ...], str, float, float], ...] = (
    # name, optimizer, figure, dtypes, format, least, most
    ("share of the ceiling", "lion8bit", "share_of_ceiling", ("fp32",), "{:.0%}", 0.85, NO_LIMIT),
    ("share of the ceiling", "lion8bit", "share_of_ceiling", ("bf16",), "{:.0%}", 0.55, NO_LIMIT),
    ("share of the ceiling", "lion8bit-stochastic", "share_of_ceiling", ("bf16",), "{:.0%}", 0.50, NO_LIMIT),
    ("time over ours", "lion8bit-4bit", "time_over_ours", ALL, "{:.2f}x", -NO_LIMIT, 1.1),
    ("time over ours", "lion-pytorch", "time_over_ours", ALL, "{:.1f}x", 6.0, NO_LIMIT),
    ("time over ours", "compiled-lion", "time_over_ours", ALL, "{:.1f}x", 1.2, NO_LIMIT),
    ("time over ours", "adamw", "time_over_ours", ALL, "{:.1f}x", 1.5, NO_LIMIT),
    ("time over ours", "bitsandbytes", "time_over_ours", ALL, "{:.1f}x", 100.0, NO_LIMIT),
    ("extra bytes of a step", "lion8bit", "extra_bytes", ALL, "{:,.0f}", -NO_LIMIT, 1e6),
    ("extra bytes of a step", "portable", "extra_bytes", ALL, "{:,.0f}", -NO_LIMIT, 64e6),
)
LINEAR_GOAL = 1.25  # slowest over fastest time per parameter


# ---- Measuring -------------------------------------------------------------------------------------------------------


def extra_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes during a call above what is held before it; None where the system does not count them."""
    if device.type != "cpu" or sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would hide what the call takes
    before = reset_process_peak()
    call()
    return process_bytes("VmHWM") - before


def streams(size: int, device: torch.device) -> list[tuple[Callable[[], Any], int]]:
    """In-place passes over ``size`` bytes in all, each with the bytes that it moves."""
    x = torch.ones(size // 8, device=device)
    y = torch.ones_like(x)
    both = torch.ones(size // 4, device=device)
    return [
        (lambda: both.mul_(1.0001), 2 * both.nbytes),
        (lambda: x.add_(y), 3 * x.nbytes),
        (lambda: x.copy_(y), 2 * x.nbytes),
    ]


def probe(contender: Contender, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> float | str:
    """Seconds per parameter of a small second step, or why the contender cannot make one."""
    try:
        params = make_params(PROBE_SHAPES, device, *dtypes)
        optimizer = contender.make(params)
        optimizer.step()
        return time_call(optimizer.step, device)[1] / numel(PROBE_SHAPES)
    except Exception as error:  # peers refuse dtypes with different exceptions
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"


def enter(
    contender: Contender, params: Params, dtype: str, repeats: int, budget: float
) -> tuple[Row, torch.optim.Optimizer | None, int]:
    """A contender's row, its warmed optimizer where it can run within the budget, and in how many rounds it runs."""
    count = sum(param.numel() for param in params)
    seconds = probe(contender, params[0].device, DTYPES[dtype])
    if isinstance(seconds, str):
        return {"status": "unsupported", "reason": seconds}, None, 0
    if seconds * count > budget:
        ms = {"median": seconds * count * 1e3}
        return {"status": "extrapolated", "ms": ms, "ns_per_parameter": seconds * 1e9}, None, 0
    optimizer = contender.make(params)
    for _ in range(2):  # the second may still compile
        optimizer.step()
    row = {"status": "measured", "bytes_per_parameter": bytes_moved(params, optimizer) / count}
    return row, optimizer, max(1, min(repeats, int(budget / (seconds * count))))


def measure(
    shapes: list[Shape],
    device: torch.device,
    dtype: str,
    contenders: dict[str, Contender],
    repeats: int,
    budget: float,
) -> list[Row]:
    """Times all contenders on one model.

    Args:
        shapes: the model.
        device: where.
        dtype: key of `DTYPES`.
        contenders: who takes part.
        repeats: rounds.
        budget: seconds that a contender may take in all, without its warm-up.

    Returns:
        A row per contender, with the stream ``bandwidth`` in bytes per second.
    """
    params = make_params(shapes, device, *DTYPES[dtype])
    rows: dict[str, Row] = {}
    running: dict[str, tuple[torch.optim.Optimizer, int]] = {}
    for key, contender in contenders.items():
        if dtype in contender.dtypes:
            rows[key], optimizer, rounds = enter(contender, params, dtype, repeats, budget)
            if optimizer is not None:
                running[key] = optimizer, rounds

    touched = sum(p.nbytes + p.grad.nbytes for p in params) + state_bytes(running[OURS][0])
    passes = streams(touched, device)
    for call, _ in passes:
        call()
    times: dict[str, list[float]] = {key: [] for key in running}
    pass_times: list[list[float]] = [[] for _ in passes]
    for round_ in range(repeats):
        for (call, _), seconds in zip(passes, pass_times):
            seconds.append(time_call(call, device)[0])
        for key, (optimizer, rounds) in running.items():
            if round_ < rounds:
                times[key].append(time_call(optimizer.step, device)[0])

    bandwidth = max(size / statistics.median(seconds) for (_, size), seconds in zip(passes, pass_times))
    for key, own in times.items():
        ns = statistics.median(own) * 1e9 / numel(shapes)
        rows[key] |= {
            "ms": spread([seconds * 1e3 for seconds in own]),
            "ns_per_parameter": ns,
            "share_of_ceiling": rows[key]["bytes_per_parameter"] / bandwidth * 1e9 / ns,
            "time_over_ours": statistics.median(a / b for a, b in zip(own, times[OURS], strict=False)),
            "extra_bytes": extra_memory(running[key][0].step, device),
        }
    for row in rows.values():
        if row["status"] == "extrapolated":
            row["time_over_ours"] = row["ns_per_parameter"] / rows[OURS]["ns_per_parameter"]
    return [{"optimizer": key, **row, "bandwidth": bandwidth} for key, row in rows.items()]


def bytes_moved(params: Params, optimizer: torch.optim.Optimizer) -> int:
    """The least that a step moves: parameters and state read and written, gradients read."""
    return sum(2 * param.nbytes + param.grad.nbytes for param in params) + 2 * state_bytes(optimizer)


def measure_sizes(sizes: Sequence[int], repeats: int) -> list[Row]:
    """Times lion8bit on fp32 tensors of growing size, as far as the memory suffices, and on one of `FEW` parameters.

    Returns:
        Rows with ``parameters``, ``ms``, and ``ns_per_parameter`` of what is beyond the step of few.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 32
    device = torch.device("cpu")
    optimizers: dict[int, torch.optim.Optimizer] = {}
    for size in (FEW, *sizes):
        if 10 * (size + sum(optimizers)) > SHARE_OF_MEMORY * memory:
            break
        optimizers[size] = CONTENDERS[OURS].make(make_params([(size // 1024, 1024)], device, *DTYPES["fp32"]))
        optimizers[size].step()
    times: dict[int, list[float]] = {size: [] for size in optimizers}
    for _ in range(repeats):
        for size, optimizer in optimizers.items():
            times[size].append(time_call(optimizer.step, device)[0])
    fixed = statistics.median(times[FEW])
    return [
        {
            "table": "size",
            "parameters": size,
            "ms": spread([t * 1e3 for t in seconds]),
            "ns_per_parameter": (statistics.median(seconds) - fixed) * 1e9 / size,
        }
        for size, seconds in times.items()
    ]


# ---- Goals -----------------------------------------------------------------------------------------------------------


def judge(name: str, found: dict[str, float], form: str, *, least: float = -math.inf, most: float = math.inf) -> Row:
    """A goal that every figure in ``found`` has to meet; ``met`` is None where nothing was measured."""
    requirement = f"at least {form.format(least)}" if least > -math.inf else f"at most {form.format(most)}"
    measured = ", ".join(f"{case} {form.format(figure)}" for case, figure in found.items())
    met = all(least <= figure <= most for figure in found.values()) if found else None
    return {"goal": name, "requirement": requirement, "measured": measured or "not measured", "met": met}


def goals(rows: list[Row]) -> list[Row]:
    """The goals with what was measured, on one tensor at the most threads."""
    steps = [row for row in rows if row["table"] == "step" and row["model"] == "64M"]
    most_threads = max((row["threads"] for row in steps), default=1)
    found = []
    for name, key, figure, dtypes, form, least, most in GOALS:
        figures = {
            row["dtype"]: row[figure]
            for row in steps
            if row["threads"] == most_threads and row["optimizer"] == key and row["dtype"] in dtypes
            if row.get(figure) is not None
        }
        only = f" in {dtypes[0]}" if len(dtypes) == 1 else ""
        found.append(judge(f"{CONTENDERS[key].label}, {name}{only}", figures, form, least=least, most=most))
    each = {r["parameters"]: r["ns_per_parameter"] for r in rows if r["table"] == "size" and r["parameters"] > FEW}
    if each:
        ratios = {f"{min(each) / 1e6:.0f}M to {max(each) / 1e6:.0f}M": max(each.values()) / min(each.values())}
        name = "lion8bit, time per parameter beyond a step of few, largest over smallest"
        found.append(judge(name, ratios, "{:.2f}x", most=LINEAR_GOAL))
    return found


# ---- The report ------------------------------------------------------------------------------------------------------


def label(row: Row) -> str:
    """The name of a row's optimizer, and why it was not measured."""
    note = "" if row["status"] == "measured" else f" {row['status']} {row.get('reason', '')[:50]}"
    return CONTENDERS[row["optimizer"]].label + note


STEP_COLUMNS: dict[str, Cell] = {
    "dtype": "{dtype}",
    "optimizer": label,
    "ms": "{ms[median]:.2f}",
    "min to max": "{ms[min]:.2f} to {ms[max]:.2f}",
    "ns/param": "{ns_per_parameter:.3f}",
    "bytes/param": "{bytes_per_parameter:.2f}",
    "stream GB/s": lambda row: f"{row['bandwidth'] / 1e9:.1f}",
    "of the ceiling": "{share_of_ceiling:.0%}",
    "time over ours": "{time_over_ours:.2f}x",
    "extra bytes": "{extra_bytes:,}",
}
SIZE_COLUMNS: dict[str, Cell] = {
    "parameters": "{parameters:,}",
    "ms": "{ms[median]:.2f}",
    f"ns/param beyond {FEW}'s": "{ns_per_parameter:.3f}",
}
GOAL_COLUMNS: dict[str, Cell] = {
    "goal": "{goal}",
    "requirement": "{requirement}",
    "measured": "{measured}",
    "verdict": lambda row: {True: "[green]met[/]", False: "[red]NOT MET[/]", None: "-"}[row["met"]],
}


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Times everything that is selected, prints the tables and writes the files."""
    options = parser(DESCRIPTION, EPILOG)
    cores = os.cpu_count() or 1
    options.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    options.add_argument("--dtype", nargs="+", choices=list(DTYPE_KEYS), default=list(DTYPE_KEYS), help="default: all")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    options.add_argument("--threads", type=int, nargs="+", help="CPU threads, each in turn (default: 1, and 2 if any)")
    options.add_argument("--repeats", type=int, help="rounds (default: 15; 3 with --quick)")
    options.add_argument("--budget", type=float, default=10.0, help="seconds per contender and model (default: 10)")
    others = [key for key in CONTENDERS if key != OURS]
    options.add_argument("--skip", nargs="+", metavar="ROW", choices=others, default=[], help=f"of {', '.join(others)}")
    settings = options.parse_args()
    out, record = begin()
    contenders = installed({key: c for key, c in CONTENDERS.items() if key not in settings.skip}, out)
    models = QUICK_MODELS if settings.quick else MODELS
    repeats = settings.repeats or (3 if settings.quick else 15)
    threads = settings.threads or ([1] if settings.quick or cores == 1 else [1, 2])
    dtypes = [DTYPE_KEYS[key] for key in settings.dtype]

    rows: list[Row] = []
    cases = [(count, model) for count in threads for model in settings.model]
    with progress("step time") as bar:
        for count, model in bar.track(cases):
            torch.set_num_threads(count)
            shapes, here = models[model][1], []
            for dtype in dtypes:
                case = {"table": "step", "model": model, "parameters": numel(shapes), "device": settings.device}
                found = measure(shapes, torch.device(settings.device), dtype, contenders, repeats, settings.budget)
                here += [{**case, "threads": count, "dtype": dtype, **row} for row in found]
            rows += here
            title = f"{model} ({numel(shapes) / 1e6:.1f}M parameters), {settings.device}, {count} threads"
            out.print(rows_table(title, here, STEP_COLUMNS, left=2))
    if "64M" in settings.model and settings.device == "cpu":
        sizes = measure_sizes(SIZES[:2] if settings.quick else SIZES, min(repeats, 7))
        out.print(rows_table("One fp32 tensor, the most threads", sizes, SIZE_COLUMNS, left=0))
        rows += sizes
    found = goals(rows)
    title = "Goals (dry run of --quick: the numbers are not measurements)" if settings.quick else "Goals"
    out.print(rows_table(title, found, GOAL_COLUMNS, left=4))
    write_json(settings.json, "step_time", settings, {"environment": record, "goals": found, "rows": rows})


if __name__ == "__main__":
    main()
