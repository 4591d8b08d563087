"""Tests the benchmarks: each runs in its quick form, and its JSON says what it must; no test asserts a time."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lion8bit.tools import cli

pytest.importorskip("rich", reason="needs the extra named demo")
pytest.importorskip("matplotlib", reason="needs the extra named demo")

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = ("fidelity", "convergence", "step_time", "footprint", "memory", "overhead")
TESTS = Path(__file__).parent


def run_script(name: str, *arguments: str) -> str:
    """Runs a benchmark on one thread and returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_quick(name: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs a benchmark's quick form; returns its JSON and what it printed."""
    path = folder / f"{name}.json"
    printed = run_script(name, "--quick", "--json", str(path), *arguments)
    record = json.loads(path.read_text())
    assert record["benchmark"] == name
    assert "Goals" not in printed or "--quick" in printed, "verdicts on figures of no worth"
    versions = record["environment"]["versions"]
    assert versions["torch"] and versions["lion8bit"]
    assert record["environment"]["cpu"] and record["environment"]["date"] and record["environment"]["threads"] == 1
    return record, printed


def test_outliers_are_measured_for_every_contender(tmp_path: Path) -> None:
    record, printed = run_quick("outliers", tmp_path)
    assert [(row["noisy"], row["ratio"]) for row in record["rows"]] == [(n, r) for n in (False, True) for r in (1, 10)]
    assert all(0 <= row["block 128"]["wrong"] < 0.1 and row["block 64"]["way"] > 0.9 for row in record["rows"])
    assert "Steady gradients" in printed


# ---- Fidelity --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fidelity(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The quick language model and stall workloads: JSON, printed text and picture."""
    folder = tmp_path_factory.mktemp("fidelity")
    picture = folder / "fidelity.png"
    record, printed = run_quick("fidelity", folder, "--workload", "lm", "stall", "--plot", str(picture))
    return record, printed, picture


def test_fp32_control_reads_exactly_zero(fidelity: tuple[dict[str, Any], str, Path]) -> None:
    record, printed, _ = fidelity
    assert [case["workload"] for case in record["cases"]] == ["lm", "stall"]
    for case in record["cases"]:
        control = case["formats"]["fp32"]
        figures = ("momentum_error", "sign_differs", "drift", "frozen", "radial_bias")
        assert [control[name] for name in figures] == [0] * len(figures)
        assert control["bytes_per_parameter"] == 4
    assert printed.count("exactly 0") == 3, "one per case and one among the goals"


@pytest.mark.parametrize("peer", ["bitsandbytes", "linear"])
def test_signs_differ_less_often_than_in_a_peer(fidelity: tuple[dict[str, Any], str, Path], peer: str) -> None:
    for case in fidelity[0]["cases"]:
        rows = case["formats"]
        if peer not in rows:
            pytest.skip(f"{peer} is not installed")
        for block_size in (64, 128, 256):
            assert rows[f"lion8bit-{block_size}"]["sign_differs"] < rows[peer]["sign_differs"], case["name"]


def test_codes_of_a_stalled_format_are_found_frozen(fidelity: tuple[dict[str, Any], str, Path]) -> None:
    rows = fidelity[0]["cases"][1]["formats"]
    assert rows["nearest-root"]["frozen"] > 0.1
    assert rows["lion8bit-128"]["frozen"] < 0.01


def test_verdicts_compare_at_no_more_bytes(fidelity: tuple[dict[str, Any], str, Path]) -> None:
    against = {"bitsandbytes": "lion8bit-256", "linear": "lion8bit-128", "flashoptim": "lion8bit-64"}
    for case in fidelity[0]["cases"]:
        for peer, comparison in case["comparisons"].items():
            rows = case["formats"]
            assert comparison["no_larger"] and comparison["against"] == against[peer]
            assert rows[against[peer]]["bytes_per_parameter"] == rows[peer]["bytes_per_parameter"]
    assert all(comparison["ahead"] for comparison in fidelity[0]["cases"][1]["comparisons"].values())


def test_fidelity_has_a_verdict_per_goal(fidelity: tuple[dict[str, Any], str, Path]) -> None:
    record, printed, _ = fidelity
    met = {goal["goal"]: goal["met"] for goal in record["goals"]}
    assert met["control"] is True
    assert met["no underflow"] is None, "the workload of tiny gradients did not run"
    behind = [c for case in record["cases"] for c in case["comparisons"].values() if c["behind_on"]]
    assert met["behind no peer"] == (not behind)
    assert all(goal in printed for goal in met)


def test_fidelity_draws_its_picture(fidelity: tuple[dict[str, Any], str, Path]) -> None:
    assert fidelity[2].read_bytes().startswith(b"\x89PNG")


def test_models_of_the_workloads_learn(
    fidelity: tuple[dict[str, Any], str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra named bench")
    folder = tmp_path_factory.mktemp("models")
    record, _ = run_quick("fidelity", folder, "--workload", "conv", "embedding", "--length", "0.06")
    cases = [fidelity[0]["cases"][0], *record["cases"]]
    assert [case["workload"] for case in cases] == ["lm", "conv", "embedding"]
    for case in cases:
        assert case["facts"]["last_loss"] < case["facts"]["first_loss"] - 0.25, case["workload"]


@pytest.fixture
def fidelity_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/fidelity.py` as a module."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("fidelity")


def test_bitsandbytes_row_is_its_own_optimizer_bit_for_bit(fidelity_module: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra named peers")
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = bitsandbytes.optim.Lion8bit([param], lr=1.0, betas=(0.9, 0.99))
    store = fidelity_module.BitsAndBytes(param.shape, (0.9, 0.99), 256)
    for _ in range(20):
        param.grad = 1e-3 * torch.randn(param.shape, generator=generator)
        sign = store.step(param.grad)
        param.detach().zero_()
        optimizer.step()
        assert torch.equal(-param.detach(), sign)
        assert torch.equal(optimizer.state[param]["state1"].view(-1), store.codes.view(-1))


def test_gpu_row_of_flashoptim_is_its_own_code(fidelity_module: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("flashoptim quantizes on an NVIDIA GPU only")
    pytest.importorskip("flashoptim", reason="flashoptim is not installed")
    shape, generator = torch.Size((64, 256)), torch.Generator().manual_seed(0)
    formula = fidelity_module.Softsign(shape, (0.9, 0.99), 32, torch.float16)
    package = fidelity_module.FlashOptim(shape, (0.9, 0.99), 32)
    momentum = 1e-3 * torch.randn(shape, generator=generator)
    codes, scales = formula.encode(momentum)
    package_codes, package_scales = package.encode(momentum)
    assert torch.equal(scales.view(-1), package_scales.cpu().view(-1))
    assert (codes != package_codes).float().mean() < 1e-4, "a GPU divides with other roundings at most"


# ---- Convergence -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def convergence(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The quick language model, the model for a GPU at a small size, and bf16 weights: JSON and printed text."""
    pytest.importorskip("scipy", reason="needs the extra named bench")
    folder = tmp_path_factory.mktemp("convergence")
    picture = folder / "convergence.png"
    record, printed = run_quick(
        "convergence",
        folder,
        "--problem",
        "lm",
        "gpt2",
        "weights",
        "--rates",
        "3",
        "--tuning-seeds",
        "2",
        "--plot",
        str(picture),
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    return record, printed


def test_every_optimizer_tries_as_many_rates_and_seeds(convergence: tuple[dict[str, Any], str]) -> None:
    for problem in convergence[0]["problems"].values():
        assert {"adamw", "lion", "lion8bit"} <= problem["rows"].keys()
        for row in problem["rows"].values():
            assert [len(losses) for losses in row["tried"].values()] == [2, 2, 2] and len(row["test_loss"]) == 2
            means = {lr: statistics.fmean(losses) for lr, losses in row["tried"].items()}
            assert means[str(row["lr"])] == min(means.values())
            assert row["training_loss"][0] < 6.5


def test_losses_are_compared_seed_by_seed(convergence: tuple[dict[str, Any], str]) -> None:
    for problem in convergence[0]["problems"].values():
        rows = problem["rows"]
        ours, baseline = rows["lion8bit"], rows["lion"]
        differences = [a - b for a, b in zip(ours["test_loss"], baseline["test_loss"], strict=True)]
        assert ours["paired"]["mean"] == pytest.approx(sum(differences) / 2)
        assert baseline["std_error"] == pytest.approx(abs(baseline["test_loss"][0] - baseline["test_loss"][1]) / 2)
        excess = ours["mean"] - baseline["mean"]
        within = abs(excess) <= baseline["std_error"]
        assert ours["verdict"] == ("within" if within else "worse" if excess > 0 else "better")
        assert 0 <= ours["paired"]["p"] <= 1


def test_bf16_weights_rounded_to_nearest_stall(convergence: tuple[dict[str, Any], str]) -> None:
    record, printed = convergence
    rows = record["weights"]["rows"]
    assert rows["fp32"]["gain"] > 0.01
    assert rows["nearest"]["of_fp32_gain"] < 0.2 and rows["nearest"]["frozen"] > 0.5
    assert rows["stochastic"]["of_fp32_gain"] > 0.8
    # The model computes with the bf16 half of compensated weights, where 20 steps of 1e-5 do not always show yet.
    assert rows["compensated"]["of_fp32_gain"] > 0.4
    met = {goal["goal"]: goal["met"] for goal in record["goals"]}
    assert met["bf16, nearest"] and met["bf16, stochastic"]
    assert all(goal in printed for goal in met)


# ---- Step time -------------------------------------------------------------------------------------------------------


def test_step_time_reports_every_contender(tmp_path: Path) -> None:
    picture = tmp_path / "step_time.png"
    record, printed = run_quick(
        "step_time",
        tmp_path,
        "--model",
        "64M",
        "--dtype",
        "fp32",
        "bf16",
        "--device",
        "cpu",
        "--plot",
        str(picture),
        "--skip",
        "torchao",
        "compiled-lion",
    )
    assert [run["dtype"] for run in record["runs"]] == ["fp32", "bf16"]
    for run, expected in zip(record["runs"], (14.0625, 8.0625), strict=True):
        ours = run["rows"]["lion8bit"]
        assert ours["bytes_per_parameter"] == pytest.approx(expected)
        assert ours["time_over_ours"] == 1
        assert run["bandwidth"] > 0
        for row in run["rows"].values():
            assert row["status"] in ("measured", "extrapolated")
            assert row["ns_per_parameter"] > 0 and row["time_over_ours"] > 0
        assert ours["extra_bytes"] < 1e6 < run["rows"]["portable"]["extra_bytes"] < 64e6
    assert "lion8bit-stochastic" in record["runs"][1]["rows"]
    verdicts = {goal["goal"]: goal["met"] for goal in record["goals"]}
    assert verdicts["torch.compile'd fp32 Lion, time over ours"] is None, "nothing was measured"
    assert verdicts["extra memory of a step, lion8bit"] is True
    assert isinstance(verdicts["share of the ceiling, lion8bit, fp32"], bool)
    assert all(goal in printed for goal in verdicts)
    assert "torch AdamW(fused=True)" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


# ---- Footprint -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def footprint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quick footprint, as JSON."""
    return run_quick("footprint", tmp_path_factory.mktemp("footprint"))[0]


def test_state_takes_one_byte_and_a_scale_per_block(footprint: dict[str, Any]) -> None:
    for record in footprint["state"]:
        assert record["optimizers"]["lion8bit"]["whole_blocks"] == 1 + 4 / 128
        assert record["optimizers"]["lion"]["whole_model"] == 4
        assert record["optimizers"]["adamw"]["whole_model"] > 7.99


def test_steps_allocate_no_tensors(footprint: dict[str, Any]) -> None:
    on_cpu = [record for record in footprint["allocations"] if record["device"] == "cpu"]
    assert {record["dtype"] for record in on_cpu} == {"float32", "bfloat16"}
    for record in on_cpu:
        assert record["optimizers"]["lion8bit"]["tensor_bytes_per_step"] == 0
        assert record["optimizers"]["lion"]["tensor_bytes_per_step"] > 0, "the counter sees nothing"


def test_import_is_light(footprint: dict[str, Any]) -> None:
    assert footprint["import"]["forbidden"] == []
    assert footprint["import"]["new_packages"] == ["lion8bit"]


def test_goals_have_verdicts(footprint: dict[str, Any]) -> None:
    met = {goal["goal"]: goal["met"] for goal in footprint["goals"]}
    assert met["state"] and met["allocations"] and met["light import"]
    assert met["install"] is None


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_split_and_as_planned(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    rows = ["--case", "full", "limit", "--contender", "adamw", "lion8bit-release"]
    record, printed = run_quick("memory", tmp_path, *rows, "--plot", str(picture))
    full, limit = record["cases"]["full"], record["cases"]["limit"]
    adamw, ours = full["rows"]["adamw"], full["rows"]["lion8bit-release"]
    assert adamw["gradients"] == adamw["weights"] == ours["weights"] and ours["gradients"] == 0
    assert adamw["state"] > 1.99 * adamw["weights"] and ours["state"] < 0.55 * ours["weights"]
    assert (adamw["peak_in"], ours["peak_in"]) == ("step", "backward")
    for row in (adamw, ours):
        assert row["peak"] == max(moment["peak"] for moment in row["moments"].values())
        assert row["state"] < row["checkpoint"] < 1.1 * row["state"] + 10_000
        assert row["requested"] <= row["peak"]
        assert row["requested"] == pytest.approx(row["planned"], rel=0.08), (
            "temporaries of AdamW's step are not planned"
        )
        if sys.platform == "linux":
            assert row["process"] > 0
    assert limit["rows"]["adamw"]["status"] == "out of memory"
    assert "out of memory" in printed and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", ["lora", "activations"])
def test_memory_where_the_optimizer_hardly_matters(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    memory = importlib.import_module("memory")
    row = memory.measure(memory.QUICK_CASES[case], memory.ALL["lion8bit"], torch.device("cpu"))
    assert row["status"] == "measured" and row["state"] < 0.08 * row["peak"]
    assert row["requested"] == pytest.approx(row["planned"], rel=0.06)


def test_memory_limit_has_to_be_positive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["memory.py", "--limit", "0"])
    with pytest.raises(SystemExit):
        importlib.import_module("memory").main()
    assert "--limit must be positive, got 0.0" in capsys.readouterr().err


# ---- Overhead --------------------------------------------------------------------------------------------------------


def test_overhead_leaves_the_kernel_out(tmp_path: Path) -> None:
    record, printed = run_quick("overhead", tmp_path, "--tensors", "20")
    assert [run["gradients"] for run in record["runs"]] == ["kept", "new", "from backward"]
    for run in record["runs"]:
        assert run["goal_us"] == pytest.approx(107)
        assert run["met"] == (run["rows"]["lion8bit-no-kernel"]["us"]["min"] <= run["goal_us"])
        assert {"lion8bit", "adamw-fused", "foreach-mul"} < run["rows"].keys()
        assert all(row["us"]["repeats"] == 10 for row in run["rows"].values())
    assert "goal 107 us without the kernel" in printed


# ---- The command lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_teaches(name: str) -> None:
    text = run_script(name, "--help")
    assert "examples:" in text
    assert "--json" in text and "--quick" in text


@pytest.mark.skipif(shutil.which("valgrind") is None or shutil.which("g++") is None, reason="needs valgrind and g++")
def test_instructions(tmp_path: Path) -> None:
    """The counts are those of whole vectors of work: more than one instruction per element at four lanes, not 100."""
    record, printed = run_quick("instructions", tmp_path)
    assert "instructions per element" in printed
    for counts in record["instructions_per_element"].values():
        assert 1 < counts["fp32"] < 100


def test_bench_passes_arguments_to_the_script() -> None:
    command = [sys.executable, "-m", "lion8bit", "bench"]
    listed = subprocess.run([*command, "--help"], capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert all(name in listed for name in cli.BENCHMARKS)
    done = subprocess.run([*command, "fidelity", "--workload", "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice: 'none'" in done.stderr


@pytest.mark.parametrize("name", list(cli.BENCHMARKS))
def test_bench_names_scripts_that_exist(name: str) -> None:
    assert (REPOSITORY / "benchmarks" / f"{cli.BENCHMARKS[name][0]}.py").is_file()
