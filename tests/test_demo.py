"""Tests the demo: its runs, figures, command line and errors, and the pretrained model that it fine-tunes."""

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

import pytest
import torch

from lion8bit import Lion8bit
from lion8bit.tools import demo
from lion8bit.tools.cli import build_app, main, try_to_write
from lion8bit.tools.demo.bytelm import CHECKPOINT, ByteLM, ByteLMConfig, load_pretrained, save_pretrained

pytest.importorskip("matplotlib", reason="needs the extra named demo")
Console = pytest.importorskip("rich.console", reason="needs the extra named demo").Console
CliRunner = pytest.importorskip("typer.testing", reason="needs the extra named demo").CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
REPOSITORY = Path(__file__).parent.parent
SMALL = ["--steps", str(STEPS), "--batch-size", "1", "--eval-windows", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def results() -> demo.Results:
    """A demo of a few steps with two seeds."""
    return demo.run_demo(steps=STEPS, batch_size=1, eval_windows=2, seeds=2, device="cpu")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


# ---- The pretrained model ----------------------------------------------------------------------------------


def test_checkpoint_is_small() -> None:
    assert CHECKPOINT.stat().st_size < 4_000_000


def test_pretrained_model_predicts_topics_far_better_than_an_untrained_one() -> None:
    task = demo.byte_task(None, torch.device("cpu"), eval_windows=16)
    pretrained = task.held_out_loss(8)
    torch.manual_seed(0)
    task.model.load_state_dict(ByteLM().state_dict())
    untrained = task.held_out_loss(8)
    assert untrained == pytest.approx(8, abs=0.3)  # a uniform guess over 256 bytes costs 8 bits
    assert pretrained < 3.5


def test_model_is_causal() -> None:
    model = load_pretrained()
    tokens = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] ^= 1
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    model = ByteLM(ByteLMConfig(width=16, layers=1, heads=2, context=8))
    save_pretrained(model, tmp_path / "model.pt")
    loaded = load_pretrained(tmp_path / "model.pt")
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name


@pytest.mark.parametrize("sizes", [{"width": 0}, {"width": 20, "heads": 4}])
def test_bad_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="width must be"):
        ByteLMConfig(**sizes)


def test_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 8 long, got 9"):
        ByteLM(ByteLMConfig(width=16, layers=1, heads=2, context=8))(torch.zeros(1, 9, dtype=torch.int64))


# ---- The runs ----------------------------------------------------------------------------------------------


def test_every_optimizer_starts_alike(results: demo.Results) -> None:
    rows = [row for row in results.rows if row.unavailable is None]
    assert {row.loss_before for row in rows} == {rows[0].loss_before}
    for seed in range(2):
        first = {row.runs[seed].train_loss[0] for row in rows if row.key != "none"}
        assert len(first) == 1, f"seed {seed}: first training losses differ: {first}"
    lion = next(row for row in rows if row.key == "lion")
    assert lion.runs[0].train_loss[0] != lion.runs[1].train_loss[0], "seeds must give different batches"


def test_rows_are_complete(results: demo.Results) -> None:
    assert [row.key for row in results.rows] == ["none", "adamw", "lion", "lion8bit", "bitsandbytes"]
    for row in results.rows:
        if row.key == "none":
            assert row.loss_after == row.loss_before
            assert row.optimizer_ms is None
            continue
        if row.unavailable is not None:
            continue
        assert [run.seed for run in row.runs] == [0, 1]
        for run in row.runs:
            assert len(run.train_loss) == STEPS
            assert run.held_out_steps == [0, *range(1, STEPS + 1)]
            assert len(run.held_out_loss) == len(run.held_out_steps)
            assert all(map(math.isfinite, run.train_loss + run.held_out_loss))
            assert run.optimizer_ms is not None
            assert run.optimizer_ms > 0
        assert row.loss_after < row.loss_before
        assert row.loss_after_spread is not None


def test_state_sizes(results: demo.Results) -> None:
    size = {row.key: row.state_bytes_per_param for row in results.rows}
    assert size["none"] == 0
    assert size["adamw"] == pytest.approx(8, rel=1e-3)
    assert size["lion"] == pytest.approx(4, rel=1e-3)
    assert 1 < size["lion8bit"] < 1.1
    checkpoint = {row.key: row.checkpoint_bytes for row in results.rows}
    for row in results.rows:
        if row.runs and row.key != "none":
            assert checkpoint[row.key] == pytest.approx(row.runs[0].state_bytes, rel=0.05)


