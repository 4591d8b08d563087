"""Owns a visit to a GPU: the steps of its three stages, their processes, and the files that each leaves as it goes.

It imports only the standard library, `gpu_report.py` and `machine.py`. Every step is a separate process, so that a
fault in one does not disturb the others.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from machine import program, write_whole

DESCRIPTION = """\
What this machine's GPU says of lion8bit, in three stages that stand alone:

  check   is it right? Installation, doctor, first steps, every test that needs a GPU, some tunings of the kernel
  speed   is it fast? Steps on the parameter lists of public models beside the peers, then full fine-tuning of 7B and 8B
          models in 24 GiB and of a 3B model in 12 GiB
  deep    what do NVIDIA's tools find? memcheck and racecheck over every kind of kernel, ncu on two kernels
  all     the three in turn

Needs no network. STAGE.json and STAGE.log, gpu.md and gpu.png are written into one folder after every step, so a run
that is ended at any moment leaves all that was finished. A step that hangs is interrupted at its limit; the others run
all the same, also after one that fails. Steps for which too little time is left are listed and do not run.
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
LOG_BYTES = 1 << 20  # of one step's output; of more a quarter from its begin and a quarter from its end are kept
CONTENDERS = ("lion8bit", "lion8bit-stochastic", "lion8bit-compensated", "bitsandbytes", "flashlion", "adamw")
FEW_TUNINGS = (
    "passes 1",
    "passes 2",
    "passes 4",
    "passes 16",
    "8 elements, resident 4, nothing ahead",
    "16 elements, resident 3, nothing ahead",
    "8 elements, resident 4, registers ahead",
)
TRAININGS = {  # of `examples/full_finetune.py`: shape, GiB of the GPU, and further options; sequences have 2048 tokens
    "7B": ("llama-7b", 24, ""),
    "8B": ("llama3-8b", 24, "--paged"),
    "3B": ("llama-3b", 12, "--paged"),
    "7B bitsandbytes": ("llama-7b", 24, "--optimizer bitsandbytes --steps 5"),
    "7B adamw": ("llama-7b", 24, "--optimizer adamw --steps 5"),
    "7B flashlion": ("llama-7b", 24, "--optimizer flashlion --steps 5"),
    "3B flashlion": ("llama-3b", 12, "--optimizer flashlion --steps 5"),
}
PROFILE = "--clock-control none -k regex:lion8bit_update -s 10 -c 1" + "".join(  # the first launch on a large tensor
    f" --section {name}"
    for name in (
        "SpeedOfLight",
        "MemoryWorkloadAnalysis",
        "SchedulerStats",
        "WarpStateStats",
        "LaunchStats",
        "Occupancy",
    )
)
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # for sanitizers: every tensor has bounds of its own
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
    required: bool = False  # where it fails, nothing else runs
    optional: bool = False  # runs where it is asked for by name
    only_after: str = ""  # runs where that step failed
    allowed: Sequence[int] = (0,)  # exit codes
    says: str = ""  # what its output must contain, as a regular expression
    environment: dict[str, str] = field(default_factory=dict)


def sanitizer(name: str) -> list[str]:
    """The command of one of compute-sanitizer's tools; calls of torch that fail on purpose are not reported."""
    path = program("compute-sanitizer") or "compute-sanitizer"
    options = "--error-exitcode 9 --report-api-errors no --target-processes all --print-limit 3"
    return [path, "--tool", name, *options.split()]


