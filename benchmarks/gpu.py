"""Measures a GPU in three stages, whose steps are separate processes within a budget, so no fault disturbs another."""

from __future__ import annotations

import argparse
import contextlib
import datetime
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

from gpu_report import markdown, write_report
from machine import asked_of_driver, program, write_whole

DESCRIPTION = """\
Measures lion8bit on this machine's GPU, in stages that stand alone. Needs no network.

  check   is it right? Installation, doctor, first steps, every test that needs a GPU, some tunings of the kernel
  speed   is it fast? Steps on the parameter lists of public models beside the peers, then full fine-tuning of 7B and 8B
          models in 24 GiB, of a 4B model in 16 GiB and of a 3B model in 12 GiB
  deep    what do NVIDIA's tools find? memcheck and racecheck over every kind of kernel, ncu on two kernels
  all     the three in turn
"""
EPILOG = """\
STAGE.json, STAGE.log, gpu.md and gpu.png are written after every step, so an interrupted run keeps what was finished.
This python needs torch for CUDA, pytest and rich; pytest-xdist, pytest-timeout and matplotlib are used where they are
installed. lion8bit is built from this checkout into build/gpu, unless it is installed from here. Peers (bitsandbytes,
flashoptim) are measured where they are installed, or from .whl/.

exit code: 0 where no step failed, 1 otherwise, 130 where it was interrupted.

examples:
  make gpu-check PYTHON=python3.12
  python benchmarks/gpu.py speed --budget 170 --step 7B 8B --output results
  python benchmarks/gpu.py all --device cpu --quick               dry run without a GPU
"""

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WHEELS = ROOT / ".whl"
BUDGETS = {"check": 250.0, "speed": 310.0, "deep": 150.0}  # seconds
GRACE = 8  # seconds from SIGINT, in which pytest reports what it has, to SIGKILL
LOG_BYTES = 1 << 20  # of one step's output; a step that writes more is interrupted
CONTENDERS = (
    "lion8bit", "lion8bit-stochastic", "lion8bit-4bit", "lion8bit-compensated", "bitsandbytes", "flashlion", "adamw",
)  # fmt: skip
FEW_TUNINGS = (*(f"passes {count}" for count in (1, 2, 4, 16)), "8 elements, resident 4, nothing ahead",
               "16 elements, resident 3, nothing ahead", "8 elements, resident 4, registers ahead")  # fmt: skip
LISTS = {"gpt2": 70, "1B": 60, "llama": 70, "lora": 45}  # models of `gpu_step.py`: seconds
# Of `examples/full_finetune.py`: shape, GiB of the GPU, and further options. Sequences have 2048 tokens.
TRAININGS = {
    "7B": ("llama-7b", 24, ""),
    "8B-4bit": ("llama3-8b", 24, "--bits 4 --chunked-loss"),
    "4B-4bit": ("qwen3-4b", 16, "--bits 4 --chunked-loss"),
    "8B": ("llama3-8b", 24, "--paged"),
    "3B": ("llama-3b", 12, "--paged"),
}
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy")
PROFILE = "--clock-control none -k regex:lion8bit_update -s 10 -c 1"  # the first launch on a large tensor
PROFILE += "".join(f" --section {section}" for section in SECTIONS)
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # for sanitizers: every tensor has its own bounds


# ---- The steps of the stages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One process of a stage."""

    name: str
    command: Sequence[str | Path]
    limit: float  # seconds
    least: float = 5.0  # seconds that must be left for it to begin
    tail: int = 4  # lines of its output that are printed
    recorded: bool = False  # it takes --json FILE
    only_after: str = ""  # runs where that step failed
    says: str = ""  # what its output must contain, as a regular expression
    environment: dict[str, str] = field(default_factory=dict)


def script(name: str, *arguments: str) -> list[str | Path]:
    """The command of one of the benchmarks."""
    return [sys.executable, HERE / f"{name}.py", *arguments]


def sanitizer(name: str) -> list[str | Path]:
    """The command of one of compute-sanitizer's tools; calls of torch that fail on purpose are not reported."""
    options = "--error-exitcode 9 --report-api-errors no --target-processes all --print-limit 3"
    return [program("compute-sanitizer") or "compute-sanitizer", "--tool", name, *options.split()]


