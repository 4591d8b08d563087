"""Owns what is said of a visit to a GPU: verdicts on the goals, a page of tables and a picture; it measures nothing."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import asked_of_driver

STAGES = ("check", "speed", "deep")
OURS, FLASH = "lion8bit", "flashlion"
GIB = 2**30

Record = dict[str, Any]


def default_output() -> Path:
    """A folder named after the GPU and the day."""
    name = asked_of_driver().get("name", "none")
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
    return Path(__file__).resolve().parent / "results" / f"gpu-{plain}-{datetime.date.today().isoformat()}"


def read_records(folder: Path) -> dict[str, Record]:
    """The stages that left a record in a folder, by name."""
    places = {stage: folder / f"{stage}.json" for stage in STAGES}
    return {stage: json.loads(place.read_text()) for stage, place in places.items() if place.exists()}


def result(records: dict[str, Record], stage: str, step: str) -> Record:
    """What a step wrote; nothing where it did not run."""
    steps = records.get(stage, {}).get("steps", [])
    return next((each.get("result") or {} for each in steps if each["step"] == step), {})


def list_rows(records: dict[str, Record]) -> list[Record]:
    """All measurements on parameter lists."""
    steps = records.get("speed", {}).get("steps", [])
    return [row for step in steps for row in (step.get("result") or {}).get("rows", [])]


def trainings(records: dict[str, Record]) -> list[tuple[Record, Record]]:
    """All full fine-tunings: how the step ended, and its record."""
    steps = records.get("speed", {}).get("steps", [])
    return [(step, step["result"]) for step in steps if "losses" in (step.get("result") or {})]


def find(rows: Sequence[Record], model: str, dtype: str, contender: str) -> Record | None:
    """One measurement, if it was made."""
    wanted = (model, dtype, contender, "measured")
    return next((r for r in rows if (r["model"], r["dtype"], r["contender"], r["status"]) == wanted), None)


# ---- Goals -----------------------------------------------------------------------------------------------------------


def judge(records: dict[str, Record]) -> list[Record]:
    """The goals, each with ``goal``, ``requirement``, ``measured`` and ``met``; None where it was not measured."""
    goals: list[Record] = []

    def add(goal: str, requirement: str, value: float | None, bound: float, form: str, least: bool = False) -> None:
        met = None if value is None else value >= bound if least else value <= bound
        shown = "not measured" if value is None else format(value, form)
        goals.append({"goal": goal, "requirement": requirement, "measured": shown, "met": met})

    if "check" in records:
        judge_check(records, add)
    if "speed" in records:
        judge_speed(records, add)
        goals.append(slower_than_peers(list_rows(records)))
    if any(record["trial"] for record in records.values()):
        goals = [{**goal, "met": None} for goal in goals]
    return goals


def judge_check(records: dict[str, Record], add: Callable[..., None]) -> None:
    """The goals of the first stage."""
    tests = result(records, "check", "tests")
    passed, failed = tests.get("passed", 0), tests.get("failed", 0)
    add("tests that fail", "none of at least 100", failed if failed or passed >= 100 else None, 0, "d")
    for process, bound in (("first process", 2.0), ("second process", 0.3)):
        value = result(records, "check", process).get("first_step")
        add(f"first step of the {process}", f"under {bound} s", value, bound, ".2f")


def judge_speed(records: dict[str, Record], add: Callable[..., None]) -> None:
    """The goals of the second stage, one by one."""
    rows = list_rows(records)
    for model, dtype, contender, share in (
        ("1B", "fp32", OURS, 0.92),
        ("1B", "bf16", OURS, 0.85),
        ("1B", "bf16", f"{OURS}-stochastic", 0.80),
        ("llama", "bf16", OURS, 0.80),
    ):
        row = find(rows, model, dtype, contender)
        goal = f"{model} {dtype}{', stochastic' if contender != OURS else ''}: share of copy bandwidth"
        add(goal, f"at least {share:.0%}", row and row["share_of_copy"], share, ".1%", least=True)
    for model, peer, ratio, words in (
        ("gpt2", "bitsandbytes", 1 / 5, "1/5"),
        ("gpt2", FLASH, 1 / 3, "1/3"),
        ("llama", "bitsandbytes", 1 / 1.3, "1/1.3"),
    ):
        ours, theirs = find(rows, model, "bf16", OURS), find(rows, model, "bf16", peer)
        value = ours["wall_ms"]["median"] / theirs["wall_ms"]["median"] if ours and theirs else None
        add(f"{model} bf16: wall time over {peer}'s", f"at most {words}", value, ratio, ".3f")
    for step, record in trainings(records):
        if record["optimizer"] != OURS:
            continue
        host = ", momentum on the host" if record["paged"] else ""
        name, limit = f"{step['step']}, {record['model']}{host}", record["memory_limit_gib"]
        losses = record["losses"] if step["status"] == "passed" else []
        # The plan counts tensors; the allocator rounds them up.
        peak = (record["requested_bytes"] or record["peak_bytes"]) if losses else None
        planned = record.get("planned_bytes")  # none where the memory did not suffice for the model
        reserved = record["reserved_bytes"] if losses else None
        if limit is not None:
            add(f"{name}: reserved", f"at most {limit:.0f} GiB", reserved and reserved / GIB, limit, ".2f")
        add(f"{name}: peak over the plan's", "at most 1.03", peak and planned and peak / planned, 1.03, ".3f")
        falling = sum(losses[-5:]) / 5 / losses[0] if losses else None
        add(f"{name}: last five losses over the first", "at most 0.9", falling, 0.9, ".3f")


def slower_than_peers(rows: Sequence[Record]) -> Record:
    """The goal to be slower than a peer nowhere."""
    slower, compared = [], 0
    for row in rows:
        ours = find(rows, row["model"], row["dtype"], OURS)
        if ours is None or row["status"] != "measured" or row["contender"].startswith(OURS):
            continue
        compared += 1
        for clock in ("gpu_ms", "wall_ms", "wall_new_ms"):
            if row.get(clock) and ours.get(clock) and (over := ours[clock]["median"] / row[clock]["median"]) > 1:
                slower.append(f"{row['model']} {row['dtype']} {row['contender']} {clock[:-3]} {over:.2f}x")
    measured = "; ".join(slower) or (f"none of {compared} comparisons" if compared else "not measured")
    met = not slower if compared else None
    return {"goal": "slower than a peer", "requirement": "nowhere", "measured": measured, "met": met}


# ---- The page --------------------------------------------------------------------------------------------------------


def write_report(folder: Path, picture: bool) -> dict[str, Record]:
    """Writes `gpu.md` and, if asked for and with matplotlib, `gpu.png` from a folder's records; returns these."""
    records = read_records(folder)
    (folder / "gpu.md").write_text(markdown(records))
    if picture and importlib.util.find_spec("matplotlib") is not None and (bars := panels(records)):
        draw(bars, folder / "gpu.png")
    return records


