"""Tests the visit to a GPU (`benchmarks/gpu.py`) without one: its stages, how they end, and what they say."""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lion8bit import estimate

pytest.importorskip("rich", reason="needs the extra named demo")
pytest.importorskip("matplotlib", reason="needs the extra named demo")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs GNU's timeout and process groups")

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/gpu.py` as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/gpu_report.py` as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_report")


def python(code: str) -> list[str]:
    """A command that runs some Python."""
    return [sys.executable, "-c", code]


# ---- The stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "steps"),
    [
        ("check", ["machine", "doctor", "first process", "second process", "tests", "variants"]),
        ("speed", ["machine", "gpt2", "1B", "llama", "lora", "7B", "8B-4bit", "4B-4bit", "8B", "3B"]),
        ("deep", ["machine", "memcheck", "racecheck", "ncu nearest", "ncu stochastic"]),
    ],
)
def test_stage_passes_without_a_gpu(stage: str, steps: list[str], tmp_path: Path, report: Any) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", stage, "--device", "cpu", "--quick", "--output", tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / f"{stage}.json").read_text())
    assert [(step["step"], step["status"]) for step in record["steps"]] == [(step, "passed") for step in steps]
    records = {stage: record}
    assert report.result(records, stage, "machine")["versions"]["torch"]
    assert all(goal["met"] is None for goal in report.judge(records)), "a trial proves no goal"
    assert "the numbers are not measurements" in done.stdout
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{stage}.json", f"{stage}.log", "gpu.md", *(["gpu.png"] if stage == "speed" else [])}
    log = (tmp_path / f"{stage}.log").read_text()
    assert all(f"=== {step}: " in log for step in steps)
    assert sys.executable not in (tmp_path / f"{stage}.json").read_text(), "a path of this machine"
    if stage == "check":
        tests = report.counts(records["check"])
        assert tests["failed"] == 0 and tests["passed"] > 0 and tests["skipped"] > 50
        assert report.result(records, stage, "second process")["first_step"] > 0
        assert {row["variant"] for row in report.result(records, stage, "variants")["kernels"]} > {"base"}
    if stage == "speed":
        rows = report.list_rows(records)
        assert {row["model"] for row in rows} == {"gpt2", "1B", "llama", "lora"}
        assert {row["contender"] for row in rows} >= {
            "lion8bit",
            "lion8bit-stochastic",
            "lion8bit-compensated",
            "adamw",
        }
        assert all(row["status"] == "measured" and row["wall_new_ms"]["median"] > 0 for row in rows)
        found = report.results(records, "losses")
        assert [(step["step"], training["paged"], training["bits"], training["chunked_loss"])
                for step, training in found] == [
            ("7B", False, 8, False), ("8B-4bit", False, 4, True), ("4B-4bit", False, 4, True),
            ("8B", True, 8, False), ("3B", True, 8, False),
        ]  # fmt: skip
        assert all(len(training["losses"]) == 8 for _, training in found)
        assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_else_is_tried(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "check", "--output", tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert "torch must find an NVIDIA GPU, got none" in done.stdout and "FAILED: machine" in done.stdout
    assert [step["step"] for step in json.loads((tmp_path / "check.json").read_text())["steps"]] == ["machine"]


def test_a_gpu_gets_the_real_thing(gpu: Any) -> None:
    """On a GPU models have their size, memory its limit, tools watch, and only tests that need a GPU run."""
    steps = {step.name: list(map(str, step.command)) for stage in gpu.BUDGETS
             for step in gpu.steps_of(stage, "cuda", False, Path())}  # fmt: skip
    for name, options in {
        "7B": "--shape llama-7b --memory-limit 24",
        "8B-4bit": "--shape llama3-8b --memory-limit 24 --bits 4 --chunked-loss",
        "4B-4bit": "--shape qwen3-4b --memory-limit 16 --bits 4 --chunked-loss",
        "8B": "--shape llama3-8b --memory-limit 24 --paged",
        "3B": "--shape llama-3b --memory-limit 12 --paged",
    }.items():
        assert steps[name][2:-2] == options.split()
    assert "memcheck" in steps["memcheck"] and "--every" in steps["memcheck"] and "racecheck" in steps["racecheck"]
    assert "ncu" in steps["ncu nearest"][0] and "--dry" not in steps["variants"]
    assert "test_gpu or on_gpu" in steps["tests"] and str(TESTS / "test_cuda.py") in steps["tests"]
    assert not any("--quick" in command for command in steps.values())


@pytest.mark.parametrize(("name", "model"), [("8B-4bit", "llama-3-8b"), ("4B-4bit", "qwen3-4b")])
def test_4_bits_fit_by_the_plan_without_host_memory(gpu: Any, name: str, model: str) -> None:
    row = estimate(model, vram=gpu.TRAININGS[name][1], chunked_loss=True).rows["lion8bit-4bit-release"]
    assert row.fits and row.host == 0


def test_tests_that_need_a_gpu_are_named_so() -> None:
    """`make gpu-check` selects them by name, so no file of tests may have such a name."""
    assert list(TESTS.glob("test_gpu*")) == []
    for path in TESTS.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("needs_gpu" in ast.unparse(d) for d in node.decorator_list):
                assert node.name.startswith("test_gpu"), f"{path.name}: {node.name}"


def test_refuses_what_it_cannot_do(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["check", "--budget", "0"], "--budget must be positive, got 0.0"),
        (["check", "--step", "7B"], "--step must be among machine; doctor;"),
    ):
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
        assert message in capsys.readouterr().err
    assert gpu.parse(["speed", "--step", "3B"]).step == ["3B"]


