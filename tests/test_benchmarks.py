"""Each benchmark runs in its quick form, and its JSON holds what it must. No test asserts a time or a learned loss."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs the extra named demo")
pytest.importorskip("matplotlib", reason="needs the extra named demo")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("fidelity", "convergence", "step_time", "footprint", "memory", "overhead", "outliers")
Record = dict[str, Any]


def run_script(name: str, *arguments: str) -> str:
    """Runs a benchmark on one thread and returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_quick(name: str, folder: Path, *arguments: str) -> Record:
    """Runs a benchmark's quick form and returns its JSON. A picture that it draws must be a PNG."""
    path = folder / f"{name}.json"
    printed = run_script(name, "--quick", "--json", str(path), *arguments)
    record: Record = json.loads(path.read_text())
    assert record["command"].startswith(f"python benchmarks/{name}.py --quick")
    assert record["versions"]["torch"] and record["versions"]["lion8bit"]
    assert record["machine"]["cpu"] and record["date"] and record["machine"]["threads"] == 1
    assert path.read_text().count("\n") > len(record["rows"]), "one row a line"
    for goal in record.get("goals", []):
        assert goal["goal"] in printed and "dry run" in printed, "verdicts that are not marked as a dry run"
    if "--plot" in arguments:
        assert Path(arguments[arguments.index("--plot") + 1]).read_bytes().startswith(b"\x89PNG")
    return record


def by(record: Record, *names: str) -> dict[Any, Record]:
    """The rows by one or several of their fields."""
    return {tuple(row.get(name) for name in names) if names[1:] else row[names[0]]: row for row in record["rows"]}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_outliers_are_measured_for_every_contender(tmp_path: Path) -> None:
    rows = by(run_quick("outliers", tmp_path), "noisy", "ratio", "optimizer")
    for noisy in (False, True):
        for ratio in (1, 10):
            assert 0 <= rows[noisy, ratio, "block 128"]["wrong"] < 0.1 and rows[noisy, ratio, "block 64"]["way"] > 0.9


# ---- Fidelity --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fidelity(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The quick language model and stall workloads."""
    folder = tmp_path_factory.mktemp("fidelity")
    return run_quick("fidelity", folder, "--workload", "lm", "stall", "--plot", str(folder / "fidelity.png"))


def test_fp32_control_is_exactly_zero(fidelity: Record) -> None:
    for workload in ("lm", "stall"):
        control = by(fidelity, "workload", "format")[workload, "fp32"]
        figures = ("momentum_error", "sign_differs", "drift", "frozen", "radial_bias")
        assert [control[name] for name in figures] == [0] * len(figures)
        assert control["bytes_per_parameter"] == 4


@pytest.mark.parametrize("peer", ["bitsandbytes", "linear"])
def test_signs_differ_less_often_than_in_a_peer(fidelity: Record, peer: str) -> None:
    rows = by(fidelity, "workload", "format")
    for workload in ("lm", "stall"):
        if (workload, peer) not in rows:
            pytest.skip(f"{peer} is not installed")
        for block_size in (64, 128, 256):
            ours = rows[workload, f"lion8bit-{block_size}"]
            assert ours["sign_differs"] < rows[workload, peer]["sign_differs"], workload


def test_codes_of_a_stalled_format_are_found_frozen(fidelity: Record) -> None:
    rows = by(fidelity, "workload", "format")
    assert rows["stall", "nearest-root"]["frozen"] > 0.1
    assert rows["stall", "lion8bit-128"]["frozen"] < 0.01


def test_peers_are_compared_at_no_more_bytes(fidelity: Record) -> None:
    against = {"bitsandbytes": "lion8bit-256", "linear": "lion8bit-128", "flashoptim": "lion8bit-64"}
    rows = by(fidelity, "workload", "format")
    for (workload, peer), row in rows.items():
        if "against" in row:
            assert row["against"] == against[peer]
            assert rows[workload, against[peer]]["bytes_per_parameter"] == row["bytes_per_parameter"]
            assert workload == "lm" or row["ahead"]


def test_bitsandbytes_row_is_its_own_optimizer_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra named peers")
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = bitsandbytes.optim.Lion8bit([param], lr=1.0, betas=(0.9, 0.99))
    store = script("formats", monkeypatch).BitsAndBytes(param.shape, (0.9, 0.99), 256)
    for _ in range(20):
        param.grad = 1e-3 * torch.randn(param.shape, generator=generator)
        sign = store.step(param.grad)
        param.detach().zero_()
        optimizer.step()
        assert torch.equal(-param.detach(), sign)
        assert torch.equal(optimizer.state[param]["state1"].view(-1), store.codes.view(-1))


