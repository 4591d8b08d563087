"""Owns a visit to a GPU: the steps of its three stages, their processes, and the files that each leaves as it goes.

It imports nothing beside the standard library and `gpu_report.py`; every step is a process of its own, so that a fault
in one hides no other.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_report import default_output, markdown, write_report

DESCRIPTION = """\
What this machine's GPU says of lion8bit, in three stages that stand alone:

  check   is it right? Installation, doctor, first steps, every test that needs a GPU, some tunings of the kernel
  speed   is it fast? Steps on the parameter lists of public models beside the peers, then full fine-tuning of 7B and 8B
          models in 24 GiB and of a 3B model in 12 GiB
  deep    is anything hidden? compute-sanitizer's memcheck and racecheck over every kind of kernel, ncu on two kernels
  all     the three in turn

Needs no network. STAGE.json and STAGE.log, gpu.md and gpu.png are written into one folder after every step, so a run
that is ended at any moment leaves all that was finished. A step that fails or hangs is interrupted at its limit and
hides no other. Steps for which the time does not suffice are left out and listed.
"""

EPILOG = """\
This python needs torch for CUDA, pytest and rich; pytest-xdist and pytest-timeout (tests in parallel) and matplotlib
(the picture) are used where they are. lion8bit is built from this checkout into build/gpu, unless this python has it
installed from here. Peers (bitsandbytes, flashoptim) take part where they are installed, or lie in the folder of
--wheels. The GPU's settings are left as they are, and no step uses managed memory.

exit code: 0 where no step failed, 1 otherwise, 130 where it was interrupted.

examples:
  make gpu-check PYTHON=python3.12
  make gpu-speed BUDGET=200 OUT=results
  python benchmarks/gpu.py check
  python benchmarks/gpu.py speed --budget 170 --step 7B 8B
  python benchmarks/gpu.py deep --output results
  python benchmarks/gpu.py all --device cpu --quick               proves the stages without a GPU
