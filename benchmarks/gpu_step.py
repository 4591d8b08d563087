"""Owns the measurement of one model's step on a GPU, by every optimizer, in a process that `gpu.py` starts."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Shape, available, environment, make_params, numel, spread
from models import GPU_MODELS, QUICK_GPU_MODELS
from step_time import CONTENDERS, DTYPES, LR, OURS, Contender, Params, time_call

from lion8bit import Lion8bit
from lion8bit.demo import state_bytes

SECONDS_PER_CONTENDER = 3.0  # of repeats, its first steps apart
SHARE_OF_MEMORY = 0.9  # of what is free, that parameters, gradients and our state may take


class ForeachLion(torch.optim.Optimizer):
    """Lion with fp32 momentum by torch's foreach functions."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = group["params"]
            for param in params:
                if not self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param, dtype=torch.float32)
            momenta = [self.state[param]["momentum"] for param in params]
            grads = [param.grad.float() for param in params]
            updates = torch._foreach_mul(momenta, 0.9)
            torch._foreach_add_(updates, grads, alpha=1 - 0.9)
            torch._foreach_sign_(updates)
            updates = [update.to(param.dtype) for update, param in zip(updates, params)]
            torch._foreach_add_(params, updates, alpha=-LR)
            torch._foreach_lerp_(momenta, grads, 1 - 0.99)


def flash(bits: int | None) -> Callable[[Params], torch.optim.Optimizer]:
    """FlashOptim's Lion with that many bits of weights, None for those of the parameter."""

    def make(params: Params) -> torch.optim.Optimizer:
        from flashoptim import FlashLion

        return FlashLion(params, lr=LR, master_weight_bits=bits)  # type: ignore[no-any-return]

    return make


GPU_CONTENDERS: dict[str, Contender] = {
    OURS: CONTENDERS[OURS],
    "lion8bit-stochastic": CONTENDERS["lion8bit-stochastic"],
    "lion8bit-compensated": Contender(
        "lion8bit, 24-bit weights",
        lambda params: Lion8bit(params, lr=LR, weight_rounding="compensated"),
        dtypes=("bf16",),
    ),
    "bitsandbytes": CONTENDERS["bitsandbytes"],
    "flashlion": Contender("FlashLion", flash(None), "flashoptim"),
    "flashlion-24": Contender("FlashLion, 24-bit weights", flash(24), "flashoptim", dtypes=("bf16",)),
    "adamw": CONTENDERS["adamw"],
    "foreach-lion": Contender("foreach Lion, fp32 state", ForeachLion),
    "compiled-lion": CONTENDERS["compiled-lion"],
}


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes per second that a copy within the device's memory reads and writes."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    times = [time_call(lambda: target.copy_(source), device)[0] for _ in range(repeats + 1)]
    return 2 * source.nbytes / statistics.median(times[1:])


def fitted(shapes: list[Shape], bytes_each: float, free: float) -> list[Shape]:
    """A single tensor halved until it fits into memory; a model as it is, or nothing where it does not fit."""
    while numel(shapes) * bytes_each > SHARE_OF_MEMORY * free:
        if len(shapes) > 1:
            return []
        shapes = [(shapes[0][0] // 2, *shapes[0][1:])]
    return shapes


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated."""
    gc.collect()
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def measure(
    contender: Contender, params: Params, device: torch.device, repeats: int, bandwidth: float
) -> dict[str, Any]:
    """The figures of one contender, or why there are none."""
    optimizer = None
    try:
        begin = time.perf_counter()
        optimizer = contender.make(params)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - begin
        optimizer.step()
        times = []
        begin = time.perf_counter()
        while len(times) < repeats and (len(times) < 3 or time.perf_counter() - begin < SECONDS_PER_CONTENDER):
            times.append(time_call(optimizer.step, device))
        state = state_bytes(optimizer)
    except Exception as error:  # peers refuse dtypes and sizes with whatever exception they meet first
        lines = str(error).strip().splitlines()
        return {"status": "failed", "reason": f"{type(error).__name__}: {lines[0][:200] if lines else ''}"}
    moved = sum(2 * param.nbytes + param.grad.nbytes for param in params) + 2 * state
    speed = moved / statistics.median(gpu for gpu, _ in times)
    return {
        "status": "measured",
        "gpu_ms": spread([gpu * 1e3 for gpu, _ in times]),
        "wall_ms": spread([wall * 1e3 for _, wall in times]),
        "first_step_s": first,
        "bytes_per_parameter": moved / sum(param.numel() for param in params),
        "gb_per_s": speed / 1e9,
        "share_of_copy": speed / bandwidth,
    }


def rows(
    model: str, device: torch.device, dtypes: list[str], keys: list[str], repeats: int, quick: bool
) -> Iterator[Any]:
    """One record per dtype and contender of a model, as soon as it is measured."""
    name, shapes = (QUICK_GPU_MODELS if quick else GPU_MODELS)[model]
    size = 1 << 22 if quick else int(min(1 << 30, free_memory(device) / 8))
    bandwidth = copy_bandwidth(device, size, repeats)
    for dtype in dtypes:
        bytes_each = sum(each.itemsize for each in DTYPES[dtype]) + 1.1
        fitting = fitted(shapes, bytes_each, free_memory(device))
        place = {"model": model, "name": name, "dtype": dtype, "copy_gb_per_s": bandwidth / 1e9}
        if not fitting:
            need = numel(shapes) * bytes_each / 1e9
            yield {**place, "contender": OURS, "label": OURS, "status": "failed", "reason": f"needs {need:.0f} GB"}
            continue
        params = make_params(fitting, device, *DTYPES[dtype])
        place |= {"parameters": numel(fitting), "tensors": len(fitting)}
        for key in keys:
            contender = GPU_CONTENDERS[key]
            if dtype not in contender.dtypes or not available(contender.package):
                continue
            yield {
                **place,
                "contender": key,
                "label": contender.label,
                **measure(contender, params, device, repeats, bandwidth),
            }
            free_memory(device)
        del params


def driver_version() -> str | None:
    """The NVIDIA driver's version, where its tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main() -> None:
    """Appends a line of JSON per measurement to a file, or prints the environment."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--environment", action="store_true", help="print the machine's record as JSON and stop")
    options.add_argument("--model", choices=list(GPU_MODELS), default="gpt2")
    options.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    options.add_argument("--contender", nargs="+", choices=list(GPU_CONTENDERS), default=list(GPU_CONTENDERS))
    options.add_argument("--device", default="cuda")
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--quick", action="store_true", help="small models")
    options.add_argument("--rows", type=Path, help="file to append to")
    settings = options.parse_args()
    if settings.environment:
        print(json.dumps({**environment(), "driver": driver_version()}))
        return
    device = torch.device(settings.device)
    todo = (settings.model, device, settings.dtype, settings.contender, settings.repeats, settings.quick)
    for row in rows(*todo):
        with settings.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
