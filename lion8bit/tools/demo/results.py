"""The demo's measurements, and the sentence that says what they show."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

SMALLEST_GAP = 1e-4  # of two losses that the conclusion distinguishes
LABELS = {
    "none": "no fine-tuning",
    "adamw": "AdamW",
    "lion": "Lion, fp32",
    "lion8bit": "Lion8bit",
    "bitsandbytes": "bitsandbytes Lion8bit",
}


@dataclasses.dataclass
class Run:
    """Measurements of one optimizer with one seed; losses are in the task's unit."""

    seed: int
    train_loss: list[float]  # of each step's batch, before the step
    held_out_steps: list[int]  # steps taken at each evaluation, the first 0
    held_out_loss: list[float]  # at each
    optimizer_ms: float | None = None  # median of `optimizer.step()`; None without an optimizer
    state_bytes: int = 0
    checkpoint_bytes: int = 0


@dataclasses.dataclass
class Row:
    """Measurements of one optimizer over all seeds; losses are in the task's unit."""

    key: str  # of `LABELS`
    hyperparameters: dict[str, Any] | None = None
    unavailable: str | None = None  # why there are no runs
    runs: list[Run] = dataclasses.field(default_factory=list)
    state_bytes_per_param: float = math.nan
    checkpoint_bytes: int = 0
    optimizer_ms: float | None = None  # mean of the runs' medians
    loss_before: float = math.nan  # held-out loss of the pretrained weights
    loss_after: float = math.nan  # mean of the runs' held-out losses after the last step
    loss_after_spread: float | None = None  # standard deviation of the same; None with one seed

    def summarize(self, parameters: int) -> None:
        """Computes the figures from the runs; `parameters` is the number of trained parameters."""
        after = [run.held_out_loss[-1] for run in self.runs]
        times = [run.optimizer_ms for run in self.runs if run.optimizer_ms is not None]
        self.state_bytes_per_param = self.runs[0].state_bytes / parameters
        self.checkpoint_bytes = self.runs[0].checkpoint_bytes
        self.optimizer_ms = statistics.fmean(times) if times else None
        self.loss_before = self.runs[0].held_out_loss[0]
        self.loss_after = statistics.fmean(after)
        self.loss_after_spread = statistics.stdev(after) if len(after) > 1 else None

    def mean_held_out(self) -> list[float]:
        """The held-out losses, averaged over the seeds."""
        return [statistics.fmean(losses) for losses in zip(*(run.held_out_loss for run in self.runs))]


@dataclasses.dataclass
class Results:
    """What the demo measured: the setting, one row per key of `LABELS`, a sentence, and the wall time of all runs."""

    setting: dict[str, Any]
    rows: list[Row]
    conclusion: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The results for JSON, which has no NaN: None is in its place."""
        record = dataclasses.asdict(self)
        record["rows"] = [
            {"label": LABELS[row["key"]], **{name: None if value != value else value for name, value in row.items()}}
            for row in record["rows"]
        ]
        return record

    def describe_run(self) -> str:
        """How much training a run is, such as "120 steps of 4 x 256 bytes, CPU, 2 threads, 1 seed"."""
        s = self.setting
        batch = f"{s['batch_size']} x {s['context']} {s['token']}s"
        return f"{s['steps']} steps of {batch}, {s['device']}, {s['seeds']} seed{'s' * (s['seeds'] != 1)}"


def conclude(rows: list[Row], unit: str) -> str:
    """Says in one sentence what the summarized rows show; losses are in `unit`."""
    by_key = {row.key: row for row in rows if row.unavailable is None}
    ours, lion, adamw = by_key["lion8bit"], by_key["lion"], by_key["adamw"]
    gain = lion.loss_before - lion.loss_after

    def gap(row: Row) -> str:
        difference = row.loss_after - lion.loss_after
        if abs(difference) < SMALLEST_GAP:
            return f"within {SMALLEST_GAP} {unit} of fp32 Lion"
        share = f" ({abs(difference) / gain:.2%} of what fine-tuning gained)" if gain > 0 else ""
        return f"{abs(difference):.4f} {unit} {'above' if difference > 0 else 'below'} fp32 Lion{share}"

    ratios = [row.state_bytes_per_param / ours.state_bytes_per_param for row in (lion, adamw)]
    sentence = (
        f"Lion8bit ends {gap(ours)}, with {ratios[0]:.1f}x less optimizer state than fp32 Lion and "
        f"{ratios[1]:.1f}x less than AdamW"
    )
    if "bitsandbytes" in by_key:
        sentence += f"; bitsandbytes' Lion8bit ends {gap(by_key['bitsandbytes'])}"
    return sentence + "."
