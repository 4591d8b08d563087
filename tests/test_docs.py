"""Tests the pages: their Python code runs, and every command and option in them exists."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
from command import run_cli

from lion8bit.tools import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:lion8bit [a-z-]|python (?:benchmarks|examples)/|make [a-z])[^`|#\n]*")


def python_of(page: Path) -> str:
    """The Python blocks of a page, also those in comments, at their line numbers in the page, which errors print."""
    page_lines, lines = page.read_text().splitlines(), []
    for match in FENCE.finditer(page.read_text()):
        if match["language"] == "python":
            begin = page.read_text().count("\n", 0, match.start("text"))
            lines += [""] * (begin - len(lines)) + textwrap.dedent(match["text"]).splitlines()
    assert len(lines) <= len(page_lines)
    return "\n".join(lines)


def commands_of(page: Path) -> list[str]:
    """The commands of a page, in blocks without another language and in code within the text."""
    text = page.read_text()
    shown = [match["text"] for match in FENCE.finditer(text) if match["language"] in ("", "sh", "bash", "console")]
    shown += re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    lines = [line.strip().removeprefix("$ ") for part in shown for line in part.replace("\\\n", " ").splitlines()]
    return [match[0].strip() for line in lines if (match := COMMAND.match(line))]


def examples_of_help() -> dict[str, list[str]]:
    """The examples in the help of each command of `lion8bit`."""
    return {
        name: re.findall(r"^ +(lion8bit .*)$", run.__doc__ or "", re.MULTILINE)
        for name, (run, _) in cli.COMMANDS.items()
    }


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    examples = examples_of_help()
    assert examples.keys() == {"demo", "doctor", "estimate", "convert"}
    for command, lines in examples.items():
        printed = run_cli(capsys, command, "--help").stdout
        assert lines and all(f"\n  {line}\n" in printed for line in lines), printed


def run_python(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.stem)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """Each page runs in a separate process, in an empty folder."""
    (tmp_path / page.name).write_text(python_of(page))
    done = run_python(page.name, tmp_path)
    if missing := re.search(r"^ModuleNotFoundError: No module named '([^.']+)", done.stderr, re.MULTILINE):
        assert missing[1] != "lion8bit", done.stderr
        pytest.skip(f"needs {missing[1]}")
    assert done.returncode == 0, done.stderr


COMMANDS = {command for page in PAGES for command in commands_of(page)}
COMMANDS |= {example.partition(" >")[0] for examples in examples_of_help().values() for example in examples}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_are_known(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command accepts --help after its other arguments, and its help has all of its options."""
    check_command(command, monkeypatch, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "lion8bit bench",
        "lion8bit demo --bench",
        "lion8bit demo --step 3",
        "python benchmarks/sass.py --spills",
        "python benchmarks/sass.py --arch 91",
    ],
)
def test_unknown_commands_are_found(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        check_command(command, monkeypatch, capsys)


def check_command(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """AssertionError if the command or one of its options does not exist."""
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    start = partial(runpy.run_path, str(ROOT / words[0]), run_name="__main__")
    if program == "lion8bit":
        start = partial(cli.main, [*words, "--help"])
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    monkeypatch.syspath_prepend((ROOT / words[0]).parent)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        start()
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", printed.out), f"{option} is not in the help of {command}"


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!--\n```python\na = 1\n```\n-->\ntext `lion8bit demo --steps 3` and ``\n- item\n\n"
        "  ```python\n  assert a == 2\n  ```\n\n```\nmake test  # all\nlion8bit doctor \\\n  --json\n```\n"
        "```toml\nlion8bit none\n```\n"
    )
    assert python_of(page) == "\n\na = 1\n\n\n\n\n\n\nassert a == 2"
    assert commands_of(page) == ["make test", "lion8bit doctor    --json", "lion8bit demo --steps 3"]
    (tmp_path / "page.py").write_text(python_of(page))
    assert 'page.py", line 10' in run_python("page.py", tmp_path).stderr
