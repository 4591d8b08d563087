"""Owns one run of everything that needs a GPU: tests, compute-sanitizer, benchmarks against the peers, and the report.

It imports nothing beside the standard library, so that it can say what is missing; the measurements are made in
processes of their own (`gpu_step.py`, `gpu_first.py`, `examples/full_finetune.py`), where a fault disturbs no other.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Tests lion8bit on this machine's GPU, runs it under compute-sanitizer, times it against the peers that are there, and
fine-tunes all weights of 7B, 8B and 3B models in 24 and 12 GiB. Needs no network. Writes gpu.json, gpu.md, gpu.png and
the tools' output into one folder; fails where a test, a tool or a measurement of lion8bit fails. Parts for which the
time does not suffice are left out, the last first, and listed.
"""

EPILOG = """\
This python needs torch for CUDA, pytest, rich and, for the picture, matplotlib. lion8bit is built from this checkout
into a temporary folder, unless it is installed from here already. Peers (bitsandbytes, flashoptim) take part where they
are installed, or lie in the folder of --wheels. The GPU's settings are left as they are.

examples:
  make gpu PYTHON=python3.12
  python benchmarks/gpu.py --budget 300 --output results
  python benchmarks/gpu.py --part gpt2 1B
  python benchmarks/gpu.py --part 7B 8B 3B peers                 only the full fine-tuning
  python benchmarks/gpu.py --device cpu --quick --part gpt2       proves the script without a GPU
"""

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHMARKS = ("gpt2", "1B", "llama", "lora", "vit", "sdxl")
OURS = "lion8bit"
FLASH = "flashlion"
GIB = 2**30


@dataclass(frozen=True)
class Training:
    """A full fine-tuning by `examples/full_finetune.py`, with sequences of 2048 tokens."""

    shape: str
    limit: int  # GiB of the GPU that the process may take
    optimizer: str = OURS
    paged: bool = False
    steps: int = 20

    def arguments(self, quick: bool, device: str, record: Path) -> list[str]:
        """Its command line; a quick one is tiny and has no limit."""
        size = ["--shape", "tiny", "--sequence", "64", "--lr", "1e-3"]
        if not quick and device != "cpu":
            size = ["--shape", self.shape, "--memory-limit", str(self.limit)]
        paged = ["--paged"] if self.paged else []
        common = ["--optimizer", self.optimizer, "--steps", str(self.steps), "--device", device, "--json", str(record)]
        return [*size, *paged, *common]


PEER_STEPS = 5
TRAININGS = {
    "7B": [Training("llama-7b", 24)],
    "8B": [Training("llama3-8b", 24, paged=True)],
    "3B": [Training("llama-3b", 12, paged=True)],
    "peers": [
        Training("llama-7b", 24, "bitsandbytes", steps=PEER_STEPS),
        Training("llama-7b", 24, FLASH, steps=PEER_STEPS),
        Training("llama3-8b", 24, "bitsandbytes", paged=True, steps=PEER_STEPS),
        Training("llama-3b", 12, FLASH, steps=PEER_STEPS),
        Training("llama-7b", 24, "adamw", steps=PEER_STEPS),
    ],
}
OUT_OF_MEMORY = 3  # exit code of the example


@dataclass(frozen=True)
class Part:
    """One piece of the run."""

    name: str
    estimate: float  # seconds that must be left for it to begin
    limit: float  # seconds after which it is ended


PARTS = (  # in the order of their worth
    Part("tests", 90, 260),
    Part("start", 15, 60),
    Part("gpt2", 20, 90),
    Part("1B", 20, 90),
    Part("llama", 25, 120),
    Part("7B", 45, 110),
    Part("8B", 60, 130),
    Part("3B", 45, 90),
    Part("memcheck", 20, 90),
    Part("memory", 60, 150),
    Part("racecheck", 20, 90),
    Part("peers", 60, 150),
    Part("sdxl", 25, 90),
    Part("lora", 20, 60),
    Part("vit", 20, 60),
    Part("initcheck", 20, 90),
    Part("synccheck", 20, 90),
)


