"""The demo's training runs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lion8bit import Lion, Lion8bit
from lion8bit.tools.demo.report import LABELS, OptimizerResult, Results, Run, conclude
from lion8bit.tools.demo.task import DemoInputError, Task, first_line, load_task, resolve_device
from lion8bit.tools.memory import checkpoint_bytes, state_bytes

Progress = Callable[[str, int, str], None]
OnStep = Callable[[int, float], None]

WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.1
EVALUATIONS = 6  # of the held-out loss during a run, besides the one before it; more frequent at first
THREAD_TRIALS = 3  # training passes that decide the number of CPU threads

# (peak learning rate, betas, weight decay) of AdamW and of the Lions.
# Learning rates: the best held-out loss after the default run (seed 0; 1.6700 bits/byte before) among
# AdamW       5e-4 1.1845, 1e-3 1.1588, 1.4e-3 1.1568, 2e-3 1.1644, 4e-3 1.2643
# fp32 Lion   1e-4 1.2759, 2e-4 1.2025, 3e-4 1.1778, 4e-4 1.1681, 5e-4 1.1654, 8e-4 1.1707
# The 8-bit Lions get fp32 Lion's. Betas are the usual defaults, and lr * weight_decay is the same for all.
BYTE_LEVEL = ((1.4e-3, (0.9, 0.999), 0.01), (5e-4, (0.9, 0.99), 0.028))
# Customary for fine-tuning models of 100 million parameters and more; not swept here.
HUGGING_FACE = ((2e-5, (0.9, 0.999), 0.01), (5e-6, (0.9, 0.99), 0.04))


def build_optimizer(key: str, params: Sequence[nn.Parameter], hyperparameters: dict[str, Any]) -> torch.optim.Optimizer:
    """Builds the optimizer of a key of `LABELS`; AdamW is torch's fused one."""
    if key == "adamw":
        return torch.optim.AdamW(params, fused=True, **hyperparameters)
    cls: Any = {"lion": Lion, "lion8bit": Lion8bit}.get(key)
    if cls is None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that its Lion does not need
        cls = importlib.import_module("bitsandbytes").optim.Lion8bit
    optimizer: torch.optim.Optimizer = cls(params, **hyperparameters)
    return optimizer


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warmup over the first twentieth, times half a cosine down to a tenth."""
    warmup = min(1.0, (step + 1) / max(1.0, WARMUP_SHARE * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warmup * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fine_tune(
    task: Task, optimizer: torch.optim.Optimizer, steps: int, batch_size: int, seed: int, on_step: OnStep
) -> Run:
    """Fine-tunes from the pretrained weights and calls `on_step(steps taken, loss of the last batch)`.

    The batches depend on the seed alone, so that all optimizers see the same.
    """
    task.reset()
    torch.manual_seed(seed)  # for dropout
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(task.train) - task.window + 1, (steps, batch_size, 1), generator=generator)
    offsets = torch.arange(task.window)
    evaluate_after = {math.ceil(steps * (i / EVALUATIONS) ** 1.5) for i in range(1, EVALUATIONS + 1)}
    (group,) = optimizer.param_groups
    peak_lr = group["lr"]
    run = Run(seed, [], [0], [task.held_out_loss(batch_size)])
    milliseconds = []
    for step in range(steps):
        group["lr"] = peak_lr * learning_rate_share(step, steps)
        loss = task.loss(task.train[starts[step] + offsets].long().to(task.device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        synchronize(task.device)
        started = time.perf_counter()
        optimizer.step()
        synchronize(task.device)
        milliseconds.append((time.perf_counter() - started) * 1e3)
        run.train_loss.append(loss.item() * task.unit_per_nat)
        if step + 1 in evaluate_after:
            run.held_out_steps.append(step + 1)
            run.held_out_loss.append(task.held_out_loss(batch_size))
        on_step(step + 1, run.train_loss[-1])
    run.optimizer_ms = statistics.median(milliseconds)
    run.state_bytes, run.checkpoint_bytes = state_bytes(optimizer), checkpoint_bytes(optimizer)
    return run


@contextlib.contextmanager
def fastest_threads(task: Task, batch_size: int) -> Iterator[None]:
    """Makes torch use one CPU thread inside the context if that trains faster than all of them.

    On a busy machine it can be ten times faster: threads wait actively for those that have no processor.
    """

    def seconds(threads: int) -> float:
        names = {"task": task, "windows": task.held_out[:batch_size]}
        return Timer("task.loss(windows).backward()", globals=names, num_threads=threads).timeit(THREAD_TRIALS).mean

    threads = torch.get_num_threads()
    try:
        if task.device.type == "cpu" and threads > 1:
            torch.set_num_threads(min(threads, 1, key=seconds))
        yield
    finally:
        torch.set_num_threads(threads)


def run_row(row: OptimizerResult, task: Task, counts: dict[str, int], on_progress: Progress) -> None:
    """Trains with a row's optimizer once per seed; where bitsandbytes fails, its row says why."""
    steps = counts["steps"]

    def on_step(done: int, loss: float) -> None:
        on_progress(row.key, len(row.runs) * steps + done, f"{loss:.3f} {task.unit}")

    try:
        for seed in range(counts["seeds"]):
            optimizer = build_optimizer(row.key, task.trained, row.hyperparameters or {})
            row.runs.append(fine_tune(task, optimizer, steps, counts["batch_size"], seed, on_step))
    except Exception as error:
        if row.key != "bitsandbytes":
            raise
        row.runs = []
        missing = isinstance(error, ModuleNotFoundError)
        row.unavailable = "pip install bitsandbytes" if missing else f"{type(error).__name__}: {first_line(error)}"
        on_progress(row.key, 0, "unavailable")
    else:
        row.summarize(task.parameters)
        on_progress(row.key, counts["seeds"] * steps, f"{row.loss_after:.3f} {task.unit} held out")