@dataclass(frozen=True)
class Plan:
    """What the steps of the stages are made of."""

    device: str
    quick: bool
    scratch: Path

    def script(self, name: str, *arguments: str) -> list[str | Path]:
        """The command of one of the benchmarks."""
        return [sys.executable, HERE / f"{name}.py", *arguments]

    def steps(self, stage: str) -> list[Step]:
        """The steps of a stage in the order of their worth."""
        command = self.script("gpu_step", "--environment", "--device", self.device)
        machine = Step("machine", command, 90, recorded=True, required=True)
        return [machine, *{"check": self.check, "speed": self.speed, "deep": self.deep}[stage]()]

    def first(self, *arguments: str) -> list[str | Path]:
        """First steps in a fresh process."""
        return self.script("gpu_first", "--device", self.device, *arguments)

    def tune(self, *arguments: str) -> list[str | Path]:
        """Tunings of the kernel, compiled only where there is no GPU."""
        without = ["--dry"] if self.device == "cpu" else []
        return self.script("gpu_tune", *without, *(["--quick"] if self.quick else []), *arguments)

    def check(self) -> Iterator[Step]:
        """Is it right?"""
        yield Step("doctor", [sys.executable, "-m", "lion8bit", "doctor"], 90, tail=16)
        slow = {"CUDA_LAUNCH_BLOCKING": "1"}
        yield Step("first, blocking", self.first(), 60, tail=12, only_after="doctor", environment=slow)
        watched = [*sanitizer("memcheck"), *self.first()]
        yield Step("first, memcheck", watched, 90, tail=25, only_after="doctor", environment={**slow, **UNCACHED})
        fresh = {"LION8BIT_CACHE_DIR": str(self.scratch / "fresh")}
        for process in ("first process", "second process"):
            yield Step(process, self.first(), 60, tail=1, recorded=True, environment=fresh)
        instead = ["--instead", "parameter_limits"] if self.device == "cpu" else []
        yield Step("tests", self.script("gpu_tests", *instead), 130, least=20, tail=40, recorded=True)
        cases = ["--case", "nearest", "fp32", "stochastic", "--seconds", "60"]
        some = self.tune(*cases, "--variant", *FEW_TUNINGS)
        yield Step("variants", some, 90, least=20, tail=60, recorded=True)

    def speed(self) -> Iterator[Step]:
        """Is it fast?"""
        quick = ["--quick"] if self.quick else []
        for model, limit in {"gpt2": 70, "1B": 60, "llama": 70, "lora": 45, "vit": 45, "sdxl": 70}.items():
            command = self.script("gpu_step", "--device", self.device, *quick, "--model", model)
            command += ["--contender", *CONTENDERS]
            yield Step(model, command, limit, least=15, recorded=True, optional=model in ("vit", "sdxl"))
        for name, (shape, limit, more) in TRAININGS.items():
            size = f"--shape {shape} --memory-limit {limit}"
            if self.quick or self.device == "cpu":
                size = "--shape tiny --sequence 64 --lr 1e-3"
            command = [sys.executable, ROOT / "examples" / "full_finetune.py", *size.split(), *more.split()]
            peer = "--optimizer" in more
            yield Step(name, [*command, "--device", self.device], 110, least=35, tail=12, recorded=True, optional=peer,
                       allowed=(0, OUT_OF_MEMORY) if peer else (0,))  # fmt: skip

        memory = self.script("memory", "--device", self.device, "--skip", "torchao", *quick)
        yield Step("memory", memory, 150, least=60, tail=60, recorded=True, optional=True)

    def deep(self) -> Iterator[Step]:
        """What do NVIDIA's tools find?"""
        watched = self.device == "cuda"
        for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
            command = [*(sanitizer(name) if watched else []), *self.first("--every")]
            optional = name in ("synccheck", "initcheck")
            says = "(ERROR|RACECHECK) SUMMARY: 0 " if watched else "stepped every kind"
            yield Step(name, command, 75, least=20, tail=6, environment=UNCACHED, optional=optional, says=says)
        profiler = [program("ncu") or "ncu", *PROFILE.split()]
        for case in ("nearest", "stochastic"):
            command = self.tune("--case", case, "--variant", "base", "--log2", "27", "--rounds", "1")
            says = "Memory Throughput" if watched else ""  # ncu also succeeds where it has profiled nothing
            yield Step(f"ncu {case}", [*(profiler if watched else []), *command], 45, least=15, tail=70, says=says)


# ---- A visit ---------------------------------------------------------------------------------------------------------


