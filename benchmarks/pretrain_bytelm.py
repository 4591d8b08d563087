"""Pretrains the byte-level model that ships with the package, on the Python standard library's source.

python benchmarks/pretrain_bytelm.py --steps 3600 --threads 1 --out lion8bit/tools/demo/data/bytelm.pt
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from lion8bit.tools.demo.bytelm import CHECKPOINT, ByteLM, encode, load_pretrained, next_token_loss, save_pretrained

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
    """Reads the standard library's source, in the order of the files' paths.

    Args:
        root: the standard library's folder.

    Returns:
        The training text and the held-out text (whole files), files separated by a zero byte.
    """
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if EXCLUDED.isdisjoint(relative.parts):
            held_out = zlib.crc32(relative.as_posix().encode()) % HELD_OUT_ONE_IN == 0
            texts[held_out].append(file.read_bytes())
    return b"\0".join(texts[0]), b"\0".join(texts[1])


def random_windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Draws windows at uniformly random places.

    Args:
        tokens: [n] uint8.
        count: number of windows.
        length: bytes per window.
        generator: source of the places.

    Returns:
        [count, length] int64.
    """
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()


@torch.no_grad()
def bits_per_byte(model: ByteLM, windows: Tensor) -> float:
    """Evaluates the model.

    Args:
        model: the model.
        windows: [count, context + 1] int64; every byte but a window's first is predicted.

    Returns:
        Mean cross entropy, in bits per byte.
    """
    losses = [
        next_token_loss(model(batch[:, :-1]), batch[:, 1:], "sum").item() for batch in torch.split(windows, BATCH)
    ]
    return sum(losses) / windows[:, 1:].numel() / math.log(2)


def learning_rate(step: int, steps: int) -> float:
    """Gives the schedule: linear warmup, then half a cosine.

    Args:
        step: index of the step, from 0.
        steps: total number of steps.

    Returns:
        The learning rate.
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LR * warmup * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


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
    generator = torch.Generator().manual_seed(args.seed)
    console = Console()

    train, held_out = (encode(text) for text in read_corpus(Path(sysconfig.get_path("stdlib"))))
    model = ByteLM()
    window = model.config.context + 1
    held_out_windows = random_windows(held_out, args.eval_windows, window, torch.Generator().manual_seed(0))
    train_windows = random_windows(train, args.eval_windows, window, torch.Generator().manual_seed(0))
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{len(train):,} bytes to train on, {len(held_out):,} held out; "
        f"{args.steps * BATCH * model.config.context:,} bytes will be seen"
    )

    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS, weight_decay=WEIGHT_DECAY)

    started = time.perf_counter()
    smoothed: float | None = None
    columns = (
        TextColumn("pretraining"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=args.steps)
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps)
            batch = random_windows(train, BATCH, window, generator)
            loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            bits = loss.item() / math.log(2)
            smoothed = bits if smoothed is None else 0.98 * smoothed + 0.02 * bits
            progress.update(task, advance=1, description=f"{smoothed:.3f} bits/byte")
            if (step + 1) % 400 == 0:
                console.print(f"step {step + 1}: held out {bits_per_byte(model, held_out_windows):.4f} bits/byte")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_pretrained(model, args.out)
    saved = load_pretrained(args.out)
    console.print(
        f"{args.out}: {args.out.stat().st_size:,} bytes after {time.perf_counter() - started:.0f} s; "
        f"training text {bits_per_byte(saved, train_windows):.4f}, "
        f"held-out text {bits_per_byte(saved, held_out_windows):.4f} bits/byte"
    )


if __name__ == "__main__":
    main()
