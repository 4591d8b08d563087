"""Runs the examples at a small scale: full fine-tuning, its record, and where it stopped."""

from __future__ import annotations

import importlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lion8bit import estimate

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


def test_shapes_have_the_published_sizes(llama: Any) -> None:
    sizes = {"llama-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "llama-3b": 3_212_749_824}
    sizes |= {"qwen3-4b": 4_022_468_096, "tinyllama-1.1b": 1_100_048_384, "smollm-135m": 134_515_008, "tiny": 434_816}
    with torch.device("meta"):
        models = {name: llama.Llama(config) for name, config in llama.SHAPES.items()}
    assert {name: sum(param.numel() for param in model.parameters()) for name, model in models.items()} == sizes


@pytest.mark.parametrize(("shape", "name"), [("llama3-8b", "llama-3-8b"), ("qwen3-4b", "qwen3-4b")])
def test_shapes_have_the_plan_of_the_named_model(llama: Any, shape: str, name: str) -> None:
    with torch.device("meta"):
        model = llama.Llama(llama.SHAPES[shape])
    assert estimate(model, chunked_loss=True).rows == estimate(name, chunked_loss=True).rows


QWEN3 = {"model_type": "qwen3", "head_dim": 64}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, QWEN3], ids=["llama", "tied", "qwen3"])
def test_saved_models_are_those_of_transformers(llama: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model_class = pytest.importorskip("transformers", reason="needs transformers").AutoModelForCausalLM
    config = llama.dataclasses.replace(llama.SHAPES["tiny"], **changes)
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


def test_the_record_and_the_saved_model(finetune: Any, tmp_path: Path, capsys: Any) -> None:
    save = tmp_path / "tuned"
    record = run(finetune, tmp_path, "--shape", "tiny", "--batch", "2", "--steps", "3", "--save", str(save))
    assert len(record["losses"]) == len(record["seconds"]) == 3 and len({*record["losses"]}) == 3
    assert record["parameters"] == 434_816 and record["weight_bytes"] == 2 * 434_816
    assert record["state_bytes"] == pytest.approx(record["parameters"] * (1 + 4 / 128), rel=0.02)
    assert record["planned_bytes"] > record["weight_bytes"] + record["state_bytes"]
    assert record["tokens_per_second"] > 0 and record["out_of_memory"] is record["interrupted"] is None
    assert "planned  " in capsys.readouterr().out
    pytest.importorskip("transformers", reason="needs transformers")
    theirs = run(finetune, tmp_path, "--model", str(save), "--steps", "1", "--batch", "2")
    assert theirs["parameters"] == record["parameters"] and theirs["losses"][0] != record["losses"][0]


def test_release_and_paging_change_no_bits(finetune: Any, tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--lr", "1e-3", "--steps", "4")
    losses = [run(finetune, tmp_path, *options, *more)["losses"] for more in ([], ["--paged"], ["--no-release"])]
    assert losses[0] == losses[1] == losses[2]


def test_4_bits_with_a_chunked_loss(finetune: Any, tmp_path: Path, capsys: Any) -> None:
    options = ("--shape", "tiny", "--steps", "3", "--bits", "4")
    whole, chunked = (run(finetune, tmp_path, *options, *more) for more in ([], ["--chunked-loss"]))
    assert chunked["state_bytes"] == pytest.approx(434_816 * (0.5 + 4 / 64), rel=0.03)
    assert (chunked["bits"], chunked["chunked_loss"], whole["chunked_loss"]) == (4, True, False)
    assert chunked["losses"][0] == pytest.approx(whole["losses"][0], rel=1e-5)
    assert chunked["losses"] == pytest.approx(whole["losses"], rel=0.01)
    assert "lion8bit, 4 bits, gradient release, chunked loss" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "bitsandbytes"])
