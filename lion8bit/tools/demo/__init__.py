"""Fine-tunes one pretrained language model with several optimizers: the runs, the table and the figure.

Every optimizer starts from the same weights, sees the same batches and takes the same number of steps.
Nothing here prints; `lion8bit.tools.cli` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import logging
import math
import platform
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lion8bit import Lion, Lion8bit
from lion8bit.tools.demo.bytelm import encode, load_pretrained, next_token_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

HELD_OUT_SHARE = 0.1
WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.1
FILES = ("demo.png", "demo.json")
EVALUATIONS = 6  # of the held-out loss during a run, besides the one before it; closer together at first
HF_CONTEXT = 256  # tokens per window for Hugging Face models
THREAD_TRIALS = 3  # training passes that decide the number of CPU threads
SMALLEST_GAP = 1e-4  # of two losses that the conclusion tells apart


class DemoInputError(ValueError):
    """The demo was asked for something it cannot do; the message is meant for the person who asked."""


# ---- The contenders ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What an optimizer is built with; `lr` is the peak of the schedule in `learning_rate_share`."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


# Learning rates: the best held-out loss after the default run (seed 0; 1.6700 bits/byte before) among
# AdamW       5e-4 1.1845, 1e-3 1.1588, 1.4e-3 1.1568, 2e-3 1.1644, 4e-3 1.2643
# fp32 Lion   1e-4 1.2759, 2e-4 1.2025, 3e-4 1.1778, 4e-4 1.1681, 5e-4 1.1654, 8e-4 1.1707
# The 8-bit Lions get fp32 Lion's. Betas are the usual defaults, and lr * weight_decay is the same for all.
ADAMW = Hyperparameters(lr=1.4e-3, betas=(0.9, 0.999), weight_decay=0.01)
LION = Hyperparameters(lr=5e-4, betas=(0.9, 0.99), weight_decay=0.028)

# Customary for fine-tuning models of 100 million parameters and more; not swept here.
HF_ADAMW = Hyperparameters(lr=2e-5, betas=(0.9, 0.999), weight_decay=0.01)
HF_LION = Hyperparameters(lr=5e-6, betas=(0.9, 0.99), weight_decay=0.04)

LABELS = {
    "none": "no fine-tuning",
    "adamw": "AdamW",
    "lion": "Lion, fp32",
    "lion8bit": "Lion8bit",
    "bitsandbytes": "bitsandbytes Lion8bit",
}


def build_optimizer(key: str, params: Sequence[nn.Parameter], h: Hyperparameters) -> torch.optim.Optimizer:
    """Builds a contender's optimizer: AdamW in torch's fastest form, the others as they come.

    Args:
        key: a key of `LABELS` other than "none".
        params: parameters to train.
        h: hyperparameters.

    Returns:
        The optimizer.

    Raises:
        ImportError: bitsandbytes is asked for and not installed.
    """
    if key == "adamw":
        return torch.optim.AdamW(params, lr=h.lr, betas=h.betas, weight_decay=h.weight_decay, fused=True)
    cls: Any = {"lion": Lion, "lion8bit": Lion8bit}.get(key)
    if cls is None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that its Lion does not need
        cls = importlib.import_module("bitsandbytes").optim.Lion8bit
    optimizer: torch.optim.Optimizer = cls(params, lr=h.lr, betas=h.betas, weight_decay=h.weight_decay)
    return optimizer


# ---- The task: a model and a text --------------------------------------------------------------------------


@dataclasses.dataclass
class Task:
    """A pretrained model and a text to fine-tune it on.

    Args:
        model: the model, on the device that it trains on.
        model_name: name for people.
        text_name: name for people.
        train: [n] integer tokens to train on, on the CPU.
        held_out: [windows, context + 1] int64 tokens never trained on, on the model's device.
        token: what a token is called, "byte" or "token".
        unit: unit of the losses.
        unit_per_nat: losses in `unit` per nat.
        logits: [batch, length] tokens -> [batch, length, vocabulary] logits.
    """

    model: nn.Module
    model_name: str
    text_name: str
    train: Tensor
    held_out: Tensor
    token: str
    unit: str
    unit_per_nat: float
    logits: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self.initial = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in self.trained)
        self.device = self.held_out.device
        self.window = self.held_out.shape[1]

    def reset(self) -> None:
        """Puts the pretrained weights back and drops the gradients."""
        self.model.load_state_dict(self.initial)
        self.model.zero_grad()

    def loss(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """Scores the prediction of every token but each window's first.

        Args:
            windows: [batch, context + 1] int64, on the model's device.
            reduction: "mean" or "sum".

        Returns:
            Scalar fp32, in nats.
        """
        return next_token_loss(self.logits(windows[:, :-1]), windows[:, 1:], reduction)

    @torch.no_grad()
    def held_out_loss(self, batch_size: int) -> float:
        """Mean loss over the held-out windows, in `unit`, `batch_size` windows at a time."""
        self.model.eval()
        total = 0.0
        for start in range(0, len(self.held_out), batch_size):
            total += float(self.loss(self.held_out[start : start + batch_size], "sum"))
        self.model.train()
        return total / self.held_out[:, 1:].numel() * self.unit_per_nat


def resolve_device(name: str | None) -> torch.device:
    """Picks the device and tries it.

    Args:
        name: a torch device, or None for a GPU if there is one, else the CPU.

    Returns:
        The device.

    Raises:
        DemoInputError: torch knows no such device, or this machine has none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
        raise DemoInputError(f"device must be one that this machine has, got {name!r} ({reason})") from error
    return device


