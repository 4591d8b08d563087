"""Fine-tunes all weights of a large language model in bf16 on one GPU: gradient release, checkpointing, 8-bit momentum.

Owns the run and its report; the optimizer is lion8bit's, the built-in model is in llama.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from llama import SHAPES, build
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from lion8bit import Lion8bit, fuse_into_backward
from lion8bit.planner import estimate
from lion8bit.tools.cli import try_to_write
from lion8bit.tools.demo import DemoInputError, first_line, limit_gpu_memory, read_text, resolve_device, state_bytes

DESCRIPTION = """\
Fine-tunes every weight of a language model in bf16 (stochastic rounding) on one device: each parameter is stepped
inside the backward pass and its gradient freed, activations are recomputed, the momentum has 8 bits. The model is a
local folder of Hugging Face (needs transformers), or has random weights in the shape of a public one. The text is a
file; without a tokenizer its bytes are the tokens. Prints the loss of each step, the speed, and the memory at its peak
beside the plan of `lion8bit estimate`.
"""

EPILOG = """\
exit code: 0 done, 2 wrong arguments, 3 out of memory, 130 interrupted (Ctrl-C); the report then says where. Nothing is
saved unless all steps are done.

examples:
  python examples/full_finetune.py --model ~/models/Llama-2-7b --text notes.txt --save tuned
  python examples/full_finetune.py --shape llama-7b --memory-limit 24
  python examples/full_finetune.py --shape llama3-8b --memory-limit 24 --paged
  python examples/full_finetune.py --shape llama-3b --memory-limit 12 --paged
  python examples/full_finetune.py --shape llama-7b --memory-limit 24 --optimizer bitsandbytes
  python examples/full_finetune.py --shape tiny --sequence 64 --device cpu
"""

OUT_OF_MEMORY = 3
INTERRUPTED = 130
GIB = 2**30
LR = {"shape": 1e-4, "model": 1e-5}  # random weights have further to go
WEIGHT_DECAY = 0.1
OPTIMIZERS = ("lion8bit", "bitsandbytes", "flashlion", "adamw")
PLANNED = {  # (optimizer, release, paged): row of `lion8bit.planner`
    ("lion8bit", True, False): "lion8bit-release",
    ("lion8bit", True, True): "lion8bit-release-host",
    ("lion8bit", False, False): "lion8bit",
    ("flashlion", True, False): "flashlion-release",
    ("flashlion", False, False): "flashlion",
    ("adamw", False, False): "adamw",
}


# ---- What is trained -------------------------------------------------------------------------------------------------


def load(settings: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Any]:
    """The model in bf16 on the device, and its tokenizer or None."""
    if settings.model is None:
        return build(SHAPES[settings.shape], device, seed=settings.seed), None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted = settings.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=trusted
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=True, trust_remote_code=trusted)
    except (OSError, ValueError, ImportError):
        tokenizer = None
    return model.to(device).train(), tokenizer


def loss_of(model: nn.Module, window: Tensor) -> Tensor:
    """Mean loss of the next token over [batch, sequence + 1] tokens."""
    logits = model(window[:, :-1])
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def windows(tokens: Tensor, settings: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """Random windows of a text, [batch, sequence + 1] each."""
    length = settings.sequence + 1
    if len(tokens) < length:
        raise DemoInputError(f"text must have at least {length} tokens, got {len(tokens)}; pass a longer file")
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        starts = torch.randint(len(tokens) - length + 1, (settings.batch,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts]).long().to(device)


# ---- How it is stepped -----------------------------------------------------------------------------------------------


def make(name: str, params: Sequence[nn.Parameter], lr: float, paged: bool) -> torch.optim.Optimizer:
    """An optimizer by its name."""
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    if name == "bitsandbytes":
        from bitsandbytes.optim import Lion8bit as Theirs

        return Theirs(params, lr=lr, weight_decay=WEIGHT_DECAY, is_paged=paged)  # type: ignore[no-any-return]
    if name == "flashlion":
        from flashoptim import FlashLion

        return FlashLion(params, lr=lr, weight_decay=WEIGHT_DECAY)  # type: ignore[no-any-return]
    return Lion8bit(params, lr=lr, weight_decay=WEIGHT_DECAY, is_paged=paged)


def attach(model: nn.Module, settings: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Optimizers over all parameters, stepped by the backward pass if gradients are to be released.

    Lion8bit does that itself; of the others each parameter gets one of its own.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    arguments = (settings.lr, settings.paged)
    if settings.no_release or settings.optimizer == "lion8bit":
        optimizer = make(settings.optimizer, params, *arguments)
        if isinstance(optimizer, Lion8bit) and not settings.no_release:
            fuse_into_backward(model, optimizer)
        return [optimizer]
    each = {param: make(settings.optimizer, [param], *arguments) for param in params}

    def step(param: Tensor) -> None:
        each[param].step()  # type: ignore[index]
        param.grad = None

    for param in params:
        param.register_post_accumulate_grad_hook(step)
    return [*each.values()]


# ---- Where it is -----------------------------------------------------------------------------------------------------


class Place:
    """What the run is doing, and the peak of each kind of work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.work = "start"
        self.step: int | None = None
        self.latest_gradient: str | None = None
        self.peaks: dict[str, int] = {}
        self.requested: int | None = None  # the highest peak before the allocator rounds; None on the CPU

    @contextmanager
    def at(self, work: str, step: int | None = None) -> Iterator[None]:
        """Within this context the run is at this work; where it fails, it stays there."""
        self.work, self.step, self.latest_gradient = work, step, None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            if self.device.type == "cuda":
                stats = torch.cuda.memory_stats(self.device)
                self.peaks[work] = max(self.peaks.get(work, 0), stats["allocated_bytes.all.peak"])
                self.requested = max(self.requested or 0, stats["requested_bytes.all.peak"])

    def watch(self, model: nn.Module) -> None:
        """Notes each gradient as it is complete; to be called before other hooks free it."""
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda _, name=name: setattr(self, "latest_gradient", name))

    def describe(self) -> str:
        """For people."""
        step = "" if self.step is None else f" of step {self.step}"
        after = "" if self.latest_gradient is None else f", at or after the gradient of {self.latest_gradient}"
        return f"{self.work}{step}{after}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of the GPU or of the host."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def limit_memory(device: torch.device, gib: float) -> None:
    """Holds the process to so much of the GPU's memory, or on the CPU to so much more than it has now."""
    if device.type == "cuda":
        limit_gpu_memory(device, gib * GIB)
        return
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(gib * GIB), resource.RLIM_INFINITY))


