"""Measures the time of one model's optimizer step on a GPU, by optimizer and dtype."""

from __future__ import annotations

import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from common import Shape, make_params, numel, spread, write_json
from machine import PROGRAMS, asked_of_driver, program, write_whole
from models import GPU_MODELS, QUICK_GPU_MODELS
from step_time import CONTENDERS, DTYPES, LR, OURS, Contender, Params, time_call

from lion8bit import Lion8bit
from lion8bit.tools.memory import state_bytes

DESCRIPTION = """\
How long does one step of a public model's parameters take on a GPU, with each optimizer? Caches are flushed before each
step. The GPU's time is that between two events while its queue is full; the wall time is what a caller waits for, with
the optimizer's own Python, with the same gradients as before or with new ones.
"""
EPILOG = """\
examples:
  python benchmarks/gpu_step.py --model gpt2 --json gpt2.json
  python benchmarks/gpu_step.py --model 1B --dtype fp32 --contender lion8bit adamw
  python benchmarks/gpu_step.py --model gpt2 --device cpu --quick       dry run without a GPU
"""

SECONDS_PER_CONTENDER = 3.0  # of repeats, without the first steps
MOST_SPARE = 1 << 28  # parameters of a list that has a second set of gradients
SHARE_OF_MEMORY = 0.9  # of the free memory, for parameters, gradients and our state


def flash(bits: int | None) -> Callable[[Params], torch.optim.Optimizer]:
    """FlashOptim's Lion with that many bits of weights, None for those of the parameter."""

    def make(params: Params) -> torch.optim.Optimizer:
        from flashoptim import FlashLion

        return FlashLion(params, lr=LR, master_weight_bits=bits)  # type: ignore[no-any-return]

    return make


GPU_CONTENDERS: dict[str, Contender] = {
    **{
        key: CONTENDERS[key]
        for key in (OURS, "lion8bit-stochastic", "lion8bit-4bit", "bitsandbytes", "adamw", "compiled-lion")
    },
    "lion8bit-compensated": Contender(
        "lion8bit, 24-bit weights", functools.partial(Lion8bit, lr=LR, weight_rounding="compensated"), dtypes=("bf16",)
    ),
    "flashlion": Contender("FlashLion", flash(None), "flashoptim"),
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


def synchronize(device: torch.device) -> None:
    """Until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    contender: Contender,
    params: Params,
    spare: list[torch.Tensor],
    device: torch.device,
    repeats: int,
    bandwidth: float,
) -> dict[str, Any]:
    """The figures of one contender, or why there are none; ``spare``: other gradients for "wall_new", or nothing."""
    optimizer = None

    def step_with_new_gradients() -> float:
        for i, param in enumerate(params):
            param.grad, spare[i] = spare[i], param.grad
        common.flush_cache(device)
        synchronize(device)
        start = time.perf_counter()
        optimizer.step()  # type: ignore[union-attr]
        synchronize(device)
        return time.perf_counter() - start

    try:
        begin = time.perf_counter()
        optimizer = contender.make(params)
        optimizer.step()
        synchronize(device)
        first = time.perf_counter() - begin
        optimizer.step()
        times = []
        begin = time.perf_counter()
        while len(times) < repeats and (len(times) < 3 or time.perf_counter() - begin < SECONDS_PER_CONTENDER):
            times.append(time_call(optimizer.step, device))
        new = [step_with_new_gradients() for _ in range(len(times) if spare else 0)]
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
        "wall_new_ms": spread([wall * 1e3 for wall in new]) if new else None,
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
        spare = [param.grad.clone() for param in params] if numel(fitting) < MOST_SPARE else []
        place |= {"parameters": numel(fitting), "tensors": len(fitting)}
        for key in keys:
            contender = GPU_CONTENDERS[key]
            if dtype not in contender.dtypes or not common.available(contender.package):
                continue
            row = {**place, "contender": key, "label": contender.label}
            yield row | measure(contender, params, spare, device, repeats, bandwidth)
            free_memory(device)
        del params, spare


def context() -> dict[str, Any]:
    """The machine's record, what its driver reports, and NVIDIA's programs."""
    asked = asked_of_driver()
    tools = [name for name in PROGRAMS if program(name)]
    return {**common.environment(), "driver": asked.get("driver_version"), "driver_says": asked, "tools": tools}


def main() -> None:
    """Measures a list and writes each row when it is there, or only the machine's record."""
    options = common.parser(DESCRIPTION, EPILOG)
    options.add_argument("--machine", action="store_true", help="only the machine's record")
    options.add_argument("--model", choices=list(GPU_MODELS), default="gpt2")
    options.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    options.add_argument("--contender", nargs="+", choices=list(GPU_CONTENDERS), default=list(GPU_CONTENDERS))
    options.add_argument("--device", default="cuda")
    options.add_argument("--repeats", type=int, default=20)
    settings = options.parse_args()
    record, out = context(), common.console()
    if settings.device == "cuda" and not torch.cuda.is_available():
        options.error("torch must find an NVIDIA GPU, got none; use another python, or --device cpu")
    if settings.machine:
        torch.ones(1, device=settings.device).item()
        out.print(record["driver_says"], record["tools"], common.describe(record))
        if settings.json is not None:
            write_whole(settings.json, json.dumps(record) + "\n")
        return
    found: list[dict[str, Any]] = []
    repeats = min(3, settings.repeats) if settings.quick else settings.repeats
    device = torch.device(settings.device)
    for row in rows(settings.model, device, settings.dtype, settings.contender, repeats, settings.quick):
        found.append(row)
        write_json(settings.json, "gpu_step", settings, {"environment": record, "rows": found})
        figures = f"{row['gpu_ms']['median']:.3f} ms, {row['share_of_copy']:.0%}" if "gpu_ms" in row else row["reason"]
        out.print(f"{row['name']}, {row['dtype']}, {row['label']}: {figures}", highlight=False)


if __name__ == "__main__":
    main()
