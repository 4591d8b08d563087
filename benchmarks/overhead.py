"""Owns the measurement of what a step costs beside its kernel: Python, checks, calls; not of the kernel's speed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from common import available, console, describe, environment, parser, progress, spread, write_json
from rich.table import Table

from lion8bit import Lion8bit
from lion8bit.backends import cpu

DESCRIPTION = """\
What does a warmed optimizer step cost on the CPU beside its arithmetic? Many parameters of a few elements are stepped
on one thread, so that kernels take next to no time; for lion8bit the native kernel is also replaced by a function
that does nothing. Contenders take turns; the median and the least of all steps are reported, in us. Gradients are

  kept           the same tensors at every step
  new            assigned anew before every step, and perhaps elsewhere in memory
  from backward  made by zero_grad() and a backward pass, which also leaves the processor's caches to the optimizer cold

`torch._foreach_mul_`, one call that multiplies the parameters by 1, is no optimizer: it is what one pass of torch over
so many tensors costs.
"""

EPILOG = """\
The goal for lion8bit without its kernel is 100 us and 0.35 us for each parameter. Where a machine is busy the least of
many steps says more than their median; verdicts are about the least.

examples:
  python benchmarks/overhead.py
  python benchmarks/overhead.py --tensors 300 --json o.json
"""

ELEMENTS = 8
WARM_UP, STEPS = 3, 10  # a contender's turn: steps until its code and state are in the caches, steps that count
GOAL_FIXED, GOAL_PER_TENSOR = 100.0, 0.35  # us
FLOOR = "foreach-mul"

Params = list[torch.nn.Parameter]
Step = Callable[[], Any]


# ---- Contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    label: str
    make: Callable[[Params], Step]
    package: str = "torch"


def make_ours(params: Params) -> Step:
    """Lion8bit with quantized momentum even for so few elements."""
    return Lion8bit(params, min_8bit_size=0).step


@contextmanager
def no_kernel() -> Iterator[None]:
    """Puts a function that does nothing in the place of the native kernel."""
    with mock.patch.object(cpu.load_library(), "lion8bit_update", _nothing):
        yield


def _nothing(*arguments: Any) -> int:
    return 0


def make_bitsandbytes(params: Params) -> Step:
    """bitsandbytes' 8-bit Lion, quantized momentum likewise."""
    import bitsandbytes

    return bitsandbytes.optim.Lion8bit(params, min_8bit_size=0).step


def make_lion_pytorch(params: Params) -> Step:
    """lion-pytorch's Lion."""
    import lion_pytorch

    return lion_pytorch.Lion(params).step


def make_optimi(params: Params) -> Step:
    """torch-optimi's Lion, over lists of tensors."""
    import optimi

    return optimi.Lion(params, lr=1e-4, foreach=True).step


OURS = "lion8bit-no-kernel"
CONTENDERS: dict[str, Contender] = {
    OURS: Contender("lion8bit without its kernel", make_ours, "lion8bit"),
    "lion8bit": Contender("lion8bit", make_ours, "lion8bit"),
    "bitsandbytes": Contender("bitsandbytes Lion8bit", make_bitsandbytes, "bitsandbytes"),
    "lion-pytorch": Contender("lion-pytorch Lion", make_lion_pytorch, "lion_pytorch"),
    "optimi": Contender("torch-optimi Lion(foreach=True)", make_optimi, "optimi"),
    "adamw-foreach": Contender(
        "torch AdamW(foreach=True)", lambda params: torch.optim.AdamW(params, foreach=True).step
    ),
    "adamw-fused": Contender("torch AdamW(fused=True)", lambda params: torch.optim.AdamW(params, fused=True).step),
    FLOOR: Contender(
        "torch._foreach_mul_(params, 1.0)",
        lambda params: partial(torch._foreach_mul_, [param.detach() for param in params], 1.0),
    ),
}


# ---- Timing ----------------------------------------------------------------------------------------------------------


def new(params: Params) -> None:
    """Assigns new gradients."""
    for param in params:
        param.grad = torch.randn(ELEMENTS)


def from_backward(params: Params) -> None:
    """Has autograd make new gradients."""
    for param in params:
        param.grad = None
    torch.autograd.backward(params, [torch.ones(ELEMENTS)] * len(params))


