"""Owns the comparison of optimizers by the losses that they train to; `fidelity` compares formats step by step."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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
from torch import nn

from lion8bit import Lion8bit

DESCRIPTION = """\
Do 8-bit optimizers train to the same loss? Every optimizer trains the same models from the same initial weights on the
same batches, to the end of a schedule (warm-up, then half a cosine), over several seeds.

  lm         a byte transformer of one layer on Python's own help texts
  conv       a convolutional net on scikit-learn's digits
  embedding  a model of hashed n-grams on the help texts, most of whose rows are idle in any step
  weights    bf16 weights at lr 1e-5: training of the shipped byte transformer goes on with each way of rounding
             weights, and in fp32
  gpt2       a byte transformer in the shape of GPT-2 124M on the standard library's source; for a GPU, and only run
             where it is named

Tuning is the same for all: each optimizer tries the same number of learning rates, in steps of a factor 2 around a
centre (AdamW's is ten times the Lions', its weight decay a tenth), each with the same few seeds, and the rate with the
smallest mean loss on a validation split is taken: with one seed, a lucky run at a rate where training is erratic would
decide. What is reported is the loss on a test split over other seeds, at the rate so chosen.
"""

EPILOG = """\
How to read the table: "mean" and "std. error" are over the seeds (error: their standard deviation over the root of
their number). "minus Lion" is the mean over the seeds of the difference to fp32 Lion with the same seed, +- that
difference's own standard error; p is the paired t-test's probability of so large a mean difference by chance. The
verdict compares the means by fp32 Lion's standard error: within one of it, or better or worse by more. A rate marked *
is the smallest or largest tried.

The exit status is 0 whatever the verdicts: they are in the last table and in the JSON.

examples:
  python benchmarks/convergence.py --threads 1                              half an hour
  python benchmarks/convergence.py --problem lm --optimizer lion lion8bit-64 lion8bit lion8bit-256 bitsandbytes
  python benchmarks/convergence.py --problem gpt2 --device cuda --seeds 2 --rates 3 --tuning-seeds 1
  python benchmarks/convergence.py --json c.json --plot c.png
