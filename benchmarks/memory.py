"""Owns the measurement of what training takes in memory, by part, moment and optimizer; the plan is the library's."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    available,
    console,
    describe,
    environment,
    new_table,
    parser,
    plot_option,
    progress,
    save_figure,
    write_json,
)
from gpu_step import flash
from rich.table import Table
from step_time import CONTENDERS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lion8bit import Lion, Lion8bit, estimate, fuse_into_backward
from lion8bit.tools.demo import limit_gpu_memory, state_bytes
from lion8bit.tools.demo.bytelm import rotary_table, rotate

DESCRIPTION = """\
What does training take in memory, at which moment, and what of it does the optimizer change? Transformers in the shapes
of public models, with random weights, are trained for a few steps by each optimizer:

  full         full fine-tuning in bf16 with activation checkpointing: the case that this library is for
  lora         adapters of rank 16 only: the state of few parameters, so no optimizer makes a difference
  activations  a longer sequence without checkpointing: at the peak no gradient is there yet, so releasing gains nothing
  limit        full fine-tuning in a process that is held to a limit, which some optimizers run out of

Columns:

  weights, gradients, state   bytes of the tensors; gradients are what is left when the backward pass ends
  activations                 tensors that the forward pass leaves for the backward pass
  forward, backward, step     the largest sum of living tensors during each; the largest of the three is the peak
  planned                     what `lion8bit estimate` says of this peak; on a GPU to be compared with `requested` in
                              the JSON, the peak before the allocator rounds sizes up
  process                     CPU: peak of the process's resident memory above that after the imports, in an iteration
                              of its own; GPU: what the caching allocator has reserved at its peak
  checkpoint                  size of a file with the optimizer's state_dict
"""

EPILOG = """\
On the CPU each row is a process of its own. Living tensors are counted from torch's profiler, one iteration per row;
the process's memory is read from /proc (VmHWM, reset by clear_refs) in another, with glibc told to give each block of
64 KiB and more back at once (MALLOC_MMAP_THRESHOLD_), so that it follows what lives. The limit is RLIMIT_DATA beyond
what the imports take. On a GPU the rows share a process; the caching allocator counts, and is held to the limit.
--snapshot writes the allocator's history of an iteration per row of the case full, for https://pytorch.org/memory_viz.

examples:
  python benchmarks/memory.py
  python benchmarks/memory.py --case full --contender adamw lion8bit lion8bit-release
  python benchmarks/memory.py --case limit --limit 1.5
  python benchmarks/memory.py --json memory.json --plot memory.png
  python benchmarks/memory.py --contender adamw --case full --json memory.json --add memory.json      in pieces
  python benchmarks/memory.py --device cuda --snapshot .
"""

GIB = 2**30
LR = 1e-6
TIMED_STEPS = 3
QUICK_CONTENDERS = ("adamw", "lion8bit", "lion8bit-release")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PART_COLOURS = {"weights": "#0072B2", "optimizer state": "#009E73", "gradients, activations and temporaries": "#E69F00"}


# ---- The model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The configuration of a Llama."""

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    tied: bool = False


SMOL = Shape("SmolLM-135M", 30, 576, 9, 3, 1536, 49152, tied=True)
TINY_LLAMA = Shape("TinyLlama-1.1B", 22, 2048, 32, 4, 5632, 32000)
QUICK = Shape("4 layers of 128", 4, 128, 4, 2, 384, 1000)


