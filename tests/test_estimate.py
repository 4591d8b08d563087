"""Tests `lion8bit estimate`: its errors, what it prints, and which code it may run."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command import Done, run_cli
from test_planner import LLAMA, hugging_face
from torch import nn

import lion8bit
from lion8bit import PlanError, estimate, planner
from lion8bit.planner import named

# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("7X", {}, "model must be a count such as 7B.*got '7X'"),
        ("qwen3-5b", {}, "or one of llama-3-8b, .*, qwen3-4b, .*got 'qwen3-5b'"),
        ("0", {}, "model must be a count of 1,000,000 to 100,000,000,000,000"),
        ("-7B", {}, "model must be a count of 1,000,000 to"),
        ("101T", {}, "model must be a count of 1,000,000 to"),
        ("organisation/model", {}, "have to be downloaded first"),
        ("no_such_package.module:factory", {}, "model must be importable.*no_such_package"),
        ("torch.nn:NoSuchThing", {}, "model must be importable.*NoSuchThing"),
        ("torch.nn:Linear", {}, "factory that takes no arguments.*TypeError"),
        ("os:getcwd", {}, "model must be a factory of an nn.Module, got str"),
        (nn.Conv2d(3, 4, 5), {"lora": 4}, "lora must meet a linear layer"),
        ("7B", {"gpus": 0}, "gpus must be at least 1, got 0"),
        ("7B", {"batch": 0}, "batch must be at least 1"),
        ("7B", {"sequence": -1}, "sequence must be at least 1"),
        ("7B", {"lora": 0}, "lora must be at least 1"),
        ("7B", {"dtype": "int8"}, "dtype must be one of bf16, fp16, fp32, got 'int8'"),
        ("7B", {"vram": 0}, "vram must be a positive number of GiB"),
        ("7B", {"reserve": -1}, "reserve must be at least 0 GiB"),
    ],
)
def test_arguments_that_cannot_be_planned(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        estimate(model, **options)


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"folder with a config\.json"):
        estimate(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "transformers", None)
        with pytest.raises(PlanError, match="pip install transformers"):
            estimate(tmp_path)
    pytest.importorskip("transformers", reason="needs transformers")
    for text in ('{"model_type": "no_such_type"}', "{}", "no JSON"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PlanError, match=r"of a type that transformers .* builds.*check model_type"):
            estimate(str(tmp_path / "config.json"))


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command within this process."""
    pytest.importorskip("rich", reason="needs the extra named cli")
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run_cli, capsys, "estimate")


def test_command_prints_table_and_bars(invoke: Callable[..., Done]) -> None:
    done = invoke("7B", "--vram", "24")
    assert done.exit_code == 0
    line = next(line for line in done.stdout.splitlines() if line.startswith(" Lion8bit, release "))
    assert line.split()[2:] == ["13.0", "0.0", "6.7", "0.2", "1.4", "21.1", "fits"]
    assert "█" in done.stdout and "21.1 loss" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