def gpu_tests(gpu: bool, scratch: Path, folder: Path = ROOT / "tests", limit: int = 100) -> list[str | Path]:
    """pytest on the tests that need a GPU; without one, on those that are skipped and a few that run.

    A fault on a GPU loses the context of its process, so later tests of the same worker fail too. pytest names the
    worker of each failure; the first failure of a worker is the one to read.
    """
    instead = "ON_GPU" if gpu else "parameter_limits"
    text = re.compile(rf"(?m)^def test_gpu|on_gpu|ON_GPU|{instead}")
    files = [path for path in sorted(folder.glob("test_*.py")) if text.search(path.read_text())]
    # Without a GPU, a test with the parameter gpu_or_cpu would run on the CPU.
    names = "test_gpu or on_gpu" if gpu else f"(test_gpu or on_gpu or {instead}) and not gpu_or_cpu"
    options = f"-v --tb short -o addopts=--strict-markers -o cache_dir={scratch}/cache --maxfail 60 --disable-warnings"
    options += " -W ignore::lion8bit.SlowBackendWarning"
    if importlib.util.find_spec("xdist") is not None:
        options += f" -n {min(10, os.cpu_count() or 1)} --dist worksteal"
    if importlib.util.find_spec("pytest_timeout") is not None:  # its thread also ends a worker that waits for a kernel
        options += f" --timeout {limit} --timeout-method thread"
    pytest = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    return [*pytest, *options.split(), "-k", names, *files]


def check(gpu: bool, device: Sequence[str], quick: Sequence[str], scratch: Path) -> Iterator[Step]:
    """Is it right?"""
    first, slow = script("gpu_first", *device), {"CUDA_LAUNCH_BLOCKING": "1"}
    yield Step("doctor", [sys.executable, "-m", "lion8bit", "doctor"], 90, tail=16)
    yield Step("first, blocking", first, 60, tail=12, only_after="doctor", environment=slow)
    watched = [*sanitizer("memcheck"), *first]
    yield Step("first, memcheck", watched, 90, tail=25, only_after="doctor", environment={**slow, **UNCACHED})
    fresh = {"LION8BIT_CACHE_DIR": str(scratch / "fresh")}
    for process in ("first process", "second process"):
        yield Step(process, first, 60, tail=1, recorded=True, environment=fresh)
    yield Step("tests", gpu_tests(gpu, scratch), 130, least=20, tail=40, says=r"[1-9]\d* passed")
    tune = script("gpu_tune", *([] if gpu else ["--dry"]), *quick, "--case", "nearest", "fp32", "stochastic")
    tune += ["--seconds", "60", "--variant", *FEW_TUNINGS]
    yield Step("variants", tune, 90, least=20, tail=60, recorded=True)


def speed(gpu: bool, device: Sequence[str], quick: Sequence[str], scratch: Path) -> Iterator[Step]:
    """Is it fast?"""
    for model, limit in LISTS.items():
        contenders = [name for name in CONTENDERS if gpu or name != "bitsandbytes"]  # which is slow on a CPU
        command = script("gpu_step", *device, *quick, "--model", model, "--contender", *contenders)
        yield Step(model, command, limit, least=15, recorded=True)
    for name, (shape, limit, more) in TRAININGS.items():
        size = f"--shape {shape} --memory-limit {limit}"
        if quick or not gpu:
            size = "--shape tiny --sequence 32 --lr 1e-3 --steps 8"
        command = [sys.executable, ROOT / "examples" / "full_finetune.py", *size.split(), *more.split(), *device]
        yield Step(name, command, 110, least=35, tail=12, recorded=True)


def deep(gpu: bool, device: Sequence[str], quick: Sequence[str], scratch: Path) -> Iterator[Step]:
    """What do NVIDIA's tools find?"""
    for name in ("memcheck", "racecheck"):
        command = [*(sanitizer(name) if gpu else []), *script("gpu_first", *device, "--every")]
        says = "(ERROR|RACECHECK) SUMMARY: 0 " if gpu else "stepped every kind"
        yield Step(name, command, 75, least=20, tail=6, environment=UNCACHED, says=says)
    profiler = [program("ncu") or "ncu", *PROFILE.split()] if gpu else []
    for case in ("nearest", "stochastic"):
        options = f"--case {case} --variant base --log2 27 --rounds 1{'' if gpu else ' --dry'}".split()
        command = [*profiler, *script("gpu_tune", *quick, *options)]
        says = "Memory Throughput" if gpu else ""  # ncu also succeeds where it has profiled nothing
        yield Step(f"ncu {case}", command, 45, least=15, tail=70, says=says)