class RMSNorm(nn.Module):
    """In fp32, as in the published Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Adapted(nn.Linear):
    """A frozen linear layer with a trained fp32 adapter of low rank."""

    def adapt(self, rank: int) -> None:
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, self.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        if not hasattr(self, "down"):
            return result
        return result + F.linear(F.linear(x.float(), self.down), self.up).to(x.dtype)


class Block(nn.Module):
    """Attention and a gated feed-forward network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.key_heads, self.channels = shape.heads, shape.key_heads, shape.width // shape.heads
        keys = self.key_heads * self.channels
        linear = functools.partial(Adapted, bias=False)
        self.attention_norm, self.mlp_norm = RMSNorm(shape.width), RMSNorm(shape.width)
        self.query, self.out = linear(shape.width, shape.width), linear(shape.width, shape.width)
        self.key, self.value = linear(shape.width, keys), linear(shape.width, keys)
        self.gate, self.up = linear(shape.width, shape.inner), linear(shape.width, shape.inner)
        self.down = linear(shape.inner, shape.width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, length, _ = x.shape
        normed = self.attention_norm(x)
        query, key, value = (
            project(normed).view(batch, length, -1, self.channels).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, table), rotate(key, table)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.mlp_norm(x)
        result: Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return result


class Llama(nn.Module):
    """A decoder that returns loss and logits, as those of transformers do; `config` is what the planner reads."""

    def __init__(self, shape: Shape, checkpointing: bool) -> None:
        super().__init__()
        self.shape, self.checkpointing = shape, checkpointing
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self.config = SimpleNamespace(
            model_type="llama",
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            intermediate_size=shape.inner,
            vocab_size=shape.vocabulary,
            get_text_config=lambda: self.config,
        )

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        table = rotary_table(tokens.shape[1], self.shape.width // self.shape.heads).to(x)
        for block in self.blocks:
            x = checkpoint(block, x, table, use_reentrant=False) if self.checkpointing else block(x, table)
        logits: Tensor = self.head(self.norm(x))
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), logits


# ---- Cases and contenders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is trained. ``limit`` is in GiB."""

    shape: Shape
    dtype: str = "bf16"
    batch: int = 1
    sequence: int = 2048
    checkpointing: bool = True
    lora: int | None = None
    limit: float | None = None
    contenders: tuple[str, ...] = ()  # none: all

    def title(self) -> str:
        words = [self.shape.name, self.dtype, f"{self.batch} x {self.sequence} tokens"]
        words.append("checkpointing" if self.checkpointing else "no checkpointing")
        words += [f"LoRA of rank {self.lora}"] if self.lora else []
        words += [f"held to {self.limit:g} GiB"] if self.limit else []
        return ", ".join(words)


FEW = ("adamw", "lion8bit", "lion8bit-release")
CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        # Few tokens: processors without instructions for bf16 take a minute for 64.
        "full": Case(SMOL, sequence=16),
        "lora": Case(SMOL, sequence=16, lora=16, contenders=FEW),
        "activations": Case(
            replace(SMOL, name="SmolLM-135M, 8 layers", layers=8),
            "fp32",
            sequence=512,
            checkpointing=False,
            contenders=FEW,
        ),
        "limit": Case(SMOL, sequence=16, limit=0.95, contenders=FEW),
    },
    "cuda": {
        "full": Case(TINY_LLAMA),
        "lora": Case(TINY_LLAMA, lora=16, contenders=FEW),
        "activations": Case(SMOL, batch=4, checkpointing=False, contenders=FEW),
        "limit": Case(TINY_LLAMA, limit=6.0, contenders=FEW),
    },
}
QUICK_CASES = {
    "full": Case(QUICK, sequence=32),
    "lora": Case(QUICK, sequence=32, lora=4, contenders=("lion8bit",)),
    "activations": Case(QUICK, "fp32", sequence=512, checkpointing=False, contenders=("lion8bit",)),
    "limit": Case(QUICK, sequence=32, limit=0.002, contenders=("adamw",)),
}

Params = list[nn.Parameter]


@dataclass(frozen=True)
class Contender:
    """An optimizer, and how it is used.

    Args:
        label: for people.
        make: builds it.
        planned: the row of the plan that it is.
        package: what it needs.
        device: where it runs, if not everywhere.
        release: installs gradient release, given the model and the optimizer.
        fp32: weights are fp32, and autocast computes in 16 bits.
        dtypes: of the case, for which it differs from another row.
    """

    label: str
    make: Callable[[Params], torch.optim.Optimizer]
    planned: str | None = None
    package: str = "torch"
    device: str | None = None
    release: Callable[[nn.Module, Any], Any] | None = None
    fp32: bool = False
    dtypes: tuple[str, ...] = ("bf16", "fp32")


def bitsandbytes_adamw(params: Params) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit AdamW."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=LR)


def flash_release(model: nn.Module, optimizer: Any) -> None:
    """FlashOptim's own gradient release."""
    from flashoptim import enable_gradient_release

    enable_gradient_release(model, optimizer)