class Visit:
    """One stage: runs steps within a budget and keeps what they say in a folder."""

    stopped = False  # by a signal: the present step is interrupted, and no other begins

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
        """Writes the JSON."""
        write_whole(self.output / f"{self.stage}.json", json.dumps(self.record, indent=1) + "\n")

    def run(self, steps: Sequence[Step]) -> bool:
        """Runs steps in turn until it is stopped; whether all have passed."""
        all_passed = True
        for step in steps:
            passed = not self.stopped and self.run_one(step)
            if self.stopped or (step.required and not passed):
                return False
            all_passed &= passed
        return all_passed

    def run_one(self, step: Step) -> bool:
        """Runs a step if it can; whether it passed, or had no reason to run."""
        if step.only_after and not any(e["step"] == step.only_after and e["status"] != "passed" for e in self.steps):
            return True
        left = self.end - time.monotonic()
        if left < step.least:
            return self.pass_over(step, "dropped", f"needs {step.least:.0f} s, {max(0.0, left):.0f} s were left")
        if shutil.which(step.command[0]) is None:
            return self.pass_over(step, "skipped", f"{step.command[0]} is not installed")
        return self.execute(step, min(step.limit, left))

    def pass_over(self, step: Step, status: str, detail: str) -> bool:
        """Records a step that does not run."""
        self.steps.append({"step": step.name, "status": status, "detail": detail})
        print(f"## {step.name}: {status}, {detail}", flush=True)
        self.save()
        return False

    def execute(self, step: Step, limit: float) -> bool:
        """Runs a step; whether it passed. Its output goes to the log, its record into the JSON while it runs."""
        place = self.scratch / f"{re.sub(r'[^a-zA-Z0-9]+', '-', step.name)}.json"
        command = [*map(str, step.command), *(["--json", str(place)] if step.recorded else [])]
        shown = " ".join(command)
        for path, word in ((sys.executable, "python"), (f"{ROOT}/", ""), (str(self.scratch), ".")):
            shown = shown.replace(path, word)
        entry: dict[str, Any] = {"step": step.name, "status": "running", "command": shown}
        self.steps.append(entry)
        begin = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            print(f"\n=== {step.name}: {shown}", file=log, flush=True)
            offset = self.log.stat().st_size
            # `timeout` ends the step with all that it started, also where this process is killed.
            wrapped = ["timeout", "-s", "INT", "-k", str(GRACE), f"{limit:.0f}", *command]
            process = subprocess.Popen(
                wrapped,
                env=self.environment | step.environment,
                cwd=self.scratch,  # so that what is installed is found, not the checkout
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            while process.poll() is None:
                self.look(entry, place, begin)
                shorten(self.log, offset)
                if self.stopped:
                    process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE + 2 if self.stopped else 0.5)
        code, late = process.wait(), time.monotonic() - begin >= round(limit)  # `timeout` dies with what it kills
        shorten(self.log, offset)
        text = self.log.read_bytes()[offset:].decode(errors="replace")
        good = code in step.allowed and re.search(step.says, text) is not None
        status = "passed" if good else "timed out" if late else "failed"
        lines = text.rstrip().splitlines()
        words = (line.strip() for line in reversed(lines) if re.search(r"\w\w", line))
        entry |= {"status": "interrupted" if self.stopped else status, "detail": next(words, "no output")[:200]}
        self.look(entry, place, begin)
        with self.log.open("a", encoding="utf-8") as log:
            print(f"\n=== {step.name}: {entry['status']}, exit code {code}, {entry['seconds']} s", file=log)
        print(f"## {step.name}: {entry['status']}, {entry['seconds']} s (at {time.monotonic() - self.begin:.0f} s)")
        print(*(line[:220] for line in lines[-step.tail :]), sep="\n", flush=True)
        self.report(picture=not {"rows", "cases"}.isdisjoint(entry.get("result", ())))
        return status == "passed"

    def report(self, picture: bool) -> str:
        """Writes the page and the picture; returns this stage's page, or why there is none, which ends no visit."""
        try:
            return markdown({self.stage: write_report(self.output, picture)[self.stage]})
        except Exception as error:
            self.record["report"] = f"{type(error).__name__}: {error}"
            self.save()
            return f"THE PAGE COULD NOT BE WRITTEN: {self.record['report']}"

    def look(self, entry: dict[str, Any], place: Path, begin: float) -> None:
        """Takes in what a step has recorded so far."""
        with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is half written
            entry["result"] = json.loads(place.read_text())
        entry["seconds"] = round(time.monotonic() - begin, 1)
        self.save()