# ---- Steps and their ends --------------------------------------------------------------------------------------------


@pytest.fixture
def visit(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A visit of 60 s whose steps the test chooses; a step has 1 s from SIGINT to SIGKILL."""
    monkeypatch.setattr(gpu, "GRACE", 1)
    (tmp_path / "scratch").mkdir()
    return gpu.Visit("check", tmp_path / "results", tmp_path / "scratch", 60.0, {"trial": True})


def outcomes(visit: Any) -> dict[str, str]:
    """How each step of a visit ended, by the file that it left."""
    steps = json.loads((visit.output / "check.json").read_text())["steps"]
    return {step["step"]: step["status"] for step in steps}


def test_a_step_that_hangs_is_interrupted_then_killed(gpu: Any, visit: Any) -> None:
    politely = "import time\ntry: time.sleep(50)\nexcept KeyboardInterrupt: print('what was found so far')"
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(50)"
    )
    steps = [
        gpu.Step("polite", python(politely), 2),
        gpu.Step("deaf", python(deaf), 2),
        gpu.Step("next", python(""), 9),
    ]
    begin = time.monotonic()
    visit.run(steps)
    assert time.monotonic() - begin < 30
    assert outcomes(visit) == {"polite": "timed out", "deaf": "timed out", "next": "passed"}
    assert "what was found so far" in visit.log.read_text() and "begun" in visit.log.read_text()


def test_a_step_that_fails_hides_no_other(gpu: Any, visit: Any) -> None:
    record = "import json, sys; open(sys.argv[2], 'w').write(json.dumps({'found': 3}))"
    visit.run(
        [
            gpu.Step("doctor", python("1 / 0"), 9),
            gpu.Step("why", python("print('closer')"), 9, only_after="doctor"),
            gpu.Step("recorded", python(record), 9, recorded=True),
            gpu.Step("halves", python("import sys; open(sys.argv[2], 'w').write('{')"), 9, recorded=True),
            gpu.Step("why a success", python(""), 9, only_after="recorded"),
            gpu.Step("silent", python("print('ERROR SUMMARY: 3 errors')"), 9, says="SUMMARY: 0 "),
            gpu.Step("says so", python("print('ERROR SUMMARY: 0 errors')"), 9, says="SUMMARY: 0 "),
            gpu.Step("absent", ["no-such-program"], 9),
            gpu.Step("long", python(""), 90, least=80),
        ]
    )
    assert outcomes(visit) == {
        "doctor": "failed", "why": "passed", "recorded": "passed", "halves": "passed",
        "silent": "failed", "says so": "passed", "absent": "skipped", "long": "dropped",
    }  # fmt: skip
    steps = {step["step"]: step for step in visit.steps}
    assert steps["recorded"]["result"] == {"found": 3} and "result" not in steps["halves"]
    assert steps["doctor"]["detail"].startswith("ZeroDivisionError")
    assert steps["absent"]["detail"] == "no-such-program is not installed"
    assert steps["long"]["detail"].startswith("needs 80 s, ")
    assert "| check | doctor | failed |" in (visit.output / "gpu.md").read_text()


def test_a_page_that_cannot_be_written_ends_no_visit(gpu: Any, visit: Any) -> None:
    odd = "import json, sys; open(sys.argv[2], 'w').write(json.dumps({'rows': [3]}))"
    visit.stage, visit.record["stage"] = "speed", "speed"
    visit.run([gpu.Step("gpt2", python(odd), 9, recorded=True), gpu.Step("next", python(""), 9)])
    assert [step["status"] for step in visit.steps] == ["passed", "passed"]
    assert visit.report(picture=False).startswith("THE PAGE COULD NOT BE WRITTEN: TypeError")
    assert json.loads((visit.output / "speed.json").read_text())["report"].startswith("TypeError")


def test_a_step_that_floods_the_log_is_interrupted(gpu: Any, visit: Any) -> None:
    flood = (
        "import time; print('the begin', flush=True)\nwhile True: print('x' * 100_000, flush=True); time.sleep(0.01)"
    )
    visit.run([gpu.Step("flood", python(flood), 30), gpu.Step("next", python(""), 9)])
    assert outcomes(visit) == {"flood": "failed", "next": "passed"}
    assert "the begin" in visit.log.read_text() and visit.log.stat().st_size < 30 * gpu.LOG_BYTES


PROGRAM = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu
code = "import json, sys, time; time.sleep(0.2); print('said by', sys.argv[1]); " \\
    "open(sys.argv[3], 'w').write(json.dumps({'first_step': 1.0, 'long': 'x' * 100_000}))"
for signum in (gpu.signal.SIGINT, gpu.signal.SIGTERM):
    gpu.signal.signal(signum, gpu.stop)
with tempfile.TemporaryDirectory() as scratch:
    visit = gpu.Visit("check", Path(sys.argv[2]), Path(scratch), 60.0, {"trial": True})
    visit.run([gpu.Step(f"step{i}", [sys.executable, "-c", code, f"step{i}."], 9, recorded=True) for i in range(40)])
"""


def test_installation_is_tried_once(gpu: Any, visit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the build fails the checkout is used as it is, and a wheel that is none hides nothing."""
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    for folder in (checkout / "lion8bit", checkout / "csrc", wheels):
        folder.mkdir(parents=True)
    (checkout / "pyproject.toml").write_text("[build-system]\nrequires = ['no-such-backend']")
    (checkout / "lion8bit" / "__init__.py").write_text("word = 'found'")
    (wheels / "nonsense-1-py3-none-any.whl").write_bytes(b"no wheel")
    monkeypatch.setattr(gpu, "ROOT", checkout)
    monkeypatch.setattr(gpu, "WHEELS", wheels)
    environment = dict(visit.environment)

    def install() -> list[tuple[str, str]]:
        """All steps so far. This python has another lion8bit, which cannot be hidden."""
        visit.environment = dict(environment)
        with pytest.raises(SystemExit, match="uninstall the other one"):
            gpu.install(visit)
        return [(step["step"], step["status"]) for step in visit.steps]

    nonsense = ("nonsense-1-py3-none-any.whl", "failed")
    assert install() == [("build", "failed"), nonsense]
    assert install() == [("build", "failed"), nonsense, nonsense]
    ours, peers = visit.environment["PYTHONPATH"].split(os.pathsep)[:2]
    assert (Path(ours) / "lion8bit" / "__init__.py").read_text() == "word = 'found'" and Path(peers).is_dir()
    (checkout / "csrc" / "new.h").write_text("")
    assert install()[3:] == [("build", "failed"), nonsense], "other sources"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_ended_at_any_moment_it_leaves_what_was_finished(signum: int, tmp_path: Path) -> None:
    chance = random.Random(signum)
    most = 0
    for attempt in range(3):
        output = tmp_path / str(attempt)
        process = subprocess.Popen(
            [*python(PROGRAM), str(BENCHMARKS), str(output)],
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not (output / "check.json").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 3))
        process.send_signal(signum)
        process.wait(20)
        steps = json.loads((output / "check.json").read_text())["steps"]
        log = (output / "check.log").read_text()
        finished = [step for step in steps if step["status"] == "passed"]
        assert [step["step"] for step in finished] == [f"step{i}" for i in range(len(finished))]
        for step in finished:
            assert f"said by {step['step']}." in log and len(step["result"]["long"]) == 100_000
        assert {step["status"] for step in steps[len(finished) :]} <= {"running", "interrupted"}
        if signum != signal.SIGKILL and len(steps) > len(finished):
            assert steps[-1]["status"] == "interrupted"
        most = max(most, len(finished))
    assert most > 1


# ---- The tests on a GPU ----------------------------------------------------------------------------------------------

FAULTY = """
import os, time, pytest
@pytest.mark.parametrize("i", range(4))
def test_gpu_sound(i): time.sleep(0.05)
def test_gpu_that_fails(): assert "the left" == "the right"
def test_gpu_that_hangs(): time.sleep(60)
def test_gpu_that_ends_its_process(): os._exit(1)
@pytest.mark.skip
def test_gpu_skipped(): pass
def test_of_another_kind(): assert 0
"""


def test_failures_are_counted_and_name_their_worker(
    gpu: Any, report: Any, visit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    pytest.importorskip("pytest_timeout", reason="needs pytest-timeout")
    (tmp_path / "test_some.py").write_text(FAULTY)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # whose warning filters do not import torch, as ours do in every worker
    command = gpu.gpu_tests(True, visit.scratch, tmp_path, limit=2)
    del command[command.index("-W") : command.index("-W") + 2]
    assert not visit.run([gpu.Step("tests", command, 60)])
    assert report.counts({"steps": visit.steps}) == {"passed": 4, "failed": 3, "skipped": 1}
    log = visit.log.read_text()
    failed = re.findall(r"(?m)^\[gw\d+\].* FAILED .*test_gpu_that_(\w+)", log)
    assert sorted(failed) == ["ends_its_process", "fails", "hangs"], "each worker is named while the tests run"


# ---- Lists and verdicts ----------------------------------------------------------------------------------------------


def test_model_lists_have_the_published_sizes(gpu: Any) -> None:
    models, common = importlib.import_module("models"), importlib.import_module("common")
    published = {
        "gpt2": 124_439_808,
        "1B": 2**30,
        "llama": 8_030_261_248,
        "lora": 41_943_040,
    }
    assert {key: common.numel(shapes) for key, (_, shapes) in models.GPU_MODELS.items()} == published
    assert models.QUICK_GPU_MODELS.keys() == published.keys()
    assert gpu.LISTS.keys() <= published.keys()


def test_single_tensor_shrinks_to_the_memory_and_a_model_does_not(gpu: Any) -> None:
    gpu_step = importlib.import_module("gpu_step")
    assert gpu_step.fitted([(32768, 32768)], 10.0, 24e9) == [(32768, 32768)]
    assert gpu_step.fitted([(32768, 32768)], 10.0, 8e9) == [(16384, 32768)]
    assert gpu_step.fitted([(32768, 32768), (1,)], 10.0, 8e9) == []


def made_up_row(model: str, dtype: str, contender: str, ms: float, share: float) -> dict[str, Any]:
    """A row as `gpu_step.py` writes it, with figures that nobody measured."""
    times = {"median": ms, "min": ms, "max": ms, "repeats": 1}
    return {
        "model": model, "name": model, "dtype": dtype, "contender": contender, "label": contender, "parameters": 10**9,
        "tensors": 1, "status": "measured", "gpu_ms": times, "wall_ms": times, "wall_new_ms": times,
        "copy_gb_per_s": 4000.0, "bytes_per_parameter": 8.0, "gb_per_s": 4000 * share, "share_of_copy": share,
    }  # fmt: skip


def made_up_step(name: str, result: dict[str, Any] | None = None, status: str = "passed") -> dict[str, Any]:
    """A step as `gpu.py` records it."""
    return {"step": name, "status": status, "seconds": 1.0, "detail": "a | b", "result": result}


def made_up_records() -> dict[str, Any]:
    """Both stages that have goals, as `gpu.py` records them."""
    rows = [
        made_up_row("1B", "fp32", "lion8bit", 4.0, 0.93),
        made_up_row("1B", "bf16", "lion8bit", 2.0, 0.84),
        made_up_row("gpt2", "bf16", "lion8bit", 1.0, 0.5),
        made_up_row("gpt2", "bf16", "bitsandbytes", 5.5, 0.1),
        made_up_row("gpt2", "bf16", "flashlion", 0.9, 0.6),
        {**made_up_row("gpt2", "fp32", "flashlion", 1, 1), "status": "failed", "reason": "TypeError: a | b"},
    ]
    machine = {"gpu": {"name": "Made-up GPU", "cuda": "0.0"}, "driver": "0", "versions": {"torch": "0", "x": None}}
    tests = made_up_step("tests", status="failed") | {"detail": "=== 1 failed, 150 passed, 2 skipped in 9.00s ==="}
    times = {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}
    tuning = {"variant": "base", "ms": times, "share_of_copy": 0.9, "speed_over_base": 1.0}
    gib = 2**30
    training = {
        "model": "llama-7b", "optimizer": "lion8bit", "paged": False, "memory_limit_gib": 24.0, "out_of_memory": None,
        "losses": [10.0, 9.0, 8.5, 8.0, 7.5, 7.0], "peak_bytes": 21 * gib, "requested_bytes": 20 * gib,
        "reserved_bytes": 23 * gib, "planned_bytes": 19 * gib, "state_bytes": 6 * gib, "tokens_per_second": 1234.0,
    }  # fmt: skip
    four = {**training, "model": "llama3-8b", "bits": 4, "chunked_loss": True}
    full = {**training, "model": "llama3-8b", "paged": True, "losses": [], "out_of_memory": {"where": "step 1"}}
    del full["planned_bytes"]  # as where the memory does not suffice for the model
    return {
        "check": {"trial": False, "steps": [
            made_up_step("machine", machine), made_up_step("first process", {"first_step": 2.5}),
            made_up_step("second process", {"first_step": 0.2}), tests,
            made_up_step("variants", {"cases": {"nearest": {"elements": 10**6, "rows": [tuning]}}}),
        ]},
        "speed": {"trial": False, "steps": [
            made_up_step("machine", machine), made_up_step("gpt2", {"rows": rows}),
            made_up_step("llama", None, "timed out"), made_up_step("7B", training),
            made_up_step("8B-4bit", four), made_up_step("8B", full, "failed"),
            made_up_step("3B", training, "timed out"),
        ]},
    }  # fmt: skip


def test_page_and_verdicts_of_made_up_records(report: Any, tmp_path: Path) -> None:
    records = made_up_records()
    for stage, record in records.items():
        (tmp_path / f"{stage}.json").write_text(json.dumps(record))
    assert report.write_report(tmp_path, picture=True) == records
    met = {goal["goal"]: goal["met"] for goal in report.judge(records)}
    assert met["tests that fail"] is False
    assert (met["first step of the first process"], met["first step of the second process"]) == (False, True)
    assert met["1B fp32: share of copy bandwidth"] is True
    assert met["1B bf16: share of copy bandwidth"] is False
    assert met["1B bf16, stochastic: share of copy bandwidth"] is None
    assert met["gpt2 bf16: wall time over bitsandbytes's"] is True
    assert met["gpt2 bf16: wall time over flashlion's"] is False
    assert met["llama bf16: wall time over bitsandbytes's"] is None
    assert met["slower than a peer"] is False
    assert met["7B, llama-7b: reserved"] is met["7B, llama-7b: last five losses over the first"] is True
    assert met["7B, llama-7b: peak over the plan's"] is False
    assert met["8B, llama3-8b, momentum on the host: reserved"] is None
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# Made-up GPU") and "| speed | llama | timed out | 1.0 | a / b |" in page
    assert "gpt2 bf16 flashlion gpu 1.11x; gpt2 bf16 flashlion wall 1.11x; gpt2 bf16 flashlion wall_new 1.11x" in page
    assert "| bf16 | bitsandbytes | 5.500 | 5.500 | 5.500 | 8.00 | 400 | 10.0% | 5.50x |" in page
    assert "| fp32 | flashlion: TypeError: a / b |" in page
    assert (
        "| llama-7b | 24 GiB | lion8bit | GPU | loss 10.00 to 7.00 in 6 steps | 21.00 | 19.00 | 6.00 | 1234 |" in page
    )
    assert "| llama3-8b | 24 GiB | lion8bit | host | out of memory: step 1 |" in page
    assert "| loss 10.00 to 7.00 in 6 steps, timed out | 21.00 |" in page
    assert met["3B, llama-7b: reserved"] is None and met["8B-4bit, llama3-8b, 4 bits: reserved"] is True
    assert "| llama3-8b | 24 GiB | lion8bit, 4 bits, chunked loss | GPU | loss 10.00 to 7.00 in 6 steps |" in page
    assert "| base | 2.0000 | 1.0000 | 3.0000 | 90.0% | 1.000 |" in page
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    tests = next(step for step in records["check"]["steps"] if step["step"] == "tests")
    tests["detail"] = "3 passed in 9.00s"
    assert report.judge(records)[0]["met"] is None, "too few for a verdict"
    tests["detail"] = "3 passed, 60 errors in 9.00s"
    assert report.judge(records)[0]["met"] is False, "a broken kernel"
    records["speed"]["trial"] = True
    assert all(goal["met"] is None for goal in report.judge(records))