"""

FIRST_TUNING_SEED = 1000  # beyond those reported
WARM_UP_SHARE = 0.05
FINAL_LR_SHARE = 0.1
BASELINE = "lion"
ROUNDING_LR = 1e-5
SMOOTHING = 20  # steps
QUICK_EXAMPLES = 32


# ---- Contenders and problems -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One optimizer: where it comes from, and the centre of the learning rates that it tries."""

    label: str
    package: str
    name: str
    rate: float = 8e-4
    weight_decay: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimizer."""
        cls = getattr(importlib.import_module(self.package), self.name)
        optimizer: torch.optim.Optimizer = cls(params, lr=lr, weight_decay=self.weight_decay, **self.options)
        return optimizer


CONTENDERS = {
    "adamw": Contender("AdamW", "torch.optim", "AdamW", rate=8e-3, weight_decay=0.01, options={"fused": True}),
    "lion": Contender("Lion, fp32", "lion8bit", "Lion"),
    "lion8bit": Contender("Lion8bit", "lion8bit", "Lion8bit"),
    "lion8bit-64": Contender("Lion8bit, block 64", "lion8bit", "Lion8bit", options={"block_size": 64}),
    "lion8bit-256": Contender("Lion8bit, block 256", "lion8bit", "Lion8bit", options={"block_size": 256}),
    "bitsandbytes": Contender("bitsandbytes Lion8bit", "bitsandbytes.optim", "Lion8bit"),
    # Weights are fp32 for all, which is what FlashLion has no correction bits for.
    "flashoptim": Contender("FlashLion", "flashoptim", "FlashLion", options={"master_weight_bits": None}),
}
DEFAULT_CONTENDERS = ["adamw", "lion", "lion8bit", "bitsandbytes"]


@dataclass(frozen=True)
class Problem:
    """A task with the length of its training."""

    task: Callable[[bool], tasks.Task]  # of --quick
    steps: int
    batch: int
    tuning_share: float = 1.0  # of the steps, when a learning rate is tried
    shift: float = 1.0  # times the centre of the learning rates

    def load(self, quick: bool) -> tasks.Task:
        """The task, with little to evaluate if quick."""
        task = self.task(quick)
        if not quick:
            return task
        validation, test = (
            (inputs[:QUICK_EXAMPLES], targets[:QUICK_EXAMPLES]) for inputs, targets in (task.validation, task.test)
        )
        return dataclasses.replace(task, validation=validation, test=test)


PROBLEMS = {
    "lm": Problem(lambda quick: tasks.byte_lm(width=128), steps=400, batch=16),
    "conv": Problem(lambda quick: tasks.digits(), steps=400, batch=32),
    "embedding": Problem(lambda quick: tasks.n_grams(width=128), steps=400, batch=8, shift=4),
    "gpt2": Problem(
        lambda quick: tasks.gpt2(1, 64, 16, 512, tasks.help_topics()) if quick else tasks.gpt2(),
        steps=1000,
        batch=8,
        tuning_share=0.25,
        shift=1 / 8,
    ),
}
WEIGHTS = Problem(lambda quick: tasks.pretrained_lm(), steps=150, batch=4)
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


def autocast(device: torch.device) -> torch.autocast:
    """bf16 matrix products on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(
    task: tasks.Task,
    problem: Problem,
    make: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer],
    lr: float,
    seed: int,
    steps: int,
    device: torch.device,
    tick: Callable[[], None],
) -> Run:
    """Trains a fresh model; the seed decides its initial weights and its batches."""
    torch.manual_seed(seed)
    model = task.build().to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = make(model.parameters(), lr)
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_share(step, steps)
        inputs, targets = task.batch(problem.batch, generator)
        with autocast(device):
            loss = tasks.loss(model(inputs.to(device)), targets.to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
        tick()
    return Run(model, torch.stack(losses).tolist(), time.perf_counter() - start)


def evaluate(task: tasks.Task, model: nn.Module, split: tasks.Examples, device: torch.device) -> float:
    """Mean loss over a split in nats; infinite where training has diverged."""
    with autocast(device):
        loss = task.evaluate(model, split, device)
    return loss if math.isfinite(loss) else math.inf


def run_problem(
    problem: Problem,
    contenders: dict[str, Contender],
    settings: argparse.Namespace,
    steps: int,
    tick: Callable[[str], None],
) -> dict[str, Any]:
    """Tunes and trains every contender on one problem.

    Args:
        problem: what to learn.
        contenders: who takes part.
        settings: the command line.
        steps: of a reported run.
        tick: called with the contender's label before each step.

    Returns:
        The task's name and size, and by contender the validation losses by rate, the test losses by seed and the
        smoothed training losses.
    """
    task, device = problem.load(settings.quick), torch.device(settings.device)
    rows = {}
    parameters = 0
    for key, contender in contenders.items():
        report = functools.partial(tick, key)
        tried: dict[float, list[float]] = {}
        centre = contender.rate * problem.shift
        for i in range(settings.rates):
            lr = centre * 2.0 ** (i - settings.rates // 2)
            for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + settings.tuning_seeds):
                run = train(task, problem, contender.make, lr, seed, tuning_steps(problem, steps), device, report)
                tried.setdefault(lr, []).append(evaluate(task, run.model, task.validation, device))
        chosen = min(tried, key=lambda lr: statistics.fmean(tried[lr]))
        test, curves, seconds = [], [], []
        for seed in range(settings.seeds):
            run = train(task, problem, contender.make, chosen, seed, steps, device, report)
            test.append(evaluate(task, run.model, task.test, device))
            curves.append(run.losses)
            seconds.append(run.seconds)
            parameters = sum(param.numel() for param in run.model.parameters())
        rows[key] = {
            "label": contender.label,
            "tried": tried,
            "lr": chosen,
            "at_edge": chosen in (min(tried), max(tried)),
            "test_loss": test,
            "seconds": statistics.median(seconds),
            "training_loss": smooth([statistics.fmean(losses) for losses in zip(*curves, strict=True)]),
            **spread(test),
        }
    for key, row in rows.items():
        if key != BASELINE and BASELINE in rows:
            row["paired"] = paired(row["test_loss"], rows[BASELINE]["test_loss"])
            row["verdict"] = judge(row, rows[BASELINE])
    return {"task": task.name, "parameters": parameters, "steps": steps, "batch": problem.batch, "rows": rows}


def tuning_steps(problem: Problem, steps: int) -> int:
    """Steps of a run that tries a learning rate."""
    return max(1, int(steps * problem.tuning_share))


def smooth(losses: Sequence[float]) -> list[float]:
    """Means over consecutive steps."""
    return [statistics.fmean(losses[i : i + SMOOTHING]) for i in range(0, len(losses), SMOOTHING)]


def spread(losses: Sequence[float]) -> dict[str, float]:
    """Mean over the seeds and its standard error."""
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else math.nan
    return {"mean": statistics.fmean(losses), "std_error": error}


def judge(row: dict[str, float], baseline: dict[str, float]) -> str | None:
    """Whether a mean is within one of the baseline's standard errors of the baseline's; None without an error."""
    difference, error = row["mean"] - baseline["mean"], baseline["std_error"]
    return (
        None if math.isnan(error) else "worse" if difference > error else "better" if difference < -error else "within"
    )


def paired(losses: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """The differences to the baseline with the same seed: mean, standard error, and the paired t-test's p."""
    from scipy import stats

    differences = [a - b for a, b in zip(losses, baseline, strict=True)]
    if len(differences) < 2:
        p = math.nan
    else:
        p = float(stats.ttest_rel(losses, baseline).pvalue) if any(differences) else 1.0
    return {**spread(differences), "p": p}


# ---- Rounding of bf16 weights ----------------------------------------------------------------------------------------


def run_roundings(settings: argparse.Namespace, steps: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """Trains the shipped model on with Lion8bit at `ROUNDING_LR`, its weights in bf16 and in fp32.

    All start from the same bf16 values and compute in fp32, so that they differ in nothing but the weights' storage.
    """
    task, device = WEIGHTS.load(settings.quick), torch.device(settings.device)
    rows: dict[str, dict[str, Any]] = {}
    before = parameters = 0.0
    for key, label in ROUNDINGS.items():
        test, frozen = [], []
        for seed in range(settings.seeds):
            model = task.build().to(device, torch.bfloat16)
            if key == "fp32":
                model = model.float()
            options = {} if key == "fp32" else {"weight_rounding": key}
            optimizer = Lion8bit(model.parameters(), lr=ROUNDING_LR, **options)

            def forward(inputs: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
                weights = {name: param.float() for name, param in model.named_parameters()}
                logits: torch.Tensor = torch.func.functional_call(model, weights, inputs)
                return logits

            before = before or task.evaluate(forward, task.test, device)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(steps):
                inputs, targets = task.batch(WEIGHTS.batch, generator)
                optimizer.zero_grad()
                torch.autograd.backward(tasks.loss(forward(inputs.to(device)), targets.to(device)))
                optimizer.step()
                tick(label)
            test.append(task.evaluate(forward, task.test, device))
            frozen.append(optimizer.frozen_fraction())
            parameters = sum(param.numel() for param in model.parameters())
        gain = before - statistics.fmean(test)
        rows[key] = {"label": label, "test_loss": test, "frozen": frozen[-1], "gain": gain, **spread(test)}
    for key, row in rows.items():
        row["of_fp32_gain"] = row["gain"] / rows["fp32"]["gain"]
        if key != "fp32":
            row["paired"] = paired(row["test_loss"], rows["fp32"]["test_loss"])
    return {"task": task.name, "parameters": parameters, "steps": steps, "batch": WEIGHTS.batch} | {
        "before": before,
        "lr": ROUNDING_LR,
        "rows": rows,
    }


# ---- The report ------------------------------------------------------------------------------------------------------


def goals(problems: dict[str, Any], weights: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The goals with what was measured; ``met`` is None where nothing was."""
    found = []
    for name, result in problems.items():
        ours, baseline = result["rows"].get("lion8bit"), result["rows"].get(BASELINE)
        met, measured = None, "not measured"
        if ours and baseline and math.isfinite(baseline["std_error"]):
            met = ours["verdict"] != "worse"
            measured = f"{(ours['mean'] - baseline['mean']) / baseline['std_error']:+.2f} standard errors"
        found.append(("Lion8bit on " + name, "at most 1 standard error above fp32 Lion", measured, met))
    if weights:
        rows = weights["rows"]
        requirements = {
            "nearest": ("at most half of fp32's gain: it stalls", lambda share: share <= 0.5),
            "stochastic": ("at least 0.9 of fp32's gain", lambda share: share >= 0.9),
            "compensated": ("at least 0.95 of fp32's gain", lambda share: share >= 0.95),
        }
        for key, (requirement, met_by) in requirements.items():
            share = rows[key]["of_fp32_gain"]
            found.append((f"bf16, {key}", requirement, f"{share:.2f}", met_by(share)))
    return [dict(zip(("goal", "requirement", "measured", "met"), row, strict=True)) for row in found]


def size(result: dict[str, Any]) -> str:
    """A result's model and training, for people."""
    return f"{result['task']} ({result['parameters'] / 1e6:.2f} M), {result['steps']} steps of {result['batch']}"


def problem_table(result: dict[str, Any]) -> Table:
    """The table of one problem."""
    table = new_table(
        f"{size(result)}: test loss in nats",
        ["optimizer"],
        ["lr", "mean", "std. error", "minus Lion, same seed", "p", "seconds"],
    )
    table.add_column("mean against fp32 Lion's")
    for key, row in result["rows"].items():
        difference = row.get("paired")
        table.add_row(
            row["label"],
            f"{row['lr']:.1e}{'*' if row['at_edge'] else ''}",
            f"{row['mean']:.4f}",
            f"{row['std_error']:.4f}",
            f"{difference['mean']:+.4f} +- {difference['std_error']:.4f}" if difference else "",
            f"{difference['p']:.2f}" if difference else "",
            f"{row['seconds']:.1f}",
            row.get("verdict") or "",
            style="green" if key.startswith("lion8bit") else None,
        )
    return table


def weights_table(result: dict[str, Any]) -> Table:
    """The table of the ways of rounding."""
    table = new_table(
        f"{size(result)} at lr {result['lr']:.0e} in bf16: test loss in nats, {result['before']:.4f} before",
        ["weights"],
        ["mean", "std. error", "gain", "of fp32's", "cannot move", "minus fp32, same seed"],
    )
    for row in result["rows"].values():
        difference = row.get("paired")
        table.add_row(
            row["label"],
            f"{row['mean']:.4f}",
            f"{row['std_error']:.4f}",
            f"{row['gain']:.4f}",
            f"{row['of_fp32_gain']:.2f}",
            f"{row['frozen']:.0%}",
            f"{difference['mean']:+.4f} +- {difference['std_error']:.4f}" if difference else "",
        )
    return table


def draw(pyplot: Any, problems: dict[str, Any], weights: dict[str, Any] | None) -> Any:
    """Training losses on the left; on the right each seed's test loss, with mean and standard error."""
    lines = [*problems.items(), *([("weights", weights)] if weights else [])]
    figure, axes = pyplot.subplots(len(lines), 2, figsize=(12, 3.2 * len(lines)), squeeze=False, layout="constrained")
    for (name, result), (left, right) in zip(lines, axes, strict=True):
        for place, row in enumerate(result["rows"].values()):
            colour = pyplot.get_cmap("tab10")(place)
            if "training_loss" in row:
                steps = [SMOOTHING * i for i in range(len(row["training_loss"]))]
                left.plot(steps, row["training_loss"], color=colour, label=row["label"])
            right.plot(row["test_loss"], [place + 0.15] * len(row["test_loss"]), "|", color=colour)
            right.errorbar(row["mean"], place, xerr=row["std_error"], fmt="o", color=colour, capsize=4)
        left.set(title=f"{name}: training loss, mean over the seeds", xlabel="step", yscale="log")
        if name == "weights":
            left.barh(
                [row["label"] for row in result["rows"].values()], [row["gain"] for row in result["rows"].values()]
            )
            left.invert_yaxis()
            left.set(title=f"weights: test loss gained at lr {ROUNDING_LR:.0e}", xlabel="nats", yscale="linear")
        else:
            left.legend(fontsize=7)
        right.set(title=f"{name}: test loss, each seed; mean and standard error", xlabel="nats")
        right.set_yticks(range(len(result["rows"])), [row["label"] for row in result["rows"].values()])
        right.invert_yaxis()
    return figure


# ---- The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Trains everything that is asked for, prints the tables and writes the files."""
    options = parser(DESCRIPTION, EPILOG)
    plot_option(options)
    default = [*(name for name in PROBLEMS if name != "gpt2"), "weights"]
    options.add_argument(
        "--problem", nargs="+", choices=[*PROBLEMS, "weights"], default=default, help="default: all but gpt2"
    )
    options.add_argument(
        "--optimizer",
        nargs="+",
        choices=list(CONTENDERS),
        help=f"default: {' '.join(DEFAULT_CONTENDERS)}, and flashoptim where there is a GPU",
    )
    options.add_argument("--seeds", type=int, help="runs reported (default: 5; 2 with --quick)")
    options.add_argument(
        "--rates", type=int, help="learning rates that each optimizer tries (default: 7; 2 with --quick)"
    )
    options.add_argument(
        "--tuning-seeds", type=int, help="runs that each learning rate is tried with (default: 3; 1 with --quick)"
    )
    options.add_argument("--steps", type=int, help="of a run (default: 300 to 1,000 by problem; 20 with --quick)")
    options.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    settings: argparse.Namespace = options.parse_args()
    settings.seeds = settings.seeds or (2 if settings.quick else 5)
    settings.rates = settings.rates or (2 if settings.quick else 7)
    settings.tuning_seeds = settings.tuning_seeds or (1 if settings.quick else 3)
    if settings.threads:
        torch.set_num_threads(settings.threads)

    out = console()
    record = environment()
    out.print(describe(record), style="dim")
    on_gpu = torch.device(settings.device).type == "cuda"
    wanted = settings.optimizer or [*DEFAULT_CONTENDERS, *(["flashoptim"] if on_gpu else [])]
    contenders = {key: CONTENDERS[key] for key in wanted if available(CONTENDERS[key].package.partition(".")[0])}
    for key in wanted:
        if key not in contenders:
            out.print(f"{CONTENDERS[key].label} is not installed and left out", style="yellow")

    names = [name for name in settings.problem if name in PROBLEMS]
    steps = {name: settings.steps or (20 if settings.quick else PROBLEMS[name].steps) for name in names}
    rounding_steps = settings.steps or (20 if settings.quick else WEIGHTS.steps)
    total = len(contenders) * sum(
        settings.rates * settings.tuning_seeds * tuning_steps(PROBLEMS[name], steps[name])
        + settings.seeds * steps[name]
        for name in names
    )
    problems: dict[str, Any] = {}
    weights = None
    with progress("convergence") as bar:
        task = bar.add_task(
            "", total=total + ("weights" in settings.problem) * len(ROUNDINGS) * settings.seeds * rounding_steps
        )
        for name in names:
            problems[name] = run_problem(
                PROBLEMS[name],
                contenders,
                settings,
                steps[name],
                lambda key, name=name: bar.update(task, advance=1, description=f"{name}, {key}"),
            )
            out.print(problem_table(problems[name]))
        if "weights" in settings.problem:
            weights = run_roundings(
                settings, rounding_steps, lambda key: bar.update(task, advance=1, description=f"weights, {key}")
            )
            out.print(weights_table(weights))
    found = goals(problems, weights)
    out.print(goal_table(found, settings.quick))
    results = {"environment": record, "goals": found, "problems": problems, "weights": weights}
    write_json(settings.json, "convergence", settings, results)
    save_figure(lambda pyplot: draw(pyplot, problems, weights), settings.plot)


if __name__ == "__main__":
    main()