def run_parts(
    parts: Sequence[Part],
    budget: float,
    run: Callable[[Part, float], dict[str, Any]],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Runs parts in order while their estimates fit into what is left.

    Args:
        parts: what to do.
        budget: seconds from now.
        run: does a part within a number of seconds; returns at least ``status``.
        clock: seconds.
    """
    end, records = clock() + budget, []
    for part in parts:
        begin = clock()
        if end - begin < part.estimate:
            reason = f"needs {part.estimate:.0f} s, {max(0.0, end - begin):.0f} s were left"
            records.append({"part": part.name, "status": "dropped", "detail": reason})
            continue
        record = run(part, min(part.limit, end - begin))
        records.append({"part": part.name, **record, "seconds": round(clock() - begin, 1)})
    return records


# ---- Processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A process that has ended, or was ended at its limit, which is status 124."""

    status: int
    output: str


def call(command: Sequence[str | Path], environment: dict[str, str], folder: Path, limit: float) -> Finished:
    """Runs a command in a folder; at the limit it is killed with all that it started."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            cwd=folder,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Finished(status, output.read())


def last_line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def missing(modules: Sequence[str]) -> list[str]:
    """Those that this python does not find."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


class Session:
    """What the parts share: the settings, the environment of their processes, and the folder of the results."""

    def __init__(self, settings: argparse.Namespace, output: Path, site: Path) -> None:
        self.settings, self.output, self.site = settings, output, site
        self.log = output / "gpu.log"
        self.rows = site / "rows.jsonl"
        self.trainings: list[dict[str, Any]] = []
        self.variables = {**os.environ, "PYTHONUNBUFFERED": "1", "LION8BIT_CACHE_DIR": str(site / "kernels")}
        self.variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))

    def call(self, command: Sequence[str | Path], limit: float, **variables: str) -> Finished:
        """Runs a command outside of the checkout, so that only what is installed is found, and logs its output."""
        finished = call(command, {**self.variables, **variables}, self.site, limit)
        with self.log.open("a", encoding="utf-8") as file:
            words = " ".join(map(str, command))
            file.write(f"\n$ {words}\n{finished.output}\nstatus {finished.status}\n")
        return finished

    def location(self) -> Path:
        """A file that `import lion8bit` reads, or the root of the file system where it fails."""
        asked = self.call([sys.executable, "-c", "from lion8bit import cpu; print(cpu.__file__)"], 180)
        return Path(last_line(asked.output)).resolve() if asked.status == 0 else Path("/")

    def install(self) -> list[str]:
        """Puts lion8bit and the wheels where the processes find them; says what was done."""
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", self.site]
        said = []
        if self.location().is_relative_to(ROOT):
            said.append("lion8bit: installed from this checkout")
        elif self.call([*pip, "--no-build-isolation", ROOT], 180).status == 0:
            said.append("lion8bit: built from this checkout")
        else:
            self.variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), self.variables["PYTHONPATH"]])
            said.append("lion8bit: the checkout as it is, without the CPU kernel (its build failed, see gpu.log)")
        found = self.location()
        if not found.is_relative_to(ROOT) and not found.is_relative_to(self.site.resolve()):
            raise RuntimeError(f"lion8bit must be imported from {ROOT}, got {found}; uninstall the other one")
        for wheel in sorted(self.settings.wheels.resolve().glob("*.whl")):
            done = self.call([*pip, wheel], 60)
            said.append(f"{wheel.name}: {'installed' if done.status == 0 else last_line(done.output)}")
        return said

    # ---- The parts ----

    def run(self, part: Part, limit: float) -> dict[str, Any]:
        """Does one part within a number of seconds."""
        if part.name == "tests":
            return self.tests(limit)
        if part.name == "start":
            return self.start(limit)
        if part.name == "memory":
            return self.memory(limit)
        if part.name in SANITIZERS:
            return self.sanitizer(part.name, limit)
        if part.name in TRAININGS:
            return self.train(part.name, limit)
        return self.benchmark(part.name, limit)

    def tests(self, limit: float) -> dict[str, Any]:
        """Every test that needs a GPU; their names begin with test_gpu, or their parameter is called on_gpu."""
        if missing(["pytest"]):
            return {"status": "skipped", "detail": "pytest is not installed"}
        files = [
            path
            for path in sorted((ROOT / "tests").glob("test_*.py"))
            if re.search(r"def test_gpu|on_gpu|ON_GPU", path.read_text())
        ]
        report = self.output / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-k", "test_gpu or on_gpu", "-c", ROOT / "pyproject.toml"]
        command += [
            "-o",
            f"cache_dir={self.site}/cache",
            "-W",
            "ignore::lion8bit.SlowBackendWarning",
            f"--junit-xml={report}",
            "--rootdir",
            ROOT,
            *files,
        ]
        if not missing(["xdist"]):
            command += ["-n", str(min(6, os.cpu_count() or 1))]
        if not missing(["pytest_timeout"]):
            command += ["--timeout", "120"]  # or a kernel that hangs would hide all that was found before
        finished = self.call(command, limit)
        counts = count_tests(report) if report.exists() else {}
        good = finished.status == 0 and counts.get("passed", 0) > 0
        detail = ", ".join(f"{count} {name}" for name, count in counts.items()) or last_line(finished.output)
        return {"status": status_of(finished, good), "detail": detail, "tests": counts}

    def start(self, limit: float) -> dict[str, Any]:
        """The first step of a first and of a second process, whose kernels are cached."""
        records = []
        for _ in range(2):
            command = [sys.executable, HERE / "gpu_first.py", "--device", self.settings.device]
            finished = self.call(command, limit / 2, LION8BIT_CACHE_DIR=str(self.site / "start"))
            if finished.status != 0:
                return {"status": status_of(finished, False), "detail": last_line(finished.output)}
            records.append(json.loads(last_line(finished.output)))
        cold, cached = (record["first_step"] for record in records)
        return {
            "status": "passed",
            "detail": f"first step {cold:.2f} s, cached {cached:.2f} s",
            "start": {"first_process": records[0], "second_process": records[1]},
        }

    def sanitizer(self, tool: str, limit: float) -> dict[str, Any]:
        """One of compute-sanitizer's tools on a few steps of every kind."""
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if program is None or self.settings.device == "cpu":
            return {"status": "skipped", "detail": "needs a GPU and compute-sanitizer of the CUDA toolkit"}
        # Without torch's caching allocator every tensor has bounds of its own. Errors that torch itself asks the driver
        # for, to see what it can do, are none of ours.
        command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        command += ["--target-processes", "all", sys.executable]
        finished = self.call([*command, HERE / "gpu_first.py", "--every"], limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", finished.output)
        good = finished.status == 0 and "stepped every kind" in finished.output and bool(found)
        return {"status": status_of(finished, good), "detail": found[-1] if found else last_line(finished.output)}

    def train(self, name: str, limit: float) -> dict[str, Any]:
        """Fine-tunes all weights of a large model; that a peer runs out of memory is a result."""
        if absent := missing(["rich"]):
            return {"status": "skipped", "detail": f"{absent[0]} is not installed"}
        end, told, worst = time.monotonic() + limit, [], "passed"
        chosen = self.settings.contender
        for training in TRAININGS[name]:
            if chosen and training.optimizer not in chosen:
                continue
            place = self.site / f"training-{len(self.trainings)}.json"
            arguments = training.arguments(self.settings.quick, self.settings.device, place)
            command = [sys.executable, ROOT / "examples" / "full_finetune.py", *arguments]
            left = end - time.monotonic()
            finished = self.call(command, left) if left > 10 else Finished(124, "no time was left")
            record = json.loads(place.read_text()) if place.exists() else {}
            outcome = outcome_of(training, finished, record)
            self.trainings.append({**vars(training), **record, "shape": training.shape, "outcome": outcome})
            told.append(f"{training.shape} {training.optimizer}: {outcome}")
            if training.optimizer == OURS and not outcome.startswith("done"):
                worst = status_of(finished, False)
        return {"status": worst, "detail": "; ".join(told)}

    def benchmark(self, model: str, limit: float) -> dict[str, Any]:
        """All contenders on one model; rows that were measured before a failure are kept."""
        if absent := missing(["rich"]):
            return {"status": "skipped", "detail": f"{absent[0]} is not installed"}
        options = ["--model", model, "--device", self.settings.device, "--rows", self.rows]
        options += ["--quick", "--repeats", "3"] if self.settings.quick else []
        options += ["--contender", *self.settings.contender] if self.settings.contender else []
        finished = self.call([sys.executable, HERE / "gpu_step.py", *options], limit)
        mine = [row for row in read_rows(self.rows) if row["model"] == model]
        measured = [row for row in mine if row["status"] == "measured"]
        # One dtype may be too large for the memory, which is no fault; any other failure of ours is.
        bad = [row for row in mine if row["contender"].startswith(OURS) and not excused(row)]
        good = finished.status == 0 and bool(measured) and not bad
        detail = f"{len(measured)} of {len(mine)} rows measured" if mine else last_line(finished.output)
        return {"status": status_of(finished, good), "detail": detail}

    def memory(self, limit: float) -> dict[str, Any]:
        """What training takes in memory with each optimizer, with the allocator's snapshots beside the results."""
        if absent := missing(["rich"]):
            return {"status": "skipped", "detail": f"{absent[0]} is not installed"}
        file = self.output / "memory.json"
        file.unlink(missing_ok=True)
        options = ["--device", self.settings.device, "--json", file, "--snapshot", self.output, "--skip", "torchao"]
        options += [] if missing(["matplotlib"]) else ["--plot", self.output / "memory.png"]
        options += ["--quick"] if self.settings.quick else []
        finished = self.call([sys.executable, HERE / "memory.py", *options], limit)
        cases = json.loads(file.read_text())["cases"] if file.exists() else {}
        rows = [(key, row) for case in cases.values() for key, row in case["rows"].items()]
        measured = [row for _, row in rows if row["status"] == "measured"]
        bad = [key for key, row in rows if key.startswith(OURS) and row["status"] == "failed"]
        good = finished.status == 0 and bool(measured) and not bad
        detail = f"{len(measured)} of {len(rows)} rows measured" if rows else last_line(finished.output)
        return {"status": status_of(finished, good), "detail": detail, "memory": cases}


def outcome_of(training: Training, finished: Finished, record: dict[str, Any]) -> str:
    """How a training ended, in words that begin with "done" where it took all its steps."""
    if finished.status == OUT_OF_MEMORY and record.get("out_of_memory"):
        return f"out of memory: {record['out_of_memory']['where']}"
    if finished.status != 0 or len(record.get("losses", [])) != training.steps:
        return "timed out" if finished.status == 124 else f"failed: {last_line(finished.output)}"
    return f"done, loss {record['losses'][0]:.2f} to {record['losses'][-1]:.2f}"


def excused(row: dict[str, Any]) -> bool:
    """Whether a row is measured, or only the memory was too small for it."""
    return row["status"] == "measured" or row["reason"].startswith(("needs", "OutOfMemoryError"))


def status_of(finished: Finished, good: bool) -> str:
    """The word for how a part ended."""
    return "passed" if good else "timed out" if finished.status == 124 else "failed"


def count_tests(report: Path) -> dict[str, int]:
    """How many tests of a JUnit report passed, failed or were skipped."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The measurements that the processes have appended so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- The report ------------------------------------------------------------------------------------------------------


def find(rows: Sequence[dict[str, Any]], model: str, dtype: str, contender: str) -> dict[str, Any] | None:
    """One measurement, if it was made."""
    wanted = (model, dtype, contender, "measured")
    return next((r for r in rows if (r["model"], r["dtype"], r["contender"], r["status"]) == wanted), None)


def judge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals, each with ``goal``, ``requirement``, ``measured`` and ``met``; None where it was not measured."""
    rows, goals = record["rows"], []

    def add(goal: str, requirement: str, value: float | None, bound: float, form: str, least: bool = False) -> None:
        met = None if value is None else value >= bound if least else value <= bound
        shown = "not measured" if value is None else format(value, form)
        goals.append({"goal": goal, "requirement": requirement, "measured": shown, "met": met})

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
        ("llama", FLASH, 1.0, "1"),
    ):
        ours, theirs = find(rows, model, "bf16", OURS), find(rows, model, "bf16", peer)
        value = ours["wall_ms"]["median"] / theirs["wall_ms"]["median"] if ours and theirs else None
        add(f"{model} bf16: wall time over {peer}'s", f"at most {words}", value, ratio, ".3f")
    start = next((part["start"] for part in record["parts"] if "start" in part), None)
    for process, bound in (("first_process", 2.0), ("second_process", 0.3)):
        value = start and start[process]["first_step"]
        add(f"first step of the {process.replace('_', ' ')}", f"under {bound} s", value, bound, ".2f")
    for training in record["trainings"]:
        if training["optimizer"] != OURS:
            continue
        name = f"{training['shape']} in {training['limit']} GiB{', momentum on the host' if training['paged'] else ''}"
        done = training["outcome"].startswith("done")
        peak, planned = (training["peak_bytes"], training["planned_bytes"]) if done else (None, None)
        losses = training["losses"] if done else []
        bound = training["limit"]
        add(
            f"{name}: reserved at most", f"at most {bound} GiB", peak and training["reserved_bytes"] / GIB, bound, ".2f"
        )
        add(f"{name}: peak over the plan's", "at most 1.03", peak and peak / planned, 1.03, ".3f")
        add(
            f"{name}: last five losses over the first",
            "at most 0.9",
            sum(losses[-5:]) / 5 / losses[0] if losses else None,
            0.9,
            ".3f",
        )
    slower = []
    compared = 0
    for row in rows:
        ours = find(rows, row["model"], row["dtype"], OURS)
        if ours is None or row["status"] != "measured" or row["contender"].startswith(OURS):
            continue
        compared += 1
        for clock in ("gpu_ms", "wall_ms"):
            ratio = ours[clock]["median"] / row[clock]["median"]
            if ratio > 1:
                slower.append(f"{row['model']} {row['dtype']} {row['contender']} {clock[:-3]} {ratio:.2f}x")
    measured = "; ".join(slower) or (f"none of {compared} comparisons" if compared else "not measured")
    goals.append(
        {
            "goal": "slower than a peer",
            "requirement": "nowhere",
            "measured": measured,
            "met": not slower if compared else None,
        }
    )
    return goals