def markdown(records: dict[str, Record]) -> str:
    """All records as a page of tables."""
    machine = next((found for stage in records if (found := result(records, stage, "machine"))), {})
    gpu = machine.get("gpu") or {"name": "no GPU"}
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items() if version)
    lines = [f"# {gpu['name']}, {machine.get('date', '')}", ""]
    if any(record["trial"] for record in records.values()):
        lines += ["A trial of the program: none of these figures is a result.", ""]
    lines += [
        f"Driver {machine.get('driver')}, CUDA {gpu.get('cuda')}, Python {machine.get('python')}; {versions}.",
        "",
    ]
    steps = [(stage, step) for stage, record in records.items() for step in record["steps"]]
    lines += table(
        ["stage", "step", "result", "seconds", "last line"],
        [
            [stage, step["step"], step["status"], step.get("seconds", ""), step.get("detail", "")]
            for stage, step in steps
        ],
    )
    words = {True: "met", False: "NOT MET", None: "-"}
    goals = [[goal["goal"], goal["requirement"], goal["measured"], words[goal["met"]]] for goal in judge(records)]
    lines += table(["goal", "requirement", "measured", "verdict"], goals) if goals else []
    for failure in result(records, "check", "tests").get("first_failures", []):
        lines += [f"First failure of {failure['worker']}: `{failure['test']}`", "", "```", failure["text"], "```", ""]
    if found := trainings(records):
        lines += ["## Full fine-tuning in bf16, one sequence of 2048 tokens, gradient release, checkpointing", ""]
        heads = ["model", "limit", "optimizer", "state on", "outcome", "peak GiB", "planned", "state GiB", "tokens/s"]
        lines += table(heads, [training_cells(*each) for each in found])
    rows = list_rows(records)
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        size = mine[0].get("parameters", 0) / 1e6
        lines += [f"## {mine[0]['name']} ({size:.1f}M parameters, {mine[0].get('tensors', 0)} tensors)", ""]
        lines += [f"Copy bandwidth {mine[0]['copy_gb_per_s']:.0f} GB/s. Medians, caches flushed before each step.", ""]
        heads = ["dtype", "optimizer", "GPU ms", "wall ms", "wall ms, new gradients", "bytes/param", "GB/s", "of copy"]
        cells = [row_cells(row, find(mine, model, row["dtype"], OURS)) for row in mine]
        lines += table([*heads, "GPU time over ours"], cells)
    for case, timed in result(records, "check", "variants").get("cases", {}).items():
        lines += [f"## Tunings, {case} ({timed['elements'] / 1e6:.0f}M elements)", ""]
        lines += table(
            ["tuning", "ms", "least", "most", "of copy", "speed over base"],
            [
                [row["variant"], *(f"{row['ms'][key]:.4f}" for key in ("median", "min", "max")),
                 f"{row['share_of_copy']:.1%}", f"{row['speed_over_base']:.3f}"]
                for row in timed["rows"]
            ],
        )  # fmt: skip
    return "\n".join(lines)


