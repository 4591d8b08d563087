"""Fine-tunes every weight of a language model in bf16 (stochastic rounding) on one device.

The backward pass steps each parameter and frees its gradient, activations are recomputed, the momentum has 8 bits, or 4
with --bits 4. 4 bits keep the bound on the drift from fp32 Lion and give up that on single signs (docs/numerics.md).
The model is a local folder of Hugging Face (needs transformers), or has random weights in the shape of a public model.
The text is a file; without a tokenizer its bytes are the tokens. Prints the loss of each step, the speed, and the peak
memory beside the plan of `lion8bit estimate`.

exit code: 0 done, 2 wrong arguments, 3 out of memory, 130 interrupted (Ctrl-C); the report says where. The model is
saved only after the last step.

examples:
  python examples/full_finetune.py --model ~/models/Llama-2-7b --text notes.txt --save tuned
  python examples/full_finetune.py --shape llama3-8b --memory-limit 24 --bits 4 --chunked-loss
  python examples/full_finetune.py --shape llama3-8b --memory-limit 24 --paged
  python examples/full_finetune.py --shape llama-7b --memory-limit 24 --optimizer bitsandbytes
  python examples/full_finetune.py --shape tiny --sequence 64 --device cpu
"""

from __future__ import annotations

import argparse
import importlib
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
from chunked_loss import chunked_loss
from llama import SHAPES, build
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lion8bit import Lion8bit, estimate, fuse_into_backward
from lion8bit.planner.formulas import LOSS_PIECE
from lion8bit.tools.cli import try_to_write
from lion8bit.tools.demo import DemoInputError, first_line, read_text, resolve_device
from lion8bit.tools.memory import GIB, is_out_of_memory, limit_memory, state_bytes

WEIGHT_DECAY = 0.1
OPTIMIZERS = {
    "lion8bit": ("lion8bit", "Lion8bit"),
    "bitsandbytes": ("bitsandbytes.optim", "Lion8bit"),
    "flashlion": ("flashoptim", "FlashLion"),
    "adamw": ("torch.optim", "AdamW"),
}
PAGED = ("lion8bit", "bitsandbytes")  # have the option `is_paged`
Advance = Callable[[str], None]


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