def limit_gpu_memory(device: torch.device, size: float) -> None:
    """Holds this process to ``size`` bytes of a GPU's memory; infinity lets it have all."""
    index = torch.cuda.current_device() if device.index is None else device.index  # the last call refuses plain "cuda"
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), index)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def read_text(path: Path | None) -> tuple[str, bytes]:
    """Reads the text to fine-tune on.

    Args:
        path: a file, or None for the source of Python's own help topics.

    Returns:
        The text's name and content.

    Raises:
        DemoInputError: the file cannot be read.
    """
    name = "pydoc_data/topics.py" if path is None else path.name
    if path is None:
        path = Path(str(importlib.import_module("pydoc_data.topics").__file__))
    try:
        return name, path.read_bytes()
    except OSError as error:
        raise DemoInputError(f"text must be a readable file, got {path} ({error.strerror})") from error


def split(tokens: Tensor, window: int, count: int) -> tuple[Tensor, Tensor]:
    """Splits a text into a part to train on and held-out windows, evenly spaced over its last tenth.

    Args:
        tokens: [n] integer.
        window: tokens per window.
        count: held-out windows wanted; fewer are given where they would overlap.

    Returns:
        Training tokens [about 0.9 n], and held-out windows [count, window] int64.

    Raises:
        DemoInputError: the last tenth is shorter than one window.
    """
    cut = len(tokens) - int(len(tokens) * HELD_OUT_SHARE)
    train, held_out = tokens[:cut], tokens[cut:]
    if len(held_out) < window:
        raise DemoInputError(
            f"text must be at least {math.ceil(window / HELD_OUT_SHARE)} tokens long, so that its held-out "
            f"last {HELD_OUT_SHARE:.0%} fills a window of {window}, got {len(tokens)}; pass a longer file"
        )
    starts = torch.linspace(0, len(held_out) - window, min(count, len(held_out) // window)).long()
    return train, held_out[starts[:, None] + torch.arange(window)].long()


def byte_task(text: Path | None, device: torch.device, eval_windows: int) -> Task:
    """Makes the default task: the byte-level model that ships with the package, in fp32.

    Args:
        text: file to fine-tune on, or None for the source of Python's help topics.
        device: where to train.
        eval_windows: number of held-out windows.

    Returns:
        The task.

    Raises:
        DemoInputError: the text cannot be read or is too short.
    """
    text_name, content = read_text(text)
    model = load_pretrained().to(device)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    train, held_out = split(encode(content), model.config.context + 1, eval_windows)
    return Task(
        model=model,
        model_name=f"byte-level transformer, {size}",
        text_name=text_name,
        train=train,
        held_out=held_out.to(device),
        token="byte",
        unit="bits/byte",
        unit_per_nat=1 / math.log(2),
        logits=model,
    )


def hugging_face_task(
    folder: Path, text: Path | None, device: torch.device, eval_windows: int, trust_remote_code: bool = False
) -> Task:
    """Makes a task of a local Hugging Face causal language model, in bf16 on CUDA devices, else in fp32.

    Args:
        folder: a folder that `save_pretrained` wrote, with model and tokenizer.
        text: file to fine-tune on, or None for the source of Python's help topics.
        device: where to train.
        eval_windows: number of held-out windows.
        trust_remote_code: the folder may bring Python code of its own, which is then executed.

    Returns:
        The task.

    Raises:
        DemoInputError: transformers is missing, the folder holds no such model, or the text cannot be read or
            is too short.
    """
    wanted = f"model must be a folder that holds a Hugging Face causal language model, got {folder}"
    if not folder.is_dir():
        raise DemoInputError(wanted)
    text_name, content = read_text(text)
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise DemoInputError("model needs the transformers package; run: pip install transformers") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise DemoInputError(
                f"model must be of a type that transformers has itself, got {folder}, which brings code of its own; "
                "if you trust that code, pass --trust-remote-code"
            ) from error
        raise DemoInputError(f"{wanted} ({first_line(error)})") from error
    ids = tokenizer(content.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
    context = min(HF_CONTEXT, getattr(model.config, "max_position_embeddings", None) or HF_CONTEXT)
    train, held_out = split(torch.tensor(ids), context + 1, eval_windows)
    model = model.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).train()
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.4g} M parameters"
    return Task(
        model=model,
        model_name=f"{folder.resolve().name}, {size} in {str(model.dtype).removeprefix('torch.')}",
        text_name=text_name,
        train=train,
        held_out=held_out.to(device),
        token="token",
        unit="nats/token",
        unit_per_nat=1.0,
        logits=lambda tokens: model(tokens, use_cache=False).logits,
    )


# ---- The runs ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What one optimizer did with one seed.

    Args:
        seed: seed of the batches.
        train_loss: loss of each step's batch before the step, in the task's unit.
        held_out_steps: steps taken at each evaluation, the first 0.
        held_out_loss: held-out loss at each, in the task's unit.
        optimizer_ms: median time of `optimizer.step()`, in milliseconds; None without an optimizer.
        state_bytes: bytes of all tensors in the optimizer's state.
        checkpoint_bytes: size of `torch.save(optimizer.state_dict(), file)`.
    """

    seed: int
    train_loss: list[float]
    held_out_steps: list[int]
    held_out_loss: list[float]
    optimizer_ms: float | None = None
    state_bytes: int = 0
    checkpoint_bytes: int = 0


@dataclasses.dataclass
class Row:
    """What one contender did over all seeds.

    Args:
        key: its key in `LABELS`.
        hyperparameters: what its optimizer was built with; None without one.
        unavailable: why there are no runs; None if there are.
        runs: one per seed.
        state_bytes_per_param: bytes of optimizer state per trained parameter.
        checkpoint_bytes: size of the optimizer's own checkpoint.
        optimizer_ms: mean over the seeds of the median milliseconds per `optimizer.step()`.
        loss_before: held-out loss of the pretrained weights.
        loss_after: mean over the seeds of the held-out loss after the last step.
        loss_after_spread: standard deviation of the same; None with one seed.
    """

    key: str
    hyperparameters: Hyperparameters | None = None
    unavailable: str | None = None
    runs: list[Run] = dataclasses.field(default_factory=list)
    state_bytes_per_param: float = math.nan
    checkpoint_bytes: int = 0
    optimizer_ms: float | None = None
    loss_before: float = math.nan
    loss_after: float = math.nan
    loss_after_spread: float | None = None

    def summarize(self, parameters: int) -> None:
        """Fills in the figures from the runs; `parameters` is the number of trained parameters."""
        after = [run.held_out_loss[-1] for run in self.runs]
        times = [run.optimizer_ms for run in self.runs if run.optimizer_ms is not None]
        self.state_bytes_per_param = self.runs[0].state_bytes / parameters
        self.checkpoint_bytes = self.runs[0].checkpoint_bytes
        self.optimizer_ms = statistics.fmean(times) if times else None
        self.loss_before = self.runs[0].held_out_loss[0]
        self.loss_after = statistics.fmean(after)
        self.loss_after_spread = statistics.stdev(after) if len(after) > 1 else None


@dataclasses.dataclass
class Results:
    """What the demo measured.

    Args:
        setting: model, text, device, sizes and versions.
        rows: one per contender, in the order of `LABELS`.
        conclusion: one sentence made of the measured figures.
        seconds: wall time of all runs.
    """

    setting: dict[str, Any]
    rows: list[Row]
    conclusion: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The results as lists, dictionaries, strings, finite numbers and None, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "rows": [{"label": LABELS[row.key], **without_nan(dataclasses.asdict(row))} for row in self.rows],
        }


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for the values that are NaN, which JSON cannot hold."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}


def learning_rate_share(step: int, steps: int) -> float:
    """The schedule: linear warmup over the first twentieth, times half a cosine down to a tenth.

    Args:
        step: index of the step, from 0.
        steps: number of steps.

    Returns:
        Share of the peak learning rate.
    """
    warmup = min(1.0, (step + 1) / max(1.0, WARMUP_SHARE * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warmup * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in dictionaries, lists, tuples, wrappers such as torchao's and DTensors, and FlashOptim's objects."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        yield from tensors_in([getattr(value, name) for name in names])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
    elif type(value).__module__.partition(".")[0] == "flashoptim":
        yield from tensors_in(vars(value))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state: momentum, codes, scales, maps, counters; shared tensors count once."""
    held = tensors_in([*optimizer.state.values()])
    return sum({(t.device, t.data_ptr(), t.nbytes): t.nbytes for t in held}.values())


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size in bytes of `torch.save(optimizer.state_dict(), file)`."""
    with tempfile.TemporaryFile() as file:
        torch.save(optimizer.state_dict(), file)
        return file.tell()


def synchronize(device: torch.device) -> None:
    """Waits for a device, so that a clock read next measures work and not its submission."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fine_tune(
    task: Task,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[int, float], None],
) -> Run:
    """Fine-tunes a task's model from its pretrained weights.

    Args:
        task: model and text.
        optimizer: an optimizer of `task.trained` that has not taken a step.
        steps: optimizer steps.
        batch_size: windows per step.
        seed: seed of the batches and of any dropout; the same for every optimizer that is compared.
        on_step: told the number of steps taken and the last batch's loss.

    Returns:
        The measurements.
    """
    task.reset()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(task.train) - task.window + 1, (steps, batch_size, 1), generator=generator)
    offsets = torch.arange(task.window)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    evaluate_after = {math.ceil(steps * (i / EVALUATIONS) ** 1.5) for i in range(1, EVALUATIONS + 1)}
    run = Run(seed, [], [0], [task.held_out_loss(batch_size)])
    milliseconds = []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_share(step, steps)
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
    run.state_bytes = state_bytes(optimizer)
    run.checkpoint_bytes = checkpoint_bytes(optimizer)
    return run