def markdown(record: dict[str, Any]) -> str:
    """The whole record as a page of tables."""
    machine = record["environment"]
    gpu = machine.get("gpu") or {"name": "no GPU"}
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items() if version)
    lines = [f"# {gpu['name']}, {machine.get('date', '')}", ""]
    if record["trial"]:
        lines += ["A trial of the script: none of these figures is a result.", ""]
    lines += [
        f"Driver {machine.get('driver')}, CUDA {gpu.get('cuda')}, Python {machine.get('python')}; {versions}.",
        "",
    ]
    lines += table(
        ["part", "result", "seconds", "detail"],
        [[part["part"], part["status"], part.get("seconds", ""), part["detail"]] for part in record["parts"]],
    )
    words = {True: "met", False: "NOT MET", None: "-"}
    lines += table(
        ["goal", "requirement", "measured", "verdict"],
        [[goal["goal"], goal["requirement"], goal["measured"], words[goal["met"]]] for goal in record["goals"]],
    )
    if record["trainings"]:
        lines += ["## Full fine-tuning in bf16, one sequence of 2048 tokens, gradient release, checkpointing", ""]
        heads = ["model", "limit", "optimizer", "state on", "outcome", "peak GiB", "planned", "state GiB", "tokens/s"]
        lines += table(heads, [training_cells(training) for training in record["trainings"]])
    for model in dict.fromkeys(row["model"] for row in record["rows"]):
        mine = [row for row in record["rows"] if row["model"] == model]
        size = mine[0].get("parameters", 0) / 1e6
        lines += [f"## {mine[0]['name']} ({size:.1f}M parameters, {mine[0].get('tensors', 0)} tensors)", ""]
        lines += [f"Copy bandwidth {mine[0]['copy_gb_per_s']:.0f} GB/s. Medians, caches flushed before each step.", ""]
        heads = ["dtype", "optimizer", "GPU ms", "wall ms", "bytes/param", "GB/s", "of copy", "GPU time over ours"]
        lines += table(heads, [row_cells(row, find(mine, model, row["dtype"], OURS)) for row in mine])
    for case in next((part["memory"] for part in record["parts"] if "memory" in part), {}).values():
        lines += [f"## Memory, {case['title']}", ""]
        heads = ["optimizer", "weights", "gradients", "state", "activations", "peak, GiB", "in", "planned", "reserved"]
        lines += table(heads, [memory_cells(row) for row in case["rows"].values()])
    return "\n".join(lines)


