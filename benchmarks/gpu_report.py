"""Turns the records of `gpu.py` into verdicts on the goals, a page of tables and a picture; it measures nothing."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "lion8bit"
GIB = 2**30
SHARES = (("1B", "fp32", OURS, 0.92), ("1B", "bf16", OURS, 0.85), ("1B", "bf16", f"{OURS}-stochastic", 0.80),
          ("llama", "bf16", OURS, 0.80))  # fmt: skip
RATIOS = (("gpt2", "bitsandbytes", 5.0), ("gpt2", "flashlion", 3.0), ("llama", "bitsandbytes", 1.3))
CLOCKS = ("gpu_ms", "wall_ms", "wall_new_ms")

# Columns of the tables: heading, and format of a row's values.
STEPS = {"stage": "{stage}", "step": "{step}", "result": "{status}", "seconds": "{seconds}", "last line": "{detail}"}
GOALS = {"goal": "{goal}", "requirement": "{requirement}", "measured": "{measured}", "verdict": "{verdict}"}
TRAININGS = {"model": "{model}", "limit": "{memory_limit_gib:.0f} GiB", "optimizer": "{optimizer}",
             "state on": "{place}", "outcome": "{outcome}", "peak GiB": "{peak:.2f}", "planned": "{planned:.2f}",
             "state GiB": "{state:.2f}", "tokens/s": "{tokens_per_second:.0f}"}  # fmt: skip
LISTS = {"dtype": "{dtype}", "optimizer": "{label}", "GPU ms": "{gpu_ms[median]:.3f}",
         "wall ms": "{wall_ms[median]:.3f}", "wall ms, new gradients": "{wall_new_ms[median]:.3f}",
         "bytes/param": "{bytes_per_parameter:.2f}", "GB/s": "{gb_per_s:.0f}", "of copy": "{share_of_copy:.1%}",
         "GPU time over ours": "{over:.2f}x"}  # fmt: skip
TUNINGS = {"tuning": "{variant}", "ms": "{ms[median]:.4f}", "least": "{ms[min]:.4f}", "most": "{ms[max]:.4f}",
           "of copy": "{share_of_copy:.1%}", "speed over base": "{speed_over_base:.3f}"}  # fmt: skip

Record = dict[str, Any]


def result(records: dict[str, Record], stage: str, step: str) -> Record:
    """What a step wrote; nothing where it did not run."""
    steps = records.get(stage, {}).get("steps", [])
    return next((each.get("result") or {} for each in steps if each["step"] == step), {})


def results(records: dict[str, Record], key: str) -> list[tuple[Record, Record]]:
    """The steps of the stage "speed" whose result has a key, each with its result."""
    steps = records.get("speed", {}).get("steps", [])
    return [(step, step["result"]) for step in steps if key in (step.get("result") or {})]


def list_rows(records: dict[str, Record]) -> list[Record]:
    """All measurements on parameter lists."""
    return [row for _, found in results(records, "rows") for row in found["rows"]]


def counts(record: Record) -> dict[str, int]:
    """How many GPU tests passed, failed and were skipped, from pytest's last line."""
    details = (step.get("detail", "") for step in record["steps"] if step["step"] == "tests")
    found = {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", next(details, ""))}
    failed = sum(found.get(word, 0) for word in ("failed", "error", "errors"))
    return {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}


def find(rows: Sequence[Record], model: str, dtype: str, contender: str) -> Record | None:
    """One measurement, if it was made."""
    wanted = (model, dtype, contender, "measured")
    return next((r for r in rows if (r["model"], r["dtype"], r["contender"], r["status"]) == wanted), None)


# ---- Goals -----------------------------------------------------------------------------------------------------------


def goal(name: str, requirement: str, value: float | None, met: bool, form: str) -> Record:
    """A row of the goals' table; ``met`` is None where there is no value."""
    shown = "not measured" if value is None else format(value, form)
    return {"goal": name, "requirement": requirement, "measured": shown, "met": None if value is None else met}


def at_most(name: str, value: float | None, bound: float, form: str, unit: str = "") -> Record:
    """A goal with an upper bound."""
    return goal(name, f"at most {bound:.3g}{unit}", value, value is not None and value <= bound, form)


def judge(records: dict[str, Record]) -> list[Record]:
    """The goals of the stages that ran; without verdicts where one was a dry run."""
    goals: list[Record] = []
    if "check" in records:
        tests = counts(records["check"])
        measured = tests["failed"] if tests["failed"] or tests["passed"] >= 100 else None
        goals.append(goal("tests that fail", "none of at least 100", measured, tests["failed"] == 0, "d"))
        for process, bound in (("first process", 2.0), ("second process", 0.3)):
            first = result(records, "check", process).get("first_step")
            goals.append(at_most(f"first step of the {process}", first, bound, ".2f", " s"))
    if "speed" in records:
        goals += judge_steps(list_rows(records))
        for step, record in results(records, "losses"):
            goals += judge_training(step, record)
    trial = any(record["trial"] for record in records.values())
    return [{**each, "met": None} for each in goals] if trial else goals


def judge_steps(rows: Sequence[Record]) -> list[Record]:
    """The goals of the times on parameter lists."""
    goals = []
    for model, dtype, contender, bound in SHARES:
        row = find(rows, model, dtype, contender)
        share = row["share_of_copy"] if row else None
        name = f"{model} {dtype}{', stochastic' if contender != OURS else ''}: share of copy bandwidth"
        goals.append(goal(name, f"at least {bound:.0%}", share, share is not None and share >= bound, ".1%"))
    for model, peer, ratio in RATIOS:
        ours, theirs = find(rows, model, "bf16", OURS), find(rows, model, "bf16", peer)
        value = ours["wall_ms"]["median"] / theirs["wall_ms"]["median"] if ours and theirs else None
        goals.append(at_most(f"{model} bf16: wall time over {peer}'s", value, 1 / ratio, ".3f"))
    slower, compared = [], 0
    for row in rows:
        ours = find(rows, row["model"], row["dtype"], OURS)
        if ours is None or row["status"] != "measured" or row["contender"].startswith(OURS):
            continue
        compared += 1
        for clock in CLOCKS:
            if row.get(clock) and ours.get(clock) and (over := ours[clock]["median"] / row[clock]["median"]) > 1:
                slower.append(f"{row['model']} {row['dtype']} {row['contender']} {clock[:-3]} {over:.2f}x")
    nowhere = goal("slower than a peer", "nowhere", compared or None, not slower, "d")
    return [*goals, {**nowhere, "measured": "; ".join(slower) or f"none of {compared} comparisons"}]


def judge_training(step: Record, record: Record) -> list[Record]:
    """The goals of one full fine-tuning."""
    name = f"{step['step']}, {record['model']}{', momentum on the host' if record['paged'] else ''}"
    name += ", 4 bits" if record.get("bits") == 4 else ""
    losses = record["losses"] if step["status"] == "passed" else []
    limit, planned, reserved = (record.get(key) for key in ("memory_limit_gib", "planned_bytes", "reserved_bytes"))
    # The plan counts tensors; the allocator rounds them up.
    peak = record["requested_bytes"] or record["peak_bytes"]
    over_plan = peak / planned if losses and peak and planned else None
    reserved = reserved / GIB if losses and reserved else None
    falling = sum(losses[-5:]) / 5 / losses[0] if losses else None
    return [
        at_most(f"{name}: reserved", reserved, limit or float("inf"), ".2f", " GiB"),
        at_most(f"{name}: peak over the plan's", over_plan, 1.03, ".3f"),
        at_most(f"{name}: last five losses over the first", falling, 0.9, ".3f"),
    ]


# ---- The page --------------------------------------------------------------------------------------------------------


def write_report(folder: Path, picture: bool) -> dict[str, Record]:
    """Writes `gpu.md` and, with ``picture`` and matplotlib, `gpu.png` from a folder's records; returns these."""
    places = {stage: folder / f"{stage}.json" for stage in ("check", "speed", "deep")}
    records = {stage: json.loads(place.read_text()) for stage, place in places.items() if place.exists()}
    (folder / "gpu.md").write_text(markdown(records))
    rows = [row for row in list_rows(records) if row["status"] == "measured"]
    if picture and rows and importlib.util.find_spec("matplotlib") is not None:
        draw(rows, folder / "gpu.png")
    return records


def markdown(records: dict[str, Record]) -> str:
    """All records as a page of tables."""
    machine = next((found for stage in records if (found := result(records, stage, "machine"))), {})
    gpu = machine.get("gpu") or {"name": "no GPU", "cuda": None}
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items() if version)
    commit = next((record["commit"] for record in records.values() if record.get("commit")), "unknown")
    lines = [f"# {gpu['name']}, {machine.get('date', '')}", "", f"Commit {commit}, driver {machine.get('driver')}, "
             f"CUDA {gpu['cuda']}, Python {machine.get('python')}; {versions}.", ""]  # fmt: skip
    if any(record["trial"] for record in records.values()):
        lines += ["Dry run: the numbers are not measurements.", ""]
    lines += table(STEPS, [{"stage": stage, **step} for stage, record in records.items() for step in record["steps"]])
    words = {True: "met", False: "NOT MET", None: "-"}
    lines += table(GOALS, [{**goal, "verdict": words[goal["met"]]} for goal in judge(records)])
    if found := results(records, "losses"):
        lines += ["## Full fine-tuning in bf16, one sequence of 2048 tokens, gradient release, checkpointing", ""]
        lines += table(TRAININGS, [training_row(*each) for each in found])
    rows = list_rows(records)
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        size = f"{mine[0].get('parameters', 0) / 1e6:.1f}M parameters, {mine[0].get('tensors', 0)} tensors"
        lines += [f"## {mine[0]['name']} ({size})", ""]
        lines += [f"Copy bandwidth {mine[0]['copy_gb_per_s']:.0f} GB/s. Medians, caches flushed before each step.", ""]
        lines += table(LISTS, [list_row(row, find(mine, model, row["dtype"], OURS)) for row in mine])
    for case, timed in result(records, "check", "variants").get("cases", {}).items():
        lines += [f"## Tunings, {case} ({timed['elements'] / 1e6:.0f}M elements)", "", *table(TUNINGS, timed["rows"])]
    return "\n".join(lines)


