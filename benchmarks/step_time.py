"""Owns the measurement of what an optimizer step costs in time; not of how exact it is."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import (
    MODELS,
    QUICK_MODELS,
    Shape,
    available,
    console,
    describe,
    environment,
    flush_cache,
    goal_table,
    make_params,
    new_table,
    numel,
    parser,
    plot_option,
    progress,
    save_figure,
    spread,
    write_json,
)
from rich.table import Table
from torch import Tensor

from lion8bit import Lion8bit
from lion8bit import optimizer as lion8bit_optimizer
from lion8bit.backends import portable
from lion8bit.tools.demo import state_bytes

DESCRIPTION = """\
How long does a step take, and how near is that to what the memory allows? Every contender steps the same parameters and
gradients in turn, again and again, the caches flushed before each step; medians are reported, and ratios are medians of
ratios taken within one round, so that a busy machine disturbs both sides alike. Reported per contender:

  ms, ns/param    one step, and that over the number of parameters
  bytes/param     what a step has to move at the least: parameter and state read and written, gradient read
  of the ceiling  time that those bytes take at the stream bandwidth, over the time of the step. The bandwidth is the
                  best of x.mul_(c), x.add_(y) and x.copy_(y) on as many bytes as lion8bit touches, timed in the same
                  rounds
  time over ours  above 1: slower than lion8bit (rounding to nearest, as the others do)
  extra MB        peak of a step above what is held before it (Linux: of the process's resident memory)

Then lion8bit alone: time per parameter from 1M to 1B parameters in one fp32 tensor, beyond what a step of 1024 takes
(with cold caches that is Python's and torch's own code, fetched from memory), and the step on one thread and on several
in turn. The last table judges the goals.

On CUDA, ms is the device's time with the queue kept full, and wall ms what a caller waits for a single step.
"""

EPILOG = """\
A contender that would take longer than the budget for one step is not run; its time is extrapolated from 1M parameters
and marked with ~. One whose dtypes are not supported is listed so. torch.compile'd contenders need g++. The goals are
judged on the tensor of 64M at the most threads; ratios have to hold for every pair of dtypes.

examples:
  python benchmarks/step_time.py                                  everything
  python benchmarks/step_time.py --model 64M --dtype bf16 --threads 1 2
  python benchmarks/step_time.py --skip torchao compiled-lion
  python benchmarks/step_time.py --json t.json --plot t.png
  python benchmarks/step_time.py --model minilm --json t.json --add t.json      in pieces
"""

LR = 1e-6  # small enough that hundreds of steps leave the weights as they are
PROBE_SHAPES: list[Shape] = [(1024, 1024)]
SIZES = tuple(1 << log for log in (20, 22, 24, 26, 28, 30))  # parameters, to see whether time is linear in them
FEW = 1024  # parameters of a step that costs what any step does
SHARE_OF_MEMORY = 0.6  # of the machine's, that one of them may take
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {  # of parameters and gradients
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32/bf16": (torch.float32, torch.bfloat16),
}
DTYPE_KEYS = {"fp32": "fp32", "bf16": "bf16", "mixed": "fp32/bf16"}

CEILING_GOALS = (("fp32", "lion8bit", 0.85), ("bf16", "lion8bit", 0.55), ("bf16", "lion8bit-stochastic", 0.50))
RATIO_GOALS = {"lion-pytorch": 6.0, "compiled-lion": 1.2, "adamw": 1.5, "bitsandbytes": 100.0}
LINEAR_GOAL = 1.25  # slowest over fastest time per parameter
THREAD_GOAL = 1.6
EXTRA_GOALS = {"lion8bit": 1.0, "portable": 64.0}  # MB; what the system counts is off by some pages
PORTABLE_GOAL = 4.0

Params = list[torch.nn.Parameter]


# ---- Contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One row of the table of optimizers."""

    label: str
    make: Callable[[Params], torch.optim.Optimizer]
    package: str = "torch"
    dtypes: tuple[str, ...] = tuple(DTYPES)


def make_bitsandbytes(params: Params) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit Lion."""
    import bitsandbytes

    return bitsandbytes.optim.Lion8bit(params, lr=LR)


def make_lion_pytorch(params: Params) -> torch.optim.Optimizer:
    """lion-pytorch's Lion, momentum in the parameter's dtype."""
    import lion_pytorch

    return lion_pytorch.Lion(params, lr=LR)


def make_optimi(params: Params) -> torch.optim.Optimizer:
    """torch-optimi's Lion as it comes: for 16-bit parameters with its Kahan summation, one more tensor of state."""
    import optimi

    return optimi.Lion(params, lr=LR)


def fresh_compiler() -> None:
    """Empties torch.compile's cache, which fills up: it compiles anew for each dtype and number of threads, 8 times."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it goes on eagerly and says nothing


class CompiledLion(torch.optim.Optimizer):
    """Lion with fp32 momentum, one torch.compile'd kernel per parameter."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {})
        fresh_compiler()
        self.update = torch.compile(_lion, dynamic=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param, dtype=torch.float32)
                self.update(param.detach().view(-1), param.grad.view(-1), state["momentum"].view(-1))


def _lion(param: Tensor, grad: Tensor, momentum: Tensor) -> None:
    g = grad.float()
    sign = torch.sign(momentum * 0.9 + g * (1 - 0.9))
    param.copy_(param.float() - LR * sign)
    momentum.copy_(momentum * 0.99 + g * (1 - 0.99))


def make_torchao(params: Params) -> torch.optim.Optimizer:
    """torchao's 8-bit AdamW, which compiles itself."""
    from torchao.optim import AdamW8bit

    fresh_compiler()
    return AdamW8bit(params, lr=LR)  # type: ignore[no-any-return]


class PortableLion8bit(Lion8bit):
    """Lion8bit as it steps where it has no kernel, in plain torch."""

    def step(self, closure: None = None) -> None:
        with mock.patch.object(lion8bit_optimizer, "update_", portable.update_):
            super().step()


OURS = "lion8bit"
CONTENDERS: dict[str, Contender] = {
    OURS: Contender("lion8bit", lambda params: Lion8bit(params, lr=LR, weight_rounding="nearest")),
    "lion8bit-stochastic": Contender(
        "lion8bit, stochastic rounding", lambda params: Lion8bit(params, lr=LR), dtypes=("bf16",)
    ),
    "portable": Contender(
        "lion8bit, portable backend", lambda params: PortableLion8bit(params, lr=LR, weight_rounding="nearest")
    ),
    "bitsandbytes": Contender("bitsandbytes Lion8bit", make_bitsandbytes, "bitsandbytes"),
    "lion-pytorch": Contender("lion-pytorch Lion", make_lion_pytorch, "lion_pytorch"),
    "optimi": Contender("torch-optimi Lion", make_optimi, "optimi"),
    "adamw": Contender("torch AdamW(fused=True)", lambda params: torch.optim.AdamW(params, lr=LR, fused=True)),
    "compiled-lion": Contender("torch.compile'd fp32 Lion", CompiledLion),
    "torchao": Contender("torchao AdamW8bit", make_torchao, "torchao"),
}


# ---- Timing ----------------------------------------------------------------------------------------------------------


def time_call(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of one call with cold caches: the device's own time, and what a caller waits; equal on the CPU."""
    flush_cache(device)
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
        return wall, wall
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    flush_cache(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device waits while the host fills the queue, so that the events enclose work and no gaps.
    torch.cuda._sleep(int(2e9 * min(wall, 0.05)))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, wall


def extra_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes during a call above what is held before it; None where the system does not tell.

    On a GPU as requested, before the allocator rounds sizes up.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        call()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before  # type: ignore[no-any-return]
    if sys.platform != "linux":
        return None

    def resident(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
    before = resident("VmHWM")
    call()
    return resident("VmHWM") - before


def streams(size: int, device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """In-place passes over ``size`` bytes in all, each with the bytes that it moves."""
    x = torch.ones(size // 8, device=device)
    y = torch.ones_like(x)
    both = torch.ones(size // 4, device=device)
    return {
        "x.mul_(c)": (lambda: both.mul_(1.0001), 2 * both.nbytes),
        "x.add_(y)": (lambda: x.add_(y), 3 * x.nbytes),
        "x.copy_(y)": (lambda: x.copy_(y), 2 * x.nbytes),
    }


def probe(contender: Contender, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> float | str:
    """Seconds per parameter of a small second step, or why the contender cannot make one."""
    try:
        params = make_params(PROBE_SHAPES, device, *dtypes)
        optimizer = contender.make(params)
        optimizer.step()
        return time_call(optimizer.step, device)[1] / numel(PROBE_SHAPES)
    except Exception as error:  # peers refuse dtypes with whatever exception they meet first
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"


def measure(
    shapes: list[Shape],
    device: torch.device,
    dtype: str,
    contenders: dict[str, Contender],
    repeats: int,
    budget: float,
    tick: Callable[[str], None],
) -> dict[str, Any]:
    """Times all contenders on one model.

    Args:
        shapes: the model.
        device: where.
        dtype: key of `DTYPES`.
        contenders: who takes part.
        repeats: rounds.
        budget: seconds that a contender may take in all, its warm-up apart.
        tick: called with a label after each round and warm-up.

    Returns:
        ``bandwidth`` in bytes per second, and ``rows`` with the figures by contender.
    """
    params = make_params(shapes, device, *DTYPES[dtype])
    count = numel(shapes)
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, tuple[torch.optim.Optimizer, int]] = {}
    for key, contender in contenders.items():
        tick(contender.label)
        if dtype not in contender.dtypes:
            continue
        row: dict[str, Any] = {"label": contender.label}
        rows[key] = row
        seconds = probe(contender, device, DTYPES[dtype])
        if isinstance(seconds, str):
            row |= {"status": "unsupported", "reason": seconds}
        elif seconds * count > budget:
            row |= {
                "status": "extrapolated",
                "ns_per_parameter": seconds * 1e9,
                "ms": {"median": seconds * count * 1e3},
            }
        else:
            optimizer = contender.make(params)
            for _ in range(2):  # the second may still compile
                optimizer.step()
            running[key] = (optimizer, max(1, min(repeats, int(budget / (seconds * count)))))
            row |= {"status": "measured", "bytes_per_parameter": bytes_moved(params, optimizer) / count}

    touched = sum(p.nbytes + p.grad.nbytes for p in params) + state_bytes(running[OURS][0])
    passes = streams(touched, device)
    for call, _ in passes.values():
        call()
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in (*running, *passes)}
    for round_ in range(repeats):
        tick("")
        for name, (call, _) in passes.items():
            times[name].append(time_call(call, device))
        for key, (optimizer, rounds) in running.items():
            if round_ < rounds:
                times[key].append(time_call(optimizer.step, device))

    speeds = {name: size / statistics.median(t for t, _ in times[name]) for name, (_, size) in passes.items()}
    bandwidth = max(speeds.values())
    for key in running:
        own = [seconds for seconds, _ in times[key]]
        ours = [seconds for seconds, _ in times[OURS]]
        ns = statistics.median(own) * 1e9 / count
        rows[key] |= {
            "ms": spread([seconds * 1e3 for seconds in own]),
            "wall_ms": spread([wall * 1e3 for _, wall in times[key]]),
            "ns_per_parameter": ns,
            "share_of_ceiling": rows[key]["bytes_per_parameter"] / bandwidth * 1e9 / ns,
            "time_over_ours": statistics.median(a / b for a, b in zip(own, ours, strict=False)),
            "extra_bytes": extra_memory(running[key][0].step, device),
        }
    for row in rows.values():
        if row["status"] == "extrapolated":
            row["time_over_ours"] = row["ns_per_parameter"] / rows[OURS]["ns_per_parameter"]
    return {"bandwidth": bandwidth, "streams": speeds, "rows": rows}


def bytes_moved(params: Params, optimizer: torch.optim.Optimizer) -> int:
    """The least that a step moves: parameters and state read and written, gradients read."""
    return sum(2 * param.nbytes + param.grad.nbytes for param in params) + 2 * state_bytes(optimizer)


def measure_sizes(sizes: Sequence[int], repeats: int, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times lion8bit on fp32 tensors of growing size, as far as the machine's memory goes, and on one of `FEW`.

    Returns:
        ``parameters``, ``ms``, and ``ns_per_parameter`` of what is beyond the step of few.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 32
    device = torch.device("cpu")
    optimizers: dict[int, torch.optim.Optimizer] = {}
    for size in (FEW, *sizes):
        tick(f"{size / 1e6:.0f}M parameters")
        if 10 * (size + sum(optimizers)) > SHARE_OF_MEMORY * memory:
            break
        optimizers[size] = CONTENDERS[OURS].make(make_params([(size // 1024, 1024)], device, *DTYPES["fp32"]))
        optimizers[size].step()
    times: dict[int, list[float]] = {size: [] for size in optimizers}
    for _ in range(repeats):
        for size, optimizer in optimizers.items():
            times[size].append(time_call(optimizer.step, device)[0])
    records = []
    fixed = statistics.median(times[FEW])
    for size, seconds in times.items():
        ns = (statistics.median(seconds) - fixed) * 1e9 / size
        records.append({"parameters": size, "ms": spread([t * 1e3 for t in seconds]), "ns_per_parameter": ns})
    return records


def measure_threads(
    shapes: list[Shape], threads: int, dtypes: Sequence[str], repeats: int, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Times lion8bit on one thread and on ``threads``, in turn."""
    records = []
    for dtype in dtypes:
        tick(f"threads, {dtype}")
        params = make_params(shapes, torch.device("cpu"), *DTYPES[dtype])
        optimizer = CONTENDERS[OURS].make(params)
        optimizer.step()
        times: dict[int, list[float]] = {count: [] for count in (1, threads)}
        for _ in range(repeats):
            for count, seconds in times.items():
                torch.set_num_threads(count)
                seconds.append(time_call(optimizer.step, params[0].device)[0])
        one, most = times.values()
        records.append(
            {
                "dtype": dtype,
                "threads": threads,
                "gb_per_s": bytes_moved(params, optimizer) / statistics.median(one) / 1e9,  # of one thread
                "speedup": statistics.median(a / b for a, b in zip(one, most, strict=True)),
            }
        )
    return records


# ---- Goals -----------------------------------------------------------------------------------------------------------


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals with what was measured, on one tensor at the most threads; ``met`` is None where nothing was."""
    runs = [run for run in results["runs"] if run["device"] == "cpu" and run["tensors"] == 1]
    by_dtype = {run["dtype"]: run for run in sorted(runs, key=lambda run: run["threads"])}

    def figures(key: str, name: str) -> dict[str, float]:
        found = {dtype: run["rows"].get(key, {}).get(name) for dtype, run in by_dtype.items()}
        return {dtype: figure for dtype, figure in found.items() if figure is not None}

    table: list[dict[str, Any]] = []

    def judge(
        goal: str, found: dict[str, float], form: str, *, least: float = -math.inf, most: float = math.inf
    ) -> None:
        requirement = f"at least {form.format(least)}" if least > 0 else f"at most {form.format(most)}"
        measured = ", ".join(f"{case} {form.format(figure)}" for case, figure in found.items())
        met = all(least <= figure <= most for figure in found.values()) if found else None
        table.append({"goal": goal, "requirement": requirement, "measured": measured or "-", "met": met})

    for dtype, key, least in CEILING_GOALS:
        share = {name: figure for name, figure in figures(key, "share_of_ceiling").items() if name == dtype}
        judge(f"share of the ceiling, {CONTENDERS[key].label}, {dtype}", share, "{:.0%}", least=least)
    for key, least in RATIO_GOALS.items():
        judge(f"{CONTENDERS[key].label}, time over ours", figures(key, "time_over_ours"), "{:.1f}x", least=least)
    each = {record["parameters"]: record["ns_per_parameter"] for record in results["sizes"][1:]}
    if each:
        spread_ = {f"{min(each) / 1e6:.0f}M to {max(each) / 1e6:.0f}M": max(each.values()) / min(each.values())}
        judge("time per parameter beyond a step of few, largest over smallest", spread_, "{:.2f}x", most=LINEAR_GOAL)
    speedups = {
        record["dtype"]: record["speedup"]
        for record in results["threads"]
        if record["gb_per_s"] < by_dtype[record["dtype"]]["bandwidth"] / 1e9 / THREAD_GOAL
    }
    judge("all threads over one that does not saturate memory", speedups, "{:.2f}x", least=THREAD_GOAL)
    for key, most in EXTRA_GOALS.items():
        extra = {dtype: figure / 1e6 for dtype, figure in figures(key, "extra_bytes").items()}
        judge(f"extra memory of a step, {CONTENDERS[key].label}", extra, "{:.0f} MB", most=most)
    lion = figures("lion-pytorch", "ns_per_parameter").get("fp32", math.nan)
    ratios = {dtype: ns / lion for dtype, ns in figures("portable", "ns_per_parameter").items()}
    judge("time of the portable backend over fp32 lion-pytorch", ratios, "{:.1f}x", most=PORTABLE_GOAL)
    return table


# ---- The report ------------------------------------------------------------------------------------------------------


def where(run: dict[str, Any]) -> str:
    """Device and threads of a run, for people."""
    return "cuda" if run["device"] == "cuda" else f"cpu, {run['threads']} thread" + "s" * (run["threads"] > 1)


def model_table(runs: list[dict[str, Any]]) -> Table:
    """The table of one model in one place, over all dtypes."""
    first = runs[0]
    table = Table(title=f"{first['model']} ({first['parameters'] / 1e6:.1f}M parameters), {where(first)}")
    table.title_justify, table.title_style = "left", "bold"
    table.add_column("dtype")
    table.add_column("optimizer")
    headings = ["ms", "min to max", "ns/param", "bytes/param", "of the ceiling", "time over ours", "extra MB"]
    if first["device"] == "cuda":
        headings.insert(1, "wall ms")
    for heading in headings:
        table.add_column(heading, justify="right")
    for run in runs:
        ours = run["rows"][OURS]["bytes_per_parameter"]
        ceiling = ours / run["bandwidth"] * 1e9
        table.add_row(
            run["dtype"],
            f"(stream at {run['bandwidth'] / 1e9:.1f} GB/s)",
            f"{ceiling * run['parameters'] / 1e6:.2f}",
            *[""] * (len(headings) - 6),
            f"{ceiling:.3f}",
            f"{ours:.2f}",
            "100%",
            f"{ceiling / run['rows'][OURS]['ns_per_parameter']:.2f}x",
            "",
            style="dim",
        )
        for key, row in run["rows"].items():
            cells = _cells(row, first["device"] == "cuda")
            style = "green" if key.startswith(OURS) else None
            label = row["label"] + (f": {row['reason'][:50]}" if row["status"] == "unsupported" else "")
            table.add_row("", label, *cells, style=style)
        table.add_section()
    return table


def _cells(row: dict[str, Any], cuda: bool) -> list[str]:
    blank = [""] * cuda
    if row["status"] == "unsupported":
        return ["unsupported", *blank, *[""] * 6]
    if row["status"] == "extrapolated":
        ms, ns, ratio = row["ms"]["median"], row["ns_per_parameter"], row["time_over_ours"]
        return [f"~{ms:.0f}", *blank, "", f"~{ns:.1f}", "", "", f"~{ratio:.0f}x", ""]
    return [
        f"{row['ms']['median']:.2f}",
        *([f"{row['wall_ms']['median']:.2f}"] if cuda else []),
        f"{row['ms']['min']:.2f} to {row['ms']['max']:.2f}",
        f"{row['ns_per_parameter']:.3f}",
        f"{row['bytes_per_parameter']:.2f}",
        f"{row['share_of_ceiling']:.0%}",
        f"{row['time_over_ours']:.2f}x",
        "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}",
    ]


def draw(pyplot: Any, runs: list[dict[str, Any]]) -> Any:
    """One panel per model and place: ns per parameter, with a line where the memory's limit is."""
    models = list(dict.fromkeys(run["model"] for run in runs))
    places = list(dict.fromkeys(where(run) for run in runs))
    size = (7 * len(places), 4.5 * len(models))
    figure, axes = pyplot.subplots(len(models), len(places), figsize=size, squeeze=False, layout="constrained")
    for run_model, line in zip(models, axes, strict=True):
        for place, axis in zip(places, line, strict=True):
            here = [run for run in runs if run["model"] == run_model and where(run) == place]
            bars = [
                (f"{run['dtype']}: {row['label']}", row, run["bandwidth"], key)
                for run in here
                for key, row in run["rows"].items()
                if row["status"] != "unsupported"
            ]
            for position, (_, row, bandwidth, key) in enumerate(bars):
                colour = "tab:green" if key.startswith(OURS) else "tab:gray"
                hatch = "//" if row["status"] == "extrapolated" else None
                axis.barh(position, row["ns_per_parameter"], color=colour, hatch=hatch)
                axis.text(row["ns_per_parameter"], position, f" {row['ns_per_parameter']:.2f}", va="center", fontsize=8)
                if "bytes_per_parameter" in row:
                    limit = row["bytes_per_parameter"] / bandwidth * 1e9
                    axis.plot([limit, limit], [position - 0.4, position + 0.4], color="black")
            axis.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
            axis.invert_yaxis()
            axis.set(xscale="log", title=f"{run_model}, {place}", xlabel="ns per parameter (black: its memory limit)")
            axis.margins(x=0.15)
    return figure


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Times everything that is asked for, prints the tables and writes the files."""
    options = parser(DESCRIPTION, EPILOG)
    plot_option(options)
    cores = os.cpu_count() or 1
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    options.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    options.add_argument("--dtype", nargs="+", choices=list(DTYPE_KEYS), default=list(DTYPE_KEYS), help="default: all")
    options.add_argument("--device", nargs="+", choices=["cpu", "cuda"], default=devices, help="default: all there are")
    options.add_argument(
        "--threads", type=int, nargs="+", help=f"CPU threads, each in turn (default: {'1 2' if cores > 1 else '1'})"
    )
    options.add_argument("--repeats", type=int, help="rounds (default: 15; 3 with --quick)")
    options.add_argument(
        "--budget", type=float, default=10.0, help="seconds for one contender on one model (default: 10)"
    )
    others = [key for key in CONTENDERS if key != OURS]
    options.add_argument(
        "--skip", nargs="+", metavar="ROW", choices=others, default=[], help=f"not these of {', '.join(others)}"
    )
    options.add_argument(
        "--add", type=Path, metavar="FILE", help="begin with the figures of this file, an earlier --json"
    )
    settings: argparse.Namespace = options.parse_args()

    out = console()
    record = environment()
    out.print(describe(record), style="dim")
    if record["load_average"] and record["load_average"] > 0.5:
        out.print(f"the machine is busy (load {record['load_average']}): trust ratios only", style="yellow")
    contenders = {key: c for key, c in CONTENDERS.items() if available(c.package) and key not in settings.skip}
    for key in CONTENDERS.keys() - contenders.keys() - set(settings.skip):
        out.print(f"{CONTENDERS[key].label} is not installed and left out", style="yellow")
    models = QUICK_MODELS if settings.quick else MODELS
    repeats = settings.repeats or (3 if settings.quick else 15)
    threads = settings.threads or ([1] if settings.quick or cores == 1 else [1, 2])
    dtypes = [DTYPE_KEYS[key] for key in settings.dtype]
    places = [
        (device, count) for device in settings.device for count in (threads if device == "cpu" else [max(threads)])
    ]

    results: dict[str, Any] = {"environment": record, "runs": [], "sizes": [], "threads": []}
    if settings.add:
        results = json.loads(settings.add.read_text()) | {"environment": record}
    with progress("step time") as bar:
        total = len(places) * len(settings.model) * len(dtypes) * (len(contenders) + repeats)
        task = bar.add_task("", total=total)

        def tick(label: str) -> None:
            bar.update(task, advance=1, description=f"{at} {label}")

        for device, count in places:
            torch.set_num_threads(count)
            for model in settings.model:
                name, shapes = models[model]
                here = []
                for dtype in dtypes:
                    at = f"{name}, {device}, {count} threads, {dtype}"
                    result = measure(shapes, torch.device(device), dtype, contenders, repeats, settings.budget, tick)
                    place = {"model": name, "tensors": len(shapes), "parameters": numel(shapes), "dtype": dtype}
                    here.append({**place, "device": device, "threads": count, **result})
                results["runs"] = [run for run in results["runs"] if not any(same(run, new) for new in here)] + here
                out.print(model_table(here))
        if "64M" in settings.model and "cpu" in settings.device:
            at = "lion8bit"
            results["sizes"] = measure_sizes(SIZES[:2] if settings.quick else SIZES, min(repeats, 7), tick)
            if max(threads) > 1:
                results["threads"] = measure_threads(models["64M"][1], max(threads), dtypes, repeats, tick)
    results["goals"] = goals(results)
    if results["sizes"]:
        sizes = new_table("One fp32 tensor, the most threads", [], ["parameters", "ms", f"ns/param beyond {FEW}'s"])
        for size in results["sizes"]:
            ms, ns = size["ms"]["median"], size["ns_per_parameter"]
            sizes.add_row(f"{size['parameters']:,}", f"{ms:.2f}", f"{ns:.3f}" if ns else "")
        out.print(sizes)
    out.print(goal_table(results["goals"], settings.quick))
    write_json(settings.json, "step_time", settings, results)
    save_figure(lambda pyplot: draw(pyplot, results["runs"]), settings.plot)


def same(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs are of the same case."""
    return all(run[name] == other[name] for name in ("model", "dtype", "device", "threads"))


if __name__ == "__main__":
    main()