def training_cells(training: dict[str, Any]) -> list[str]:
    """The cells of one training."""

    def gib(name: str) -> str:
        return f"{training[name] / GIB:.2f}" if training.get(name) is not None else "-"

    speed = training.get("tokens_per_second")
    return [
        training["shape"],
        f"{training['limit']} GiB",
        training["optimizer"],
        "host" if training["paged"] else "GPU",
        training["outcome"],
        gib("peak_bytes"),
        gib("planned_bytes"),
        gib("state_bytes"),
        "-" if speed is None else f"{speed:.0f}",
    ]


def memory_cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row of `memory.py`, in GiB."""
    if row["status"] != "measured":
        return [row["label"], f"{row['status']}: {row['phase']}", *[""] * 7]
    sizes = [row.get(name) for name in ("weights", "gradients", "state", "activations", "peak", "planned", "process")]
    cells = ["-" if size is None else f"{size / GIB:.2f}" for size in sizes]
    return [row["label"], *cells[:5], row["peak_in"], *cells[5:]]


def row_cells(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    """The cells of one measurement."""
    if row["status"] != "measured":
        return [row["dtype"], row["label"], row["reason"], "", "", "", "", ""]
    gpu = row["gpu_ms"]["median"]
    return [
        row["dtype"],
        row["label"],
        f"{gpu:.3f}",
        f"{row['wall_ms']['median']:.3f}",
        f"{row['bytes_per_parameter']:.2f}",
        f"{row['gb_per_s']:.0f}",
        f"{row['share_of_copy']:.1%}",
        f"{gpu / ours['gpu_ms']['median']:.2f}x" if ours else "",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table with an empty line after it."""
    cells = [list(heads), ["---"] * len(heads), *rows]
    return [*("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in cells), ""]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per model: wall and GPU time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row["status"] == "measured"]
    models = list(dict.fromkeys(row["model"] for row in measured))
    size = (8, 3.6 * len(models))
    figure, axes = pyplot.subplots(len(models), 1, figsize=size, squeeze=False, layout="constrained")
    for model, axis in zip(models, axes[:, 0]):
        mine = [row for row in measured if row["model"] == model]
        for position, row in enumerate(mine):
            colour = "tab:green" if row["contender"].startswith(OURS) else "tab:gray"
            axis.barh(position, row["wall_ms"]["median"], color=colour, alpha=0.4)
            axis.barh(position, row["gpu_ms"]["median"], color=colour, height=0.4)
            axis.text(row["wall_ms"]["median"], position, f" {row['share_of_copy']:.0%}", va="center", fontsize=7)
        axis.set_yticks(range(len(mine)), [f"{row['dtype']}: {row['label']}" for row in mine], fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(xscale="log", title=mine[0]["name"], xlabel="ms per step: GPU (narrow) and wall; % of copy bandwidth")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def default_output(environment: dict[str, Any]) -> Path:
    """A folder named after the GPU and the day."""
    name = (environment.get("gpu") or {"name": "none"})["name"].lower().replace("nvidia", "").strip()
    day = datetime.date.today().isoformat()
    return HERE / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name)}-{day}"


def write(record: dict[str, Any], output: Path) -> str:
    """Writes the JSON, the page and the picture; returns the page."""
    record["goals"] = judge(record)
    if record["trial"]:
        record["goals"] = [{**goal, "met": None} for goal in record["goals"]]
    page = markdown(record)
    (output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "gpu.md").write_text(page)
    if any(row["status"] == "measured" for row in record["rows"]) and not missing(["matplotlib"]):
        draw(record["rows"], output / "gpu.png")
    return page


# ---- The command line ------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a command line."""
    options = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    options.add_argument("--budget", type=float, default=560.0, help="seconds for everything (default: 560)")
    options.add_argument(
        "--output", type=Path, help="folder of the results (default: benchmarks/results/gpu-NAME-DATE)"
    )
    options.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="folder of peers' wheels (default: .whl)")
    options.add_argument("--part", nargs="+", choices=names, default=names, help="default: all, in this order")
    options.add_argument("--contender", nargs="+", help="keys of the optimizers to time (default: all installed)")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--quick", action="store_true", help="small models, 3 repeats: proves the script only")
    settings = options.parse_args(arguments)
    if settings.budget <= 0:
        options.error(f"--budget must be positive, got {settings.budget}")
    return settings