def training_row(step: Record, record: Record) -> Record:
    """The values of one training's row."""
    losses, outcome = record["losses"], "" if step["status"] == "passed" else step["status"]
    if losses:
        outcome = f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps{', ' * bool(outcome)}{outcome}"
    if record["out_of_memory"]:
        outcome = f"out of memory: {record['out_of_memory']['where']}"
    gib = {name: record[f"{name}_bytes"] / GIB for name in ("peak", "planned", "state") if record.get(f"{name}_bytes")}
    options = [f"{record['bits']} bits"] if record.get("bits") else []  # older records have no such keys
    options += ["chunked loss"] if record.get("chunked_loss") else []
    optimizer = ", ".join([record["optimizer"], *options])
    return {**record, **gib, "optimizer": optimizer, "outcome": outcome, "place": "host" if record["paged"] else "GPU"}


def list_row(row: Record, ours: Record | None) -> Record:
    """The values of one measurement's row."""
    if row["status"] != "measured":
        return {"dtype": row["dtype"], "label": f"{row['label']}: {row['reason']}"}
    return {**row, "over": row["gpu_ms"]["median"] / ours["gpu_ms"]["median"] if ours else None}


def table(columns: dict[str, str], rows: Sequence[Record]) -> list[str]:
    """A Markdown table with an empty line after it; nothing without rows. What is not there is an empty cell."""

    def cell(form: str, row: Record) -> str:
        try:
            return form.format_map(row).replace("|", "/")
        except (KeyError, TypeError):
            return ""

    cells = [[cell(form, row) for form in columns.values()] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *cells] if rows else []
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def draw(rows: Sequence[Record], path: Path) -> None:
    """One panel per model: the device's time of a step, and behind it the wall time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Record]] = {}
    for row in rows:
        panels.setdefault(row["name"], []).append(row)
    heights = [1 + 0.25 * len(panel) for panel in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for (title, panel), axis in zip(panels.items(), axes[:, 0]):
        for position, row in enumerate(panel):
            colour, wall = "tab:green" if row["contender"].startswith(OURS) else "tab:gray", row["wall_ms"]["median"]
            axis.barh(position, wall, color=colour, alpha=0.4)
            axis.barh(position, row["gpu_ms"]["median"], color=colour, height=0.4)
            axis.text(wall, position, f" {row['share_of_copy']:.0%}", va="center", fontsize=7)
        axis.set_yticks(range(len(panel)), [f"{row['dtype']}: {row['label']}" for row in panel], fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(xscale="log", title=title, xlabel="ms per step: GPU (narrow) and wall; % of copy bandwidth")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