def steps_of(stage: str, device: str, quick: bool, scratch: Path) -> list[Step]:
    """The steps of a stage, the most valuable first; where "machine" fails no other runs."""
    options = ["--device", device]
    machine = Step("machine", script("gpu_step", "--machine", *options), 90, recorded=True)
    steps = {"check": check, "speed": speed, "deep": deep}[stage]
    return [machine, *steps(device == "cuda", options, ["--quick"] if quick else [], scratch)]


# ---- Running them ----------------------------------------------------------------------------------------------------


class Visit:
    """One stage: runs steps within a budget and saves their results in a folder."""

    stopped = False  # by a signal: the present step is interrupted, and no other begins

    def __init__(self, stage: str, output: Path, scratch: Path, budget: float, record: dict[str, Any]) -> None:
        self.stage, self.output, self.scratch = stage, output, scratch
        self.begin = time.monotonic()
        self.end = self.begin + budget
        self.log = output / f"{stage}.log"
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.steps: list[dict[str, Any]] = []
        self.record = {"stage": stage, "budget": budget, **record, "steps": self.steps}
        output.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self.save()

    def save(self) -> None:
        """Writes the JSON."""
        write_whole(self.output / f"{self.stage}.json", json.dumps(self.record, indent=1) + "\n")

    def run(self, steps: Sequence[Step]) -> bool:
        """Runs steps in turn until it is stopped; whether all have passed or had no reason to run."""
        all_passed = True
        for step in steps:
            if self.stopped:
                return False
            failed = {entry["step"] for entry in self.steps if entry["status"] != "passed"}
            if step.only_after and step.only_after not in failed:
                continue
            left = self.end - time.monotonic()
            if left < step.least:
                passed = self.leave_out(step, "dropped", f"needs {step.least:.0f} s, {max(0.0, left):.0f} s were left")
            elif shutil.which(step.command[0]) is None:
                passed = self.leave_out(step, "skipped", f"{step.command[0]} is not installed")
            else:
                passed = self.execute(step, min(step.limit, left))
            all_passed &= passed
            if step.name == "machine" and not passed:
                return False
        return all_passed

    def leave_out(self, step: Step, status: str, detail: str) -> bool:
        """Records a step that does not run."""
        self.steps.append({"step": step.name, "status": status, "detail": detail})
        print(f"## {step.name}: {status}, {detail}", flush=True)
        self.save()
        return False

    def execute(self, step: Step, limit: float) -> bool:
        """Runs a step; whether it passed. Its output goes to the log, its result into the JSON while it runs."""
        place = self.scratch / f"{re.sub(r'[^a-zA-Z0-9]+', '-', step.name)}.json"
        command = [*map(str, step.command), *(["--json", str(place)] if step.recorded else [])]
        shown = " ".join(command)
        for path, word in ((sys.executable, "python"), (f"{ROOT}/", ""), (str(self.scratch), ".")):
            shown = shown.replace(path, word)
        entry: dict[str, Any] = {"step": step.name, "status": "running", "command": shown}
        self.steps.append(entry)
        with self.log.open("a", encoding="utf-8") as log:
            print(f"\n=== {step.name}: {shown}", file=log, flush=True)
            begin, offset = time.monotonic(), self.log.stat().st_size
            # `timeout` ends the step with all that it started, also where this process is killed.
            process = subprocess.Popen(
                ["timeout", "-s", "INT", "-k", str(GRACE), f"{limit:.0f}", *command],
                env=self.environment | step.environment, cwd=self.scratch,  # where no lion8bit hides the installed one
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            code = None
            while code is None:
                if ending := self.stopped or self.log.stat().st_size - offset > LOG_BYTES:
                    process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(GRACE + 2 if ending else 0.5)
                with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is half written
                    entry["result"] = json.loads(place.read_text())
                entry["seconds"] = round(time.monotonic() - begin, 1)
                self.save()
        text = self.log.read_bytes()[offset:].decode(errors="replace")
        lines = text.rstrip().splitlines()
        words = (line.strip() for line in reversed(lines) if re.search(r"\w\w", line))
        late = time.monotonic() - begin >= round(limit)  # `timeout` dies with what it kills
        good = code == 0 and re.search(step.says, text) is not None
        status = "interrupted" if self.stopped else "passed" if good else "timed out" if late else "failed"
        entry |= {"status": status, "detail": next(words, "no output")[:200]}
        self.save()
        print(f"## {step.name}: {status} ({code}), {entry['seconds']} s (at {time.monotonic() - self.begin:.0f} s)")
        print(*(line[:220] for line in lines[-step.tail :]), sep="\n", flush=True)
        self.report(picture="rows" in entry.get("result", ()))
        return status == "passed"

    def report(self, picture: bool) -> str:
        """Writes the page and the picture; returns this stage's page, or why there is none, which ends no visit."""
        try:
            return markdown({self.stage: write_report(self.output, picture)[self.stage]})
        except Exception as error:
            self.record["report"] = f"{type(error).__name__}: {error}"
            self.save()
            return f"THE PAGE COULD NOT BE WRITTEN: {self.record['report']}"


# ---- Installation ----------------------------------------------------------------------------------------------------


def imported(visit: Visit) -> Path:
    """The file of the lion8bit that the steps import."""
    find = "import importlib.util as u; found = u.find_spec('lion8bit'); print(found.origin if found else 'none')"
    command = [sys.executable, "-c", find]
    found = subprocess.run(command, env=visit.environment, cwd=visit.scratch, capture_output=True, text=True)
    return Path(found.stdout.strip()).resolve()


def install(visit: Visit) -> None:
    """Installs lion8bit and the peers' wheels for the steps, once for the same python and sources.

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
    paths = [str(peers), os.environ.get("PYTHONPATH", "")]
    if not imported(visit).is_relative_to(ROOT):
        paths.insert(0, str(ours))
        if not ours.exists():
            built = visit.run([Step("build", [*pip, kept / "draft", "--no-build-isolation", ROOT], 150)])
            if visit.stopped:
                return
            if built:
                (kept / "draft").rename(ours)
            else:
                print("NO CPU KERNEL: the build failed; the checkout is used as it is", flush=True)
                ours.symlink_to(ROOT)
    for wheel in sorted(WHEELS.glob("*.whl")):
        done = peers / f"{wheel.name}.installed"
        if not done.exists() and visit.run([Step(wheel.name, [*pip, peers, wheel], 60)]):
            done.touch()
    visit.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if not (found := imported(visit)).is_relative_to(ROOT):
        raise SystemExit(f"lion8bit must be imported from {ROOT}, got {found}; uninstall the other one")


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
    options.add_argument("--step", nargs="+", default=[], metavar="NAME", help="only these, in the stage's order")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--quick", action="store_true", help="dry run with small models and few repeats")
    settings = options.parse_args(arguments)
    if settings.budget is not None and settings.budget <= 0:
        options.error(f"--budget must be positive, got {settings.budget}")
    settings.stages = list(BUDGETS) if settings.stage == "all" else [settings.stage]
    known = [step.name for stage in settings.stages for step in steps_of(stage, "cuda", False, Path())]
    if unknown := set(settings.step) - set(known):
        options.error(f"--step must be among {'; '.join(known)}, got {'; '.join(unknown)}")
    return settings


def default_output() -> Path:
    """A folder named after the GPU and the day."""
    name = asked_of_driver().get("name", "none").lower().replace("nvidia", "")
    plain = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return HERE / "results" / f"gpu-{plain}-{datetime.date.today().isoformat()}"


def commit() -> str | None:
    """The checkout's commit, where git knows it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def stop(signum: int, frame: FrameType | None) -> None:
    """Handles SIGINT and SIGTERM. A KeyboardInterrupt could get lost where Python ignores exceptions."""
    Visit.stopped = True


def main() -> int:
    """Runs the stages; returns 0 where no step failed."""
    settings = parse()
    if shutil.which("timeout") is None:
        raise SystemExit("the program timeout must be installed, got none; install GNU coreutils")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    output = (settings.output or default_output()).resolve()
    left = settings.budget or sum(BUDGETS[stage] for stage in settings.stages)
    failed: list[str] = []
    record = {"commit": commit(), "device": settings.device, "trial": settings.quick or settings.device == "cpu"}
    for stage in settings.stages:
        begin = time.monotonic()
        budget = min(left, BUDGETS[stage]) if len(settings.stages) > 1 else left
        with tempfile.TemporaryDirectory() as folder:
            visit = Visit(stage, output, Path(folder), budget, record)
            install(visit)
            steps = steps_of(stage, settings.device, settings.quick, Path(folder))
            visit.run([step for step in steps if not settings.step or step.name in ("machine", *settings.step)])
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