def main() -> int:
    """Runs the parts; returns 0 where none failed."""
    begin = time.monotonic()
    settings = parse()
    with tempfile.TemporaryDirectory() as site:
        draft = Path(site) / "draft"
        draft.mkdir()
        session = Session(settings, draft, Path(site))
        try:
            said = session.install()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        asked = session.call([sys.executable, HERE / "gpu_step.py", "--environment"], 120)
        try:
            environment = json.loads(asked.output.splitlines()[-1])
        except (ValueError, IndexError):
            print(f"the environment must be readable, got: {last_line(asked.output)}", file=sys.stderr)
            return 1
        if settings.device == "cuda" and not environment["gpu"]:
            print("torch must find an NVIDIA GPU, got none; PYTHON=... names another python", file=sys.stderr)
            return 1
        output = (settings.output or default_output(environment)).resolve()
        output.mkdir(parents=True, exist_ok=True)
        session.output, session.log = output, output / "gpu.log"
        session.log.write_bytes((draft / "gpu.log").read_bytes())
        environment["installed"] = said
        print(*said, sep="\n", flush=True)
        record: dict[str, Any] = {
            "schema": 1,
            "benchmark": "gpu",
            "settings": {name: str(value) for name, value in vars(settings).items()},
            "environment": environment,
            "trial": settings.quick or settings.device == "cpu",
        }

        so_far: list[dict[str, Any]] = []

        def run(part: Part, limit: float) -> dict[str, Any]:
            result = session.run(part, limit)
            print(f"{part.name}: {result['status']}: {result['detail']}", flush=True)
            so_far.append({"part": part.name, **result})
            partial = {**record, "parts": so_far, "rows": read_rows(session.rows), "trainings": session.trainings}
            (output / "gpu.json").write_text(json.dumps(partial, indent=1) + "\n")  # for a run that does not end
            return result

        chosen = [part for part in PARTS if part.name in settings.part]
        left = settings.budget - (time.monotonic() - begin)
        record["parts"] = run_parts(chosen, left, run)
        record["rows"] = read_rows(session.rows)
        record["trainings"] = session.trainings
        print(write(record, output))
    failed = [part["part"] for part in record["parts"] if part["status"] in ("failed", "timed out")]
    for part in record["parts"]:
        if part["status"] in ("dropped", "skipped"):
            print(f"not run: {part['part']} ({part['detail']})")
    print(f"results in {output}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