def test_others_run_too(finetune: Any, optimizer: str, tmp_path: Path) -> None:
    if optimizer == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    options = ("--shape", "tiny", "--steps", "3", "--optimizer", optimizer)
    losses = run(finetune, tmp_path, *options)["losses"]
    assert len({*losses}) == 3 and run(finetune, tmp_path, *options, "--no-release")["losses"] == losses


def test_the_plan_is_that_of_the_options(finetune: Any, llama: Any) -> None:
    with torch.device("meta"):
        model = llama.Llama(llama.SHAPES["smollm-135m"])
    rows = estimate(model, batch=1, sequence=2048).rows
    expected = {
        "": "lion8bit-release",
        "--paged": "lion8bit-release-host",
        "--no-release": "lion8bit",
        "--bits 4": "lion8bit-4bit-release",
        "--bits 4 --no-release": "lion8bit-4bit",
        "--optimizer flashlion": "flashlion-release",
        "--optimizer adamw --no-release": "adamw",
    }
    for options, key in expected.items():
        settings = finetune.parse(["--shape", "tiny", *options.split()])
        assert finetune.plan(model, settings) == (rows[key].total, rows[key].peak), options
    for options in ("--optimizer adamw", "--bits 4 --paged"):
        assert finetune.plan(model, finetune.parse(["--shape", "tiny", *options.split()])) == (None, None)
    chunked = estimate(model, batch=1, sequence=2048, chunked_loss=True).rows["lion8bit-4bit-release"]
    settings = finetune.parse(["--shape", "tiny", "--bits", "4", "--chunked-loss"])
    assert finetune.plan(model, settings) == (chunked.total, chunked.peak)
    assert chunked.total < rows["lion8bit-4bit-release"].total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to limit a CPU run's memory")
def test_running_out_of_memory_is_located(finetune: Any, tmp_path: Path, capsys: Any) -> None:
    import resource

    record, before = tmp_path / "record.json", resource.getrlimit(resource.RLIMIT_DATA)
    options = ["--shape", "tiny", "--batch", "256", "--device", "cpu", "--memory-limit", "0.1", "--json", str(record)]
    try:
        assert finetune.main(options) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    found = json.loads(record.read_text())
    assert found["out_of_memory"]["where"] == "forward pass of step 1" and found["losses"] == []
    assert "OUT OF MEMORY: forward pass of step 1" in capsys.readouterr().out


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
    found = json.loads((tmp_path / "record.json").read_text())["out_of_memory"]
    assert found["where"] == "backward pass of step 1, at or after the gradient of model.layers.1.mlp.down_proj.weight"
    assert found["message"] == "CUDA out of memory. Tried to allocate a lot"


def test_an_interrupted_run_reports_what_it_did(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupt(text: str) -> None:
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)
        seen.append(text)

    seen: list[str] = []
    monkeypatch.setattr(finetune.Progress, "update", lambda *_, description, **__: interrupt(description))
    options = ["--shape", "tiny", "--sequence", "64", "--device", "cpu", "--json", str(tmp_path / "record.json")]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        assert finetune.main(options) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["losses"]) == len(record["seconds"]) == 2 and seen == [f"loss {record['losses'][0]:.3f}"]
    assert record["interrupted"] == "optimizer of step 2" and "INTERRUPTED: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "arguments --model --shape is required"),
        ("--shape tiny --steps 0", "--steps must be positive, got 0"),
        ("--shape tiny --paged --optimizer adamw", "--paged must go with lion8bit or bitsandbytes, got adamw"),
        ("--shape tiny --bits 4 --optimizer adamw", "--bits 4 must go with lion8bit, got adamw"),
        ("--shape tiny --memory-limit 0", "--memory-limit must be positive, got 0.0"),
    ],
)
def test_wrong_arguments(finetune: Any, arguments: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune.main(arguments.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_text_that_is_too_short(finetune: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "short.txt").write_text("short")
    assert finetune.main(["--shape", "tiny", "--device", "cpu", "--text", str(tmp_path / "short.txt")]) == 2
    assert "text must have at least 2049 tokens" in capsys.readouterr().err
