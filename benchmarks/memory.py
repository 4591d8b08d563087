"""Measures the memory of training by part, by phase and by optimizer, beside what `lion8bit.estimate` plans."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Row, allocations, begin, installed, parser, progress, rows_table, save_figure, write_json
from contenders import CONTENDERS, Contender, optimizer, ours
from machine import process_bytes, reset_process_peak
from rich.table import Table
from torch import Tensor, nn

from lion8bit import estimate, fuse_into_backward
from lion8bit.tools.memory import GIB, is_out_of_memory, limit_memory, state_bytes

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import llama

DESCRIPTION = """\
How much memory does training take, in which phase, and how much of it depends on the optimizer? Transformers in the
shapes of public models, with random weights, are trained for a few steps on the CPU by each optimizer:

  full         full fine-tuning in bf16 with activation checkpointing: the case that this library is for
  lora         adapters of rank 16 only: the state of few parameters, so no optimizer makes a difference
  activations  a longer sequence without checkpointing: at the peak there are no gradients yet, so gradient release does
               not help
  limit        full fine-tuning in a process with a memory limit, at which some optimizers fail

Columns:

  weights, gradients, state   bytes of the tensors; gradients are what is left when the backward pass ends
  activations                 tensors that the forward pass keeps for the backward pass
  forward, backward, step     the largest sum of living tensors during each; the largest of the three is the peak
  planned                     the peak by `lion8bit estimate`
  process                     peak of the process's resident memory above that after the imports, in another iteration
"""

EPILOG = """\
Each row is a separate process. Living tensors are counted by torch's profiler in one iteration; the process's memory is
read from /proc (VmHWM, reset by clear_refs) in another. glibc returns each block of 64 KiB and more at once
(MALLOC_MMAP_THRESHOLD_), so that the process's memory follows the living tensors. The limit is RLIMIT_DATA beyond what
the imports take.

examples:
  python benchmarks/memory.py
  python benchmarks/memory.py --case full --contender adamw lion8bit lion8bit-release
  python benchmarks/memory.py --json memory.json --plot memory.png
"""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PART_COLOURS = {"weights": "#0072B2", "optimizer state": "#009E73", "gradients, activations and temporaries": "#E69F00"}
PHASES = ("forward", "backward", "step")


# ---- Cases and contenders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is trained, in batches of one sequence. ``limit`` is in GiB; no ``contenders`` means all."""

    title: str
    config: llama.Config
    dtype: str = "bf16"
    sequence: int = 16  # few: processors without instructions for bf16 need a minute for 64
    checkpointing: bool = True
    lora: int | None = None
    limit: float | None = None
    contenders: tuple[str, ...] = ()


FEW = ("adamw", "lion8bit", "lion8bit-release")
SMOL = llama.SHAPES["smollm-135m"]
EIGHT_LAYERS = replace(SMOL, num_hidden_layers=8)
TINY = llama.Config(128, 384, 4, 4, 2, 1000, 512, 1e4)
CASES = {
    "full": Case("SmolLM-135M, bf16, 16 tokens, checkpointing", SMOL),
    "lora": Case("the same with LoRA of rank 16", SMOL, lora=16, contenders=FEW),
    "activations": Case(
        "8 of its layers, fp32, 512 tokens, no checkpointing", EIGHT_LAYERS, "fp32", 512, False, contenders=FEW
    ),
    "limit": Case("SmolLM-135M, bf16, 16 tokens, checkpointing, 0.95 GiB", SMOL, limit=0.95, contenders=FEW),
}
QUICK_CASES = {
    "full": Case("4 layers of 128", TINY, sequence=32, contenders=FEW),
    "lora": Case("4 layers of 128", TINY, sequence=32, lora=4, contenders=("lion8bit",)),
    "activations": Case("4 layers of 128", TINY, "fp32", 512, False, contenders=("lion8bit",)),
    "limit": Case("4 layers of 128", TINY, sequence=32, limit=0.002, contenders=("adamw",)),
}

