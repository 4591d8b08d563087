"""Measures how one large element in a block affects the updates of the small ones."""

from __future__ import annotations

import torch
from common import available, begin, new_table, parser, write_json
from contenders import Make, optimizer, ours

from lion8bit import Lion

DESCRIPTION = """\
One feature in 64 has gradients that are larger than the others' by a ratio. How often do the steps of the others differ
from fp32 Lion's ("wrong"), and how far do they go in its direction ("way"; 100 % means no bias)? All optimizers get the
same gradients: steady ones, or normal ones whose mean is as large as their noise.
"""

EPILOG = """\
examples:
  python benchmarks/outliers.py
  python benchmarks/outliers.py --json benchmarks/results/outliers-cpu.json
"""

RATIOS = (1.0, 10.0, 1e2, 1e3, 3e3, 1e4, 3e4, 1e5, 1e6)
SHAPE, EVERY = (64, 256), 64
STEPS, WARM_UP = 300, 100  # the momentum of the first steps is still far from the mean gradient


def measure(make: Make, ratio: float, noisy: bool, steps: int = STEPS) -> tuple[float, float]:
    """The share of wrong steps of the small elements, and the share of fp32 Lion's way that they make."""
    generator = torch.Generator().manual_seed(0)
    small = torch.arange(SHAPE[1]) % EVERY > 0
    mean = torch.randn(SHAPE, generator=generator) if noisy else 1 + torch.rand(SHAPE[0], 1, generator=generator)
    own, exact = (torch.zeros(SHAPE, requires_grad=True) for _ in range(2))
    lions = make([own]), Lion([exact], lr=1.0)
    way, whole, wrong = (torch.zeros(SHAPE) for _ in range(3))
    for step in range(steps):
        noise = (1.0 if noisy else 0.1) * torch.randn(SHAPE, generator=generator)
        grad = (mean + noise) * torch.where(small, 1.0, ratio)
        for param, lion in zip((own, exact), lions):
            param.grad = grad
            param.detach().zero_()
            lion.step()
        if step >= min(WARM_UP, steps // 3):
            wrong += (own != exact).detach()
            way += own.detach()
            whole += exact.detach()
    share = float(wrong[:, small].mean()) / (steps - min(WARM_UP, steps // 3))
    return share, float((way * whole.sign())[:, small].sum() / whole.abs()[:, small].sum())


def main() -> None:
    """Prints a table for each kind of gradient."""
    settings = parser(DESCRIPTION, EPILOG).parse_args()
    out, record = begin(threads=1)
    makes: dict[str, Make] = {f"block {size}": ours(lr=1.0, block_size=size) for size in (64, 128, 256)}
    makes["4 bits"] = ours(lr=1.0, optim_bits=4)
    if available("bitsandbytes"):
        makes["bitsandbytes"] = optimizer("bitsandbytes.optim", "Lion8bit", lr=1.0)
    rows = []
    for noisy in (False, True):
        title = "Noise as large as the mean" if noisy else "Steady gradients"
        table = new_table(f"{title}: wrong steps, way, in %", ["ratio"], list(makes))
        for ratio in RATIOS[:2] if settings.quick else RATIOS:
            cells = []
            for name, make in makes.items():
                wrong, way = measure(make, ratio, noisy, 30 if settings.quick else STEPS)
                rows.append({"noisy": noisy, "ratio": ratio, "optimizer": name, "wrong": wrong, "way": way})
                cells.append(f"{100 * wrong:.1f}, {100 * way:.0f}")
            table.add_row(f"{ratio:g}", *cells)
        out.print(table)
    write_json(settings.json, "outliers", settings, {"environment": record, "rows": rows})


if __name__ == "__main__":
    main()
