"""Owns the measurement of what one element does to the others of its block that are much smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import available, console, describe, environment, new_table, parser, write_json

from lion8bit import Lion, Lion8bit

DESCRIPTION = """\
One feature in 64 has gradients that are larger than the others' by a ratio. How often do the steps of the others differ
from fp32 Lion's ("wrong"), and how far do they come in its direction ("way"; 100 % means no bias)? All
optimizers get the same gradients: steady ones, or normal ones whose mean is as large as their noise.
"""

EPILOG = """\
examples:
  python benchmarks/outliers.py
  python benchmarks/outliers.py --json benchmarks/results/outliers-cpu.json
"""

RATIOS = (1.0, 10.0, 1e2, 1e3, 3e3, 1e4, 3e4, 1e5, 1e6)
SHAPE, EVERY = (64, 256), 64
STEPS, WARM_UP = 300, 100  # the momentum of the first steps is still far from the mean gradient
Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def measure(make: Make, ratio: float, noisy: bool, steps: int = STEPS) -> tuple[float, float]:
    """The share of wrong steps of the small elements, and the share of fp32 Lion's way that they make."""
    generator = torch.Generator().manual_seed(0)
    small = torch.arange(SHAPE[1]) % EVERY > 0
    mean = torch.randn(SHAPE, generator=generator) if noisy else 1 + torch.rand(SHAPE[0], 1, generator=generator)
    ours, theirs = (torch.zeros(SHAPE, requires_grad=True) for _ in range(2))
    optimizers = make([ours]), Lion([theirs], lr=1.0)
    way, whole, wrong = (torch.zeros(SHAPE) for _ in range(3))
    for step in range(steps):
        noise = (1.0 if noisy else 0.1) * torch.randn(SHAPE, generator=generator)
        grad = (mean + noise) * torch.where(small, 1.0, ratio)
        for param, optimizer in zip((ours, theirs), optimizers):
            param.grad = grad
            param.detach().zero_()
            optimizer.step()
        if step >= min(WARM_UP, steps // 3):
            wrong += (ours != theirs).detach()
            way += ours.detach()
            whole += theirs.detach()
    share = float(wrong[:, small].mean()) / (steps - min(WARM_UP, steps // 3))
    return share, float((way * whole.sign())[:, small].sum() / whole.abs()[:, small].sum())


def contenders() -> Iterator[tuple[str, Make]]:
    """Optimizers with their names."""
    for block_size in (64, 128, 256):
        yield f"block {block_size}", lambda params, size=block_size: Lion8bit(params, lr=1.0, block_size=size)  # type: ignore[misc]
    if available("bitsandbytes"):
        import bitsandbytes

        yield "bitsandbytes", lambda params: bitsandbytes.optim.Lion8bit(params, lr=1.0)


def main() -> None:
    """Prints a table for each kind of gradient."""
    settings, out = parser(DESCRIPTION, EPILOG).parse_args(), console()
    torch.set_num_threads(1)
    record, rows = environment(), []
    out.print(describe(record), style="dim")
    makes = dict(contenders())
    for noisy in (False, True):
        title = "Noise as large as the mean" if noisy else "Steady gradients"
        table = new_table(f"{title}: wrong steps, way, in %", ["ratio"], list(makes))
        for ratio in RATIOS[:2] if settings.quick else RATIOS:
            found: dict[str, Any] = {"noisy": noisy, "ratio": ratio}
            for name, make in makes.items():
                wrong, way = measure(make, ratio, noisy, 30 if settings.quick else STEPS)
                found[name] = {"wrong": wrong, "way": way}
            rows.append(found)
            table.add_row(f"{ratio:g}", *(f"{100 * found[n]['wrong']:.1f}, {100 * found[n]['way']:.0f}" for n in makes))
        out.print(table)
    write_json(settings.json, "outliers", settings, {"environment": record, "rows": rows})


if __name__ == "__main__":
    main()