# ---- The run ---------------------------------------------------------------------------------------------------------


def run(settings: argparse.Namespace, device: torch.device, advance: Callable[[str], None]) -> dict[str, Any]:
    """Trains and returns the record of it; ``advance`` is told of each step."""
    place = Place(device)
    record: dict[str, Any] = {
        "model": str(settings.model or settings.shape),
        "optimizer": settings.optimizer,
        "release": not settings.no_release,
        "paged": settings.paged,
        "memory_limit_gib": settings.memory_limit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tokens_per_step": settings.batch * settings.sequence,
        "losses": [],
        "seconds": [],
        "out_of_memory": None,
        "interrupted": None,
    }
    optimizers: list[torch.optim.Optimizer] = []
    try:
        if settings.memory_limit is not None:
            limit_memory(device, settings.memory_limit)
        with place.at("building the model"):
            model, tokenizer = load(settings, device)
        record["parameters"] = sum(param.numel() for param in model.parameters())
        record["weight_bytes"] = sum(param.nbytes for param in model.parameters())
        record["planned_bytes"], record["planned_peak"] = plan(model, settings)
        record["text"], data = read_text(settings.text)
        tokens = torch.tensor([*data]) if tokenizer is None else torch.tensor(tokenizer(data.decode())["input_ids"])
        record["tokens"] = "bytes" if tokenizer is None else "tokenizer"
        with place.at("building the optimizer"):
            place.watch(model)
            optimizers = attach(model, settings)
        batches = windows(tokens, settings, device)
        for step in range(1, settings.steps + 1):
            begin, batch = time.perf_counter(), next(batches)
            with place.at("forward pass", step):
                loss = loss_of(model, batch)
            with place.at("backward pass", step):
                loss.backward()
            with place.at("optimizer", step):
                if settings.no_release or settings.optimizer == "lion8bit":
                    optimizers[0].step()
                    optimizers[0].zero_grad()
            record["losses"].append(loss.item())  # waits for the device
            record["seconds"].append(time.perf_counter() - begin)
            advance(f"loss {record['losses'][-1]:.3f}")
        if settings.save is not None:
            with place.at("saving"):
                model.save_pretrained(settings.save)
                if tokenizer is not None:
                    tokenizer.save_pretrained(settings.save)
    except KeyboardInterrupt:
        record["interrupted"] = place.describe()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        record["out_of_memory"] = {"where": place.describe(), "message": first_line(error)}
    record["state_bytes"] = sum(state_bytes(optimizer) for optimizer in optimizers)
    reports = [optimizer.memory_report() for optimizer in optimizers if isinstance(optimizer, Lion8bit)]
    record["state_bytes_on_host"] = sum(report["paged_bytes"] for report in reports)
    record["peak_bytes"] = max(place.peaks.values(), default=None)
    record["requested_bytes"] = place.requested
    record["peaks"] = place.peaks
    record["reserved_bytes"] = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    times = record["seconds"][1:] or record["seconds"]
    record["tokens_per_second"] = record["tokens_per_step"] / statistics.median(times) if times else None
    return record