"""

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUDGETS = {"check": 250.0, "speed": 310.0, "deep": 150.0}  # seconds
GRACE = 8  # seconds from SIGINT, in which pytest reports what it has, to SIGKILL
LOG_BYTES = 1 << 20  # of one step that are kept, half of them from its begin
CONTENDERS = ("lion8bit", "lion8bit-stochastic", "lion8bit-compensated", "bitsandbytes", "flashlion", "adamw")
FEW_VARIANTS = (
    "registers ahead",
    "cache ahead",
    "no_allocate, cs",
    "resident 3",
    "resident 5",
    "passes 4",
    "passes 16",
)
TRAININGS = {  # step: what `examples/full_finetune.py` is asked for; sequences have 2048 tokens
    "7B": ["--shape", "llama-7b", "--memory-limit", "24"],
    "8B": ["--shape", "llama3-8b", "--memory-limit", "24", "--paged"],
    "3B": ["--shape", "llama-3b", "--memory-limit", "12", "--paged"],
    "7B bitsandbytes": ["--shape", "llama-7b", "--memory-limit", "24", "--optimizer", "bitsandbytes", "--steps", "5"],
    "7B flashlion": ["--shape", "llama-7b", "--memory-limit", "24", "--optimizer", "flashlion", "--steps", "5"],
    "3B flashlion": ["--shape", "llama-3b", "--memory-limit", "12", "--optimizer", "flashlion", "--steps", "5"],
}
OUT_OF_MEMORY = 3  # exit code of the example: a result of a peer


@dataclass(frozen=True)
class Step:
    """One process of a stage."""

    name: str
    command: Sequence[str | Path]
    limit: float  # seconds
    least: float = 5.0  # seconds that must be left for it to begin
    tail: int = 4  # lines of its output that are printed
    recorded: bool = False  # it takes --json FILE
    optional: bool = False  # runs where it is asked for by name
    only_after: str = ""  # runs where that step failed
    allowed: Sequence[int] = (0,)  # exit codes
    environment: dict[str, str] = field(default_factory=dict)


def tool(name: str) -> str | None:
    """The path of one of NVIDIA's programs."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def stage_steps(stage: str, device: str, quick: bool, scratch: Path) -> Iterator[Step]:
    """The steps of a stage in the order of their worth."""
    python, on_gpu = [sys.executable], device == "cuda"
    first = [*python, HERE / "gpu_first.py", "--device", device]
    tune = [*python, HERE / "gpu_tune.py", *([] if on_gpu else ["--dry"]), *(["--quick"] if quick else [])]
    yield Step("machine", [*python, HERE / "gpu_step.py", "--environment"], 90, recorded=True)
    if stage == "check":
        yield Step("doctor", [*python, "-m", "lion8bit", "doctor"], 90, tail=16)
        blocking = {"CUDA_LAUNCH_BLOCKING": "1"}
        yield Step("first, blocking", first, 60, tail=12, only_after="doctor", environment=blocking)
        yield Step("first, memcheck", [*sanitizer("memcheck"), *first], 90, tail=25, only_after="doctor",
                   environment=blocking | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # fmt: skip
        fresh = {"LION8BIT_CACHE_DIR": str(scratch / "fresh")}
        yield Step("first process", first, 60, tail=1, recorded=True, environment=fresh)
        yield Step("second process", first, 60, tail=1, recorded=True, environment=fresh)
        yield Step("tests", [*python, HERE / "gpu_tests.py", *([] if on_gpu else ["--also", "parameter_limits"])], 130,
                   least=20, tail=40, recorded=True)  # fmt: skip
        some = ["--case", "nearest", "fp32", "stochastic", "--seconds", "60", "--variant", *FEW_VARIANTS]
        yield Step("variants", [*tune, *some], 90, least=20, tail=60, recorded=True)
    elif stage == "speed":
        lists = [*python, HERE / "gpu_step.py", "--device", device, *(["--quick"] if quick else []), "--model"]
        for model, limit in (("gpt2", 70), ("1B", 60), ("llama", 70), ("lora", 45), ("vit", 45), ("sdxl", 70)):
            command = [*lists, model, "--contender", *CONTENDERS]
            yield Step(model, command, limit, least=15, recorded=True, optional=model in ("vit", "sdxl"))
        for name, arguments in TRAININGS.items():
            size = arguments
            if quick or not on_gpu:  # tiny, and without the limit
                size = ["--shape", "tiny", "--sequence", "64", "--lr", "1e-3", *arguments[4:]]
            command = [*python, ROOT / "examples" / "full_finetune.py", *size, "--device", device]
            allowed = (0, OUT_OF_MEMORY) if name not in ("7B", "8B", "3B") else (0,)
            yield Step(name, command, 110, 35, 12, recorded=True, optional=len(allowed) > 1, allowed=allowed)
    else:
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has bounds of its own
        for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
            command = [*(sanitizer(name) if on_gpu else []), *first, "--every"]
            yield Step(
                name, command, 60, least=20, tail=6, environment=alone, optional=name in ("synccheck", "initcheck")
            )
        sections = [
            "SpeedOfLight",
            "MemoryWorkloadAnalysis",
            "SchedulerStats",
            "WarpStateStats",
            "LaunchStats",
            "Occupancy",
        ]
        profiler = [
            tool("ncu") or "ncu",
            "--clock-control",
            "none",
            "-k",
            "regex:lion8bit_update",
            "-s",
            "10",
            "-c",
            "1",
        ]
        for section in sections:
            profiler += ["--section", section]
        for case in ("nearest", "stochastic"):
            command = [*tune, "--case", case, "--variant", "base", "--log2", "27", "--rounds", "1"]
            yield Step(f"ncu {case}", [*(profiler if on_gpu else []), *command], 45, least=15, tail=70)


def sanitizer(name: str) -> list[str]:
    """The command of one of compute-sanitizer's tools.

    Errors that torch itself asks the driver for, to see what it can do, are none of ours.
    """
    program = tool("compute-sanitizer") or "compute-sanitizer"
    options = ["--error-exitcode", "9", "--report-api-errors", "no", "--target-processes", "all", "--print-limit", "3"]
    return [program, "--tool", name, *options]


# ---- A visit ---------------------------------------------------------------------------------------------------------


class Visit:
    """One stage: runs steps within a budget and keeps what they say in a folder."""

    def __init__(self, stage: str, output: Path, scratch: Path, budget: float, record: dict[str, Any]) -> None:
        self.stage, self.output, self.scratch = stage, output, scratch
        self.end = time.monotonic() + budget
        self.begin = time.monotonic()
        self.log = output / f"{stage}.log"
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.steps: list[dict[str, Any]] = []
        self.record = {"schema": 2, "benchmark": "gpu", "stage": stage, "budget": budget, **record, "steps": self.steps}
        output.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self.save()

    def save(self) -> None:
        """Writes the JSON, whole or not at all."""
        draft = self.output / f".{self.stage}.json"
        draft.write_text(json.dumps(self.record, indent=1) + "\n")
        draft.replace(self.output / f"{self.stage}.json")

    def run(self, steps: Sequence[Step]) -> None:
        """Runs steps in turn; one for which too little time is left, or whose program is missing, is passed over."""
        for step in steps:
            if step.only_after and not any(
                s["step"] == step.only_after and s["status"] != "passed" for s in self.steps
            ):
                continue
            left = self.end - time.monotonic()
            if left < step.least:
                self.note(step, "dropped", f"needs {step.least:.0f} s, {max(0.0, left):.0f} s were left")
            elif shutil.which(step.command[0]) is None:
                self.note(step, "skipped", f"{step.command[0]} is not installed")
            else:
                self.run_one(step, min(step.limit, left))

    def note(self, step: Step, status: str, detail: str) -> None:
        """Records a step that does not run."""
        self.steps.append({"step": step.name, "status": status, "detail": detail})
        print(f"## {step.name}: {status}, {detail}", flush=True)
        self.save()

    def run_one(self, step: Step, limit: float) -> bool:
        """Runs a step; whether it passed. Its output goes to the log, its record into the JSON while it runs."""
        place = self.scratch / f"{step.name.replace(' ', '-').replace(',', '')}.json"
        place.unlink(missing_ok=True)
        command = [*map(str, step.command), *(["--json", str(place)] if step.recorded else [])]
        shown = (
            " ".join(command).replace(sys.executable, "python").replace(f"{ROOT}/", "").replace(str(self.scratch), ".")
        )
        entry: dict[str, Any] = {"step": step.name, "status": "running", "command": shown}
        self.steps.append(entry)
        begin, seen = time.monotonic(), 0
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n=== {step.name}: {entry['command']}\n")
        offset = self.log.stat().st_size

        def look(status: str) -> None:
            nonlocal seen
            with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is half written
                if place.stat().st_mtime_ns != seen:
                    entry["result"] = json.loads(place.read_text())
                    seen = place.stat().st_mtime_ns
            entry.update(status=status, seconds=round(time.monotonic() - begin, 1))
            self.save()

        interrupted = False
        with self.log.open("a", encoding="utf-8") as log:
            # `timeout` ends the step with all that it started, also where this process is killed.
            wrapped = ["timeout", "-s", "INT", "-k", str(GRACE), f"{limit:.0f}", *command]
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": self.scratch}
            process = subprocess.Popen(wrapped, env=self.environment | step.environment, **options)
            while process.poll() is None:
                try:
                    look("running")
                    process.wait(1)
                except subprocess.TimeoutExpired:
                    continue
                except KeyboardInterrupt:
                    interrupted = True
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE + 2)
                    process.kill()
        code = process.wait()
        status = "passed" if code in step.allowed else "timed out" if code in (124, 137) else "failed"
        shorten(self.log, offset)
        lines = self.log.read_bytes()[offset:].decode(errors="replace").rstrip().splitlines()
        entry["detail"] = next(
            (line.strip()[:200] for line in reversed(lines) if re.search(r"\w\w", line)), "no output"
        )
        look("interrupted" if interrupted else status)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n=== {step.name}: {entry['status']}, exit code {code}, {entry['seconds']} s\n")
        print(f"## {step.name}: {entry['status']}, {entry['seconds']} s (at {time.monotonic() - self.begin:.0f} s)")
        print(*(line[:220] for line in lines[-step.tail :]), sep="\n", flush=True)
        write_report(self.output)
        if interrupted:
            raise KeyboardInterrupt
        return entry["status"] == "passed"


