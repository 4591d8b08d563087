"""Without a C++ compiler the wheel is pure Python, holds the CUDA source, imports, and steps in plain torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lion8bit

ROOT = Path(__file__).parents[1]

STEP = """
import sys, warnings
sys.path[:0] = sys.argv[1:]
import lion8bit, torch
assert lion8bit.__file__.startswith(sys.argv[1]), lion8bit.__file__
param = torch.ones(5000, requires_grad=True)
param.grad = torch.ones(5000)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lion8bit.Lion8bit([param], lr=0.5).step()
assert bool((param == 0.5).all())
assert any("without a C++ compiler" in str(w.message) for w in caught), caught
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


def test_wheel_without_a_compiler_is_pure(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lion8bit/csrc/cuda_kernel.cu", "lion8bit/csrc/block_math.h", "lion8bit/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp", ".dll", ".json", ".png"))]
    assert not [name for name in names if "benchmarks" in name]


def test_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    folder = metadata.rpartition("/")[0]
    assert f"\nVersion: {lion8bit.__version__}\n" in archive.read(metadata).decode()
    assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "lion8bit=lion8bit.tools.cli:main" in archive.read(f"{folder}/entry_points.txt").decode().replace(" ", "")
    assert {name.split("/")[0] for name in archive.namelist()} == {"lion8bit", folder}


def test_workflows_run_what_the_makefile_offers() -> None:
    offered = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = [path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    commands = [command for text in workflows for command in re.findall(r"run: (.*)", text)]
    assert len(commands) > 5
    for command in commands:
        assert command == "choco install make --no-progress" or re.match(r"make (\S+)", command)[1] in offered, command


def test_it_imports_and_steps(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # -S keeps the environment's own lion8bit, which has the kernel, out of the way.
    command = [sys.executable, "-S", "-c", STEP, str(tmp_path), str(Path(torch.__file__).parents[1])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