def test_command_prints_only_json(invoke: Callable[..., Done], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra named demo")
    picture = tmp_path / "plan.png"
    done = invoke("1.5B", "--gpus", "2", "--batch", "2", "--sequence", "512", "--no-checkpointing", "--lora", "8",
                  "--json", "--plot", str(picture))  # fmt: skip
    plan = estimate("1.5B", gpus=2, batch=2, sequence=512, checkpointing=False, lora=8)
    assert json.loads(done.stdout) == json.loads(json.dumps(plan.to_dict()))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_factories_of_the_working_directory(
    invoke: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are found, but no module there replaces another."""
    (tmp_path / "my_own_model.py").write_text(
        "import colorsys, sys, torch\nsaw = sys.path[-1]\nassert hasattr(colorsys, 'rgb_to_hsv')\n"
        "def make():\n    return torch.nn.Linear(30, 7)\n"
    )
    (tmp_path / "colorsys.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "my_own_model", raising=False)
    before = list(sys.path)
    done = invoke("my_own_model.make", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 217 == estimate("my_own_model:make").parameters
    assert sys.modules["my_own_model"].saw == str(tmp_path) and sys.path == before
    with pytest.raises(PlanError, match="model must be importable"):
        estimate("my_own_model:absent")
    assert sys.path == before


TRAPS = ("transformers", "matplotlib", "rich", "argparse", "json")


@pytest.mark.parametrize("arguments", [["estimate", "model", "--plot", "a.png"], ["doctor"]])
def test_no_command_runs_modules_of_the_working_directory(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="needs the extra named demo")
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    script = "import lion8bit.tools.cli, sys; sys.argv[0] = 'lion8bit'; lion8bit.tools.cli.main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(lion8bit.__file__).parents[1]), "PYTHONSAFEPATH": ""}
    path = f"import sys; sys.path.remove(''); {script}"  # a script's own folder is there instead
    done = subprocess.run([sys.executable, "-c", path, *arguments], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode < 2, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_module_as_a_command_leaves_the_working_directory_out(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="needs the extra named demo")
    # Modules that lion8bit itself imports come from the working directory all the same, as that happens before.
    (tmp_path / "rich.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('rich')")
    environment = {**os.environ, "PYTHONPATH": str(Path(lion8bit.__file__).parents[1])}
    command = [sys.executable, "-m", "lion8bit", "estimate", "7B"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Llama" in done.stdout and not (tmp_path / "ran").exists()


def code_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with Python code, which leaves a file named "ran" beside it when it is executed."""
    pytest.importorskip("transformers", reason="needs transformers")

    def asked(*_: Any) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    folder.mkdir()
    parts = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(
        json.dumps({**LLAMA, "model_type": "own", "architectures": ["Own"]} | {"auto_map": parts})
    )
    (folder / "own.py").write_text(
        f"open({str(folder.parent / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return folder


def test_code_of_a_model_is_executed_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = code_of_its_own(tmp_path / "model", monkeypatch)
    with pytest.raises(PlanError, match=r"contains its own code; .*--trust-remote-code"):
        estimate(folder)
    from lion8bit.tools import demo

    text = tmp_path / "text.txt"
    text.write_text("words " * 5000)
    with pytest.raises(demo.DemoInputError, match="model must be"):
        demo.run_demo(model=folder, text=text, device="cpu")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    plan = estimate(folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert plan.rows == estimate(hugging_face("llama", tmp_path / "llama")).rows


def test_every_call_that_could_execute_a_models_code_says_whether() -> None:
    root = Path(__file__).parents[1]
    calls = 0
    for file in itertools.chain(*((root / folder).rglob("*.py") for folder in ("lion8bit", "examples", "benchmarks"))):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                calls += 1
                assert "trust_remote_code" in {word.arg for word in node.keywords}, f"{file}:{node.lineno}"
    assert calls == 8


def test_command_reports_bad_input(
    invoke: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = invoke("7B", "--gpus", "0")
    assert done.exit_code == 2 and "error: gpus must be at least 1" in done.stderr
    pytest.importorskip("matplotlib", reason="needs the extra named demo")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(lion8bit.planner, "estimate", None)  # which comes afterwards
    for picture in ("plan.doc", str(Path(__file__) / "plan.png"), str(tmp_path / "folder.png")):
        done = invoke("7B", "--plot", picture)
        assert done.exit_code == 2 and "error: plot must be a .png, .svg or .pdf to write, got" in done.stderr


def test_help_states_the_formula_and_the_names(invoke: Callable[..., Done]) -> None:
    printed = invoke("--help").stdout
    assert "2205.05198" in printed and all(name in printed for name in named.NAMES)
    assert max(map(len, printed.splitlines())) <= 80


def test_command_plans_a_named_model(invoke: Callable[..., Done]) -> None:
    printed = {chunked: invoke("LLaMA-3-8B", "--vram", "24", *chunked).stdout for chunked in ((), ("--chunked-loss",))}
    rows = [
        next(line for line in text.splitlines() if line.startswith(" Lion8bit, 4 bits, release ")).split()
        for text in printed.values()
    ]
    assert [row[-2:] for row in rows] == [["23.1", "no"], ["20.9", "fits"]]
    assert ["chunked loss" in text for text in printed.values()] == [False, True]
    assert max(len(line) for text in printed.values() for line in text.splitlines()) <= 80


def test_planner_is_imported_when_asked_for() -> None:
    code = "import sys, lion8bit; print('lion8bit.planner' in sys.modules, lion8bit.estimate, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False <function estimate") and done.stdout.endswith("False\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lion8bit.no_such_name


# ---- The pages -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
README_ROWS = {
    "AdamW, fp32 weights": "adamw-fp32",
    "AdamW, bf16 state": "adamw",
    "AdamW, 8 bits (bitsandbytes)": "adamw8bit",
    "Lion, fp32 momentum": "lion",
    "FlashLion": "flashlion",
    "FlashLion, gradient release": "flashlion-release",
    "Lion8bit": "lion8bit",
    "Lion8bit, gradient release": "lion8bit-release",
    "Lion8bit, gradient release, momentum in host memory": "lion8bit-release-host",
    "Lion8bit, 4 bits": "lion8bit-4bit",
    "Lion8bit, 4 bits, gradient release": "lion8bit-4bit-release",
}


def cells_of(page: str, heading: str) -> list[list[str]]:
    """The rows of the table of a page whose heading begins so."""
    lines = (ROOT / page).read_text().partition(f"\n| {heading} |")[2].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip(" *`") for cell in row.split("|")[1:-1]] for row in rows]


def test_readme_shows_what_its_command_plans() -> None:
    plan = estimate("llama-3-8b", vram=24, chunked_loss=True)
    assert {key for key in plan.rows if "compensated" not in key and "24" not in key} == {*README_ROWS.values()}
    expected = []
    for label, key in README_ROWS.items():
        row = plan.rows[key]
        sizes = (row.weights, row.gradients or row.transient, row.state, row.total)
        verdict = "fits" if row.fits else "no"
        expected.append([label, *(f"{size / planner.GIB:.1f}" for size in sizes), verdict])
    assert cells_of("README.md", "optimizer | weights") == expected


def test_page_of_the_plan_has_the_named_models() -> None:
    for name, parameters, *sizes in cells_of("docs/memory_plan.md", "name"):
        found = named.NAMED[name]
        assert parameters == f"{estimate(name).parameters:,}"
        counts = (found.layers, found.hidden, f"{found.heads}, {found.key_heads}", found.head, found.inner)
        assert sizes[:-1] == [str(size) for size in (*counts, found.vocabulary)]
        assert [word in sizes[-1] for word in ("tied", "norms", "biases")] == [*found[-3:]]
    assert [row[0] for row in cells_of("docs/memory_plan.md", "name")] == [*named.NAMED]
    for name, tokens, eight, four, chunked in cells_of("docs/memory_plan.md", "model | tokens"):
        plans = [estimate(name, sequence=int(tokens), chunked_loss=choice).rows for choice in (False, True)]
        totals = [rows[f"lion8bit{bits}-release"].total / planner.GIB for rows in plans for bits in ("", "-4bit")]
        assert [eight, four, *chunked.split(", ")] == [f"{total:.1f}" for total in totals]
