"""Owns the comparison of momentum formats with fp32 Lion on the same gradients; not what a step costs."""

from __future__ import annotations

import argparse
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import tasks
import torch
from common import (
    available,
    console,
    describe,
    environment,
    goal_table,
    new_table,
    parser,
    plot_option,
    progress,
    save_figure,
    write_json,
)
from rich.table import Table
from torch import Tensor

from lion8bit import Lion8bit, dequantize, reference
from lion8bit.layout import BLOCK_SIZES, in_memory_order, memory_order

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

Workloads (each has several cases; betas are (0.9, 0.99) and lr is the library's default where nothing else is said):

  lm         a small byte transformer trained on Python's own help texts, batch 8 and 96, and at ten times the rate
  conv       a convolutional net on scikit-learn's digits, 2,000 steps
  embedding  most rows idle: a model of hashed n-grams on the help texts, and synthetic rows drawn by a Zipf law
  betas      the three models at betas (0.95, 0.98) and (0.9, 0.999)
  stall      each element's mean gradient changes its sign once, at a time of its own in the middle third of the run;
             noise 0, 1 and 4 times the mean
  spread     magnitudes within a block are lognormal, sigma 0, 0.5, 1, 1.5 and 2
  tiny       gradients of magnitude 1e-2 down to 1e-9, and 1e-12
"""

EPILOG = """\
A format with larger blocks is cheaper and less exact, so each peer is compared with the largest lion8bit state that is
no larger than the peer's: block 256 for bitsandbytes, 128 for linear int8, 64 for FlashOptim. The three numbers of a
comparison are the peer's momentum error, sign difference and drift over ours; "ahead" means that all three are above 1.
bitsandbytes and lion8bit run their own code; linear int8 is no library's, but a common choice. FlashOptim runs its own
where it is installed and there is an NVIDIA GPU, else the formula of its kernel (groups of 32, fp16 scales).

Tensors below 4096 elements are left out: every library keeps them in fp32. Of large models every n-th row is measured,
some 131,000 elements in all. The last tables hold a verdict per case and per goal; the exit status is 0 whatever they
say. With --quick only the first case of each workload runs, with fewer steps and elements.

examples:
  python benchmarks/fidelity.py --threads 1                       everything, about ten minutes
  python benchmarks/fidelity.py --workload lm --length 7          a longer look at one
  python benchmarks/fidelity.py --json f.json --plot f.png
"""

MEASURED_SIZE = 4096  # elements; smaller tensors are not quantized by any library
TRACKED = 131072  # elements of a large model that formats are measured on
SAMPLES = 40  # measurements of momentum in a run
STILL_STEPS = 100
STANDS_STILL = 1e-3  # a format whose frozen share is above it is called frozen
UNDERFLOW = 1.1  # figures at the smallest gradients over those at 1e-2, above which scales are said to underflow
CRITERIA = {"momentum_error": "error", "sign_differs": "sign", "drift": "drift"}


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
        self.codes = torch.zeros(shape, dtype=torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        assert self.scales is not None
        return dequantize(codes.to(torch.int8), self.scales, self.block_size)

    def step(self, grad: Tensor) -> Tensor:
        self.param.detach().zero_()
        self.param.grad = grad
        self.optimizer.step()
        state = self.optimizer.state[self.param]
        self.codes, self.scales = state["codes"].clone(), state["scales"]  # the next step writes into the codes
        return -self.param.detach()


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
        scales = blocks.abs().amax(-1, keepdim=True)
        codes = self.compress((blocks / scales).nan_to_num_(0.0)).round_().to(torch.int8)
        return reference.from_blocks(codes, momentum.numel()).reshape(momentum.shape), scales.to(self.scale_dtype)

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
    """FlashOptim's momentum, 2x/(1+|x|) of the value over the exact scale, which is then stored in fp16.

    Source: arXiv 2602.23349, algorithm 2, and the behaviour of flashoptim 0.1.4, `quantize`.
    """

    def compress(self, x: Tensor) -> Tensor:
        return x * 254 / (1 + x.abs())

    def expand(self, level: Tensor) -> Tensor:
        return level / (254 - level.abs())


class FlashOptim(Store):
    """The flashoptim package's own functions, which need a GPU."""

    def __init__(self, shape: torch.Size, betas: tuple[float, float], block_size: int) -> None:
        import flashoptim.optimizers

        self.functions, self.block_size = flashoptim.optimizers, block_size
        super().__init__(shape, betas)

    def encode(self, momentum: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = self.functions.quantize(momentum.cuda(), group_size=self.block_size)
        return codes.cpu(), scales

    def decode(self, codes: Tensor) -> Tensor:
        return self.functions.dequantize(codes.to("cuda", torch.int8), self.scales, group_size=self.block_size).cpu()


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
    "bitsandbytes": Format("bitsandbytes, block 256", "peer", BitsAndBytes, {"block_size": 256}),
    "flashoptim": Format("FlashOptim softsign, block 32", "peer", FlashOptim, {"block_size": 32})
    if torch.cuda.is_available() and available("flashoptim")
    else Format("FlashOptim softsign, block 32", "peer", Softsign, {"block_size": 32, "scale_dtype": torch.float16}),
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
    make: Callable[[Case, int], Stream]  # of the case and the number of steps
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 300
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warm_up: float = 1 / 3  # share of the steps that is not measured


def training(case: Case, steps: int) -> Stream:
    """Gradients of a model that learns. Options of the case: ``task``, a function that makes one, and ``batch``."""
    torch.manual_seed(0)
    task = case.options["task"]()
    model = task.build()
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    facts: dict[str, float] = {"parameters": sum(param.numel() for param in params)}

    def gradients(step: int) -> list[Tensor]:
        inputs, targets = task.batch(case.options["batch"], generator)
        with torch.enable_grad():
            loss = tasks.loss(model(inputs), targets)
            grads = torch.autograd.grad(loss, params)
        facts.setdefault("first_loss", loss.item())
        facts["last_loss"] = loss.item()
        return [_rows(grad) for grad in grads]

    return Stream([_rows(param.detach()) for param in params], gradients, facts)


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
SMALLEST = "magnitude 1e-12"

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
    case: Case, formats: dict[str, Format], steps: int, tracked: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Feeds one stream to every format.

    Args:
        case: what to run.
        formats: who takes part.
        steps: how many steps.
        tracked: about how many elements to measure on; every n-th row is.
        tick: called after each step.

    Returns:
        ``formats``: the figures by format; ``facts``: what the stream says about itself.
    """
    stream = case.make(case, steps)
    exact = [torch.zeros_like(weight) for weight in stream.weights]
    large = [i for i, weight in enumerate(stream.weights) if weight.numel() >= MEASURED_SIZE]
    elements = sum(stream.weights[i].numel() for i in large)
    rows = slice(None, None, max(1, round(elements / tracked)))
    weights = {i: stream.weights[i][rows] for i in large}
    tracks = {key: {i: Track(f, weights[i].shape, case) for i in large} for key, f in formats.items()}
    first = int(steps * case.warm_up)
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
                since = wrong[key][-every:]
                figures |= {"step": step, "drift": _norm(track.drift for track in tensors.values()) / norm}
                samples[key].append({**figures, "sign_differs": statistics.fmean(since)})
        tick()

    count = sum(weight.numel() for weight in weights.values())
    for series in samples.values():
        for row in series:
            row["sign_differs"] /= count
    return {
        "steps": steps,
        "measured_from": first,
        "elements": count,
        "of_elements": elements,
        "facts": stream.facts,
        "formats": {
            key: {
                "label": formats[key].label,
                "role": formats[key].role,
                **summarise(tensors.values(), samples[key], first, count),
                "sign_differs": statistics.fmean(wrong[key][first:]) / count,
                "drift": samples[key][-1]["drift"],
                "series": {name: [row[name] for row in samples[key]] for name in ("step", *CRITERIA)},
            }
            for key, tensors in tracks.items()
        },
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
    return {
        "momentum_error": (squared_error / norm) ** 0.5,
        "radial_bias": inner / norm,
        "frozen": frozen / count,
    }


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


def summarise(tracks: Iterable[Track], samples: list[dict[str, float]], first: int, count: int) -> dict[str, Any]:
    """One format's figures from its samples; the frozen share is None where no code could yet stand still for long."""
    after = [row for row in samples if row["step"] >= first]
    lasting = [row["frozen"] for row in after if row["step"] >= STILL_STEPS]
    stored = sum(
        tensor.nbytes for track in tracks for tensor in (track.store.codes, track.store.scales) if tensor is not None
    )
    return {
        "bytes_per_parameter": stored / count,
        "momentum_error": statistics.median(row["momentum_error"] for row in after),
        "radial_bias": statistics.median(row["radial_bias"] for row in after),
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
    against = rows[comparison["against"]]
    excess = "" if comparison["no_larger"] else f" at {against['bytes_per_parameter']:.4f} bytes"
    return f"{against['label'].removeprefix('lion8bit, ')}{excess}: {outcome(comparison)} {ratios(comparison)}"


def outcome(comparison: dict[str, Any]) -> str:
    """Whether ours is ahead."""
    return "BEHIND" if comparison["behind_on"] else "ahead" if comparison["ahead"] else "level"


def ratios(comparison: dict[str, Any]) -> str:
    """The peer's figures over ours."""
    return " ".join("inf" if ratio is None else f"{ratio:.2f}" for ratio in comparison["ratios"].values())


def goals(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals with what was measured; ``met`` is None where nothing was."""
    named = {f"{case['workload']}, {case['name']}": case for case in cases}

    def signs(case: dict[str, Any], peer: str) -> float | None:
        if peer not in case["comparisons"]:
            return None
        ours, theirs = (case["formats"][key]["sign_differs"] for key in (case["comparisons"][peer]["against"], peer))
        return ours / theirs if theirs else float(ours > 0)

    def worst(figures: dict[str, float | None]) -> tuple[float | None, str]:
        found = {name: figure for name, figure in figures.items() if figure is not None}
        name = max(found, key=lambda name: found[name], default="")
        return found.get(name), name

    def row(
        goal: str, requirement: str, figures: dict[str, float | None], met: Callable[[float], bool]
    ) -> dict[str, Any]:
        figure, name = worst(figures)
        measured = "not measured" if figure is None else f"{figure:.3g} ({name})"
        return {
            "goal": goal,
            "requirement": requirement,
            "measured": measured,
            "met": None if figure is None else met(figure),
        }

    def of_ours(case: dict[str, Any], name: str) -> list[float]:
        return [r[name] for r in case["formats"].values() if r["role"] == "ours" and r[name] is not None]

    lm = {name: signs(case, "bitsandbytes") for name, case in named.items() if case["workload"] == "lm"}
    flash = {name: signs(case, "flashoptim") for name, case in named.items()}
    frozen = {name: max(of_ours(case, "frozen"), default=None) for name, case in named.items()}
    tiny = [case for case in cases if case["workload"] == "tiny"]
    underflow: dict[str, float | None] = {}
    if tiny and tiny[-1]["name"] == SMALLEST:
        for name in ("momentum_error", "sign_differs"):
            pairs = zip(of_ours(tiny[-1], name), of_ours(tiny[0], name), strict=True)
            underflow[name.replace("_", " ")] = max(small / large for small, large in pairs)
    control = {
        name: max(abs(case["formats"]["fp32"][figure] or 0.0) for figure in (*CRITERIA, "radial_bias", "frozen"))
        for name, case in named.items()
    }
    behind = {
        name: sum(bool(found["behind_on"]) for found in case["comparisons"].values()) for name, case in named.items()
    }
    return [
        row("control", "fp32 reads exactly 0", control, lambda x: x == 0),
        row("half of bitsandbytes", "at most 0.5 of its sign differences on lm, at its bytes", lm, lambda x: x <= 0.5),
        row("less than FlashOptim", "fewer sign differences in every case, at its bytes", flash, lambda x: x < 1),
        row("never frozen", f"share at most {STANDS_STILL:.1%} at every block", frozen, lambda x: x <= STANDS_STILL),
        row(
            "no underflow",
            f"at 1e-12 at most {UNDERFLOW} times the figures at 1e-2",
            underflow,
            lambda x: x <= UNDERFLOW,
        ),
        row("behind no peer", "0 peers ahead of us on any criterion in any case", behind, lambda x: x == 0),
    ]


def case_table(title: str, result: dict[str, Any]) -> Table:
    """The table of one case."""
    table = new_table(
        title, ["format"], ["bytes/param", "momentum error", "sign differs", "drift", "frozen", "radial bias"]
    )
    table.add_column("ours: error, sign, drift")
    rows = result["formats"]
    for key, row in rows.items():
        comparison = result["comparisons"].get(key)
        frozen = "-" if row["frozen"] is None else f"{row['frozen']:.1%}"
        if row["role"] == "control":
            zero = all(row[name] == 0 for name in (*CRITERIA, "radial_bias")) and not row["frozen"]
            remark = "exactly 0" if zero else "NOT 0"
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


def score_table(cases: list[dict[str, Any]]) -> Table:
    """All cases: every peer's error, sign differences and drift over ours at no more bytes, and the verdict."""
    peers = list(dict.fromkeys(key for case in cases for key in case["comparisons"]))
    table = new_table(
        "Peer's figure over ours at no more bytes: error, sign, drift", ["workload", "case"], ["steps", *peers]
    )
    table.add_column("verdict")
    for case in cases:
        found = case["comparisons"]
        behind = [
            f"{key} ({', '.join(CRITERIA[name] for name in found[key]['behind_on'])})"
            for key in peers
            if found[key]["behind_on"]
        ]
        level = [key for key in peers if outcome(found[key]) == "level"]
        words = f"[red]BEHIND {', '.join(behind)}[/]" if behind else f"level with {', '.join(level)}" if level else ""
        cells = [ratios(found[key]) for key in peers]
        table.add_row(case["workload"], case["name"], str(case["steps"]), *cells, words or "[green]ahead[/]")
    return table


def draw(pyplot: Any, cases: list[dict[str, Any]]) -> Any:
    """Each workload's first case: momentum error, sign differences and drift over the steps."""
    shown = list({case["workload"]: case for case in reversed(cases)}.values())[::-1]
    figure, axes = pyplot.subplots(len(shown), 3, figsize=(15, 3 * len(shown)), squeeze=False, layout="constrained")
    greens, others = iter(pyplot.get_cmap("Greens")((0.5, 0.7, 0.9))), iter(pyplot.get_cmap("tab10")((1, 3, 4, 5)))
    colours = {
        key: next(greens if row["role"] == "ours" else others)
        for key, row in shown[0]["formats"].items()
        if row["role"] != "control"
    }
    for line, case in zip(axes, shown, strict=True):
        for axis, name in zip(line, CRITERIA, strict=True):
            for key, colour in colours.items():
                row = case["formats"][key]
                axis.plot(row["series"]["step"], row["series"][name], color=colour, label=row["label"])
            axis.set(title=f"{case['workload']}, {case['name']}: {name.replace('_', ' ')}", xlabel="step")
        line[0].set_yscale("log")
        line[1].set_yscale("log")
    axes[0][0].legend(fontsize=7)
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
        "--length", type=float, help="times the steps of every case (default: 1, which is 300 to 2,000; 0.4 if quick)"
    )
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    settings: argparse.Namespace = options.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    length = settings.length or (0.4 if settings.quick else 1.0)
    tracked = TRACKED // 4 if settings.quick else TRACKED

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
        task = bar.add_task("", total=sum(int(case.steps * length) for _, case in chosen))
        for workload, case in chosen:
            bar.update(task, description=f"{workload}, {case.name}")
            result = run_case(case, formats, int(case.steps * length), tracked, lambda: bar.update(task, advance=1))
            rows = result["formats"]
            result["comparisons"] = {key: compare(rows, key) for key, row in rows.items() if row["role"] == "peer"}
            cases.append({"workload": workload, "name": case.name, "lr": case.lr, "betas": case.betas, **result})
            out.print(case_table(f"{workload}, {case.name}: {result['steps']} steps", result))

    found = goals(cases)
    out.print(score_table(cases))
    out.print(goal_table(found, settings.quick))
    write_json(settings.json, "fidelity", settings, {"environment": record, "goals": found, "cases": cases})
    save_figure(lambda pyplot: draw(pyplot, cases), settings.plot)


if __name__ == "__main__":
    main()
