"""The examples run at a small scale: a model is fine-tuned fully, its loss falls, and running out of memory is told."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lion8bit.planner import methods

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`examples/full_finetune.py` as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("full_finetune")


@pytest.fixture
def llama(finetune: Any) -> Any:
    """`examples/llama.py` as a module."""
    return importlib.import_module("llama")


def run(finetune: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    """The record of a run on the CPU that succeeds."""
    options = ["--sequence", "64", "--device", "cpu", "--json", str(folder / "record.json")]
    torch.manual_seed(0)
    assert finetune.main([*options, *arguments]) == 0
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


# ---- The model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "count"), [("llama-7b", 6_738_415_616), ("llama3-8b", 8_030_261_248), ("llama-3b", 3_212_749_824)]
)
def test_shapes_have_the_published_sizes(llama: Any, shape: str, count: int) -> None:
    config = llama.SHAPES[shape]
    with torch.device("meta"):
        model = llama.Llama(config)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    assert sum(param.numel() for param in model.parameters()) == count


@pytest.mark.parametrize("tied", [False, True])
def test_saved_models_are_those_of_transformers(llama: Any, tied: bool, tmp_path: Path) -> None:
    model_class = pytest.importorskip("transformers", reason="needs transformers").AutoModelForCausalLM
    config = llama.dataclasses.replace(llama.SHAPES["tiny"], tie_word_embeddings=tied)
    model = llama.build(config, torch.device("cpu"), torch.float32)
    model.save_pretrained(tmp_path)
    theirs = model_class.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())


def test_random_weights_are_made_in_their_dtype(llama: Any) -> None:
    class Widest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and not out.is_meta:
                widest.append(out.numel())
            return out

    widest: list[int] = [0]
    with Widest():
        model = llama.build(llama.SHAPES["tiny"], torch.device("cpu"))
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16} and max(widest) == 0
    assert float(model.lm_head.weight.float().std()) == pytest.approx(0.02, rel=0.05)


# ---- Training -------------------------------------------------------------------------------------------------------


def test_loss_falls_and_the_saved_model_goes_on(finetune: Any, tmp_path: Path, capsys: Any) -> None:
    save = tmp_path / "tuned"
    record = run(finetune, tmp_path, "--shape", "tiny", "--batch", "4", "--lr", "1e-3", "--save", str(save))
    losses = record["losses"]
    assert len(losses) == 20 and losses[0] > 5.4 and sum(losses[-5:]) / 5 < 4
    assert record["parameters"] == 434_816 and record["weight_bytes"] == 2 * 434_816
    assert record["state_bytes"] == pytest.approx(record["parameters"] * (1 + 4 / 128), rel=0.02)
    assert record["planned_bytes"] > record["weight_bytes"] + record["state_bytes"]
    assert record["tokens_per_second"] > 0 and record["out_of_memory"] is None
    assert "planned peak" in capsys.readouterr().out
    pytest.importorskip("transformers", reason="needs transformers")
    resumed = run(finetune, tmp_path, "--model", str(save), "--steps", "2", "--batch", "4")
    assert resumed["losses"][0] < 4.5 and resumed["parameters"] == record["parameters"]


def test_release_and_paging_change_no_bits(finetune: Any, tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--lr", "1e-3", "--steps", "4")
    losses = [run(finetune, tmp_path, *options, *more)["losses"] for more in ([], ["--paged"], ["--no-release"])]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("optimizer", ["adamw", "bitsandbytes"])
def test_others_run_too(finetune: Any, optimizer: str, tmp_path: Path) -> None:
    if optimizer == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    options = ("--shape", "tiny", "--lr", "1e-3", "--steps", "6", "--optimizer", optimizer)
    record = run(finetune, tmp_path, *options)
    assert record["losses"][-1] < record["losses"][0] - 1
    assert run(finetune, tmp_path, *options, "--no-release")["losses"] == record["losses"]


def test_every_planned_row_exists(finetune: Any) -> None:
    assert set(finetune.PLANNED.values()) <= set(methods("bf16"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to limit a CPU run's memory")
def test_running_out_of_memory_is_located(tmp_path: Path) -> None:
    where = tmp_path / "record.json"
    options = ["--shape", "tiny", "--batch", "16", "--device", "cpu", "--memory-limit", "0.1", "--json", str(where)]
    command = [sys.executable, str(EXAMPLES / "full_finetune.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 3, done.stderr[-2000:]
    record = json.loads(where.read_text())
    assert record["out_of_memory"]["where"].startswith("forward pass of step 1") and record["losses"] == []
    assert "OUT OF MEMORY: forward pass of step 1" in done.stdout


def test_the_parameter_of_a_failed_backward_pass_is_named(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lion8bit import Lion8bit

    def fail(self: Lion8bit, param: torch.Tensor, group: dict[str, Any]) -> None:
        if param.shape == (128, 352):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot\nmore")

    monkeypatch.setattr(Lion8bit, "step_param", fail)
    place = ["--shape", "tiny", "--sequence", "64", "--device", "cpu", "--json", str(tmp_path / "record.json")]
    assert finetune.main(place) == 3
    told = json.loads((tmp_path / "record.json").read_text())["out_of_memory"]
    assert told["where"] == ("backward pass of step 1, at or after the gradient of model.layers.1.mlp.down_proj.weight")
    assert told["message"] == "CUDA out of memory. Tried to allocate a lot"


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_interrupted_run_reports_what_it_did(tmp_path: Path) -> None:
    where = tmp_path / "record.json"
    options = ["--shape", "tiny", "--sequence", "64", "--device", "cpu", "--steps", "100000", "--json", str(where)]
    command = [sys.executable, str(EXAMPLES / "full_finetune.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORCE_COLOR": "1", "TTY_INTERACTIVE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None and process.stdout is not None
    shown = b""
    while b"loss" not in shown and process.poll() is None:  # on the progress bar
        shown += process.stderr.read1()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    record = json.loads(where.read_text())
    assert 0 < len(record["losses"]) == len(record["seconds"]) < 100_000
    assert f"of step {len(record['losses']) + 1}" in record["interrupted"] and b"INTERRUPTED: " in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--shape", "tiny", "--steps", "0"],
        ["--shape", "tiny", "--paged", "--optimizer", "adamw"],
        ["--shape", "tiny", "--memory-limit", "0"],
    ],
)
def test_wrong_arguments(finetune: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune.main(arguments)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err


def test_a_text_that_is_too_short(finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("short")
    assert finetune.main(["--shape", "tiny", "--device", "cpu", "--text", str(tmp_path / "short.txt")]) == 2
    assert "text must have at least 2049 tokens" in capsys.readouterr().err