@contextlib.contextmanager
def fastest_threads(task: Task, batch_size: int) -> Iterator[None]:
    """Makes torch use one CPU thread inside the context if that trains faster than all of them.

    On a busy machine it can be ten times faster: threads that have the processor spin while they wait for those that
    have not.

    Args:
        task: model and text; its gradients change.
        batch_size: windows per step.
    """
    threads = torch.get_num_threads()
    seconds: dict[int, float] = {}
    windows = task.held_out[:batch_size]
    for count in {threads, 1} if task.device.type == "cpu" and threads > 1 else ():
        torch.set_num_threads(count)
        torch.autograd.backward(task.loss(windows))
        started = time.perf_counter()
        for _ in range(THREAD_TRIALS):
            torch.autograd.backward(task.loss(windows))
        seconds[count] = time.perf_counter() - started
    try:
        torch.set_num_threads(min(seconds, key=seconds.__getitem__, default=threads))
        yield
    finally:
        torch.set_num_threads(threads)


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
    on_progress: Callable[[str, int, str], None] = lambda key, done, note: None,
) -> Results:
    """Runs every contender and measures it.

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
        trust_remote_code: the model's folder may bring Python code of its own, which is then executed.
        on_progress: told a contender's key, its steps taken so far over all seeds, and a short note.

    Returns:
        The measurements. If bitsandbytes is missing or fails, its row says why.

    Raises:
        DemoInputError: an argument cannot be satisfied.
    """
    counts = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "eval_windows": eval_windows}
    for name, count in counts.items():
        if count < 1:
            raise DemoInputError(f"{name} must be at least 1, got {count}")
    where = resolve_device(device)
    if model is None:
        task, adamw, lion = byte_task(text, where, eval_windows), ADAMW, LION
    else:
        task, adamw, lion = hugging_face_task(model, text, where, eval_windows, trust_remote_code), HF_ADAMW, HF_LION
    adamw = dataclasses.replace(adamw, lr=adamw.lr if adamw_lr is None else adamw_lr)
    lion = dataclasses.replace(lion, lr=lion.lr if lion_lr is None else lion_lr)

    def run_seeds(key: str, h: Hyperparameters) -> Iterator[Run]:
        for seed in range(seeds):

            def on_step(done: int, loss: float, before: int = seed * steps) -> None:
                on_progress(key, before + done, f"{loss:.3f} {task.unit}")

            optimizer = build_optimizer(key, task.trained, h)
            yield fine_tune(task, optimizer, steps=steps, batch_size=batch_size, seed=seed, on_step=on_step)

    started = time.perf_counter()
    with fastest_threads(task, batch_size):
        rows = [Row("none", runs=[Run(0, [], [0], [task.held_out_loss(batch_size)])])]
        rows += [Row(key, adamw if key == "adamw" else lion) for key in LABELS if key != "none"]
        for row in rows:
            try:
                if row.hyperparameters is not None:
                    row.runs = list(run_seeds(row.key, row.hyperparameters))
            except Exception as error:
                if row.key != "bitsandbytes":
                    raise
                installed = not isinstance(error, ModuleNotFoundError)
                what = f"{type(error).__name__}: {first_line(error)}"
                row.unavailable = what if installed else "pip install bitsandbytes"
                on_progress(row.key, 0, "unavailable")
            else:
                row.summarize(task.parameters)
                on_progress(row.key, seeds * steps, f"{row.loss_after:.3f} {task.unit} held out")
        device_name = describe_device(where)

    setting = {
        "model": task.model_name,
        "text": task.text_name,
        "device": device_name,
        "parameters": task.parameters,
        "token": task.token,
        "unit": task.unit,
        **counts,
        "context": task.window - 1,
        "training_tokens": len(task.train),
        "passes_over_training_text": steps * batch_size * (task.window - 1) / len(task.train),
        "held_out_tokens": task.held_out[:, 1:].numel(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return Results(setting, rows, conclude(rows, task.unit), time.perf_counter() - started)


# ---- The report --------------------------------------------------------------------------------------------


def describe_device(device: torch.device) -> str:
    """A device's name for people, such as "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device)


def describe_run(setting: dict[str, Any]) -> str:
    """How much training a run is, such as "120 steps of 4 x 256 bytes, CPU, 2 threads, 1 seed"."""
    batch = f"{setting['batch_size']} x {setting['context']} {setting['token']}s"
    return f"{setting['steps']} steps of {batch}, {setting['device']}, {counted(setting['seeds'], 'seed')}"


def counted(count: int, noun: str) -> str:
    """A count with its noun, in the plural where it has to be."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def conclude(rows: Sequence[Row], unit: str) -> str:
    """Says in one sentence what the figures show.

    Args:
        rows: summarized rows, among them AdamW, Lion and Lion8bit.
        unit: unit of the losses.

    Returns:
        The sentence.
    """
    by_key = {row.key: row for row in rows if row.unavailable is None}
    ours, lion, adamw = by_key["lion8bit"], by_key["lion"], by_key["adamw"]
    gain = lion.loss_before - lion.loss_after

    def gap(row: Row) -> str:
        difference = row.loss_after - lion.loss_after
        if abs(difference) < SMALLEST_GAP:
            return f"within {SMALLEST_GAP} {unit} of fp32 Lion"
        share = f" ({abs(difference) / gain:.2%} of what fine-tuning gained)" if gain > 0 else ""
        return f"{abs(difference):.4f} {unit} {'above' if difference > 0 else 'below'} fp32 Lion{share}"

    ratios = [row.state_bytes_per_param / ours.state_bytes_per_param for row in (lion, adamw)]
    sentence = (
        f"Lion8bit ends {gap(ours)}, with {ratios[0]:.1f}x less optimizer state than fp32 Lion and "
        f"{ratios[1]:.1f}x less than AdamW"
    )
    if "bitsandbytes" in by_key:
        sentence += f"; bitsandbytes' Lion8bit ends {gap(by_key['bitsandbytes'])}"
    return sentence + "."


def result_table(results: Results) -> Table:
    """Lays the results out for a terminal 80 columns wide (more with several seeds).

    Args:
        results: what `run_demo` measured.

    Returns:
        A rich table.
    """
    from rich import box
    from rich.table import Table

    setting = results.setting
    caption = [f"{describe_run(setting)}; held-out loss in {setting['unit']}"]
    table = Table(
        title=f"{setting['model']}, fine-tuned on {setting['text']}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("optimizer", no_wrap=True)
    headings = ("state,bytes/param", "optimizer,checkpoint", "optimizer,ms/step", "loss,before", "loss,after")
    for heading in headings:
        table.add_column(heading.replace(",", "\n"), justify="right", no_wrap=heading != "loss,after")
    for row in results.rows:
        cells = ["-"] * len(headings)
        if row.unavailable is not None:
            caption.append(f"{LABELS[row.key]} is unavailable: {row.unavailable}")
        else:
            spread = "" if row.loss_after_spread is None else f" ±{row.loss_after_spread:.4f}"
            cells[3:] = f"{row.loss_before:.4f}", f"{row.loss_after:.4f}{spread}"
        if row.optimizer_ms is not None:
            cells[0] = f"{row.state_bytes_per_param:.3f}"
            cells[1] = f"{row.checkpoint_bytes / 1e6:.2f} MB"
            cells[2] = f"{row.optimizer_ms:.2f}"
        table.add_row(LABELS[row.key], *cells, style="bold green" if row.key == "lion8bit" else None)
    table.caption = "\n".join(caption)
    return table


# Okabe and Ito's palette, told apart with any common colour blindness: https://jfly.uni-koeln.de/color/
COLOURS = {
    "none": "#767676",
    "adamw": "#D55E00",
    "lion": "#0072B2",
    "lion8bit": "#009E73",
    "bitsandbytes": "#CC79A7",
}
# Width, opacity and dashes of the held-out curves: where Lions coincide, the wider show under the narrower.
LINES: dict[str, tuple[float, float, Any]] = {
    "adamw": (2.6, 1.0, "-"),
    "lion": (8.0, 0.35, "-"),
    "bitsandbytes": (3.4, 1.0, "-"),
    "lion8bit": (2.2, 1.0, (0, (3, 2))),
}
INK, FAINT_INK, RULE = "#222222", "#6B6B6B", "#BBBBBB"


def mean_held_out(row: Row) -> list[float]:
    """A row's held-out losses, averaged over its seeds."""
    return [statistics.fmean(losses) for losses in zip(*(run.held_out_loss for run in row.runs), strict=True)]


def spread_apart(positions: Sequence[float], gap: float) -> list[float]:
    """Moves labels apart, keeping their order and the middle of each group.

    Args:
        positions: wanted places, in any order.
        gap: smallest distance between two.

    Returns:
        The places, in the order of `positions`; distances are at least 0.99 of `gap`.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    places = list(positions)
    for _ in range(1000):
        for low, high in itertools.pairwise(order):
            overlap = max(0.0, gap - (places[high] - places[low]))
            places[low] -= overlap / 2
            places[high] += overlap / 2
    return places


def plot_losses(axes: Axes, results: Results) -> None:
    """Draws the held-out losses, labelled at the curves' ends, and an inset that magnifies what sets Lions apart."""
    from matplotlib.ticker import MaxNLocator

    steps, unit = results.setting["steps"], results.setting["unit"]
    rows = [row for row in results.rows if row.runs]
    for row in rows:
        if row.key == "none":
            axes.axhline(row.loss_before, color=COLOURS[row.key], linewidth=1.2, linestyle=(0, (1, 2)))
            continue
        width, alpha, dashes = LINES[row.key]
        axes.plot(
            row.runs[0].held_out_steps,
            mean_held_out(row),
            color=COLOURS[row.key],
            linewidth=width,
            alpha=alpha,
            linestyle=dashes,
            solid_capstyle="round",
            zorder=12 - width,
        )
    low, high = axes.get_ylim()
    places = spread_apart([row.loss_after for row in rows], 0.066 * (high - low))
    for row, place in zip(rows, places, strict=True):
        heights = [(y - low) / (high - low) for y in (row.loss_after, place, place)]
        style: dict[str, Any] = {"color": COLOURS[row.key], "transform": axes.transAxes}
        axes.plot([1.012, 1.03, 1.05], heights, linewidth=1, clip_on=False, **style)
        weight = "bold" if row.key == "lion8bit" else "normal"
        label = f"{LABELS[row.key]}  {row.loss_after:.3f}"
        axes.text(1.06, heights[-1], label, va="center", fontsize=10.5, fontweight=weight, **style)
    axes.set_xlim(0, steps)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("optimizer step", color=FAINT_INK)
    axes.set_title(f"Held-out loss, {unit}", loc="left", fontsize=12, color=INK)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    plot_gaps(axes.inset_axes((0.5, 0.47, 0.47, 0.37)), results)


def plot_gaps(axes: Axes, results: Results) -> None:
    """Draws how far the 8-bit Lions' held-out losses are from fp32 Lion's, in thousandths."""
    by_key = {row.key: row for row in results.rows if row.runs}
    base = mean_held_out(by_key["lion"])
    axes.axhline(0, color=COLOURS["lion"], linewidth=5, alpha=0.35)
    largest = 0.0
    for key in ("bitsandbytes", "lion8bit"):
        if key in by_key:
            gaps = [1e3 * (loss - b) for loss, b in zip(mean_held_out(by_key[key]), base, strict=True)]
            axes.plot(by_key[key].runs[0].held_out_steps, gaps, color=COLOURS[key], linewidth=1.6)
            largest = max(largest, *map(abs, gaps))
    axes.set_xlim(0, results.setting["steps"])
    axes.set_ylim(-1.25 * max(1.0, largest), 1.25 * max(1.0, largest))
    axes.set_xticks([])
    title = axes.set_title("8-bit minus fp32 Lion, thousandths", loc="left", fontsize=9.5, color=FAINT_INK)
    title.set_backgroundcolor("white")


def plot_memory(axes: Axes, results: Results) -> None:
    """Draws the optimizers' state as horizontal bars."""
    rows = [row for row in results.rows if row.runs and row.key != "none"]
    largest = max(row.state_bytes_per_param for row in rows)
    for place, row in enumerate(rows):
        size, weight = row.state_bytes_per_param, "bold" if row.key == "lion8bit" else "normal"
        axes.barh(place, size, color=COLOURS[row.key], height=0.58)
        text: dict[str, Any] = {"color": INK, "fontsize": 10.5, "fontweight": weight}
        axes.text(0, place - 0.34, LABELS[row.key], va="bottom", **text)
        axes.text(size + 0.02 * largest, place, f"{size:.2f}", va="center", **text)
    axes.set_xlim(0, largest * 1.1)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.set_yticks([])
    axes.set_title("Optimizer state, bytes per parameter", loc="left", fontsize=12, color=INK)


def plot(results: Results, path: Path) -> None:
    """Draws the figure: losses on the left, memory on the right, the conclusion below.

    Args:
        results: what `run_demo` measured.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.7), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    figure.subplots_adjust(left=0.045, right=0.985, top=0.81, bottom=0.215, wspace=0.62)
    plot_losses(left, results)
    plot_memory(right, results)
    for axes in (left, right, *left.child_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(colors=FAINT_INK, labelsize=9.5)
    title = f"{results.setting['model']}, fine-tuned on {results.setting['text']}"
    figure.text(0.045, 0.94, title[0].upper() + title[1:], fontsize=14.5, fontweight="bold", color=INK)
    figure.text(0.045, 0.893, describe_run(results.setting), fontsize=10.5, color=FAINT_INK)
    conclusion = textwrap.fill(results.conclusion, 160)
    figure.text(0.045, 0.085, conclusion, fontsize=10.5, color=INK, va="top", linespacing=1.4)
    figure.savefig(path)


def save_results(results: Results, folder: Path) -> tuple[Path, Path]:
    """Writes the figure and the JSON.

    Args:
        results: what `run_demo` measured.
        folder: where to write `demo.png` and `demo.json`; made if missing.

    Returns:
        The paths of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure, record = (folder / name for name in FILES)
    plot(results, figure)
    record.write_text(json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n")
    return figure, record