def test_state_is_counted_within_wrappers_and_once() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    momentum, codes = torch.zeros(10), torch.zeros(8, 8, dtype=torch.int8)
    optimizer = Lion8bit([torch.nn.Parameter(torch.zeros(1))])
    optimizer.state = {
        0: {"a": TwoTensor(momentum, momentum.clone()), "b": torch.nn.Parameter(torch.zeros(3)), "step": 1},
        1: {"a": momentum, "nested": {"codes": [codes]}},
    }
    assert demo.state_bytes(optimizer) == 2 * 40 + 12 + 64
    holder = type("Quantized", (), {"__module__": "flashoptim.optimizers"})()
    holder._quantized, holder._scales = torch.zeros(64, dtype=torch.int8), torch.zeros(2, dtype=torch.float16)
    assert sum(tensor.nbytes for tensor in demo.tensors_in({"exp_avg": holder, "step": 1})) == 64 + 4


def test_bitsandbytes_failure_becomes_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    results = demo.run_demo(steps=1, batch_size=1, eval_windows=1, device="cpu")
    row = results.rows[-1]
    assert row.unavailable == "pip install bitsandbytes"
    assert results.to_dict()["rows"][-1]["loss_after"] is None
    assert "bitsandbytes" not in results.conclusion
    assert demo.result_table(results).row_count == len(results.rows)


def test_figure_and_json_are_written(results: demo.Results, tmp_path: Path) -> None:
    figure, record = demo.save_results(results, tmp_path / "new" / "folder")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert json.loads(record.read_text()) == json.loads(json.dumps(results.to_dict()))


def test_conclusion_follows_the_figures() -> None:
    def row(key: str, after: float, state: float) -> demo.Row:
        return demo.Row(key, state_bytes_per_param=state, loss_before=2.0, loss_after=after)

    rows = [
        row("adamw", 1.2, 8),
        row("lion", 1.5, 4),
        row("lion8bit", 1.49, 1.0),
        row("bitsandbytes", 1.6, 1.0),
    ]
    sentence = demo.conclude(rows, "bits/byte")
    assert "Lion8bit ends 0.0100 bits/byte below fp32 Lion (2.00% of" in sentence
    assert "4.0x less optimizer state than fp32 Lion and 8.0x less than AdamW" in sentence
    assert "bitsandbytes' Lion8bit ends 0.1000 bits/byte above" in sentence


def test_fewer_threads_are_used_where_faster_and_put_back() -> None:
    class SleepyTask:
        device = torch.device("cpu")
        held_out = torch.zeros(1, 2)

        def loss(self, windows: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01 * torch.get_num_threads())
            return windows.sum().requires_grad_()

    torch.set_num_threads(2)
    with demo.fastest_threads(SleepyTask(), batch_size=1):  # type: ignore[arg-type]
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_schedule_warms_up_and_decays() -> None:
    shares = [demo.learning_rate_share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.2)
    assert max(shares) == pytest.approx(1, abs=0.02)
    assert shares[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("places", "gap", "expected"),
    [
        ([0.0, 10.0], 1, [0.0, 10.0]),
        ([5.0, 5.0], 1, [4.5, 5.5]),
        ([2.0, 1.0, 1.5], 1, [2.5, 0.5, 1.5]),
        ([0.0, 1.0, 1.0], 1, [-1 / 3, 2 / 3, 5 / 3]),
    ],
)
def test_labels_are_spread_apart(places: list[float], gap: float, expected: list[float]) -> None:
    assert demo.spread_apart(places, gap) == pytest.approx(expected, abs=1e-6)


# ---- Bad input ---------------------------------------------------------------------------------------------


def test_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoInputError, match=r"text must be a readable file, got .*absent\.txt"):
        demo.run_demo(text=tmp_path / "absent.txt")


@pytest.mark.parametrize("size", [0, 1, 2559])
def test_short_text_is_refused(tmp_path: Path, size: int) -> None:
    short = tmp_path / "short.txt"
    short.write_bytes(b"a" * size)
    with pytest.raises(demo.DemoInputError, match=f"at least 2570 tokens long.* got {size}; pass a longer file"):
        demo.run_demo(text=short)


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta"])
def test_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(demo.DemoInputError, match=f"device must be one that this machine has, got '{device}'"):
        demo.run_demo(device=device)