def shorten(log: Path, offset: int) -> None:
    """Cuts the middle out of what a step wrote beyond `offset`, where that is too much; the step may go on writing."""
    if log.stat().st_size - offset > LOG_BYTES:
        with log.open("r+b") as file:
            file.seek(offset)
            begin = file.read(LOG_BYTES // 4)
            file.seek(-LOG_BYTES // 4, os.SEEK_END)
            rest = file.read()
            file.truncate(offset)
            file.seek(offset)
            file.write(begin + b"\n[...]\n" + rest)


# ---- Installation ----------------------------------------------------------------------------------------------------


FIND = "import importlib.util as u; found = u.find_spec('lion8bit'); print(found.origin if found else '')"


def is_ours(visit: Visit) -> tuple[bool, str]:
    """Whether the steps import lion8bit from this checkout, and the file that they import."""
    command = [sys.executable, "-c", FIND]
    found = subprocess.run(command, env=visit.environment, cwd=visit.scratch, capture_output=True, text=True).stdout
    return bool(found.strip()) and Path(found.strip()).resolve().is_relative_to(ROOT), found.strip()


def install(visit: Visit, wheels: Path) -> None:
    """Puts lion8bit and the peers' wheels where the steps find them; done once for the same python and sources.

    Raises:
        SystemExit: the steps would import another lion8bit.
    """
    sources = [ROOT / "pyproject.toml", *sorted((ROOT / "lion8bit").rglob("*.py")), *sorted((ROOT / "csrc").iterdir())]
    digest = hashlib.sha256(sys.prefix.encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    kept = ROOT / "build" / "gpu" / digest.hexdigest()[:16]
    ours, peers = kept / "ours", kept / "peers"
    peers.mkdir(parents=True, exist_ok=True)
    visit.environment.setdefault("LION8BIT_CACHE_DIR", str(kept / "kernels"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target"]
    installed, _ = is_ours(visit)
    if not installed and not ours.exists():
        if not visit.run([Step("build", [*pip, kept / "draft", "--no-build-isolation", ROOT], 150)]):
            print("NO CPU KERNEL: the build failed; the checkout is used as it is", flush=True)
            shutil.copytree(ROOT / "lion8bit", kept / "draft" / "lion8bit", dirs_exist_ok=True)
            shutil.copytree(ROOT / "csrc", kept / "draft" / "lion8bit" / "csrc", dirs_exist_ok=True)
        if visit.stopped:
            return
        (kept / "draft").rename(ours)
    for wheel in sorted(wheels.resolve().glob("*.whl")):
        done = peers / f"{wheel.name}.installed"
        if not done.exists() and visit.run([Step(wheel.name, [*pip, peers, wheel], 60)]):
            done.touch()
    paths = [*([] if installed else [str(ours)]), str(peers), os.environ.get("PYTHONPATH", "")]
    visit.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    right, found = is_ours(visit)
    if not right:
        raise SystemExit(f"lion8bit must be imported from {ROOT}, got {found or 'none'}; uninstall the other one")


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
    plan = Plan(settings.device, settings.quick, Path())
    known = [step.name for stage in stages for step in plan.steps(stage)]
    if unknown := set(settings.step or ()) - set(known):
        options.error(f"--step must be among {'; '.join(known)}, got {'; '.join(unknown)}")
    settings.stages = stages
    return settings


def chosen(steps: Sequence[Step], names: Sequence[str] | None) -> list[Step]:
    """The steps that are asked for, or all that are not optional; the machine is always looked at."""
    return [step for step in steps if step.name == "machine" or (step.name in names if names else not step.optional)]


def stop(signum: int, frame: FrameType | None) -> None:
    """What SIGINT and SIGTERM do. A KeyboardInterrupt could get lost where Python ignores exceptions."""
    Visit.stopped = True


def main() -> int:
    """Runs the stages; returns 0 where no step failed."""
    settings = parse()
    if shutil.which("timeout") is None:
        print("the program timeout must be there, got none; install GNU coreutils", file=sys.stderr)
        return 1
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    output = (settings.output or default_output()).resolve()
    left = settings.budget or sum(BUDGETS[stage] for stage in settings.stages)
    failed: list[str] = []
    trial = settings.quick or settings.device == "cpu"
    for stage in settings.stages:
        begin = time.monotonic()
        budget = min(left, BUDGETS[stage]) if len(settings.stages) > 1 else left
        with tempfile.TemporaryDirectory() as folder:
            visit = Visit(stage, output, Path(folder), budget, {"device": settings.device, "trial": trial})
            install(visit, settings.wheels)
            plan = Plan(settings.device, settings.quick, Path(folder))
            visit.run(chosen(plan.steps(stage), settings.step))
            print(visit.report(picture=True), flush=True)
        failed += [step["step"] for step in visit.steps if step["status"] in ("failed", "timed out")]
        failed += ["report"] if "report" in visit.record else []
        left -= time.monotonic() - begin
        if Visit.stopped:
            print(f"interrupted; results in {output}")
            return 130
    print(f"results in {output}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