GRADIENTS: dict[str, Callable[[Params], None]] = {
    "kept": lambda params: None,
    "new": new,
    "from backward": from_backward,
}


def measure(
    tensors: int, gradients: str, contenders: dict[str, Contender], rounds: int, tick: Callable[[], Any]
) -> dict[str, Any]:
    """Times all contenders on so many parameters.

    Args:
        tensors: parameters.
        gradients: key of `GRADIENTS`.
        contenders: who takes part.
        rounds: turns of each.
        tick: called after each round.

    Returns:
        The rows by contender, times in us.
    """
    running: dict[str, tuple[Params, Step]] = {}
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for key, contender in contenders.items():
        params = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(tensors)]
        new(params)
        running[key] = params, contender.make(params)
    for _ in range(rounds):
        for key, (params, step) in running.items():
            with no_kernel() if key == OURS else nullcontext():
                for turn in range(-WARM_UP, STEPS):
                    GRADIENTS[gradients](params)
                    start = time.perf_counter()
                    step()
                    seconds = time.perf_counter() - start
                    if turn >= 0:
                        times[key].append(seconds)
        tick()
    rows: dict[str, Any] = {}
    for key, contender in contenders.items():
        figures = spread([seconds * 1e6 for seconds in times[key]])
        rows[key] = {"label": contender.label, "us": figures, "us_per_tensor": figures["median"] / tensors}
    return rows


# ---- The report ------------------------------------------------------------------------------------------------------


def goal(tensors: int) -> float:
    """The most that a step may cost without its kernel, in us."""
    return GOAL_FIXED + GOAL_PER_TENSOR * tensors


def run_table(run: dict[str, Any]) -> Table:
    """The table of one number of tensors and one kind of gradients."""
    table = Table(title=f"{run['tensors']} parameters of {ELEMENTS}, gradients {run['gradients']}")
    table.title_justify, table.title_style = "left", "bold"
    table.add_column("optimizer")
    for heading in ("us, median", "least", "us per parameter", "over ours"):
        table.add_column(heading, justify="right")
    ours = run["rows"][OURS]["us"]["min"]
    for key, row in run["rows"].items():
        table.add_row(
            row["label"],
            f"{row['us']['median']:.0f}",
            f"{row['us']['min']:.0f}",
            f"{row['us_per_tensor']:.2f}",
            f"{row['us']['min'] / ours:.1f}x",
            style="green" if key == OURS else "dim" if key == FLOOR else None,
        )
    return table


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Times everything that is asked for, prints the tables and the verdicts, writes the file."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--tensors", type=int, nargs="+", default=[30, 300], help="parameters (default: 30 300)")
    options.add_argument(
        "--rounds", type=int, help=f"turns of {STEPS} steps for each contender (default: 20; 1 with --quick)"
    )
    settings: argparse.Namespace = options.parse_args()
    rounds = settings.rounds or (1 if settings.quick else 20)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    out = console()
    record = environment()
    out.print(describe(record), style="dim")
    if record["load_average"] and record["load_average"] > 0.5:
        out.print(f"the machine is busy (load {record['load_average']}): trust the least times", style="yellow")
    contenders = {key: c for key, c in CONTENDERS.items() if available(c.package)}
    for key in CONTENDERS.keys() - contenders.keys():
        out.print(f"{CONTENDERS[key].label} is not installed and left out", style="yellow")
    if not cpu.available_kernels():
        raise SystemExit("lion8bit was built without its native library: there is no kernel to leave out")

    runs: list[dict[str, Any]] = []
    cases = [(tensors, gradients) for tensors in settings.tensors for gradients in GRADIENTS]
    with progress("overhead") as bar:
        task = bar.add_task("", total=len(cases) * rounds)
        for tensors, gradients in cases:
            rows = measure(tensors, gradients, contenders, rounds, lambda: bar.update(task, advance=1))
            least = rows[OURS]["us"]["min"]
            met = least <= goal(tensors)
            runs.append(
                {"tensors": tensors, "gradients": gradients, "goal_us": goal(tensors), "met": met, "rows": rows}
            )
            out.print(run_table(runs[-1]))
            out.print(f"goal {goal(tensors):.0f} us without the kernel: {least:.0f}, {'met' if met else 'missed'}\n")
    write_json(settings.json, "overhead", settings, {"environment": record, "runs": runs})


if __name__ == "__main__":
    main()