compensated = ours(weight_rounding="compensated")
ALL: dict[str, Contender] = {  # with the plan's keys, where it has them
    "adamw-fp32": Contender("AdamW, fp32 weights under autocast", CONTENDERS["adamw"].make),
    "adamw": Contender("AdamW", optimizer("torch.optim", "AdamW")),
    "adamw-fused": Contender("AdamW, fused", CONTENDERS["adamw"].make),
    "adamw8bit": Contender("bitsandbytes AdamW8bit", optimizer("bitsandbytes.optim", "AdamW8bit"), "bitsandbytes"),
    "lion-pytorch": CONTENDERS["lion-pytorch"],
    "optimi": CONTENDERS["optimi"],
    "lion": Contender("fp32 Lion", optimizer("lion8bit", "Lion")),
    "bitsandbytes": CONTENDERS["bitsandbytes"],
    "torchao": CONTENDERS["torchao"],
    "lion8bit-nearest": Contender("Lion8bit, nearest", CONTENDERS["lion8bit"].make),
    "lion8bit": Contender("Lion8bit", ours()),
    "lion8bit-compensated": Contender("Lion8bit, 24-bit weights", compensated),
    "lion8bit-release": Contender("Lion8bit, release", ours()),
    "lion8bit-release-compensated": Contender("Lion8bit, release, 24-bit", compensated),
}
SAME_PLAN = {"adamw-fused": "adamw", "lion8bit-nearest": "lion8bit"}


