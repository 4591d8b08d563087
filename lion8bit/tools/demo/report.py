"""The demo's report: a table for the terminal, a picture and a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lion8bit.tools.demo.results import LABELS, Results

if TYPE_CHECKING:
    from rich.table import Table

FILES = ("demo.png", "demo.json")


def result_table(results: Results) -> Table:
    """Lays the results out for a terminal of 80 columns, more with several seeds."""
    from rich import box
    from rich.table import Table

    setting = results.setting
    caption = [f"{results.describe_run()}; held-out loss in {setting['unit']}"]
    title = f"{setting['model']}, fine-tuned on {setting['text']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
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


def save_results(results: Results, folder: Path) -> tuple[Path, Path]:
    """Writes `demo.png` and `demo.json` into a folder, which is made if missing, and returns their paths."""
    from lion8bit.tools.demo.picture import plot

    folder.mkdir(parents=True, exist_ok=True)
    picture, record = (folder / name for name in FILES)
    plot(results, picture)
    record.write_text(json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n")
    return picture, record