def training_cells(step: Record, record: Record) -> list[str]:
    """The cells of one training."""

    def gib(name: str) -> str:
        return f"{record[name] / GIB:.2f}" if record.get(name) is not None else "-"

    losses, full, speed = record["losses"], record["out_of_memory"], record.get("tokens_per_second")
    outcome = "" if step["status"] == "passed" else step["status"]
    if losses:
        outcome = f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps{', ' * bool(outcome)}{outcome}"
    if full:
        outcome = f"out of memory: {full['where']}"
    limit = "-" if record["memory_limit_gib"] is None else f"{record['memory_limit_gib']:.0f} GiB"
    place = "host" if record["paged"] else "GPU"
    sizes = [gib(name) for name in ("peak_bytes", "planned_bytes", "state_bytes")]
    return [
        record["model"],
        limit,
        record["optimizer"],
        place,
        outcome,
        *sizes,
        "-" if speed is None else f"{speed:.0f}",
    ]


def row_cells(row: Record, ours: Record | None) -> list[str]:
    """The cells of one measurement."""
    if row["status"] != "measured":
        return [row["dtype"], row["label"], row["reason"], *[""] * 6]
    clocks = [f"{row[clock]['median']:.3f}" if row.get(clock) else "" for clock in ("gpu_ms", "wall_ms", "wall_new_ms")]
    speed = [f"{row['bytes_per_parameter']:.2f}", f"{row['gb_per_s']:.0f}", f"{row['share_of_copy']:.1%}"]
    over = f"{row['gpu_ms']['median'] / ours['gpu_ms']['median']:.2f}x" if ours else ""
    return [row["dtype"], row["label"], *clocks, *speed, over]


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table with an empty line after it."""
    cells = [list(heads), ["---"] * len(heads), *rows]
    return [*("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in cells), ""]


# ---- The picture -----------------------------------------------------------------------------------------------------

Bar = tuple[str, float, float, float, bool]  # label, ms of the device, ms of the wall, share of copy, ours


def panels(records: dict[str, Record]) -> dict[str, list[Bar]]:
    """The bars of each panel by its title."""
    found: dict[str, list[Bar]] = {}
    for row in list_rows(records):
        if row["status"] == "measured":
            clocks = row["gpu_ms"]["median"], row["wall_ms"]["median"]
            ours = row["contender"].startswith(OURS)
            bar = (f"{row['dtype']}: {row['label']}", *clocks, row["share_of_copy"], ours)
            found.setdefault(row["name"], []).append(bar)
    for case, timed in result(records, "check", "variants").get("cases", {}).items():
        found[f"tunings, {case}"] = [
            (row["variant"], row["ms"]["median"], row["ms"]["max"], row["share_of_copy"], row["variant"] == "base")
            for row in timed["rows"]
        ]
    return found


def draw(bars: dict[str, list[Bar]], path: Path) -> None:
    """One panel per model: the device's time of a step, and behind it the wall time (of tunings the longest round)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1 + 0.25 * len(panel) for panel in bars.values()]
    figure, axes = pyplot.subplots(
        len(bars), 1, figsize=(8, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for (title, panel), axis in zip(bars.items(), axes[:, 0]):
        for position, (_, device, wall, share, ours) in enumerate(panel):
            colour = "tab:green" if ours else "tab:gray"
            axis.barh(position, wall, color=colour, alpha=0.4)
            axis.barh(position, device, color=colour, height=0.4)
            axis.text(wall, position, f" {share:.0%}", va="center", fontsize=7)
        axis.set_yticks(range(len(panel)), [label for label, *_ in panel], fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        scale = "linear" if title.startswith("tunings") else "log"
        axis.set(xscale=scale, title=title, xlabel="ms per step: GPU (narrow) and wall; % of copy bandwidth")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