def windows(tokens: Tensor, settings: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """Random windows of a text, [batch, sequence + 1] each."""
    length = settings.sequence + 1
    if len(tokens) < length:
        raise DemoInputError(f"text must have at least {length} tokens, got {len(tokens)}; pass a longer file")
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        starts = torch.randint(len(tokens) - length + 1, (settings.batch, 1), generator=generator)
        yield tokens[starts + torch.arange(length)].to(device)


def build_optimizer(settings: argparse.Namespace, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    module, name = OPTIMIZERS[settings.optimizer]
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": WEIGHT_DECAY}
    options |= {"is_paged": settings.paged} if settings.optimizer in PAGED else {}
    options |= {"optim_bits": settings.bits} if settings.optimizer == "lion8bit" else {}
    options |= {"fused": True} if settings.optimizer == "adamw" else {}
    return getattr(importlib.import_module(module), name)(params, **options)  # type: ignore[no-any-return]


def attach(model: nn.Module, settings: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Builds optimizers over all parameters; with gradient release, the backward pass steps them.

    Other optimizers than Lion8bit have no gradient release: each parameter gets a separate optimizer and a hook.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    if settings.no_release or settings.optimizer == "lion8bit":
        optimizer = build_optimizer(settings, params)
        if not settings.no_release:
            fuse_into_backward(model, optimizer)
        return [optimizer]
    each = {param: build_optimizer(settings, [param]) for param in params}

    def step(param: Tensor) -> None:
        each[param].step()  # type: ignore[index]
        param.grad = None

    for param in params:
        param.register_post_accumulate_grad_hook(step)
    return [*each.values()]


class Place:
    """What the run is doing, and the peak memory of each kind of work on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.where = "start"
        self.peaks: dict[str, int] = {}
        self.requested: int | None = None  # the highest peak before the allocator rounds sizes; None on the CPU

    @contextmanager
    def at(self, work: str, step: int | None = None) -> Iterator[None]:
        """Inside this context the run does this work; `where` keeps it after an error."""
        self.where = work if step is None else f"{work} of step {step}"
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
        """Adds the latest gradient to `where`; must be called before other hooks free gradients."""

        def note(name: str) -> None:
            self.where = f"{self.where.partition(',')[0]}, at or after the gradient of {name}"

        for name, param in model.named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda _, name=name: note(name))


def plan(model: nn.Module, settings: argparse.Namespace) -> tuple[int | None, str | None]:
    """The peak that `lion8bit estimate` plans, in bytes, and its moment; None where it has no plan."""
    key = settings.optimizer + "-4bit" * (settings.bits == 4)
    key += "-release" * (not settings.no_release) + "-host" * settings.paged
    options = {"batch": settings.batch, "sequence": settings.sequence, "chunked_loss": settings.chunked_loss}
    row = estimate(model, **options).rows.get(key)
    return (None, None) if row is None or row.activations is None else (row.total, row.peak)


def loss_of(model: nn.Module, batch: Tensor, chunked: bool) -> Tensor:
    """The mean cross entropy of each token of [batch, sequence + 1] after the first."""
    if chunked:
        return chunked_loss(model, batch[:, :-1], batch[:, 1:])
    output = model(batch[:, :-1])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(
    settings: argparse.Namespace, place: Place, record: dict[str, Any], optimizers: list[Any], advance: Advance
) -> None:
    """Builds and trains the model; fills the record and the list of optimizers on the way."""
    if settings.memory_limit is not None:
        limit_memory(place.device, settings.memory_limit)
    with place.at("building the model"):
        model, tokenizer = load(settings, place.device)
    record["parameters"] = sum(param.numel() for param in model.parameters())
    record["weight_bytes"] = sum(param.nbytes for param in model.parameters())
    record["planned_bytes"], record["planned_peak"] = plan(model, settings)
    record["text"], data = read_text(settings.text)
    tokens = torch.tensor([*data] if tokenizer is None else tokenizer(data.decode())["input_ids"])
    record["tokens"] = "bytes" if tokenizer is None else "tokenizer"
    with place.at("building the optimizer"):
        place.watch(model)
        optimizers += attach(model, settings)
    batches = windows(tokens, settings, place.device)
    for step in range(1, settings.steps + 1):
        begin, batch = time.perf_counter(), next(batches)
        with place.at("forward pass", step):
            loss = loss_of(model, batch, settings.chunked_loss)
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


def run(settings: argparse.Namespace, device: torch.device, advance: Advance) -> dict[str, Any]:
    """Trains and returns the record; calls `advance` with a note after each step."""
    place = Place(device)
    optimizers: list[torch.optim.Optimizer] = []
    record: dict[str, Any] = {
        "model": str(settings.model or settings.shape),
        "optimizer": settings.optimizer,
        "bits": settings.bits if settings.optimizer == "lion8bit" else None,
        "chunked_loss": settings.chunked_loss,
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
    try:
        train(settings, place, record, optimizers, advance)
    except KeyboardInterrupt:
        record["interrupted"] = place.where
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        record["out_of_memory"] = {"where": place.where, "message": first_line(error)}
    paged = [optimizer.memory_report()["paged_bytes"] for optimizer in optimizers if isinstance(optimizer, Lion8bit)]
    times = record["seconds"][1:] or record["seconds"]
    return {
        **record,
        "state_bytes": sum(state_bytes(optimizer) for optimizer in optimizers),
        "state_bytes_on_host": sum(paged),
        "peak_bytes": max(place.peaks.values(), default=None),
        "requested_bytes": place.requested,
        "peaks": place.peaks,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "tokens_per_second": record["tokens_per_step"] / statistics.median(times) if times else None,
    }


def report(record: dict[str, Any]) -> str:
    """The record as text."""
    release = ", gradient release" if record["release"] else ""
    bits = f", {record['bits']} bits" if record["bits"] else ""
    chunked = ", chunked loss" if record["chunked_loss"] else ""
    lines = [f"{record['model']} on {record['device']}: {record['optimizer']}{bits}{release}{chunked}"]
    sizes = {name.replace("_bytes", ""): size for name, size in record.items() if name.endswith("_bytes")}
    sizes |= {f"peak of {work}": size for work, size in record["peaks"].items()}
    lines += [f"{name.replace('_', ' '):32} {size / GIB:9.4f} GiB" for name, size in sizes.items() if size]
    if record["losses"]:
        lines.append("loss " + " ".join(f"{loss:.3f}" for loss in record["losses"]))
        lines.append(f"{record['tokens_per_second']:.0f} tokens/s after the first step")
    if record["interrupted"]:
        lines.append(f"INTERRUPTED: {record['interrupted']}")
    if record["out_of_memory"]:
        lines.append(f"OUT OF MEMORY: {record['out_of_memory']['where']}: {record['out_of_memory']['message']}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="FOLDER", help="a causal model of Hugging Face, on this machine")
    source.add_argument("--shape", choices=list(SHAPES), help="random weights in this shape")
    options.add_argument("--trust-remote-code", action="store_true", help="execute Python code in the model's folder")
    options.add_argument("--text", type=Path, metavar="FILE", help="default: the source of Python's help topics")
    options.add_argument("--optimizer", choices=OPTIMIZERS, default="lion8bit")
    options.add_argument("--bits", type=int, choices=(4, 8), default=8, help="of Lion8bit's momentum")
    options.add_argument("--chunked-loss", action="store_true", help=f"logits of {LOSS_PIECE} tokens at a time")
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
    for name in ("steps", "batch", "sequence", "memory_limit"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            options.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if settings.bits == 4 and settings.optimizer != "lion8bit":
        options.error(f"--bits 4 must go with lion8bit, got {settings.optimizer}")
    if settings.paged and settings.optimizer not in PAGED:
        options.error(f"--paged must go with lion8bit or bitsandbytes, got {settings.optimizer}")
    for name, path in (("json", settings.json), ("save", settings.save and settings.save / "config.json")):
        try:
            if path is not None:
                try_to_write(path)
        except OSError as error:
            options.error(f"--{name} must be a place that can be written to, got {getattr(settings, name)} ({error})")
    if settings.lr is None:
        settings.lr = 1e-4 if settings.model is None else 1e-5  # random weights need larger steps
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints the report and returns the exit code."""
    settings = parse(arguments)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(settings.optimizer, total=settings.steps)
        try:
            device = resolve_device(settings.device)
            record = run(settings, device, lambda text: progress.update(task, advance=1, description=text))
        except (DemoInputError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if settings.json is not None:
        settings.json.write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))
    return 3 if record["out_of_memory"] else 130 if record["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