def plan(model: nn.Module, settings: argparse.Namespace) -> tuple[int | None, str | None]:
    """What `lion8bit estimate` says of this run: bytes and the moment of the peak; None where they are not known."""
    key = PLANNED.get((settings.optimizer, not settings.no_release, settings.paged))
    if key is None:
        return None, None
    row = estimate(model, batch=settings.batch, sequence=settings.sequence).rows[key]
    return (None, None) if row.activations is None else (row.total, row.peak)


def report(record: dict[str, Any]) -> str:
    """The record for people."""

    def gib(value: int | None) -> str:
        if value is None:
            return "-"
        return f"{value / GIB:.2f} GiB" if value > GIB / 10 else f"{value / 2**20:.2f} MiB"

    release = ", gradient release" if record["release"] else ""
    lines = [f"{record['model']} on {record['device']}: {record['optimizer']}{release}"]
    if "parameters" in record:
        lines.append(f"{record['parameters']:,} parameters, weights {gib(record['weight_bytes'])}")
    host = f" (in host memory {gib(record['state_bytes_on_host'])})" if record["paged"] else ""
    lines.append(f"optimizer state {gib(record['state_bytes'])}{host}")
    if record["peak_bytes"] is not None:
        parts = ", ".join(f"{work} {gib(size)}" for work, size in record["peaks"].items())
        others = f"requested {gib(record['requested_bytes'])}, reserved {gib(record['reserved_bytes'])}"
        lines.append(f"peak {gib(record['peak_bytes'])} ({others}): {parts}")
    if record.get("planned_bytes") is not None:
        lines.append(f"planned peak {gib(record['planned_bytes'])} ({record['planned_peak']})")
    if record["losses"]:
        lines.append("loss " + " ".join(f"{loss:.3f}" for loss in record["losses"]))
        lines.append(f"{record['tokens_per_second']:.0f} tokens/s after the first step")
    if record["interrupted"]:
        lines.append(f"INTERRUPTED: {record['interrupted']}")
    if record["out_of_memory"]:
        lines.append(f"OUT OF MEMORY: {record['out_of_memory']['where']}: {record['out_of_memory']['message']}")
    return "\n".join(lines)


# ---- The command line ------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a command line."""
    options = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="FOLDER", help="a causal model of Hugging Face, on this machine")
    source.add_argument("--shape", choices=list(SHAPES), help="random weights in this shape")
    options.add_argument(
        "--trust-remote-code", action="store_true", help="execute Python code that the model's folder brings"
    )
    options.add_argument("--text", type=Path, metavar="FILE", help="default: the source of Python's help topics")
    options.add_argument("--optimizer", choices=OPTIMIZERS, default="lion8bit")
    options.add_argument("--paged", action="store_true", help="optimizer state in host memory")
    options.add_argument("--no-release", action="store_true", help="keep all gradients until the step")
    options.add_argument("--memory-limit", type=float, metavar="GIB", help="of the GPU, or beyond what a CPU run has")
    options.add_argument("--lr", type=float, help="default: 1e-4 for --shape, 1e-5 for --model")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--sequence", type=int, default=2048)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", help="default: a GPU if there is one")
    options.add_argument("--save", type=Path, metavar="FOLDER", help="write the model here, for transformers")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    settings = options.parse_args(arguments)
    for name in ("steps", "batch", "sequence"):
        if getattr(settings, name) < 1:
            options.error(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if settings.memory_limit is not None and settings.memory_limit <= 0:
        options.error(f"--memory-limit must be positive, got {settings.memory_limit}")
    if settings.paged and settings.optimizer not in ("lion8bit", "bitsandbytes"):
        options.error(f"--paged must go with lion8bit or bitsandbytes, got {settings.optimizer}")
    for name, path in (("json", settings.json), ("save", settings.save and settings.save / "config.json")):
        try:
            if path is not None:
                try_to_write(path)
        except OSError as error:
            options.error(f"--{name} must be a place that can be written to, got {getattr(settings, name)} ({error})")
    if settings.lr is None:
        settings.lr = LR["shape" if settings.model is None else "model"]
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints the report and returns the exit code."""
    settings = parse(arguments)
    columns = (
        TextColumn("{task.fields[name]}", style="bold"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=settings.steps, name=settings.optimizer)
        try:
            device = resolve_device(settings.device)
            record = run(settings, device, lambda text: progress.update(task, advance=1, description=text))
        except (DemoInputError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))
    return OUT_OF_MEMORY if record["out_of_memory"] else INTERRUPTED if record["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
