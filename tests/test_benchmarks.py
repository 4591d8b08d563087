"""Tests the benchmarks: each runs in its quick form, and its JSON says what it must; no test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs the extra named demo")
pytest.importorskip("matplotlib", reason="needs the extra named demo")

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = ("fidelity", "step_time", "footprint")


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
    versions = record["environment"]["versions"]
    assert versions["torch"] and versions["lion8bit"]
    assert record["environment"]["cpu"] and record["environment"]["date"] and record["environment"]["threads"] == 1
    return record, printed


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
    assert printed.count("exactly 0, as it must be") == 2


def test_language_model_of_the_workload_learns(fidelity: tuple[dict[str, Any], str, Path]) -> None:
    facts = fidelity[0]["cases"][0]["facts"]
    assert facts["last_loss"] < facts["first_loss"] - 0.5


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
    record, printed, _ = fidelity
    stall = record["cases"][1]
    for peer, comparison in stall["comparisons"].items():
        rows = stall["formats"]
        assert comparison["no_larger"]
        assert rows[comparison["against"]]["bytes_per_parameter"] <= rows[peer]["bytes_per_parameter"]
        assert comparison["ahead"], peer
    assert "ahead on every criterion in" in printed


def test_fidelity_draws_its_picture(fidelity: tuple[dict[str, Any], str, Path]) -> None:
    assert fidelity[2].read_bytes().startswith(b"\x89PNG")


# ---- Step time -------------------------------------------------------------------------------------------------------


def test_step_time_reports_every_contender(tmp_path: Path) -> None:
    picture = tmp_path / "step_time.png"
    record, printed = run_quick(
        "step_time", tmp_path, "--model", "64M", "--dtype", "fp32", "bf16", "--device", "cpu", "--plot", str(picture)
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
    assert "lion8bit-stochastic" in record["runs"][1]["rows"]
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


# ---- The command lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_teaches(name: str) -> None:
    text = run_script(name, "--help")
    assert "examples:" in text
    assert "--json" in text and "--quick" in text
