"""Owns the first steps of a fresh process: what they cost in time, and what compute-sanitizer watches."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from machine import write_whole

SHAPES = [
    (64, 1024),
    (33, 1001),
    (20000,),
    (100,),
]  # whole blocks, rows that end in short blocks, a vector, a small one
ROUNDINGS = {torch.float32: ["auto"], torch.bfloat16: ["auto", "nearest", "compensated"], torch.float16: ["auto"]}

FLAGS = [  # with capturable, threads meet at a barrier and share memory
    {},
    {"cautious": True, "decoupled_weight_decay": False},
    {"capturable": True},
    {"capturable": True, "cautious": True},
]


def step_a_few(device: str, dtype: torch.dtype, options: dict[str, object], steps: int) -> list[float]:
    """Seconds of each step of a new optimizer on a few parameters, waited for."""
    from lion8bit import Lion8bit

    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype).to(device)) for shape in SHAPES]
    for param in params:
        param.grad = torch.full(param.shape, 0.5, dtype=dtype).to(device)
        param.grad.view(-1)[:1].copy_(torch.tensor([float("nan")], dtype=dtype))
    optimizer = Lion8bit(params, lr=1e-3, weight_decay=0.1, **options)
    seconds = []
    for _ in range(steps):
        wait(device)
        start = time.perf_counter()
        optimizer.step()
        wait(device)
        seconds.append(time.perf_counter() - start)
    assert optimizer.nonfinite_count() == len(params) * steps
    return seconds


def wait(device: str) -> None:
    """Until the device has nothing to do."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Prints the seconds of the import and of two steps as JSON, or with ``--every`` steps every kind of parameter."""
    options = argparse.ArgumentParser(description="First steps in a fresh process.")
    options.add_argument("--device", default="cuda")
    options.add_argument("--every", action="store_true", help="every dtype and rounding, block size and flag")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the seconds here")
    settings = options.parse_args()
    torch.ones(1).to(settings.device)  # the context is not the optimizer's to pay for
    wait(settings.device)
    start = time.perf_counter()
    import lion8bit  # noqa: F401

    imported = time.perf_counter() - start
    if settings.every:
        for dtype, roundings in ROUNDINGS.items():
            for rounding, block_size in zip(roundings * 3, (64, 128, 256)):
                for flags in FLAGS:
                    kind = {"weight_rounding": rounding, "block_size": block_size, **flags}
                    step_a_few(settings.device, dtype, kind, 2)
        print("stepped every kind of parameter")
    else:
        first, second = step_a_few(settings.device, torch.bfloat16, {}, 2)
        seconds = json.dumps({"import": imported, "first_step": first, "second_step": second})
        print(seconds)
        if settings.json is not None:
            write_whole(settings.json, seconds + "\n")


if __name__ == "__main__":
    main()
