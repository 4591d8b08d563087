"""Tests the demo: its runs, table, picture, command line and errors, and the pretrained model that it fine-tunes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lion8bit import Lion8bit
from lion8bit.tools import demo
from lion8bit.tools.cli import main, try_to_write
from lion8bit.tools.demo.bytelm import CHECKPOINT, ByteLM, ByteLMConfig
from lion8bit.tools.demo.report import OptimizerResult, conclude
from lion8bit.tools.demo.run import fastest_threads, fine_tune, learning_rate_share
from lion8bit.tools.demo.task import Task, load_task
from lion8bit.tools.memory import state_bytes, tensors_in

pytest.importorskip("matplotlib", reason="needs the extra named demo")
Console = pytest.importorskip("rich.console", reason="needs the extra named demo").Console

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
STEPS = 2
REPOSITORY = Path(__file__).parent.parent
SMALL = ByteLMConfig(width=128, layers=1, heads=2, context=32)


@pytest.fixture(scope="module")
def results() -> demo.Results:
    """A demo of a few steps of a small model with two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lion8bit.tools.demo.task.load_pretrained", lambda: ByteLM(SMALL))
        return demo.run_demo(steps=STEPS, batch_size=1, eval_windows=2, seeds=2, device="cpu")


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command line in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lion8bit", *arguments])
    try:
        return main() or 0  # type: ignore[func-returns-value]
    except SystemExit as stop:
        return int(stop.code or 0)


# ---- The pretrained model ----------------------------------------------------------------------------------


def test_checkpoint_is_small_and_pretrained() -> None:
    assert CHECKPOINT.stat().st_size < 4_000_000
    task = load_task(None, None, CPU, eval_windows=4)
    assert task.parameters == 1_017_216 and task.held_out_loss(4) < 3.5
    task.model.load_state_dict(ByteLM().state_dict())
    assert task.held_out_loss(4) == pytest.approx(8, abs=0.3)  # a uniform guess over 256 bytes costs 8 bits


def test_model_is_causal() -> None:
    model = ByteLM(SMALL)
    tokens = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] ^= 1
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


# ---- The runs ----------------------------------------------------------------------------------------------


def test_every_optimizer_starts_alike(results: demo.Results) -> None:
    rows = [row for row in results.rows if row.unavailable is None]
    assert {row.loss_before for row in rows} == {rows[0].loss_before}
    first = [{row.runs[seed].train_loss[0] for row in rows if row.key != "none"} for seed in range(2)]
    assert len(first[0]) == len(first[1]) == 1 and first[0] != first[1], "seeds must give different batches"


def test_rows_are_complete(results: demo.Results) -> None:
    assert [row.key for row in results.rows] == [*demo.LABELS]
    assert results.rows[0].loss_after == results.rows[0].loss_before and results.rows[0].optimizer_ms is None
    for row in results.rows[1:]:
        if row.unavailable is not None:
            assert row.key == "bitsandbytes"
            continue
        assert [run.seed for run in row.runs] == [0, 1] and row.loss_after_spread is not None
        for run in row.runs:
            assert len(run.train_loss) == STEPS and run.held_out_steps == [0, *range(1, STEPS + 1)]
            assert len(run.held_out_loss) == len(run.held_out_steps)
            assert all(map(math.isfinite, run.train_loss + run.held_out_loss)) and len({*run.held_out_loss}) > 1
            assert run.optimizer_ms is not None and run.optimizer_ms > 0
        assert row.checkpoint_bytes == pytest.approx(row.runs[0].state_bytes, rel=0.05)
    size = {row.key: row.state_bytes_per_param for row in results.rows}
    assert size["none"] == 0 and 1 < size["lion8bit"] < 1.1
    assert (size["adamw"], size["lion"]) == pytest.approx((8, 4), rel=1e-3)


def test_runs_are_reproducible() -> None:
    tokens = torch.randint(256, (400,), generator=torch.Generator().manual_seed(0))
    task = Task(ByteLM(SMALL), "model", "text", tokens[:300], tokens[None, 300:333], "byte")
    steps: list[int] = []

    def train(seed: int) -> list[float]:
        optimizer = Lion8bit(task.trained, lr=1e-3)
        return fine_tune(task, optimizer, 3, 2, seed, lambda step, loss: steps.append(step)).train_loss

    assert train(0) == train(0) != train(1) and steps == 3 * [1, 2, 3]


def test_state_is_counted_within_wrappers_and_once() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    momentum, codes = torch.zeros(10), torch.zeros(8, 8, dtype=torch.int8)
    optimizer = Lion8bit([torch.nn.Parameter(torch.zeros(1))])
    optimizer.state = {
        0: {"a": TwoTensor(momentum, momentum.clone()), "b": torch.nn.Parameter(torch.zeros(3)), "step": 1},
        1: {"a": momentum, "nested": {"codes": [codes]}},
    }
    assert state_bytes(optimizer) == 2 * 40 + 12 + 64
    holder = type("Quantized", (), {"__module__": "flashoptim.optimizers"})()
    holder._quantized, holder._scales = torch.zeros(64, dtype=torch.int8), torch.zeros(2, dtype=torch.float16)
    assert sum(tensor.nbytes for tensor in tensors_in({"exp_avg": holder, "step": 1})) == 64 + 4