def test_softsign_is_flashoptims_own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("flashoptim quantizes on an NVIDIA GPU only")
    pytest.importorskip("flashoptim", reason="flashoptim is not installed")
    shape, generator = torch.Size((64, 256)), torch.Generator().manual_seed(0)
    formats = script("formats", monkeypatch)
    formula = formats.FlatBlocks(shape, (0.9, 0.99), **formats.SOFTSIGN)
    momentum = 1e-3 * torch.randn(shape, generator=generator)
    codes, scales = formula.encode(momentum)
    own_codes, own_scales = importlib.import_module("flashoptim.optimizers").quantize(momentum.cuda(), group_size=32)
    assert torch.equal(scales.view(-1), own_scales.cpu().view(-1))
    assert (codes != own_codes.cpu()).float().mean() < 1e-4, "a GPU divides with other roundings at most"


# ---- Convergence -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def convergence(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The quick language model, and bf16 weights."""
    pytest.importorskip("scipy", reason="needs the extra named bench")
    folder = tmp_path_factory.mktemp("convergence")
    options = ["--problem", "lm", "weights", "--rates", "2", "--tuning-seeds", "2"]
    return run_quick("convergence", folder, *options, "--plot", str(folder / "convergence.png"))


def test_every_optimizer_tries_as_many_rates_and_seeds(convergence: Record) -> None:
    rows = [row for row in convergence["rows"] if row["problem"] == "lm"]
    assert {"adamw", "lion", "lion8bit"} <= {row["optimizer"] for row in rows}
    for row in rows:
        assert [len(losses) for losses in row["tried"].values()] == [2, 2] and len(row["test_loss"]) == 2
        best = min(row["tried"], key=lambda lr: sum(row["tried"][lr]))
        assert str(row["lr"]) == best


def test_losses_are_compared_seed_by_seed(convergence: Record) -> None:
    rows = by(convergence, "problem", "optimizer")
    ours, baseline = rows["lm", "lion8bit"], rows["lm", "lion"]
    differences = [a - b for a, b in zip(ours["test_loss"], baseline["test_loss"], strict=True)]
    assert ours["paired"]["mean"] == pytest.approx(sum(differences) / 2)
    assert baseline["std_error"] == pytest.approx(abs(baseline["test_loss"][0] - baseline["test_loss"][1]) / 2)
    excess = ours["mean"] - baseline["mean"]
    within = abs(excess) <= baseline["std_error"]
    assert ours["verdict"] == ("within" if within else "worse" if excess > 0 else "better")
    assert 0 <= ours["paired"]["p"] <= 1


def test_bf16_weights_rounded_to_nearest_stall(convergence: Record) -> None:
    rows = by(convergence, "problem", "optimizer")
    assert rows["weights", "nearest"]["of_fp32_gain"] < 0.2 and rows["weights", "nearest"]["frozen"] > 0.5
    assert rows["weights", "stochastic"]["frozen"] < 0.5


# ---- Step time -------------------------------------------------------------------------------------------------------


def test_step_time_reports_every_contender(tmp_path: Path) -> None:
    options = ["--model", "64M", "--dtype", "fp32", "bf16", "--skip", "torchao", "compiled-lion", "bitsandbytes"]
    record = run_quick("step_time", tmp_path, *options)
    rows = by(record, "table", "dtype", "optimizer")
    for dtype, size in (("fp32", 14.0625), ("bf16", 8.0625)):
        ours = rows["step", dtype, "lion8bit"]
        assert ours["bytes_per_parameter"] == pytest.approx(size) and ours["time_over_ours"] == 1
        assert ours["extra_bytes"] < 1e6 < rows["step", dtype, "portable"]["extra_bytes"] < 64e6
    for (table, *_), row in rows.items():
        if table == "step":
            assert row["status"] in ("measured", "extrapolated") and row["bandwidth"] > 0
            assert row["ns_per_parameter"] > 0 and row["time_over_ours"] > 0
    assert ("step", "bf16", "lion8bit-stochastic") in rows and ("step", "fp32", "lion8bit-stochastic") not in rows
    verdicts = {goal["goal"]: goal["met"] for goal in record["goals"]}
    assert verdicts["torch.compile'd fp32 Lion, time over ours"] is None, "nothing was measured"
    assert verdicts["lion8bit, extra bytes of a step"] is True
    assert isinstance(verdicts["lion8bit, share of the ceiling in fp32"], bool)