def describe_setting(task: Task, counts: dict[str, int]) -> dict[str, Any]:
    """Model, text, device, sizes and versions."""
    device, threads = str(task.device), torch.get_num_threads()
    if task.device.type == "cuda":
        device = torch.cuda.get_device_name(task.device)
    elif task.device.type == "cpu":
        device = f"CPU, {threads} thread{'s' * (threads != 1)}"
    tokens_seen = counts["steps"] * counts["batch_size"] * (task.window - 1)
    return {
        "model": task.model_name,
        "text": task.text_name,
        "device": device,
        "parameters": task.parameters,
        "token": task.token,
        "unit": task.unit,
        **counts,
        "context": task.window - 1,
        "training_tokens": len(task.train),
        "passes_over_training_text": tokens_seen / len(task.train),
        "held_out_tokens": task.held_out[:, 1:].numel(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def run_demo(
    *,
    text: Path | None = None,
    model: Path | None = None,
    device: str | None = None,
    seeds: int = 1,
    steps: int = 80,
    batch_size: int = 4,
    eval_windows: int = 48,
    adamw_lr: float | None = None,
    lion_lr: float | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress = lambda key, done, note: None,
) -> Results:
    """Trains with every optimizer and measures it. If bitsandbytes is missing or fails, its row says why.

    Args:
        text: file to fine-tune on; None for the source of Python's own help topics.
        model: folder of a Hugging Face causal language model; None for the byte-level model of this package.
        device: torch device; None for a GPU if there is one, else the CPU.
        seeds: number of seeds, each another order of batches.
        steps: optimizer steps per run.
        batch_size: windows per step.
        eval_windows: held-out windows per evaluation.
        adamw_lr: AdamW's peak learning rate; None for the model's default.
        lion_lr: peak learning rate of the three Lions; None for the model's default.
        trust_remote_code: execute Python code that the model's folder contains.
        on_progress: called with a key of `LABELS`, its steps taken so far over all seeds, and a short note.

    Raises:
        DemoInputError: an argument cannot be satisfied.
    """
    counts = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "eval_windows": eval_windows}
    for name, count in counts.items():
        if count < 1:
            raise DemoInputError(f"{name} must be at least 1, got {count}")
    task = load_task(model, text, resolve_device(device), eval_windows, trust_remote_code)
    started = time.perf_counter()
    with fastest_threads(task, batch_size):
        rows = [OptimizerResult("none", runs=[Run(0, [], [0], [task.held_out_loss(batch_size)])])]
        rows[0].summarize(task.parameters)
        for key in [*LABELS][1:]:
            lr, betas, weight_decay = (BYTE_LEVEL if model is None else HUGGING_FACE)[key != "adamw"]
            chosen_lr = adamw_lr if key == "adamw" else lion_lr
            lr = lr if chosen_lr is None else chosen_lr
            rows.append(OptimizerResult(key, {"lr": lr, "betas": betas, "weight_decay": weight_decay}))
            run_row(rows[-1], task, counts, on_progress)
        setting = describe_setting(task, counts)
    return Results(setting, rows, conclude(rows, task.unit), time.perf_counter() - started)