def ours(**options: Any) -> Callable[[Params], torch.optim.Optimizer]:
    """Lion8bit with options."""
    return lambda params: Lion8bit(params, lr=LR, **options)


BF16 = ("bf16",)
ALL: dict[str, Contender] = {
    "adamw-fp32": Contender(
        "AdamW, fp32 weights", lambda params: torch.optim.AdamW(params, lr=LR, fused=True), "adamw-fp32", fp32=True,
        dtypes=BF16,
    ),
    "adamw": Contender("AdamW", lambda params: torch.optim.AdamW(params, lr=LR), "adamw"),
    "adamw-fused": Contender("AdamW, fused", CONTENDERS["adamw"].make, "adamw"),
    "adamw8bit": Contender("bitsandbytes AdamW8bit", bitsandbytes_adamw, "adamw8bit", "bitsandbytes"),
    "lion-pytorch": Contender("lion-pytorch Lion", CONTENDERS["lion-pytorch"].make, package="lion_pytorch"),
    "optimi": Contender("torch-optimi Lion", CONTENDERS["optimi"].make, package="optimi"),
    "lion": Contender("fp32 Lion", lambda params: Lion(params, lr=LR), "lion"),
    "bitsandbytes": Contender("bitsandbytes Lion8bit", CONTENDERS["bitsandbytes"].make, package="bitsandbytes"),
    "torchao": Contender("torchao AdamW8bit", CONTENDERS["torchao"].make, package="torchao"),
    "flashlion": Contender("FlashLion", flash(None), "flashlion", "flashoptim", "cuda"),
    "flashlion-24": Contender(
        "FlashLion, 24-bit weights", flash(24), "flashlion-24", "flashoptim", "cuda", dtypes=BF16
    ),
    "flashlion-release": Contender(
        "FlashLion, release", flash(None), "flashlion-release", "flashoptim", "cuda", flash_release
    ),
    "lion8bit-nearest": Contender("Lion8bit, nearest", ours(weight_rounding="nearest"), "lion8bit", dtypes=BF16),
    "lion8bit": Contender("Lion8bit", ours(), "lion8bit"),
    "lion8bit-compensated": Contender(
        "Lion8bit, 24-bit weights", ours(weight_rounding="compensated"), "lion8bit-compensated", dtypes=BF16
    ),
    "lion8bit-release": Contender("Lion8bit, release", ours(), "lion8bit-release", release=fuse_into_backward),
    "lion8bit-release-compensated": Contender(
        "Lion8bit, release, 24-bit", ours(weight_rounding="compensated"), "lion8bit-release-compensated",
        release=fuse_into_backward, dtypes=BF16,
    ),
    "lion8bit-release-host": Contender(
        "Lion8bit, release, host", ours(is_paged=True), "lion8bit-release-host", device="cuda",
        release=fuse_into_backward,
    ),
}  # fmt: skip


def chosen(case: Case, device: str, only: Sequence[str]) -> list[str]:
    """The contenders that are asked for and can run here, in a case."""
    return [
        key
        for key, contender in ALL.items()
        if (not case.contenders or key in case.contenders)
        and key in only
        and case.dtype in contender.dtypes
        and contender.device in (None, device)
        and available(contender.package)
    ]


# ---- Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Moment:
    """Bytes of living tensors during one phase of an iteration."""

    peak: int
    requested: int  # the peak before the GPU's allocator rounds sizes up; on the CPU the same
    end: int


def tensors_of(call: Callable[[], Any]) -> tuple[int, int]:
    """Highest and final number of CPU tensor bytes that a call holds beyond those before it, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest, now


def process_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS, in bytes; 0 where there is no such file."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def reset_process_peak() -> None:
    """Lets VmHWM begin anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def gpu_moment(device: torch.device) -> Moment:
    """What the GPU's allocator has handed out, and the peaks since these were reset."""
    stats = torch.cuda.memory_stats(device)
    names = ("allocated_bytes.all.peak", "requested_bytes.all.peak", "allocated_bytes.all.current")
    return Moment(*(stats[name] for name in names))


