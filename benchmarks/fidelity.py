"""Compares momentum formats with fp32 Lion on the same gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import tasks
import torch
from common import Cell, Row, begin, installed, parser, progress, rows_table, save_figure, write_json
from formats import FORMATS, Format, blend
from torch import Tensor

from lion8bit.layout import in_memory_order, memory_order

DESCRIPTION = """\
How well do momentum formats follow fp32 Lion? Every format is given the same stream of gradients (open loop: the
parameters follow fp32 Lion), stores its own momentum and makes its own updates. Reported per format:

  bytes/param     codes and scales, measured on the stored tensors
  momentum error  |m' - m| / |m|, m' what the format stores, m the fp32 momentum; median over the measured steps
  sign differs    share of updates whose sign is not fp32 Lion's; mean over the measured steps
  drift           |sum of the differences between the updates| / |parameters| at the end
  frozen          share of elements whose code has not changed for 100 steps, although the fp32 momentum moved by more
                  than the distance to the next code, and is that far from the stored value (a code may rightly stay
                  where its block's scale follows; so the codes of the largest elements do not count)
  radial bias     <m' - m, m> / |m|^2: below 0 the format shrinks the momentum, above 0 it stretches it; median

Workloads (each has several cases; betas are (0.9, 0.99) and lr is the library's default where nothing else is said):

  lm         a small byte transformer trained on Python's own help texts, batch 8 and 96, and at ten times the rate
  conv       a convolutional net on scikit-learn's digits, 2,000 steps
  embedding  most rows idle: a model of hashed n-grams on the help texts, and synthetic rows drawn by a Zipf law
  betas      the three models at betas (0.95, 0.98) and (0.9, 0.999)
  stall      each element's mean gradient changes its sign once, at a random time in the middle third of the run; noise
             0, 1 and 4 times the mean
  spread     magnitudes within a block are lognormal, sigma 0, 0.5, 1, 1.5 and 2
  tiny       gradients of magnitude 1e-2 down to 1e-9, and 1e-12
"""

EPILOG = """\
A format with larger blocks is smaller and less exact, so each peer is compared with the largest lion8bit state that is
no larger than the peer's: block 256 for bitsandbytes, 128 for linear int8, 64 for FlashOptim. The three numbers of a
comparison are the peer's momentum error, sign difference and drift over ours; "ahead" means that all three are above 1.
bitsandbytes and lion8bit run their own code. linear int8 is a common choice of no particular library. FlashOptim is the
formula of its kernel (groups of 32, fp16 scales).

Tensors below 4096 elements are left out: every library keeps them in fp32. Of large models every n-th row is measured,
some 131,000 elements in all. With --quick only the first case of each workload runs, with fewer steps and elements.

examples:
  python benchmarks/fidelity.py --threads 1                       everything, about ten minutes
  python benchmarks/fidelity.py --workload lm --length 7          a longer run of one
  python benchmarks/fidelity.py --json f.json --plot f.png
"""

MEASURED_SIZE = 4096  # elements; smaller tensors are not quantized by any library
TRACKED = 131072  # elements of a large model that formats are measured on
SAMPLES = 40  # measurements of momentum in a run
STILL_STEPS = 100
CRITERIA = ("momentum_error", "sign_differs", "drift")


# ---- Workloads -------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """A source of gradients. ``weights`` are [rows, cols] views that fp32 Lion updates in place."""

    weights: list[Tensor]
    gradients: Callable[[int], list[Tensor]]  # of a step counted from 0, in the order of the weights


@dataclass(frozen=True)
class Case:
    """One row of the workload table."""

    name: str
    make: Callable[[Case, int], Stream]  # of the case and the number of steps
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 300
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warm_up: float = 1 / 3  # share of the steps that is not measured


def training(case: Case, steps: int) -> Stream:
    """Gradients of a model in training. Options of the case: ``task``, a function that makes one, and ``batch``."""
    torch.manual_seed(0)
    task = case.options["task"]()
    model = task.build()
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(1)

    def gradients(step: int) -> list[Tensor]:
        inputs, targets = task.batch(case.options["batch"], generator)
        with torch.enable_grad():
            grads = torch.autograd.grad(tasks.loss(model(inputs), targets), params)
        return [_rows(grad) for grad in grads]

    return Stream([_rows(param.detach()) for param in params], gradients)


def synthetic(case: Case, steps: int) -> Stream:
    """Normal gradients of a given mean and noise, one [rows, cols] parameter.

    Options of the case: ``mean`` and ``noise`` (standard deviation of the mean over the elements, and of the noise
    over the steps), ``sigma`` (of the elements' lognormal magnitudes), ``magnitude``, ``reverses`` (each mean
    changes its sign once, in the middle third), ``rows``, and ``active`` (rows that get a gradient in a step, drawn
    by a Zipf law).
    """
    options = {"mean": 1.0, "noise": 1.0, "sigma": 0.0, "magnitude": 1.0, "reverses": False, "active": None}
    options |= {"rows": 128, **case.options}
    generator = torch.Generator().manual_seed(0)
    shape = (options["rows"], 256)
    weight = torch.randn(shape, generator=generator) * 0.02
    magnitude = options["magnitude"] * torch.exp(options["sigma"] * torch.randn(shape, generator=generator))
    mean = options["mean"] * torch.randn(shape, generator=generator)
    reversal = steps / 3 * (1 + torch.rand(shape, generator=generator))
    frequency = 1 / torch.arange(1, shape[0] + 1)

    def gradients(step: int) -> list[Tensor]:
        signed = torch.where(reversal <= step, -mean, mean) if options["reverses"] else mean
        grad = magnitude * (signed + options["noise"] * torch.randn(shape, generator=generator))
        if options["active"]:
            idle = torch.ones(shape[0], 1, dtype=torch.bool)
            idle[torch.multinomial(frequency, options["active"], generator=generator)] = False
            grad.masked_fill_(idle, 0.0)
        return [grad]

    return Stream([weight], gradients)


def _rows(tensor: Tensor) -> Tensor:
    order = memory_order(tensor)
    assert order is not None
    return in_memory_order(tensor, order).view(tensor.shape[order[0]] if tensor.dim() > 1 else 1, -1)


LM = {"task": tasks.byte_lm, "batch": 8}
CONV = {"task": tasks.digits, "batch": 32}
N_GRAMS = {"task": tasks.n_grams, "batch": 8}

WORKLOADS: dict[str, tuple[Case, ...]] = {
    "lm": (
        Case("batch 8", training, LM),
        Case("batch 96", training, {**LM, "batch": 96}),
        Case("batch 8, lr 1e-3", training, LM, lr=1e-3),
    ),
    "conv": (Case("digits", training, CONV, steps=2000),),
    "embedding": (
        Case("hashed n-grams", training, N_GRAMS),
        Case("synthetic", synthetic, {"rows": 512, "mean": 0.1, "active": 16}),
    ),
    "betas": tuple(
        Case(f"{name}, {betas}", training, options, steps=steps, betas=betas)
        for betas, steps in (((0.95, 0.98), 300), ((0.9, 0.999), 1000))
        for name, options in (("lm", LM), ("conv", CONV), ("n-grams", N_GRAMS))
    ),
    # fp32 Lion needs 58 steps to turn, so what still differs a sixth of the run behind the last reversal has stalled.
    "stall": tuple(
        Case(f"noise {noise}", synthetic, {"noise": noise, "reverses": True}, steps=1200, warm_up=5 / 6)
        for noise in (0, 1, 4)
    ),
    "spread": tuple(Case(f"sigma {sigma}", synthetic, {"sigma": sigma, "mean": 0.1}) for sigma in (0, 0.5, 1, 1.5, 2)),
    "tiny": tuple(
        Case(f"magnitude 1e-{power}", synthetic, {"magnitude": 10.0**-power, "mean": 0.1})
        for power in (*range(2, 10), 12)
    ),
}


# ---- The measurement -------------------------------------------------------------------------------------------------


class Track:
    """One format on one part of a tensor: its momentum and drift, and for how long its codes have not changed."""

    def __init__(self, format_: Format, shape: torch.Size, case: Case) -> None:
        self.store = format_.store(shape, case.betas, **format_.options)
        self.lr = case.lr
        self.drift = torch.zeros(shape)
        self.still = torch.zeros(shape, dtype=torch.int16)
        self.anchor = torch.zeros(shape)  # the fp32 momentum when the code last changed

    def step(self, grad: Tensor, exact: Tensor, sign: Tensor) -> int:
        """Steps; ``exact`` and ``sign`` are fp32 Lion's new momentum and update. Returns the number of wrong signs."""
        before = self.store.codes
        difference = sign - self.store.step(grad)
        moved = self.store.codes != before
        self.still.add_(1).masked_fill_(moved, 0)
        torch.where(moved, exact, self.anchor, out=self.anchor)
        self.drift.add_(difference, alpha=self.lr)
        return int(difference.count_nonzero())

    def frozen(self, exact: Tensor) -> int:
        """Elements with an old code whose exact momentum moved, and is away from the stored value, by over a code."""
        spacing, codes = self.store.spacing(), self.store.codes
        moved = (exact - self.anchor).abs() > spacing
        away = (exact - self.store.decode(codes)).abs() > spacing
        inner = (codes > self.store.levels[0]) & (codes < self.store.levels[1])
        return int((moved & away & inner & (self.still >= STILL_STEPS)).sum())


@torch.no_grad()
def run_case(
    case: Case, formats: dict[str, Format], steps: int, tracked: int, tick: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Feeds one stream of gradients to every format.

    Args:
        case: what to run.
        formats: who takes part.
        steps: how many steps.
        tracked: about how many elements to measure on; every n-th row is.
        tick: called after each step.

    Returns:
        The figures by format; ``series`` has those of each sample.
    """
    stream = case.make(case, steps)
    exact = [torch.zeros_like(weight) for weight in stream.weights]
    large = [i for i, weight in enumerate(stream.weights) if weight.numel() >= MEASURED_SIZE]
    rows = slice(None, None, max(1, round(sum(stream.weights[i].numel() for i in large) / tracked)))
    weights = {i: stream.weights[i][rows] for i in large}
    tracks = {key: {i: Track(f, weights[i].shape, case) for i in large} for key, f in formats.items()}
    count = sum(weight.numel() for weight in weights.values())
    wrong: dict[str, list[int]] = {key: [] for key in formats}
    samples: dict[str, list[dict[str, float]]] = {key: [] for key in formats}
    every = max(1, steps // SAMPLES)

    for step in range(steps):
        for counts in wrong.values():
            counts.append(0)
        for i, grad in enumerate(stream.gradients(step)):
            sign = blend(exact[i], grad, case.betas[0]).sign_()
            exact[i] = blend(exact[i], grad, case.betas[1])
            stream.weights[i].add_(sign, alpha=-case.lr)
            if i in weights:
                seen = [tensor[rows].contiguous() for tensor in (grad, exact[i], sign)]
                for key, tensors in tracks.items():
                    wrong[key][-1] += tensors[i].step(*seen)
        if (step + 1) % every == 0 or step == steps - 1:
            norm = _norm(weights.values())
            for key, tensors in tracks.items():
                figures = measure({track: exact[i][rows] for i, track in tensors.items()})
                drift = _norm(track.drift for track in tensors.values()) / norm
                signs = statistics.fmean(wrong[key][-every:]) / count
                samples[key].append({**figures, "step": step, "drift": drift, "sign_differs": signs})
        tick()
    first = int(steps * case.warm_up)
    signs_of = {key: statistics.fmean(counts[first:]) / count for key, counts in wrong.items()}
    return {
        key: {"format": key, "sign_differs": signs_of[key], **summarise(tensors.values(), samples[key], first, count)}
        for key, tensors in tracks.items()
    }


def measure(tracks: dict[Track, Tensor]) -> dict[str, float]:
    """Momentum error, radial bias and frozen share of one format, given each track's exact momentum."""
    squared_error = squared_norm = inner = 0.0
    frozen = count = 0
    for track, exact in tracks.items():
        m = exact.double()
        error = track.store.decode(track.store.codes).double() - m
        squared_error += float(error.square().sum())
        squared_norm += float(m.square().sum())
        inner += float((error * m).sum())
        frozen += track.frozen(exact)
        count += exact.numel()
    norm = squared_norm or 1.0
    return {"momentum_error": (squared_error / norm) ** 0.5, "radial_bias": inner / norm, "frozen": frozen / count}


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


def summarise(tracks: Iterable[Track], samples: list[dict[str, float]], first: int, count: int) -> dict[str, Any]:
    """One format's figures from its samples; the frozen share is None where no code can be old enough yet."""
    after = [row for row in samples if row["step"] >= first]
    lasting = [row["frozen"] for row in after if row["step"] >= STILL_STEPS]
    stored = sum(track.store.nbytes() for track in tracks)
    return {
        "bytes_per_parameter": stored / count,
        **{name: statistics.median(row[name] for row in after) for name in ("momentum_error", "radial_bias")},
        "frozen": statistics.median(lasting) if lasting else None,
        "drift": samples[-1]["drift"],
        "series": {name: [row[name] for row in samples] for name in ("step", *CRITERIA)},
    }


# ---- Comparison ------------------------------------------------------------------------------------------------------


def compare(rows: dict[str, Row], peer: str) -> Row:
    """Compares a peer with the largest state of ours that is no larger than its own.

    Returns:
        ``against`` (key of our format), ``ratios`` (the peer's figures over ours in the order of `CRITERIA`; None
        where ours is 0), ``ahead`` (ours, on every criterion) and ``behind_on``.
    """
    fitting = [
        (row["bytes_per_parameter"], key)
        for key, row in rows.items()
        if FORMATS[key].role == "ours" and row["bytes_per_parameter"] <= rows[peer]["bytes_per_parameter"]
    ]
    _, key = max(fitting)
    pairs = {name: (rows[peer][name], rows[key][name]) for name in CRITERIA}
    return {
        "against": key,
        "ratios": [theirs / own if own else None for theirs, own in pairs.values()],
        "ahead": all(own < theirs for theirs, own in pairs.values()),
        "behind_on": [name for name, (theirs, own) in pairs.items() if own > theirs],
    }


def outcome(row: Row) -> str:
    """A peer's row in words: whether ours is ahead, and the peer's figures over ours."""
    word = "[red]BEHIND[/]" if row["behind_on"] else "ahead" if row["ahead"] else "level"
    ratios = ("inf" if ratio is None else f"{ratio:.2f}" for ratio in row["ratios"])
    return f"{row['against'].replace('lion8bit-', 'block ')}: {word} {' '.join(ratios)}"


# ---- The report ------------------------------------------------------------------------------------------------------


COLUMNS: dict[str, Cell] = {
    "format": lambda row: FORMATS[row["format"]].label,
    "bytes/param": "{bytes_per_parameter:.4f}",
    "momentum error": "{momentum_error:.4f}",
    "sign differs": "{sign_differs:.3%}",
    "drift": "{drift:.5f}",
    "frozen": "{frozen:.1%}",
    "radial bias": "{radial_bias:+.4f}",
    "ours: error, sign, drift": lambda row: outcome(row) if "against" in row else "",
}


def draw(pyplot: Any, cases: dict[tuple[str, str], dict[str, Row]]) -> Any:
    """Each workload's first case: momentum error, sign differences and drift over the steps."""
    shown = {key[0]: (key, rows) for key, rows in reversed(cases.items())}
    figure, axes = pyplot.subplots(len(shown), 3, figsize=(15, 3 * len(shown)), squeeze=False, layout="constrained")
    greens = iter(pyplot.get_cmap("Greens")((0.4, 0.55, 0.7, 0.9)))
    others = iter(pyplot.get_cmap("tab10")((1, 3, 4, 5, 6)))
    formats = [key for key in next(iter(cases.values())) if FORMATS[key].role != "control"]
    colours = {key: next(greens if FORMATS[key].role == "ours" else others) for key in formats}
    for line, ((workload, case), rows) in zip(axes, reversed(shown.values()), strict=True):
        for axis, name in zip(line, CRITERIA, strict=True):
            for key, colour in colours.items():
                series = rows[key]["series"]
                axis.plot(series["step"], series[name], color=colour, label=FORMATS[key].label)
            axis.set(title=f"{workload}, {case}: {name.replace('_', ' ')}", xlabel="step")
        line[0].set_yscale("log")
        line[1].set_yscale("log")
    axes[0][0].legend(fontsize=7)
    return figure


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the workloads, prints a table for each case and the verdicts, and writes the files."""
    options = parser(DESCRIPTION, EPILOG, plot=True, threads=True)
    options.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="default: all")
    options.add_argument(
        "--length", type=float, help="times the steps of every case (default: 1, which is 300 to 2,000; 0.4 if quick)"
    )
    settings = options.parse_args()
    length = settings.length or (0.4 if settings.quick else 1.0)
    out, record = begin(settings.threads)
    formats = installed(FORMATS, out)
    first = 1 if settings.quick else None
    chosen = [(workload, case) for workload in settings.workload for case in WORKLOADS[workload][:first]]
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    with progress("fidelity") as bar:
        task = bar.add_task("", total=sum(int(case.steps * length) for _, case in chosen))
        for workload, case in chosen:
            bar.update(task, description=f"{workload}, {case.name}")
            steps, tracked = int(case.steps * length), TRACKED // 4 if settings.quick else TRACKED
            rows = run_case(case, formats, steps, tracked, lambda: bar.update(task, advance=1))
            for key, row in rows.items():
                row |= compare(rows, key) if FORMATS[key].role == "peer" else {}
            cases[workload, case.name] = rows
            out.print(rows_table(f"{workload}, {case.name}: {steps} steps", list(rows.values()), COLUMNS))

    peers = [row["ahead"] for rows in cases.values() for row in rows.values() if "ahead" in row]
    out.print(f"lion8bit is ahead in all three measures in {sum(peers)} of {len(peers)} comparisons at no more bytes")
    flat = [
        {"workload": workload, "case": case, **{k: v for k, v in row.items() if k != "series"}}
        for (workload, case), rows in cases.items()
        for row in rows.values()
    ]
    write_json(settings.json, "fidelity", settings, {"environment": record, "rows": flat})
    save_figure(lambda pyplot: draw(pyplot, cases), settings.plot)


if __name__ == "__main__":
    main()
