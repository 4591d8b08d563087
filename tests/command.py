"""Runs the command line within the process of the tests."""

from typing import NamedTuple

import pytest

from lion8bit.tools.cli import main


class Done(NamedTuple):
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """Runs ``lion8bit`` with these arguments."""
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(code, *capsys.readouterr())
