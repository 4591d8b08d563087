"""The demo's measurements and how they are reported: a sentence, a table and files."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FILES = ("demo.png", "demo.json")
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
class OptimizerResult:
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
    rows: list[OptimizerResult]
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

    def title(self) -> str:
        """Model and text."""
        return f"{self.setting['model']}, fine-tuned on {self.setting['text']}"

    def subtitle(self) -> str:
        """How much training a run is, such as "120 steps of 4 x 256 bytes, CPU, 2 threads, 1 seed"."""
        s = self.setting
        batch = f"{s['batch_size']} x {s['context']} {s['token']}s"
        return f"{s['steps']} steps of {batch}, {s['device']}, {s['seeds']} seed{'s' * (s['seeds'] != 1)}"


def conclude(rows: list[OptimizerResult], unit: str) -> str:
    """Says in one sentence what the summarized rows show; losses are in `unit`."""
    by_key = {row.key: row for row in rows if row.unavailable is None}
    ours, lion, adamw = by_key["lion8bit"], by_key["lion"], by_key["adamw"]
    gain = lion.loss_before - lion.loss_after

    def gap(row: OptimizerResult) -> str:
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


def result_table(results: Results) -> Table:
    """Lays the results out for a terminal of 80 columns, more with several seeds."""
    from rich import box
    from rich.table import Table

    caption = [f"{results.subtitle()}; held-out loss in {results.setting['unit']}"]
    table = Table(title=results.title(), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("optimizer", no_wrap=True)
    headings = ("state\nbytes/param", "optimizer\ncheckpoint", "optimizer\nms/step", "loss\nbefore", "loss\nafter")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading != "loss\nafter")
    for row in results.rows:
        cells = ["-"] * len(headings)
        if row.unavailable is not None:
            caption.append(f"{LABELS[row.key]} is unavailable: {row.unavailable}")
        else:
            spread = "" if row.loss_after_spread is None else f" ±{row.loss_after_spread:.4f}"
            cells[3:] = f"{row.loss_before:.4f}", f"{row.loss_after:.4f}{spread}"
        if row.optimizer_ms is not None:
            size, time = f"{row.checkpoint_bytes / 1e6:.2f} MB", f"{row.optimizer_ms:.2f}"
            cells[:3] = f"{row.state_bytes_per_param:.3f}", size, time
        table.add_row(LABELS[row.key], *cells, style="bold green" if row.key == "lion8bit" else None)
    table.caption = "\n".join(caption)
    return table
