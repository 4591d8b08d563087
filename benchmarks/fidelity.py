"""Owns the comparison of momentum formats with fp32 Lion on the same gradients; not what a step costs."""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import available, console, describe, environment, parser, plot_option, progress, save_figure, write_json
from rich.table import Table
from torch import Tensor

from lion8bit import Lion8bit, reference
from lion8bit.bytelm import ByteLM, ByteLMConfig, encode, next_token_loss
from lion8bit.layout import BLOCK_SIZES, ZERO_CODE, as_rows, memory_order

DESCRIPTION = """\
How well do momentum formats follow fp32 Lion? Every format is given the same stream of gradients (open loop: the
parameters follow fp32 Lion), stores its own momentum and makes its own updates. Reported per format:

  bytes/param     codes and scales, measured on the stored tensors
  momentum error  |m' - m| / |m|, m' what the format stores, m the fp32 momentum; median over the measured steps
  sign differs    share of updates whose sign is not fp32 Lion's; mean over the measured steps
  drift           |sum of the differences between the updates| / |parameters| at the end
  frozen          share of elements whose code has stood still for 100 steps while the fp32 momentum moved by more
                  than the distance to the next code and left the stored value behind by as much (a code may rightly
                  stand still where its block's scale follows)
  radial bias     <m' - m, m> / |m|^2: below 0 the format shrinks the momentum, above 0 it stretches it; median

Workloads (each has several cases):

  lm              a small byte transformer trained on Python's own help texts, batch 8 and 96 at the
                  library's default learning rate, and at ten times that rate
  stall           each element's mean gradient changes its sign once, at a time of its own in the middle third of the
                  run; noise 0, 1 and 4 times the mean
  spread          magnitudes within a block are lognormal, sigma 0, 1 and 2
  tiny            gradients of magnitude 1e-2 down to 1e-9
  embedding       rows of which most are idle
"""

EPILOG = """\
A format with larger blocks is cheaper and less exact, so each peer is compared with the largest lion8bit state that is
no larger than the peer's; "ahead" means smaller momentum error, sign difference and drift at once, and the three
numbers are the peer's figures over ours. Tensors below 4096 elements are left out: every library keeps them in fp32.

With --quick only the first case of each workload runs, on small tensors.

examples:
  python benchmarks/fidelity.py                                   every workload, about ten minutes
  python benchmarks/fidelity.py --workload lm --steps 2000        a longer look at one
  python benchmarks/fidelity.py --json f.json --plot f.png
"""

MEASURED_SIZE = 4096  # elements; smaller tensors are not quantized by any library
PIECE_ROWS = 256
MEASURE_EVERY = 10  # steps
STILL_STEPS = 100
CRITERIA = ("momentum_error", "sign_differs", "drift")


# ---- Formats ---------------------------------------------------------------------------------------------------------


class Store(ABC):
    """One format's momentum of one [rows, cols] tensor, from zero. Its codes are ordered as their values."""

    codes: Tensor
    scales: Tensor | None = None
    levels = (-127, 127)

    def __init__(self, shape: torch.Size, betas: tuple[float, float]) -> None:
        self.betas = betas
        self.codes, self.scales = self.encode(torch.zeros(shape))

    def encode(self, momentum: Tensor) -> tuple[Tensor, Tensor | None]:
        """[rows, cols] fp32 -> codes of the same shape and scales."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes under the present scales -> [rows, cols] fp32."""

    def step(self, grad: Tensor) -> Tensor:
        """One Lion step on the stored momentum; returns the sign of the update."""
        momentum = self.decode(self.codes)
        sign = blend(momentum, grad, self.betas[0]).sign_()
        self.codes, self.scales = self.encode(blend(momentum, grad, self.betas[1]))
        return sign

    def spacing(self) -> Tensor:
        """Mean distance from the stored values to those of the neighbouring codes."""
        level = self.codes.short()
        below, above = (level - 1).clamp(min=self.levels[0]), (level + 1).clamp(max=self.levels[1])
        return (self.decode(above) - self.decode(below)) / (above - below)


class Float32(Store):
    """fp32, the control: it must read exactly 0 everywhere."""

    def encode(self, momentum: Tensor) -> tuple[Tensor, None]:
        return momentum, None

    def decode(self, codes: Tensor) -> Tensor:
        return codes

    def spacing(self) -> Tensor:
        return torch.zeros_like(self.codes)