@pytest.mark.parametrize("missing", [True, False])
def test_bitsandbytes_failure_becomes_its_row(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with_the_second_seed(params: Any, **options: Any) -> Lion8bit:
        seen.append(options)
        if len(seen) == 2:
            raise RuntimeError("no kernel\nmore")
        return Lion8bit(params, **options)

    seen: list[dict[str, Any]] = []
    fake = SimpleNamespace(optim=SimpleNamespace(Lion8bit=fail_with_the_second_seed))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None if missing else fake)
    monkeypatch.setattr("lion8bit.tools.demo.task.load_pretrained", lambda: ByteLM(SMALL))
    results = demo.run_demo(steps=1, batch_size=1, eval_windows=1, seeds=2, device="cpu", lion_lr=0.1)
    assert results.rows[-1].unavailable == ("pip install bitsandbytes" if missing else "RuntimeError: no kernel")
    assert results.rows[-1].runs == [] and results.to_dict()["rows"][-1]["loss_after"] is None
    assert all(options == {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.028} for options in seen)
    assert "bitsandbytes" not in results.conclusion
    assert demo.result_table(results).row_count == len(results.rows)


def test_conclusion_follows_the_figures() -> None:
    figures = {"adamw": (1.2, 8), "lion": (1.5, 4), "lion8bit": (1.49, 1.0), "bitsandbytes": (1.6, 1.0)}
    rows = [
        OptimizerResult(key, state_bytes_per_param=state, loss_before=2.0, loss_after=after)
        for key, (after, state) in figures.items()
    ]
    sentence = conclude(rows, "bits/byte")
    assert "Lion8bit ends 0.0100 bits/byte below fp32 Lion (2.00% of" in sentence
    assert "4.0x less optimizer state than fp32 Lion and 8.0x less than AdamW" in sentence
    assert "bitsandbytes' Lion8bit ends 0.1000 bits/byte above" in sentence


def test_fewer_threads_are_used_where_faster_and_put_back() -> None:
    class SleepyTask:
        device = CPU
        held_out = torch.zeros(1, 2)

        def loss(self, windows: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01 * torch.get_num_threads())
            return windows.sum().requires_grad_()

    torch.set_num_threads(2)
    with fastest_threads(SleepyTask(), batch_size=1):  # type: ignore[arg-type]
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_schedule_warms_up_and_decays() -> None:
    shares = [learning_rate_share(step, 100) for step in (0, 5, 99)]
    assert shares == pytest.approx([0.2, 1, 0.1], abs=0.02)


def test_labels_are_spread_apart() -> None:
    from lion8bit.tools.demo.picture import spread_apart

    assert spread_apart([0.0, 10.0], 1) == [0, 10]
    assert spread_apart([2.0, 1.0, 1.5], 1) == pytest.approx([2.5, 0.5, 1.5], abs=1e-6)


# ---- Hugging Face models -----------------------------------------------------------------------------------


