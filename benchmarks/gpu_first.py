"""Makes the first steps of a fresh process: measures their time, or runs every kind of kernel for compute-sanitizer."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from machine import write_whole

SHAPES = [(64, 1024), (33, 1001), (20000,), (100,)]  # whole blocks, short blocks at the end of rows, vectors
ROUNDINGS = {torch.float32: ["auto"], torch.bfloat16: ["auto", "nearest", "compensated"], torch.float16: ["auto"]}
FLAGS = [{}, {"cautious": True, "decoupled_weight_decay": False}]  # each also with capturable: shared memory, a barrier


def step_a_few(device: str, dtype: torch.dtype, **options: object) -> list[float]:
    """Seconds of both steps of a new optimizer on a few parameters; the gradients have a NaN each."""
    from lion8bit import Lion8bit

    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype).to(device)) for shape in SHAPES]
    for param in params:
        param.grad = torch.full(param.shape, 0.5, dtype=dtype).to(device)
        param.grad.view(-1)[:1].copy_(torch.tensor([float("nan")], dtype=dtype))
    optimizer = Lion8bit(params, lr=1e-3, weight_decay=0.1, **options)
    seconds = []
    for _ in range(2):
        wait(device)
        start = time.perf_counter()
        optimizer.step()
        wait(device)
        seconds.append(time.perf_counter() - start)
    assert optimizer.nonfinite_count() == len(params) * 2
    return seconds


def wait(device: str) -> None:
    """Until the device has nothing to do."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Writes the seconds of two steps as JSON, or with ``--every`` steps every kind of parameter."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--every", action="store_true", help="every dtype and rounding, block size and flag")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the seconds here")
    settings = options.parse_args()
    torch.ones(1).to(settings.device)  # the CUDA context is not part of the optimizer's time
    wait(settings.device)
    import lion8bit  # noqa: F401

    if settings.every:
        for dtype, roundings in ROUNDINGS.items():
            for rounding, block_size in zip(roundings * 3, (64, 128, 256)):
                for flags, capturable in itertools.product(FLAGS, (False, True)):
                    kind = {"weight_rounding": rounding, "block_size": block_size, "capturable": capturable, **flags}
                    step_a_few(settings.device, dtype, **kind)
        print("stepped every kind of parameter")
        return
    first, second = step_a_few(settings.device, torch.bfloat16)
    seconds = json.dumps({"first_step": first, "second_step": second})
    print(seconds)
    if settings.json is not None:
        write_whole(settings.json, seconds + "\n")


if __name__ == "__main__":
    main()
