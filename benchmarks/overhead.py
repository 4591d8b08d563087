"""Measures what a step costs besides its kernel: Python, checks and calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from common import Cell, Row, begin, installed, parser, progress, rows_table, spread, write_json
from contenders import CONTENDERS as TIMED
from contenders import Contender, Params, optimizer, ours
from rich.table import Table

from lion8bit.backends import cpu

DESCRIPTION = """\
What does a warmed optimizer step cost on the CPU besides its arithmetic? Many parameters of a few elements are stepped
on one thread, so that kernels take next to no time. For lion8bit the native kernel is also replaced by a function that
does nothing. Contenders take turns; the median and the least of all steps are reported, in us. Gradients are

  kept           the same tensors at every step
  new            assigned again before every step, maybe elsewhere in memory
  from backward  made by zero_grad() and a backward pass, after which the processor's caches are cold for the optimizer

`torch._foreach_mul_`, one call that multiplies the parameters by 1, is no optimizer. It is the cost of one pass of
torch over so many tensors.
"""

EPILOG = """\
The goal for lion8bit without its kernel is 45 us and 0.85 us for each parameter. The verdicts are about the least
time, because other programs disturb the median.

examples:
  python benchmarks/overhead.py
  python benchmarks/overhead.py --tensors 300 --json o.json
"""

ELEMENTS = 8
ROUNDS = 20
WARM_UP, STEPS = 3, 10  # a contender's turn: steps until its code and state are in the caches, steps that count
GOAL_FIXED, GOAL_PER_TENSOR = 45.0, 0.85  # us
OURS = "lion8bit-no-kernel"


def multiply(params: Params) -> Any:
    """An object whose step is one call of torch for all parameters."""
    return SimpleNamespace(step=partial(torch._foreach_mul_, [param.detach() for param in params], 1.0))


BITSANDBYTES = optimizer("bitsandbytes.optim", "Lion8bit", min_8bit_size=0)
CONTENDERS: dict[str, Contender] = {  # the first two with quantized momentum even for so few elements
    OURS: Contender("lion8bit without its kernel", ours(min_8bit_size=0)),
    "lion8bit": Contender("lion8bit", ours(min_8bit_size=0)),
    "bitsandbytes": Contender("bitsandbytes Lion8bit", BITSANDBYTES, "bitsandbytes"),
    "lion-pytorch": TIMED["lion-pytorch"],
    "optimi": Contender("torch-optimi Lion(foreach=True)", optimizer("optimi", "Lion", foreach=True), "optimi"),
    "adamw-foreach": Contender("torch AdamW(foreach=True)", optimizer("torch.optim", "AdamW", foreach=True)),
    "adamw-fused": TIMED["adamw"],
    "foreach-mul": Contender("torch._foreach_mul_(params, 1.0)", multiply),
}


@contextmanager
def no_kernel() -> Iterator[None]:
    """Replaces the native kernel by a function that does nothing."""
    with mock.patch.object(cpu.load_library(), "lion8bit_update", _nothing):
        yield


def _nothing(*arguments: Any) -> int:
    return 0


def new(params: Params) -> None:
    """Assigns new gradients."""
    for param in params:
        param.grad = torch.randn(ELEMENTS)


def from_backward(params: Params) -> None:
    """Makes new gradients by autograd."""
    for param in params:
        param.grad = None
    torch.autograd.backward(params, [torch.ones(ELEMENTS)] * len(params))


GRADIENTS: dict[str, Callable[[Params], None]] = {
    "kept": lambda params: None,
    "new": new,
    "from backward": from_backward,
}


def measure(tensors: int, gradients: str, contenders: dict[str, Contender], rounds: int) -> list[Row]:
    """Times all contenders in turn on ``tensors`` parameters with one of `GRADIENTS`."""
    running: dict[str, tuple[Params, Callable[[], Any]]] = {}
    times: dict[str, list[float]] = {key: [] for key in contenders}
    for key, contender in contenders.items():
        params = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(tensors)]
        new(params)
        running[key] = params, contender.make(params).step
    for _ in range(rounds):
        for key, (params, step) in running.items():
            with no_kernel() if key == OURS else nullcontext():
                for turn in range(-WARM_UP, STEPS):
                    GRADIENTS[gradients](params)
                    start = time.perf_counter()
                    step()
                    seconds = time.perf_counter() - start
                    if turn >= 0:
                        times[key].append(seconds * 1e6)
    return [
        {"tensors": tensors, "gradients": gradients, "optimizer": key, "us": spread(us)} for key, us in times.items()
    ]


def table(rows: list[Row]) -> Table:
    """The table of one number of tensors and one kind of gradients."""
    tensors, ours = rows[0]["tensors"], rows[0]["us"]["min"]
    columns: dict[str, Cell] = {
        "optimizer": lambda row: CONTENDERS[row["optimizer"]].label,
        "us, median": "{us[median]:.0f}",
        "least": "{us[min]:.0f}",
        "us per parameter": lambda row: f"{row['us']['median'] / tensors:.2f}",
        "over ours": lambda row: f"{row['us']['min'] / ours:.1f}x",
    }
    return rows_table(f"{tensors} parameters of {ELEMENTS}, gradients {rows[0]['gradients']}", rows, columns)


def main() -> None:
    """Times everything that is selected, prints the tables and the verdicts, writes the file."""
    options = parser(DESCRIPTION, EPILOG)
    options.add_argument("--tensors", type=int, nargs="+", default=[30, 300], help="parameters (default: 30 300)")
    settings = options.parse_args()
    torch.manual_seed(0)
    out, record = begin(threads=1)
    contenders = installed(CONTENDERS, out)
    if not cpu.available_kernels():
        raise SystemExit("lion8bit was built without its native library: there is no kernel to leave out")

    rows: list[Row] = []
    cases = [(tensors, gradients) for tensors in settings.tensors for gradients in GRADIENTS]
    with progress("overhead") as bar:
        for tensors, gradients in bar.track(cases):
            found = measure(tensors, gradients, contenders, 1 if settings.quick else ROUNDS)
            least, limit = found[0]["us"]["min"], GOAL_FIXED + GOAL_PER_TENSOR * tensors
            found[0] |= {"goal_us": limit, "met": least <= limit}
            out.print(table(found))
            out.print(f"goal {limit:.0f} us without the kernel: {least:.0f}, {'met' if least <= limit else 'missed'}\n")
            rows += found
    write_json(settings.json, "overhead", settings, {"environment": record, "rows": rows})


if __name__ == "__main__":
    main()
