"""Pretrains the byte-level model that ships with the package, on the Python standard library's source.

python benchmarks/pretrain_bytelm.py --steps 3600 --threads 1 --out lion8bit/tools/demo/data/bytelm.pt
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sysconfig
import time
import zlib
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lion8bit.tools.demo.bytelm import CHECKPOINT, ByteLM, load_pretrained, next_token_loss, tokenize

# Tests and idlelib are left out as far from ordinary library code, encodings as tables of escapes, and
# pydoc_data because it is the text that the demo fine-tunes and evaluates on.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
HELD_OUT_ONE_IN = 20  # files, chosen by a hash of their path

BATCH = 8  # sequences of model.config.context bytes
PEAK_LR = 3e-3
FINAL_LR_SHARE = 0.05
WARMUP_STEPS = 150
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0


def read_corpus(root: Path) -> tuple[bytes, bytes]:
    """Reads Python source below a folder: the training text and the held-out text, files separated by a zero byte."""
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if EXCLUDED.isdisjoint(relative.parts):
            held_out = zlib.crc32(relative.as_posix().encode()) % HELD_OUT_ONE_IN == 0
            texts[held_out].append(file.read_bytes())
    return b"\0".join(texts[0]), b"\0".join(texts[1])


def random_windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Draws [count, length] int64 windows at uniformly random places of [n] uint8 tokens."""
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()


@torch.no_grad()
def bits_per_byte(model: ByteLM, windows: Tensor) -> float:
    """Mean loss of [count, context + 1] int64 windows in bits per byte; each window's first byte is not predicted."""
    losses = [next_token_loss(model(part[:, :-1]), part[:, 1:], "sum").item() for part in torch.split(windows, BATCH)]
    return sum(losses) / windows[:, 1:].numel() / math.log(2)


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then half a cosine."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LR * warmup * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def save(model: ByteLM, path: Path) -> None:
    """Writes a checkpoint for `load_pretrained`: the configuration, and the weights in fp16."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": dataclasses.asdict(model.config), "weights": weights}, path)


def train(model: ByteLM, tokens: Tensor, held_out: Tensor, steps: int, seed: int, console: Console) -> None:
    """Trains on [n] uint8 tokens and prints the loss of the held-out windows every 400 steps."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    with Progress(console=console) as progress:
        task = progress.add_task("pretraining", total=steps)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            batch = random_windows(tokens, BATCH, model.config.context + 1, generator)
            loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            progress.update(task, advance=1, description=f"{loss.item() / math.log(2):.3f} bits/byte")
            if (step + 1) % 400 == 0:
                console.print(f"step {step + 1}: held out {bits_per_byte(model, held_out):.4f} bits/byte")


def main() -> None:
    """Trains, reports bits per byte, and saves the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps of 2048 bytes each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the batches")
    parser.add_argument("--eval-windows", type=int, default=128, help="windows per evaluation")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint to write")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    console = Console()
    tokens, held_out = (tokenize(text) for text in read_corpus(Path(sysconfig.get_path("stdlib"))))
    model = ByteLM()
    train_windows, held_out_windows = (
        random_windows(part, args.eval_windows, model.config.context + 1, torch.Generator().manual_seed(0))
        for part in (tokens, held_out)
    )
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{len(tokens):,} bytes to train on, {len(held_out):,} held out; "
        f"{args.steps * BATCH * model.config.context:,} bytes will be seen"
    )
    started = time.perf_counter()
    train(model, tokens, held_out_windows, args.steps, args.seed, console)
    save(model, args.out)
    saved = load_pretrained(args.out)
    console.print(
        f"{args.out}: {args.out.stat().st_size:,} bytes after {time.perf_counter() - started:.0f} s; "
        f"training text {bits_per_byte(saved, train_windows):.4f}, "
        f"held-out text {bits_per_byte(saved, held_out_windows):.4f} bits/byte"
    )


if __name__ == "__main__":
    main()
