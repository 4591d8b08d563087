"""The demo's picture: held-out losses on the left, optimizer state on the right, the conclusion below."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lion8bit.tools.demo.report import LABELS, Results

# Okabe and Ito's palette, which is distinct with any common colour blindness: https://jfly.uni-koeln.de/color/
COLOURS = {"adamw": "#D55E00", "lion": "#0072B2", "lion8bit": "#009E73", "bitsandbytes": "#CC79A7", "none": "#767676"}
# Width, opacity and dashes of the held-out curves: where Lions coincide, the wider show under the narrower.
LINES: dict[str, tuple[float, float, Any]] = {
    "adamw": (2.6, 1.0, "-"),
    "lion": (8.0, 0.35, "-"),
    "bitsandbytes": (3.4, 1.0, "-"),
    "lion8bit": (2.2, 1.0, (0, (3, 2))),
}
WEIGHTS = {"lion8bit": "bold"}  # of fonts
INK, FAINT_INK, RULE = "#222222", "#6B6B6B", "#BBBBBB"


def spread_apart(positions: Sequence[float], gap: float) -> list[float]:
    """Moves labels until they are at least 0.99 `gap` apart; keeps their order and the middle of each group."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    places = list(positions)
    for _ in range(1000):
        for low, high in itertools.pairwise(order):
            overlap = max(0.0, gap - (places[high] - places[low]))
            places[low] -= overlap / 2
            places[high] += overlap / 2
    return places


def plot_losses(axes: Axes, results: Results) -> None:
    """Draws the held-out losses with labels at the curves' ends, and an inset with the small differences of Lions."""
    rows = [row for row in results.rows if row.runs]
    for row in rows:
        colour = COLOURS[row.key]
        if row.key == "none":
            axes.axhline(row.loss_before, color=colour, linewidth=1.2, linestyle=(0, (1, 2)))
            continue
        width, alpha, dashes = LINES[row.key]
        style: dict[str, Any] = {"linewidth": width, "alpha": alpha, "linestyle": dashes, "zorder": 12 - width}
        steps = row.runs[0].held_out_steps
        axes.plot(steps, row.mean_held_out(), color=colour, solid_capstyle="round", **style)
    low, high = axes.get_ylim()
    places = spread_apart([row.loss_after for row in rows], 0.066 * (high - low))
    for row, place in zip(rows, places):
        heights = [(y - low) / (high - low) for y in (row.loss_after, place, place)]
        style = {"color": COLOURS[row.key], "transform": axes.transAxes}
        axes.plot([1.012, 1.03, 1.05], heights, linewidth=1, clip_on=False, **style)
        style |= {"fontsize": 10.5, "fontweight": WEIGHTS.get(row.key)}
        axes.text(1.06, heights[-1], f"{LABELS[row.key]}  {row.loss_after:.3f}", va="center", **style)
    axes.set_xlim(0, results.setting["steps"])
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("optimizer step", color=FAINT_INK)
    axes.set_title(f"Held-out loss, {results.setting['unit']}", loc="left", fontsize=12, color=INK)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    plot_gaps(axes.inset_axes((0.5, 0.47, 0.47, 0.37)), results)


def plot_gaps(axes: Axes, results: Results) -> None:
    """Draws the differences of the 8-bit Lions' held-out losses from fp32 Lion's, in thousandths."""
    by_key = {row.key: row for row in results.rows if row.runs}
    base = by_key["lion"].mean_held_out()
    axes.axhline(0, color=COLOURS["lion"], linewidth=5, alpha=0.35)
    largest = 1.0
    for key in ("bitsandbytes", "lion8bit"):
        if key in by_key:
            gaps = [1e3 * (loss - b) for loss, b in zip(by_key[key].mean_held_out(), base)]
            axes.plot(by_key[key].runs[0].held_out_steps, gaps, color=COLOURS[key], linewidth=1.6)
            largest = max(largest, *map(abs, gaps))
    axes.set_xlim(0, results.setting["steps"])
    axes.set_ylim(-1.25 * largest, 1.25 * largest)
    axes.set_xticks([])
    title = axes.set_title("8-bit minus fp32 Lion, thousandths", loc="left", fontsize=9.5, color=FAINT_INK)
    title.set_backgroundcolor("white")


def plot_memory(axes: Axes, results: Results) -> None:
    """Draws the optimizers' state as horizontal bars."""
    rows = [row for row in results.rows if row.runs and row.key != "none"]
    largest = max(row.state_bytes_per_param for row in rows)
    for place, row in enumerate(rows):
        size = row.state_bytes_per_param
        axes.barh(place, size, color=COLOURS[row.key], height=0.58)
        text: dict[str, Any] = {"color": INK, "fontsize": 10.5, "fontweight": WEIGHTS.get(row.key)}
        axes.text(0, place - 0.34, LABELS[row.key], va="bottom", **text)
        axes.text(size + 0.02 * largest, place, f"{size:.2f}", va="center", **text)
    axes.set_xlim(0, largest * 1.1)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.set_yticks([])
    axes.set_title("Optimizer state, bytes per parameter", loc="left", fontsize=12, color=INK)


def plot(results: Results, path: Path) -> None:
    """Draws the picture and writes it as a PNG file."""
    figure = Figure(figsize=(13, 5.7), dpi=150, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    figure.subplots_adjust(left=0.045, right=0.985, top=0.81, bottom=0.215, wspace=0.62)
    plot_losses(left, results)
    plot_memory(right, results)
    for axes in (left, right, *left.child_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(colors=FAINT_INK, labelsize=9.5)
    title = results.title()
    figure.text(0.045, 0.94, title[0].upper() + title[1:], fontsize=14.5, fontweight="bold", color=INK)
    figure.text(0.045, 0.893, results.subtitle(), fontsize=10.5, color=FAINT_INK)
    figure.text(
        0.045, 0.085, textwrap.fill(results.conclusion, 160), fontsize=10.5, color=INK, va="top", linespacing=1.4
    )
    figure.savefig(path)
