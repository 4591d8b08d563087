"""A plan as a table and bars in a terminal (needs rich), and as a picture (needs matplotlib)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from lion8bit.planner.formulas import GIB, Plan, Row

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Colours that people with any common colour blindness can distinguish, by Okabe and Ito: https://jfly.uni-koeln.de/color/
PARTS = {"weights": "#0072B2", "optimizer state": "#009E73", "gradients and activations at the peak": "#E69F00"}


def parts(row: Row) -> list[int]:
    """The bytes of `PARTS`, whose sum is a row's total."""
    return [row.weights, row.state, row.total - row.weights - row.state]


def title(plan: Plan) -> str:
    """The model and the setting in a line."""
    words = [f"{plan.parameters:,} parameters", plan.dtype, f"{plan.batch} x {plan.sequence} tokens"]
    if plan.lora:
        words.append(f"LoRA of rank {plan.lora}, {plan.trained:,} trained")
    words.append("checkpointing" if plan.checkpointing else "no checkpointing")
    words += ["chunked loss"] if plan.chunked_loss else []
    words += [f"each of {plan.gpus} GPUs (FSDP2)"] if plan.gpus > 1 else []
    return f"{plan.model}: {', '.join(words)}"


def plan_table(plan: Plan) -> Table:
    """The sizes of a plan in GiB."""
    from rich import box
    from rich.table import Table

    table = Table(title=title(plan), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("GiB", no_wrap=True)
    known = all(row.activations is not None for row in plan.rows.values())
    for heading in ("weights", "grads", "state", "transient", *(["acts"] if known else []), "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    if plan.vram is not None:
        table.add_column(f"in {plan.vram:g}", no_wrap=True)
    for row in plan.rows.values():
        sizes = (row.weights, row.gradients, row.state, row.transient, row.activations, row.total)
        texts = [f"{size / GIB:.1f}" for size in sizes if size is not None]
        if plan.vram is not None:
            least = f"at least {texts[-1] if len(texts[-1]) < 4 else row.total // GIB} GiB"
            texts.append({True: "[green]fits[/]", False: "[red]no[/]", None: least}[row.fits])
        table.add_row(row.label, *texts, style="bold" if row.label.startswith("Lion8bit") else None)
    notes = [plan.note] if plan.note else []
    notes.append(f"total{'' if known else ', at least'}: at the worst moment, which is named beside its bar")
    if plan.vram is not None:
        notes.append(f"{plan.reserve:g} GiB stay free for the CUDA context, workspaces and fragmentation")
    table.caption, table.caption_justify = "; ".join(notes), "left"
    return table


def plan_bars(plan: Plan, columns: int) -> RenderableType:
    """The totals as bars of text; the longest stands for the largest total, or for the GPU's memory if that is more."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    longest = max(row.total for row in plan.rows.values())
    scale = max(longest, (plan.vram or 0) * GIB) / max(10, columns - 46)
    grid = Table.grid(padding=(0, 1, 0, 0))
    for row in plan.rows.values():
        bar, done = Text(no_wrap=True, overflow="crop"), 0
        for end, colour in zip(itertools.accumulate(parts(row)), PARTS.values(), strict=True):
            length = round(end / scale) - done
            bar.append("█" * length, colour)
            done += length
        if plan.vram is not None:
            mark = round(plan.vram * GIB / scale)
            bar = bar + " " * (mark - done) + "|" if done < mark else bar[:mark] + "|" + bar[mark + 1 :]
        grid.add_row(row.label, bar, f"{row.total / GIB:.1f} {row.peak}")
    legend = Text()
    for name, colour in PARTS.items():
        legend.append("█ ", colour).append(f"{name}  ")
    return Group(grid, legend)


def print_plan(plan: Plan) -> None:
    """Prints the table and the bars."""
    from rich.console import Console

    console = Console()
    console.print(plan_table(plan))
    console.print(plan_bars(plan, console.width))


def check_suffix(path: Path) -> None:
    """A ValueError unless `plot_plan` can write a file of this name."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"path must end in one of .png, .svg, .pdf, got {path.name!r}")


def plot_plan(plan: Plan, path: Path) -> None:
    """Draws the totals as horizontal bars into a .png, .svg or .pdf, with a line at the GPU's memory.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = list(plan.rows.values())
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for index, (name, colour) in enumerate(PARTS.items()):
        sizes = [parts(row)[index] / GIB for row in rows]
        bars = axes.barh(range(len(rows)), sizes, left=left, color=colour, height=0.7, label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the line at the GPU's memory must not cross a number
    axes.bar_label(bars, [f"{total:.1f}" for total in left], padding=3, fontsize=9, bbox=box)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.08)
    if plan.vram is not None:
        axes.axvline(plan.vram, color="#D55E00", linestyle="--", label=f"{plan.vram:g} GiB")
    axes.set_xlabel("GiB at the worst moment")
    axes.set_title(title(plan), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