class Trainer:
    """A model, its optimizer and the phases of an iteration.

    Args:
        case: what is trained.
        contender: with what.
        device: where.
    """

    def __init__(self, case: Case, contender: Contender, device: torch.device) -> None:
        torch.manual_seed(0)
        weights = torch.float32 if contender.fp32 or case.dtype == "fp32" else torch.bfloat16
        with torch.device(device):
            self.model = Llama(case.shape, case.checkpointing).to(weights)
            if case.lora:
                self.model.requires_grad_(False)
                for part in self.model.modules():
                    if isinstance(part, Adapted):
                        part.adapt(case.lora)
            self.tokens = torch.randint(case.shape.vocabulary, (case.batch, case.sequence))
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.device, self.autocast = device, contender.fp32
        self.outputs: tuple[Tensor, Tensor] | None = None
        self.optimizer = contender.make(self.params)
        if contender.release is not None:
            contender.release(self.model, self.optimizer)

    def forward(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            self.outputs = self.model(self.tokens)

    def backward(self) -> None:
        assert self.outputs is not None
        self.outputs[0].backward()

    def step(self) -> None:
        self.outputs = None
        self.optimizer.step()

    def gradient_bytes(self) -> int:
        return sum(param.grad.nbytes for param in self.params if param.grad is not None)

    def phases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The phases by name; gradients are dropped after the last."""
        yield "forward", self.forward
        yield "backward", self.backward
        yield "step", self.step
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Bytes of state on the device, and of the buffer through which state in host memory passes."""
        total = state_bytes(self.optimizer)
        if isinstance(self.optimizer, Lion8bit):
            report = self.optimizer.memory_report()
            total += int(report["buffer_bytes"] - report["paged_bytes"])
        return total

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def held(self) -> int:
        """Bytes of weights, buffers, gradients and state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.nbytes for t in tensors) + self.gradient_bytes() + self.state_bytes()

    def moments(self, start: Moment) -> dict[str, Moment]:
        """An iteration, its tensors counted; on a GPU those beyond ``start``."""
        found = {}
        now = self.held()
        for name, phase in self.phases():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                phase()
                torch.cuda.synchronize(self.device)
                there = gpu_moment(self.device)
                found[name] = Moment(there.peak - start.peak, there.requested - start.requested, there.end - start.end)
            else:
                highest, change = tensors_of(phase)
                found[name] = Moment(now + max(0, highest), now + max(0, highest), now + change)
                now += change
        return found


def measure(case: Case, contender: Contender, device: torch.device, snapshot: Path | None = None) -> dict[str, Any]:
    """The figures of one row; where memory runs out, at which phase.

    Iterations: one that makes the state, one whose tensors are counted, one whose process is watched and timed.
    """
    resident, start = process_bytes("VmRSS"), Moment(0, 0, 0)
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        start = gpu_moment(device)
    where, record = "building", {"label": contender.label}
    hold(case.limit, device)
    trainer = None
    try:
        trainer = Trainer(case, contender, device)
        for name, phase in trainer.phases():
            where = name
            phase()
        gradients = 0
        where = "counted iteration"
        moments = trainer.moments(start)
        if snapshot is not None and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        reset_process_peak()
        times = {}
        for name, phase in trainer.phases():
            where = name
            begin = time.perf_counter()
            phase()
            trainer.synchronize()
            times[name] = time.perf_counter() - begin
            gradients = max(gradients, trainer.gradient_bytes())
        process = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else process_bytes("VmHWM") - resident
        if snapshot is not None and device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
        if contender.release is None:
            where = "step"
            times["step"] = timed_steps(trainer)
        peak = max(moments, key=lambda name: moments[name].peak)
        record |= {
            "status": "measured",
            "weights": sum(param.nbytes for param in trainer.model.parameters()),
            "gradients": gradients,
            "state": trainer.state_bytes(),
            "activations": moments["forward"].end - trainer.held(),
            "moments": {name: vars(moment) for name, moment in moments.items()},
            "peak": moments[peak].peak,
            "requested": max(moment.requested for moment in moments.values()),
            "peak_in": peak,
            "process": process,
            "checkpoint": checkpoint_bytes(trainer.optimizer),
            "seconds": times,
        }
        if contender.planned is not None:
            record["planned"] = planned(case, contender.planned)
    except Exception as error:  # peers refuse dtypes with whatever exception they meet first
        lines = str(error).strip().splitlines() or [""]
        record |= {"status": "out of memory" if ran_out(error) else "failed", "phase": where}
        record["reason"] = f"{type(error).__name__}: {lines[0][:200]}"
    finally:
        del trainer
        gc.collect()
        hold(None, device)
    return record


def hold(limit: float | None, device: torch.device) -> None:
    """Holds this process to ``limit`` GiB beyond what it has; None lets it go on a GPU and changes nothing else."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        limit_gpu_memory(device, math.inf if limit is None else limit * GIB)
    elif limit is not None:
        data = process_bytes("VmData") + int(limit * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (data, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def ran_out(error: Exception) -> bool:
    """Whether an exception says that there is no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def timed_steps(trainer: Trainer) -> float:
    """Median seconds of a step alone."""
    for param in trainer.params:
        param.grad = torch.zeros_like(param)
    times = []
    for _ in range(TIMED_STEPS):
        trainer.synchronize()
        begin = time.perf_counter()
        trainer.step()
        trainer.synchronize()
        times.append(time.perf_counter() - begin)
    trainer.optimizer.zero_grad()
    return statistics.median(times)


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size of the file that `torch.save` makes of the optimizer's state; the tensors' own bytes are not written."""
    with tempfile.NamedTemporaryFile() as file, torch.serialization.skip_data():
        torch.save(optimizer.state_dict(), file.name)
        return os.path.getsize(file.name)


def planned(case: Case, row: str) -> int | None:
    """The plan's total."""
    with torch.device("meta"):
        model = Llama(case.shape, case.checkpointing)
    plan = estimate(
        model,
        dtype=case.dtype,
        batch=case.batch,
        sequence=case.sequence,
        checkpointing=case.checkpointing,
        lora=case.lora,
    )
    return plan.rows[row].total if row in plan.rows else None


def in_own_process(case: str, key: str, settings: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a fresh process, whose memory is its own."""
    command = [sys.executable, __file__, "--worker", "--case", case, "--contender", key, "--device", "cpu"]
    command += ["--quick"] if settings.quick else []
    command += ["--limit", str(settings.limit)] if settings.limit else []
    command += ["--threads", str(settings.threads)] if settings.threads else []
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        errors = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"label": ALL[key].label, "status": "failed", "phase": "process", "reason": errors[-1][:200]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


# ---- The report ------------------------------------------------------------------------------------------------------


def unit_of(record: dict[str, Any]) -> tuple[str, int]:
    """The unit in which the sizes of a case read well."""
    largest = max((row.get("peak", 0) for row in record["rows"].values()), default=0)
    return ("GiB", GIB) if largest > GIB // 4 else ("MiB", 2**20)


def table(record: dict[str, Any]) -> Table:
    """The rows of a case."""
    unit, size = unit_of(record)
    numbers = ["weights", "gradients", "state", "activations", "forward", "backward", "step", "planned", "process"]
    result = new_table(record["title"], [unit], [*numbers, "checkpoint", "step s", "iteration s"])
    for key, row in record["rows"].items():
        style = "green" if key.startswith("lion8bit") else None
        if row["status"] != "measured":
            words = f"{row['status']}: {row['phase']}"
            result.add_row(row["label"], f"[red]{words}[/]", style=style)
            continue
        moments = [
            ("[bold]{:.2f}[/]" if name == row["peak_in"] else "{:.2f}").format(row["moments"][name]["peak"] / size)
            for name in ("forward", "backward", "step")
        ]
        parts = [f"{row[name] / size:.2f}" for name in numbers[:4]]
        plan = f"{row['planned'] / size:.2f}" if row.get("planned") else "-"
        files = [f"{row[name] / size:.2f}" for name in ("process", "checkpoint")]
        seconds = row["seconds"]
        alone = "-" if "release" in key else f"{seconds['step']:.2f}"
        total = f"{sum(seconds.values()):.2f}"
        result.add_row(row["label"], *parts, *moments, plan, *files, alone, total, style=style)
    return result


def draw(results: dict[str, Any]) -> Callable[[Any], Any]:
    """The figure: a panel per case, a bar per row, split at its peak."""

    def with_pyplot(pyplot: Any) -> Any:
        cases = list(results["cases"].values())
        sizes = [len(case["rows"]) + 1.5 for case in cases]
        figure, axes = pyplot.subplots(
            len(cases), 1, figsize=(9, 0.3 * sum(sizes)), height_ratios=sizes, squeeze=False, layout="constrained"
        )
        for case, axis in zip(cases, axes[:, 0], strict=True):
            rows = list(case["rows"].values())
            unit, scale = unit_of(case)
            for place, row in enumerate(rows):
                if row["status"] != "measured":
                    axis.text(0, place, f" {row['status']}: {row['phase']}", va="center", fontsize=8, color="#D55E00")
                    continue
                rest = row["peak"] - row["weights"] - row["state"]
                left = 0.0
                for part, colour in zip((row["weights"], row["state"], rest), PART_COLOURS.values(), strict=True):
                    axis.barh(place, part / scale, left=left, color=colour, height=0.7)
                    left += part / scale
                axis.text(left, place, f" {left:.2f} {unit}, {row['peak_in']}", va="center", fontsize=8)
            axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.set_xlim(left=0)
            axis.set_title(case["title"], loc="left", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in PART_COLOURS.values()]
        figure.legend(handles, PART_COLOURS, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        axes[-1, 0].set_xlabel("tensors at the peak, and when that is", fontsize=9)
        return figure

    return with_pyplot


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures what is asked for, prints the tables and writes the files."""
    options = parser(DESCRIPTION, EPILOG)
    plot_option(options)
    options.add_argument("--case", nargs="+", choices=list(QUICK_CASES), default=list(QUICK_CASES))
    rows: dict[str, Any] = {"nargs": "+", "metavar": "ROW", "choices": list(ALL), "default": []}
    options.add_argument("--contender", help=f"only these of {', '.join(ALL)}", **rows)
    options.add_argument("--skip", help="not these", **rows)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--limit", type=float, metavar="GIB", help="hold every row to so much (default: case limit's own)"
    )
    options.add_argument("--snapshot", type=Path, metavar="FOLDER", help="GPU: write memory snapshots of the case full")
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--add", type=Path, metavar="FILE", help="begin with the rows of this file, an earlier --json")
    settings = options.parse_args()
    if settings.limit is not None and settings.limit <= 0:
        options.error(f"--limit must be positive, got {settings.limit}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    cases = dict(QUICK_CASES if settings.quick else CASES[device.type])
    if settings.limit:
        cases = {name: replace(case, limit=settings.limit) for name, case in cases.items()}
    if settings.worker:
        print(json.dumps(measure(cases[settings.case[0]], ALL[settings.contender[0]], device)))
        return

    out = console()
    record = environment()
    out.print(describe(record), style="dim")
    only = settings.contender or (QUICK_CONTENDERS if settings.quick else ())
    only = [key for key in only or ALL if key not in settings.skip]
    todo = {name: chosen(cases[name], device.type, only) for name in settings.case}
    results: dict[str, Any] = {"environment": record, "device": device.type, "cases": {}}
    if settings.add:
        results["cases"] = json.loads(settings.add.read_text())["cases"]
    with progress("memory") as bar:
        task = bar.add_task("", total=sum(map(len, todo.values())))
        for name, keys in todo.items():
            case = cases[name]
            started = {"title": f"{name}: {case.title()}", "limit": case.limit, "rows": {}}
            found = results["cases"].setdefault(name, started)
            for key in keys:
                bar.update(task, description=f"{name}, {ALL[key].label}")
                if device.type == "cuda":
                    wanted = settings.snapshot is not None and name == "full"
                    snapshot = settings.snapshot / f"memory-{key}.pickle" if wanted else None
                    found["rows"][key] = measure(case, ALL[key], device, snapshot)
                else:
                    found["rows"][key] = in_own_process(name, key, settings)
                bar.advance(task)
                found["rows"] = {other: found["rows"][other] for other in ALL if other in found["rows"]}
                write_json(settings.json, "memory", settings, results)
            out.print(table(found))
    save_figure(draw(results), settings.plot)


if __name__ == "__main__":
    main()