# ---- Footprint -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def footprint(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The quick footprint."""
    return run_quick("footprint", tmp_path_factory.mktemp("footprint"))


def test_state_takes_one_byte_and_a_scale_per_block(footprint: Record) -> None:
    rows = by(footprint, "table", "model", "optimizer")
    for model in ("64M", "gpt2", "minilm"):
        assert rows["state", model, "lion8bit"]["whole_blocks"] == 1 + 4 / 128
        assert rows["state", model, "lion"]["whole_model"] == 4
        assert rows["state", model, "adamw"]["whole_model"] > 7.99


def test_steps_allocate_no_tensors(footprint: Record) -> None:
    rows = by(footprint, "table", "dtype", "optimizer")
    for dtype in ("float32", "bfloat16"):
        assert rows["allocations", dtype, "lion8bit"]["tensor_bytes_per_step"] == 0
        assert rows["allocations", dtype, "lion"]["tensor_bytes_per_step"] > 0, "the counter sees nothing"


def test_import_is_light(footprint: Record) -> None:
    imported = by(footprint, "table")["import"]
    assert imported["forbidden"] == [] and imported["new_packages"] == ["lion8bit"]


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_split_and_as_planned(tmp_path: Path) -> None:
    options = ["--case", "full", "limit", "--contender", "adamw", "lion8bit-release"]
    record = run_quick("memory", tmp_path, *options, "--plot", str(tmp_path / "memory.png"))
    rows = by(record, "case", "optimizer")
    adamw, ours = rows["full", "adamw"], rows["full", "lion8bit-release"]
    assert adamw["gradients"] == adamw["weights"] == ours["weights"] and ours["gradients"] == 0
    assert adamw["state"] > 1.99 * adamw["weights"] and ours["state"] < 0.55 * ours["weights"]
    assert (adamw["peak_in"], ours["peak_in"]) == ("step", "backward")
    for row in (adamw, ours):
        # Temporaries of AdamW's step are not planned.
        assert row[row["peak_in"]] == pytest.approx(row["planned"], rel=0.08)
        if sys.platform == "linux":
            assert row["process"] > 0
    assert rows["limit", "adamw"]["status"] == "out of memory"


@pytest.mark.parametrize("case", ["lora", "activations"])
def test_memory_where_the_optimizer_hardly_matters(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = script("memory", monkeypatch)
    row = memory.measure(memory.QUICK_CASES[case], "lion8bit")
    assert row["status"] == "measured" and row["state"] < 0.08 * row[row["peak_in"]]
    assert row[row["peak_in"]] == pytest.approx(row["planned"], rel=0.06)


# ---- Overhead --------------------------------------------------------------------------------------------------------


def test_overhead_leaves_the_kernel_out(tmp_path: Path) -> None:
    rows = by(run_quick("overhead", tmp_path, "--tensors", "20"), "gradients", "optimizer")
    for gradients in ("kept", "new", "from backward"):
        ours = rows[gradients, "lion8bit-no-kernel"]
        assert ours["goal_us"] == pytest.approx(62) and ours["met"] == (ours["us"]["min"] <= 62)
        assert {(gradients, key) for key in ("lion8bit", "adamw-fused", "foreach-mul")} < rows.keys()
    assert all(row["us"]["repeats"] == 10 for row in rows.values())


# ---- The command lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_examples(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        script(name, monkeypatch).main()
    text = capsys.readouterr().out
    assert "examples:" in text and f"python benchmarks/{name}.py" in text
    assert "--json" in text and "--quick" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_committed_results_are_of_the_schema(name: str) -> None:
    text = (BENCHMARKS / "results" / f"{name}-cpu.json").read_text()
    record = json.loads(text)
    assert list(record)[:4] == ["command", "machine", "versions", "date"] and record["rows"]
    assert text.count("\n") < 300 and len(text) < 100_000


@pytest.mark.skipif(shutil.which("valgrind") is None or shutil.which("g++") is None, reason="needs valgrind and g++")
def test_instructions(tmp_path: Path) -> None:
    """The counts are those of whole vectors of work: more than one instruction per element at four lanes, not 100."""
    path = tmp_path / "instructions.json"
    assert "instructions per element" in run_script("instructions", "--quick", "--json", str(path))
    for counts in json.loads(path.read_text())["instructions_per_element"].values():
        assert 1 < counts["fp32"] < 100