def shorten(log: Path, offset: int) -> None:
    """Cuts the middle out of what a step wrote beyond `offset`, where that is too much."""
    with log.open("r+b") as file:
        file.seek(offset)
        if log.stat().st_size - offset > LOG_BYTES:
            text = file.read()
            file.seek(offset)
            file.truncate()
            file.write(text[: LOG_BYTES // 2] + b"\n[...]\n" + text[-LOG_BYTES // 2 :])


# ---- Installation ----------------------------------------------------------------------------------------------------


def installed_here() -> bool:
    """Whether this python imports lion8bit from this checkout."""
    found = importlib.util.find_spec("lion8bit")
    return found is not None and found.origin is not None and Path(found.origin).resolve().is_relative_to(ROOT)


def install(visit: Visit, wheels: Path) -> None:
    """Puts lion8bit and the peers' wheels where the steps find them; done once for the same sources and wheels."""
    sources = [ROOT / "pyproject.toml", *sorted((ROOT / "lion8bit").rglob("*.py")), *sorted((ROOT / "csrc").iterdir())]
    extra = sorted(wheels.resolve().glob("*.whl"))
    digest = hashlib.sha256("".join(f"{path.name}{path.stat().st_size}" for path in extra).encode())
    for path in sources:
        digest.update(path.read_bytes())
    site = ROOT / "build" / "gpu" / digest.hexdigest()[:16]
    visit.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    visit.environment.setdefault("LION8BIT_CACHE_DIR", str(site / "kernels"))
    if (site / "complete").exists():
        return
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", site]
    built = installed_here() or visit.run_one(Step("build", [*pip, "--no-build-isolation", ROOT], 150), 150)
    if not built:
        print("NO CPU KERNEL: the build failed; the checkout is used as it is", flush=True)
        shutil.copytree(ROOT / "lion8bit", site / "lion8bit", dirs_exist_ok=True)
        shutil.copytree(ROOT / "csrc", site / "lion8bit" / "csrc", dirs_exist_ok=True)
    for wheel in extra:
        built &= visit.run_one(Step(wheel.name, [*pip, wheel], 60), 60)
    if built:
        site.mkdir(parents=True, exist_ok=True)
        (site / "complete").touch()


# ---- The command line ------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a command line."""
    options = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("stage", choices=[*BUDGETS, "all"])
    budgets = ", ".join(f"{stage} {budget:.0f}" for stage, budget in BUDGETS.items())
    options.add_argument("--budget", type=float, help=f"seconds for all of it (default: {budgets}, and their sum)")
    options.add_argument("--output", type=Path, help="folder (default: benchmarks/results/gpu-NAME-DATE)")
    options.add_argument("--step", nargs="+", metavar="NAME", help="only these, in the stage's order")
    options.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="folder of peers' wheels (default: .whl)")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--quick", action="store_true", help="small models, few repeats: proves the stages only")
    settings = options.parse_args(arguments)
    if settings.budget is not None and settings.budget <= 0:
        options.error(f"--budget must be positive, got {settings.budget}")
    stages = list(BUDGETS) if settings.stage == "all" else [settings.stage]
    known = [step.name for stage in stages for step in stage_steps(stage, settings.device, settings.quick, Path())]
    if unknown := set(settings.step or ()) - set(known):
        options.error(f"--step must be among {'; '.join(known)}, got {'; '.join(unknown)}")
    settings.stages = stages
    return settings


def chosen(steps: Sequence[Step], names: Sequence[str] | None) -> list[Step]:
    """The steps that are asked for, or all that are not optional; the machine is always looked at."""
    return [step for step in steps if step.name == "machine" or (step.name in names if names else not step.optional)]


def interrupt(signum: int, frame: FrameType | None) -> None:
    """A SIGTERM is taken as a SIGINT."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the stages; returns 0 where no step failed."""
    settings = parse()
    if shutil.which("timeout") is None:
        print("the program timeout must be there, got none; install GNU coreutils", file=sys.stderr)
        return 1
    # A shell that starts this in the background has both ignored, and the steps would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, interrupt)
    output = (settings.output or default_output()).resolve()
    left = settings.budget or sum(BUDGETS[stage] for stage in settings.stages)
    failed: list[str] = []
    trial = settings.quick or settings.device == "cpu"
    for stage in settings.stages:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            visit = Visit(
                stage,
                output,
                Path(folder),
                min(left, BUDGETS[stage]) if settings.stage == "all" else left,
                {"device": settings.device, "trial": trial},
            )
            try:
                install(visit, settings.wheels)
                visit.run(
                    chosen(list(stage_steps(stage, settings.device, settings.quick, Path(folder))), settings.step)
                )
            except KeyboardInterrupt:
                print(f"interrupted; results in {output}")
                return 130
            finally:
                print(markdown({stage: write_report(output)[stage]}), flush=True)
        failed += [step["step"] for step in visit.steps if step["status"] in ("failed", "timed out")]
        left -= time.monotonic() - begin
    print(f"results in {output}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