class Adapted(nn.Module):
    """A linear layer with a trained fp32 adapter of low rank."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result + F.linear(F.linear(x.float(), self.down), self.up).to(x.dtype)


def adapt(model: llama.Llama, rank: int) -> None:
    """Freezes a model and gives an adapter to each linear layer within its blocks."""
    model.requires_grad_(False)
    for part in list(model.model.layers.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, Adapted(child, rank))


# ---- Measuring -------------------------------------------------------------------------------------------------------


def tensors_of(call: Callable[[], Any]) -> tuple[int, int]:
    """Highest and final number of CPU tensor bytes that a call holds beyond those before it."""
    held = list(itertools.accumulate(allocations(call), initial=0))
    return max(held), held[-1]


class Trainer:
    """A model, its optimizer and the phases of an iteration."""

    def __init__(self, case: Case, key: str) -> None:
        torch.manual_seed(0)
        self.autocast = key == "adamw-fp32"
        weights = torch.float32 if self.autocast or case.dtype == "fp32" else torch.bfloat16
        self.model = llama.build(case.config, torch.device("cpu"), weights)
        self.model.checkpointing = case.checkpointing
        if case.lora:
            adapt(self.model, case.lora)
        self.tokens = torch.randint(case.config.vocab_size, (1, case.sequence))
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.outputs: tuple[Tensor, Tensor] | None = None
        self.optimizer = ALL[key].make(self.params)
        if "release" in key:
            fuse_into_backward(self.model, self.optimizer)

    def forward(self) -> None:
        """Keeps loss and logits until the step, as transformers does."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(self.tokens)
            targets = F.pad(self.tokens[:, 1:], (0, 1), value=-100)
            self.outputs = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), logits

    def backward(self) -> None:
        assert self.outputs is not None
        self.outputs[0].backward()

    def step(self) -> None:
        self.outputs = None
        self.optimizer.step()

    def phases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The phases by name; gradients are dropped after the last."""
        for name in PHASES:
            yield name, getattr(self, name)
        self.optimizer.zero_grad()

    def gradient_bytes(self) -> int:
        return sum(param.grad.nbytes for param in self.params if param.grad is not None)

    def held(self) -> int:
        """Bytes of weights, gradients and state."""
        return sum(t.nbytes for t in self.model.parameters()) + self.gradient_bytes() + state_bytes(self.optimizer)

    def count(self) -> Row:
        """An iteration: the peak of its living tensors by phase, and the activations."""
        peaks, now, activations = {}, self.held(), 0
        for name, phase in self.phases():
            highest, change = tensors_of(phase)
            peaks[name] = now + max(0, highest)
            now += change
            if name == "forward":
                activations = now - self.held()
        return {"activations": activations, **peaks}


def measure(case: Case, key: str) -> Row:
    """The figures of one row; if memory runs out, in which phase."""
    resident, phase = process_bytes("VmRSS"), "building"
    if case.limit is not None:
        limit_memory(torch.device("cpu"), case.limit)
    try:
        trainer = Trainer(case, key)
        for name, run in trainer.phases():  # this iteration makes the state
            phase = name
            run()
        phase = "counted iteration"
        row = trainer.count()
        reset_process_peak()
        phase = "watched iteration"
        for _, run in trainer.phases():
            run()
            row["gradients"] = max(row.get("gradients", 0), trainer.gradient_bytes())
        row["process"] = process_bytes("VmHWM") - resident
    except Exception as error:  # peers refuse dtypes with different exceptions
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        return {"status": "out of memory" if is_out_of_memory(error) else "failed", "phase": phase, "reason": reason}
    return {
        "status": "measured",
        "weights": sum(param.nbytes for param in trainer.model.parameters()),
        "state": state_bytes(trainer.optimizer),
        **row,
        "peak_in": max(PHASES, key=lambda name: row[name]),
        "planned": planned(case, SAME_PLAN.get(key, key)),
    }


def planned(case: Case, row: str) -> int | None:
    """The peak by the plan, where it has this row."""
    with torch.device("meta"):
        model = llama.Llama(case.config)
    options = {"dtype": case.dtype, "batch": 1, "sequence": case.sequence, "lora": case.lora}
    rows = estimate(model, checkpointing=case.checkpointing, **options).rows
    return rows[row].total if row in rows else None


def in_own_process(name: str, key: str, settings: argparse.Namespace) -> Row:
    """`measure` in a fresh process, whose memory is its own."""
    command = [sys.executable, __file__, "--worker", "--case", name, "--contender", key]
    command += ["--quick"] if settings.quick else []
    command += ["--threads", str(settings.threads)] if settings.threads else []
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        errors = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"status": "failed", "phase": "process", "reason": errors[-1][:200]}
    row: Row = json.loads(lines[-1])
    return row


# ---- The report ------------------------------------------------------------------------------------------------------


def peak(row: Row) -> int:
    """The largest number of bytes of living tensors; 0 where nothing was measured."""
    return max(row.get(name, 0) for name in PHASES)


def unit_of(rows: list[Row]) -> tuple[str, int]:
    """The unit for the sizes of a case."""
    return ("GiB", GIB) if max(map(peak, rows), default=0) > GIB // 4 else ("MiB", 2**20)


def table(title: str, rows: list[Row]) -> Table:
    """The rows of a case."""
    unit, size = unit_of(rows)

    def of(name: str) -> Callable[[Row], str]:
        return lambda row: "-" if row.get(name) is None else f"{row[name] / size:.2f}"

    def label(row: Row) -> str:
        return ALL[row["optimizer"]].label + ("" if "peak_in" in row else f" [red]{row['status']}: {row['phase']}[/]")

    sizes = ("weights", "gradients", "state", "activations", *PHASES, "planned", "process")
    columns = {unit: label, **{name: of(name) for name in sizes}}
    return rows_table(title, rows, columns)


def draw(pyplot: Any, rows: list[Row]) -> Any:
    """A panel per case, a bar per row, split at its peak."""
    by_case = {name: [row for row in rows if row["case"] == name] for name in dict.fromkeys(r["case"] for r in rows)}
    sizes = [len(found) + 1.5 for found in by_case.values()]
    shape = {"figsize": (9, 0.3 * sum(sizes)), "height_ratios": sizes, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(by_case), 1, **shape)
    for (name, found), axis in zip(by_case.items(), axes[:, 0], strict=True):
        unit, scale = unit_of(found)
        for place, row in enumerate(found):
            if row["status"] != "measured":
                axis.text(0, place, f" {row['status']}: {row['phase']}", va="center", fontsize=8, color="#D55E00")
                continue
            rest = peak(row) - row["weights"] - row["state"]
            left = 0.0
            for part, colour in zip((row["weights"], row["state"], rest), PART_COLOURS.values(), strict=True):
                axis.barh(place, part / scale, left=left, color=colour, height=0.7)
                left += part / scale
            axis.text(left, place, f" {left:.2f} {unit}, {row['peak_in']}", va="center", fontsize=8)
        axis.set_yticks(range(len(found)), [ALL[row["optimizer"]].label for row in found], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlim(left=0)
        axis.set_title(f"{name}: {CASES[name].title}", loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in PART_COLOURS.values()]
    figure.legend(handles, PART_COLOURS, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes[-1, 0].set_xlabel("tensors at the peak, and in which phase it is", fontsize=9)
    return figure


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures what is selected, prints the tables and writes the files."""
    options = parser(DESCRIPTION, EPILOG, plot=True, threads=True)
    options.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    options.add_argument(
        "--contender", nargs="+", metavar="ROW", choices=list(ALL), default=list(ALL), help=f"of {', '.join(ALL)}"
    )
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    settings = options.parse_args()
    cases = QUICK_CASES if settings.quick else CASES
    if settings.worker:
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        print(json.dumps(measure(cases[settings.case[0]], settings.contender[0])))
        return

    out, record = begin(settings.threads)
    contenders = installed({key: ALL[key] for key in settings.contender}, out)
    rows: list[Row] = []
    with progress("memory") as bar:
        for name in settings.case:
            keys = [key for key in contenders if key in (cases[name].contenders or ALL)]
            here = []
            for key in bar.track(keys, description=name):
                here.append({"case": name, "optimizer": key, **in_own_process(name, key, settings)})
            out.print(table(f"{name}: {cases[name].title}", here))
            rows += here
    write_json(settings.json, "memory", settings, {"environment": record, "rows": rows})
    save_figure(lambda pyplot: draw(pyplot, rows), settings.plot)


if __name__ == "__main__":
    main()