class Ours(Store):
    """This library's optimizer itself. Its parameter starts each step at 0 and moves by lr = 1: minus the sign."""

    def __init__(self, shape: torch.Size, betas: tuple[float, float], block_size: int) -> None:
        self.param = torch.nn.Parameter(torch.zeros(shape))
        self.optimizer = Lion8bit([self.param], lr=1.0, betas=betas, block_size=block_size, min_8bit_size=0)
        self.block_size = block_size
        self.codes = torch.full(shape, ZERO_CODE, dtype=torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        assert self.scales is not None
        return reference.decode(codes, self.scales, self.block_size)

    def step(self, grad: Tensor) -> Tensor:
        self.param.detach().zero_()
        self.param.grad = grad
        self.optimizer.step()
        state = self.optimizer.state[self.param]
        self.codes, self.scales = state["codes"].clone(), state["scales"]  # the next step writes into the codes
        return -self.param.detach()

    def spacing(self) -> Tensor:
        level = torch.where(self.codes == ZERO_CODE, 0, self.codes.short())
        below, above = (level - 1).clamp(min=self.levels[0]), (level + 1).clamp(max=self.levels[1])
        return (self.decode(above) - self.decode(below)) / (above - below)


class FlatBlocks(Store):
    """A format of one map and one absolute maximum per block, with blocks running on from row to row."""

    def __init__(
        self, shape: torch.Size, betas: tuple[float, float], block_size: int, scale_dtype: torch.dtype = torch.float32
    ) -> None:
        self.block_size, self.scale_dtype = block_size, scale_dtype
        super().__init__(shape, betas)

    @abstractmethod
    def compress(self, x: Tensor) -> Tensor:
        """[-1, 1] -> [-127, 127], before rounding."""

    @abstractmethod
    def expand(self, level: Tensor) -> Tensor:
        """Inverse of `compress`."""

    def encode(self, momentum: Tensor) -> tuple[Tensor, Tensor]:
        blocks = reference.to_blocks(momentum.reshape(1, -1), self.block_size)
        scales = blocks.abs().amax(-1, keepdim=True).to(self.scale_dtype)
        stored = scales.float()
        inverse = torch.where(stored > 0, 1 / stored, torch.zeros_like(stored))
        codes = self.compress((blocks * inverse).clamp_(-1, 1)).round_().to(torch.int8)
        return reference.from_blocks(codes, momentum.numel()).reshape(momentum.shape), scales

    def decode(self, codes: Tensor) -> Tensor:
        assert self.scales is not None
        blocks = reference.to_blocks(codes.reshape(1, -1), self.block_size)
        values = self.expand(blocks.float()).mul_(self.scales.float())
        return reference.from_blocks(values, codes.numel()).reshape(codes.shape)


class Linear(FlatBlocks):
    """Evenly spaced levels."""

    def compress(self, x: Tensor) -> Tensor:
        return x * 127

    def expand(self, level: Tensor) -> Tensor:
        return level / 127


class Softsign(FlatBlocks):
    """FlashOptim's momentum: 2x/(1+|x|) of the value over the scale, from arXiv 2602.23349, algorithm 2."""

    def compress(self, x: Tensor) -> Tensor:
        return x * 254 / (1 + x.abs())

    def expand(self, level: Tensor) -> Tensor:
        return level / (254 - level.abs())


class NearestRoot(FlatBlocks):
    """This library's map without its dither: what rounding to nearest costs by itself."""

    def compress(self, x: Tensor) -> Tensor:
        return torch.copysign(x.abs().sqrt_().mul_(127), x)

    def expand(self, level: Tensor) -> Tensor:
        return level * level.abs() / 127**2


class BitsAndBytes(Store):
    """bitsandbytes' own functions with the signed dynamic map and the block size of its `Lion8bit`."""

    levels = (0, 255)

    def __init__(self, shape: torch.Size, betas: tuple[float, float], block_size: int) -> None:
        import bitsandbytes.functional

        self.functional = bitsandbytes.functional
        self.map = self.functional.create_dynamic_map(signed=True)
        self.block_size = block_size
        super().__init__(shape, betas)

    def encode(self, momentum: Tensor) -> tuple[Tensor, Tensor]:
        codes, state = self.functional.quantize_blockwise(momentum, code=self.map, blocksize=self.block_size)
        return codes, state.absmax

    def decode(self, codes: Tensor) -> Tensor:
        return self.functional.dequantize_blockwise(
            codes.to(torch.uint8), absmax=self.scales, code=self.map, blocksize=self.block_size
        )


@dataclass(frozen=True)
class Format:
    """One row of the table of formats."""

    label: str
    role: str  # "control", "ours", "peer" or "ablation"
    store: type[Store]
    options: dict[str, Any] = field(default_factory=dict)


FORMATS: dict[str, Format] = {
    "fp32": Format("fp32", "control", Float32),
    **{
        f"lion8bit-{size}": Format(f"lion8bit, block {size}", "ours", Ours, {"block_size": size})
        for size in BLOCK_SIZES
    },
    "bitsandbytes": Format("bitsandbytes dynamic map, block 256", "peer", BitsAndBytes, {"block_size": 256}),
    "flashoptim": Format(
        "FlashOptim softsign, block 32", "peer", Softsign, {"block_size": 32, "scale_dtype": torch.float16}
    ),
    "linear": Format("linear int8, block 128", "peer", Linear, {"block_size": 128}),
    "nearest-root": Format("square root, nearest, block 128", "ablation", NearestRoot, {"block_size": 128}),
}


# ---- Workloads -------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """A source of gradients. ``weights`` are [rows, cols] views that fp32 Lion updates in place."""

    weights: list[Tensor]
    gradients: Callable[[int], list[Tensor]]  # of a step counted from 0, in the order of the weights
    facts: dict[str, float] = field(default_factory=dict)  # what the stream says about itself, for the JSON


@dataclass(frozen=True)
class Case:
    """One row of the workload table."""

    name: str
    make: Callable[[Case, int, bool], Stream]  # of the case, the number of steps, and --quick
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    length: float = 1.0  # steps, times --steps
    warm_up: float = 1 / 3  # share of the steps that is not measured


def language_model(case: Case, steps: int, quick: bool) -> Stream:
    """Next-byte prediction on `pydoc_data/topics.py`; the rows are 256 wide, so that every block size fits."""
    torch.manual_seed(0)
    config = ByteLMConfig(width=128, layers=1, context=16) if quick else ByteLMConfig(width=256, layers=1, context=32)
    model = ByteLM(config)
    params = list(model.parameters())
    text = encode(Path(pydoc_data.topics.__file__).read_bytes())
    generator = torch.Generator().manual_seed(1)
    offsets = torch.arange(config.context + 1)
    facts: dict[str, float] = {"parameters": sum(param.numel() for param in params)}

    def gradients(step: int) -> list[Tensor]:
        starts = torch.randint(len(text) - config.context, (case.options["batch"], 1), generator=generator)
        batch = text[starts + offsets].long()
        with torch.enable_grad():
            loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
            grads = torch.autograd.grad(loss, params)
        facts.setdefault("first_loss", loss.item())
        facts["last_loss"] = loss.item()
        return [_rows(grad) for grad in grads]

    return Stream([_rows(param.detach()) for param in params], gradients, facts)


def synthetic(case: Case, steps: int, quick: bool) -> Stream:
    """Normal gradients of a given mean and noise, one [rows, cols] parameter.

    Options of the case: ``mean`` and ``noise`` (standard deviation of the mean over the elements, and of the noise
    over the steps), ``sigma`` (of the elements' lognormal magnitudes), ``magnitude``, ``reverses`` (each mean
    changes its sign once, in the middle third), ``shape``, and ``active`` (rows that get a gradient in a step, drawn
    by a Zipf law).
    """
    options = {"mean": 1.0, "noise": 1.0, "sigma": 0.0, "magnitude": 1.0, "reverses": False, "active": None}
    options |= {"shape": (256, 256), **case.options}
    generator = torch.Generator().manual_seed(0)
    rows, cols = options["shape"]
    shape = (rows // 8 if quick else rows, cols)
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
    return as_rows(tensor, order)


WORKLOADS: dict[str, tuple[Case, ...]] = {
    "lm": (
        Case("batch 8", language_model, {"batch": 8}),
        Case("batch 96", language_model, {"batch": 96}),
        Case("batch 8, lr 1e-3", language_model, {"batch": 8}, lr=1e-3),
    ),
    # fp32 Lion needs 58 steps to turn, so what still differs a sixth of the run behind the last reversal has stalled.
    "stall": tuple(
        Case(f"noise {noise}", synthetic, {"noise": noise, "reverses": True}, length=4, warm_up=5 / 6)
        for noise in (0, 1, 4)
    ),
    "spread": tuple(Case(f"sigma {sigma}", synthetic, {"sigma": sigma, "mean": 0.1}) for sigma in (0, 1, 2)),
    "tiny": tuple(
        Case(f"magnitude 1e-{power}", synthetic, {"magnitude": 10.0**-power, "mean": 0.1}) for power in range(2, 10)
    ),
    "embedding": tuple(
        Case(f"rows of {cols}", synthetic, {"shape": (512, cols), "mean": 0.1, "active": 16}) for cols in (256, 384)
    ),
}


# ---- The measurement -------------------------------------------------------------------------------------------------


class Track:
    """One format on one piece of a tensor: its momentum and drift, and for how long its codes have stood still."""

    def __init__(self, format_: Format, shape: torch.Size, case: Case) -> None:
        self.store = format_.store(shape, case.betas, **format_.options)
        self.lr = case.lr
        self.drift = torch.zeros(shape)
        self.still = torch.zeros(shape, dtype=torch.int16)
        self.anchor = torch.zeros(shape)  # the fp32 momentum when the code last moved

    def step(self, grad: Tensor, exact: Tensor, sign: Tensor) -> int:
        """Takes a gradient in; ``exact`` and ``sign`` are fp32 Lion's new momentum and update. Returns wrong signs."""
        before = self.store.codes
        difference = sign - self.store.step(grad)
        moved = self.store.codes != before
        self.still.add_(1).masked_fill_(moved, 0)
        torch.where(moved, exact, self.anchor, out=self.anchor)
        self.drift.add_(difference, alpha=self.lr)
        return int(difference.count_nonzero())

    def frozen(self, exact: Tensor) -> int:
        """Elements whose code has stood still while the exact momentum has gone on, and away, by more than a code."""
        spacing = self.store.spacing()
        gone = (exact - self.anchor).abs() > spacing
        away = (exact - self.store.decode(self.store.codes)).abs() > spacing
        return int((gone & away & (self.still >= STILL_STEPS)).sum())


def blend(momentum: Tensor, grad: Tensor, beta: float) -> Tensor:
    """``beta*momentum + (1-beta)*grad``: one expression for both of Lion's averages and for every format."""
    return momentum * beta + grad * (1 - beta)


@torch.no_grad()
def run_case(
    case: Case, formats: dict[str, Format], steps: int, quick: bool, tick: Callable[[], None]
) -> dict[str, Any]:
    """Feeds one stream to every format.

    Args:
        case: what to run.
        formats: who takes part.
        steps: the case's number of steps.
        quick: small tensors.
        tick: called after each step.

    Returns:
        ``formats``: the figures by format; ``facts``: what the stream says about itself.
    """
    stream = case.make(case, steps, quick)
    weights = pieces(stream.weights)
    exact = [torch.zeros_like(weight) for weight in weights]
    large = [weight.numel() >= MEASURED_SIZE for weight in stream.weights for _ in weight.split(PIECE_ROWS)]
    measured = [i for i, enough in enumerate(large) if enough]
    tracks = {key: {i: Track(f, weights[i].shape, case) for i in measured} for key, f in formats.items()}
    count = sum(weights[i].numel() for i in measured)
    first = int(steps * case.warm_up)
    wrong = dict.fromkeys(formats, 0)
    samples: dict[str, list[dict[str, float]]] = {key: [] for key in formats}

    for step in range(steps):
        for i, grad in enumerate(pieces(stream.gradients(step))):
            sign = blend(exact[i], grad, case.betas[0]).sign_()
            exact[i] = blend(exact[i], grad, case.betas[1])
            weights[i].add_(sign, alpha=-case.lr)
            for key, tensors in tracks.items():
                if i in tensors:
                    differing = tensors[i].step(grad, exact[i], sign)
                    wrong[key] += differing if step >= first else 0
        if step % MEASURE_EVERY == 0 or step == steps - 1:
            for key, tensors in tracks.items():
                samples[key].append(sample(tensors, exact, step, count))
        tick()

    weight_norm = sum(float(weights[i].double().square().sum()) for i in measured) ** 0.5
    return {
        "steps": steps,
        "measured_from": first,
        "elements": count,
        "facts": stream.facts,
        "formats": {
            key: {
                "label": formats[key].label,
                "role": formats[key].role,
                **summarise(tensors, samples[key], first, count),
                "sign_differs": wrong[key] / ((steps - first) * count),
                "drift": sum(float(t.drift.double().square().sum()) for t in tensors.values()) ** 0.5 / weight_norm,
                "series": {name: [s[name] for s in samples[key]] for name in ("step", "momentum_error")},
            }
            for key, tensors in tracks.items()
        },
    }


def pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cuts tensors into groups of rows that stay in the processor's cache while all formats take them in.

    `PIECE_ROWS` rows are whole blocks of every format, so the formats do not notice.
    """
    return [piece for tensor in tensors for piece in tensor.split(PIECE_ROWS)]


def sample(tensors: dict[int, Track], exact: Sequence[Tensor], step: int, count: int) -> dict[str, float]:
    """Momentum error, radial bias and frozen share of one format after one step."""
    squared_error = squared_norm = inner = 0.0
    frozen = 0
    for i, track in tensors.items():
        m = exact[i].double()
        error = track.store.decode(track.store.codes).double() - m
        squared_error += float(error.square().sum())
        squared_norm += float(m.square().sum())
        inner += float((error * m).sum())
        frozen += track.frozen(exact[i])
    norm = squared_norm or 1.0
    return {
        "step": step,
        "momentum_error": (squared_error / norm) ** 0.5,
        "radial_bias": inner / norm,
        "frozen": frozen / count,
    }


def summarise(tensors: dict[int, Track], samples: list[dict[str, float]], first: int, count: int) -> dict[str, Any]:
    """One format's figures from its samples; the frozen share is None where no code could yet stand still for long."""
    after = [s for s in samples if s["step"] >= first]
    lasting = [s["frozen"] for s in after if s["step"] >= STILL_STEPS]
    stored = sum(
        tensor.nbytes for t in tensors.values() for tensor in (t.store.codes, t.store.scales) if tensor is not None
    )
    return {
        "bytes_per_parameter": stored / count,
        "momentum_error": statistics.median(s["momentum_error"] for s in after),
        "radial_bias": statistics.median(s["radial_bias"] for s in after),
        "frozen": statistics.median(lasting) if lasting else None,
    }


# ---- Verdicts --------------------------------------------------------------------------------------------------------


def compare(rows: dict[str, dict[str, Any]], peer: str) -> dict[str, Any]:
    """Sets a peer against the largest state of ours that is no larger than its own, or our smallest where none is.

    Returns:
        ``against`` (key of our format), ``no_larger`` (whether it needs no more bytes), ``ratios`` (the peer's
        figure over ours by criterion; None where ours is 0) and ``ahead`` (on every criterion).
    """
    ours = sorted((row["bytes_per_parameter"], key) for key, row in rows.items() if row["role"] == "ours")
    budget = rows[peer]["bytes_per_parameter"]
    fitting = [key for size, key in ours if size <= budget]
    key = fitting[-1] if fitting else ours[0][1]
    pairs = {name: (rows[peer][name], rows[key][name]) for name in CRITERIA}
    return {
        "against": key,
        "no_larger": bool(fitting),
        "ratios": {name: theirs / own if own else None for name, (theirs, own) in pairs.items()},
        "ahead": all(own < theirs for theirs, own in pairs.values()),
        "behind_on": [name for name, (theirs, own) in pairs.items() if own > theirs],
    }


def verdict(comparison: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """A comparison in words."""
    ratios = ", ".join("inf" if ratio is None else f"{ratio:.2f}x" for ratio in comparison["ratios"].values())
    against = rows[comparison["against"]]
    excess = "" if comparison["no_larger"] else f" at {against['bytes_per_parameter']:.4f} bytes"
    if comparison["ahead"]:
        outcome = "ahead"
    elif comparison["behind_on"]:
        outcome = "BEHIND on " + ", ".join(name.replace("_", " ") for name in comparison["behind_on"])
    else:
        outcome = "level"
    return f"{against['label']}{excess}: {outcome} ({ratios})"


def case_table(title: str, result: dict[str, Any]) -> Table:
    """The table of one case."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("format")
    for heading in ("bytes/param", "momentum error", "sign differs", "drift", "frozen", "radial bias"):
        table.add_column(heading, justify="right")
    table.add_column("ours at no more bytes against it (error, sign, drift)")
    rows = result["formats"]
    for key, row in rows.items():
        comparison = result["comparisons"].get(key)
        frozen = "-" if row["frozen"] is None else f"{row['frozen']:.1%}"
        if row["role"] == "control":
            zero = all(row[name] == 0 for name in (*CRITERIA, "radial_bias")) and not row["frozen"]
            remark = "exactly 0, as it must be" if zero else "NOT 0: the measurement is broken"
        else:
            remark = verdict(comparison, rows) if comparison else ""
        table.add_row(
            row["label"],
            f"{row['bytes_per_parameter']:.4f}",
            f"{row['momentum_error']:.4f}",
            f"{row['sign_differs']:.3%}",
            f"{row['drift']:.5f}",
            frozen,
            f"{row['radial_bias']:+.4f}",
            remark,
            style={"ours": "green", "control": "dim"}.get(row["role"]),
        )
    return table


def draw(pyplot: Any, cases: list[dict[str, Any]]) -> Any:
    """One line of panels per case: momentum error over the steps, sign differences and drift."""
    figure, axes = pyplot.subplots(len(cases), 3, figsize=(15, 2.7 * len(cases)), squeeze=False, layout="constrained")
    for line, case in zip(axes, cases, strict=True):
        rows = [row for row in case["formats"].values() if row["role"] != "control"]
        own, other = pyplot.get_cmap("Greens"), pyplot.get_cmap("tab10")
        shades = iter((0.5, 0.7, 0.9))
        colours = [
            own(next(shades)) if row["role"] == "ours" else other((1, 3, 4, 5, 6)[i % 5]) for i, row in enumerate(rows)
        ]
        for row, colour in zip(rows, colours, strict=True):
            line[0].plot(row["series"]["step"], row["series"]["momentum_error"], color=colour, label=row["label"])
        line[0].set(title=f"{case['workload']}, {case['name']}: momentum error", xlabel="step", yscale="log")
        for axis, name in zip(line[1:], ("sign_differs", "drift"), strict=True):
            axis.barh([row["label"] for row in rows], [row[name] for row in rows], color=colours)
            axis.invert_yaxis()
            axis.locator_params(axis="x", nbins=5)
            axis.set_title(name.replace("_", " "))
        line[2].set_yticklabels([])
    return figure


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the workloads, prints a table and verdicts for each case, and writes the files that are asked for."""
    options = parser(DESCRIPTION, EPILOG)
    plot_option(options)
    options.add_argument(
        "--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="what to run (default: all)"
    )
    options.add_argument(
        "--steps", type=int, help="steps per case, 300 by default (120 with --quick); stall takes four times as many"
    )
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    settings: argparse.Namespace = options.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    steps = settings.steps or (120 if settings.quick else 300)

    out = console()
    record = environment()
    out.print(describe(record), style="dim")
    formats = {key: f for key, f in FORMATS.items() if key != "bitsandbytes" or available("bitsandbytes")}
    if "bitsandbytes" not in formats:
        out.print("bitsandbytes is not installed and left out; pip install bitsandbytes", style="yellow")
    first = 1 if settings.quick else None
    chosen = [(workload, case) for workload in settings.workload for case in WORKLOADS[workload][:first]]
    cases: list[dict[str, Any]] = []
    with progress("fidelity") as bar:
        task = bar.add_task("", total=sum(int(steps * case.length) for _, case in chosen))
        for workload, case in chosen:
            bar.update(task, description=f"{workload}, {case.name}")
            result = run_case(
                case, formats, int(steps * case.length), settings.quick, lambda: bar.update(task, advance=1)
            )
            rows = result["formats"]
            result["comparisons"] = {key: compare(rows, key) for key, row in rows.items() if row["role"] == "peer"}
            cases.append({"workload": workload, "name": case.name, "lr": case.lr, "betas": case.betas, **result})
            out.print(case_table(f"{workload}, {case.name}: {result['steps']} steps", result))

    pairs = [(case, key, found) for case in cases for key, found in case["comparisons"].items()]
    behind = [
        f"{case['workload']}, {case['name']}: {case['formats'][key]['label']}: "
        + ("behind on " + ", ".join(found["behind_on"]) if found["behind_on"] else "level")
        for case, key, found in pairs
        if not found["ahead"]
    ]
    out.print(f"ahead on every criterion in {len(pairs) - len(behind)} of {len(pairs)} comparisons", style="bold")
    for line in behind:
        out.print(f"  not in {line}")
    write_json(settings.json, "fidelity", settings, {"environment": record, "cases": cases})
    save_figure(lambda pyplot: draw(pyplot, cases), settings.plot)


if __name__ == "__main__":
    main()