class FakeModel(ByteLM):
    """Has the interface of transformers' models."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.config = SimpleNamespace(context=32, max_position_embeddings=16)

    def forward(self, tokens: torch.Tensor) -> Any:
        assert self.config.use_cache is False
        return SimpleNamespace(logits=super().forward(tokens))


def fake_transformers(model: Any) -> SimpleNamespace:
    """The part of transformers that the demo uses; `model` is called to load one."""
    auto = SimpleNamespace(from_pretrained=lambda folder, **options: model(options))
    words = SimpleNamespace(from_pretrained=lambda folder, **_: lambda text, **_: {"input_ids": [*text.encode()]})
    return SimpleNamespace(AutoModelForCausalLM=auto, AutoTokenizer=words)


def test_hugging_face_models_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(lambda options: FakeModel().eval()))
    (tmp_path / "text.txt").write_text("words " * 100)
    task = load_task(tmp_path, tmp_path / "text.txt", CPU, eval_windows=2)
    assert task.model_name == f"{tmp_path.name}, {task.parameters / 1e6:.4g} M parameters in float32"
    assert (task.window, task.unit, task.text_name, task.model.training) == (17, "nats/token", "text.txt", True)
    assert task.held_out_loss(2) == pytest.approx(math.log(256), abs=0.3)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no config.json\nmore"), r"holds a Hugging Face causal language model, got .*\(no config.json\)$"),
        (ValueError("set trust_remote_code=True"), "if you trust that code, pass --trust-remote-code"),
    ],
)
def test_a_folder_without_a_known_model_is_refused(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: dict[str, bool]) -> None:
        assert options == {"local_files_only": True, "trust_remote_code": False}
        raise error

    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(fail))
    with pytest.raises(demo.DemoInputError, match=message):
        demo.run_demo(model=tmp_path, device="cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(demo.DemoInputError, match="pip install transformers"):
        demo.run_demo(model=tmp_path, device="cpu")


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": Path("absent.txt")}, r"text must be a readable file, got .*absent\.txt"),
        ({"text": Path("empty.txt")}, "text must be at least 2570 tokens long.* got 0; pass a longer file"),
        ({"text": Path("short.txt")}, "text must be at least 2570 tokens long.* got 2559; pass a longer file"),
        ({"device": "toaster"}, "device must be one that this machine has, got 'toaster'"),
        ({"device": "cuda:99"}, "device must be one that this machine has, got 'cuda:99'"),
        ({"device": "meta"}, "device must be one that this machine has, got 'meta'"),
        ({"model": Path("absent"), "device": "cpu"}, "model must be a folder"),
        *(
            ({name: 0}, f"{name} must be at least 1, got 0")
            for name in ("seeds", "steps", "batch_size", "eval_windows")
        ),
    ],
)
def test_bad_input_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(b"a" * 2559)
    with pytest.raises(demo.DemoInputError, match=message):
        demo.run_demo(**options)


# ---- The command line --------------------------------------------------------------------------------------


def test_command_prints_only_json_and_the_package_imports_no_extra(tmp_path: Path) -> None:
    """A separate process, because other tests have imported everything here."""
    arguments = ["lion8bit", "demo", "--steps", "1", "--batch-size", "1", "--eval-windows", "1", "--device", "cpu"]
    code = (
        "import sys, lion8bit; print({'typer', 'rich', 'matplotlib', 'transformers', 'bitsandbytes'} & {*sys.modules}, "
        f"file=sys.stderr); sys.argv = {[*arguments, '--json', '--out', str(tmp_path)]}; "
        "from lion8bit.tools.cli import main; sys.exit(main())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.startswith("set()\n"), done.stderr
    assert "pip install" not in done.stderr, "bitsandbytes misses a package that the demo does not need"
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "demo.json").read_text())
    assert [*printed] == ["setting", "rows", "conclusion", "seconds"] and printed["setting"]["steps"] == 1
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_the_table_and_writes_files(
    results: demo.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**options: Any) -> demo.Results:
        options.pop("on_progress")("lion8bit", 3, "loss")
        given.update(options)
        return results

    given: dict[str, Any] = {}
    monkeypatch.setattr(demo, "run_demo", run)
    folder = tmp_path / "new" / "folder"
    assert run_command(monkeypatch, "demo", "--seeds", "2", "--lion-lr", "0.1", "--out", str(folder)) == 0
    assert (given["seeds"], given["steps"], given["lion_lr"], given["adamw_lr"]) == (2, 80, 0.1, None)
    printed = capsys.readouterr().out
    assert "Lion8bit ends" in printed and all(label in printed for label in demo.LABELS.values())
    assert {path.name for path in folder.iterdir()} == {*demo.FILES}
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(results.to_dict()))


def test_command_reports_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    assert run_command(monkeypatch, "demo", "--text", "absent.txt", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: text must be a readable file")


@pytest.mark.parametrize("out", ["file/folder", "file", "pictures", "records"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_runs(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "pictures" / "demo.png").mkdir(parents=True)
    (tmp_path / "records" / "demo.json").mkdir(parents=True)
    monkeypatch.setattr(demo, "run_demo", None)
    assert run_command(monkeypatch, "demo", "--out", str(tmp_path / out)) == 2
    assert "out must be a folder that can be written to" in capsys.readouterr().err


def test_a_failure_to_write_does_not_lose_the_table(
    results: demo.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(demo, "run_demo", lambda **_: results)
    monkeypatch.setattr(demo, "save_results", full)
    assert run_command(monkeypatch, "demo", "--out", str(tmp_path)) == 2
    printed = capsys.readouterr()
    assert "Lion8bit ends" in printed.out and "No space left on device" in printed.err


def test_trying_to_write_leaves_files_as_they_are(tmp_path: Path) -> None:
    kept, new, pipe = tmp_path / "kept", tmp_path / "folder" / "new", tmp_path / "pipe"
    kept.write_text("text")
    for path in (kept, new):
        try_to_write(path)
    assert kept.read_text() == "text" and not new.exists() and new.parent.is_dir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
        try_to_write(pipe)  # and does not wait for a reader
        assert pipe.exists()
    with pytest.raises(OSError):
        try_to_write(tmp_path)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("benchmarks/step_time.py", ["--json"]),
        ("benchmarks/memory.py", ["--plot"]),
        ("examples/full_finetune.py", ["--shape", "tiny", "--json"]),
        ("examples/full_finetune.py", ["--shape", "tiny", "--save"]),
    ],
)
def test_scripts_try_their_output_first(
    script: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = REPOSITORY / script
    monkeypatch.syspath_prepend(str(path.parent))
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [str(path), *options, str(tmp_path / "file" / "a.png")])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(path.stem).main()
    assert stopped.value.code == 2 and "that can be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "command", "extra"), [("rich", "estimate 7B", "cli"), ("matplotlib", "demo", "demo")]
)
def test_missing_extra_names_the_fix(
    missing: str, command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert run_command(monkeypatch, *command.split()) == 2
    assert capsys.readouterr().err == f'error: {missing} not found; run: pip install "lion8bit[{extra}]"\n'