@pytest.mark.parametrize("name", ["seeds", "steps", "batch_size", "eval_windows"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(demo.DemoInputError, match=f"{name} must be at least 1, got 0"):
        demo.run_demo(**{name: 0})  # type: ignore[arg-type]


def test_model_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoInputError, match="model must be a folder"):
        demo.run_demo(model=tmp_path / "absent", device="cpu")


def test_model_without_transformers_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(demo.DemoInputError, match="pip install transformers"):
        demo.run_demo(model=tmp_path, device="cpu")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoInputError, match="Hugging Face causal language model"):
        demo.run_demo(model=tmp_path, device="cpu")


# ---- The command line --------------------------------------------------------------------------------------


def test_command_prints_only_json(tmp_path: Path) -> None:
    done = run_python("-m", "lion8bit", "demo", *SMALL, "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stderr, "bitsandbytes misses a package that the demo does not need"
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "demo.json").read_text())
    assert {"setting", "rows", "conclusion", "seconds"} <= printed.keys()
    assert printed["setting"]["steps"] == STEPS
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_command_reports_bad_input(tmp_path: Path) -> None:
    done = CliRunner().invoke(build_app(), ["demo", "--text", str(tmp_path / "absent.txt")])
    assert done.exit_code == 2
    assert done.output.startswith("error: text must be a readable file")


@pytest.mark.parametrize("out", ["file/folder", "file", "pictures", "records", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_runs(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if out == "/proc" and not Path(out).is_dir():
        pytest.skip("needs /proc")
    (tmp_path / "file").touch()
    (tmp_path / "pictures" / "demo.png").mkdir(parents=True)
    (tmp_path / "records" / "demo.json").mkdir(parents=True)
    monkeypatch.setattr(demo, "run_demo", None)
    done = CliRunner().invoke(build_app(), ["demo", "--out", str(tmp_path / out)])
    assert done.exit_code == 2 and done.output.startswith("error: out must be a folder that can be written to")


def test_a_failure_to_write_does_not_lose_the_table(
    results: demo.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(demo, "run_demo", lambda **_: results)
    monkeypatch.setattr(demo, "save_results", full)
    done = CliRunner().invoke(build_app(), ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "Lion8bit ends" in done.output and "No space left on device" in done.output


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


@pytest.mark.parametrize("option", ["--json", "--plot", "--save"])
@pytest.mark.parametrize("script", ["benchmarks/step_time.py", "benchmarks/memory.py", "examples/full_finetune.py"])
def test_scripts_try_their_output_first(
    script: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if (option == "--save") != script.startswith("examples") and option != "--json":
        pytest.skip("has no such option")
    path = REPOSITORY / script
    monkeypatch.syspath_prepend(str(path.parent))
    shape = ["--shape", "tiny"] if script.startswith("examples") else []
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [str(path), *shape, option, str(tmp_path / "file" / "a.png")])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(path.stem).main()
    assert stopped.value.code == 2 and "that can be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("typer", [], "cli"),
        ("rich", ["doctor"], "cli"),
        ("typer", ["demo"], "demo"),
        ("matplotlib", ["demo"], "demo"),
        ("matplotlib", ["bench", "speed", "--plot", "a.png"], "bench"),
        ("sklearn", ["bench", "fidelity"], "bench"),
    ],
)
def test_missing_extra_names_the_remedy(
    missing: str,
    arguments: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setattr(sys, "argv", ["lion8bit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f'error: {missing} not found; run: pip install "lion8bit[{extra}]"\n'


def test_table_and_version(results: demo.Results, capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=100).print(demo.result_table(results))
    printed = capsys.readouterr().out
    for row in results.rows:
        assert demo.LABELS[row.key] in printed
    runner = CliRunner()
    assert runner.invoke(build_app(), ["--version"]).output.startswith("lion8bit ")
    helped = runner.invoke(build_app(), ["demo", "--help"])
    assert helped.exit_code == 0
    for option in ("--text", "--model", "--device", "--seeds", "--out", "--json"):
        assert option in helped.output, option


@pytest.mark.parametrize(("words", "offered"), [("lion8bit do", "doctor"), ("lion8bit bench fid", "fidelity")])
def test_the_shell_completes(words: str, offered: str) -> None:
    request = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = {"_LION8BIT_COMPLETE": "complete_bash", **request}
    done = CliRunner().invoke(build_app(), [], prog_name="lion8bit", env=environment)
    assert done.stdout.split() == [offered]


def test_importing_the_package_imports_no_extra() -> None:
    extras = {"typer", "rich", "matplotlib", "transformers", "bitsandbytes"}
    code = f"import sys, lion8bit; print({extras} & set(sys.modules))"
    done = run_python("-c", code)
    assert done.stdout.strip() == "set()", done.stderr
