"""Tests `benchmarks/sass.py`: how it reads machine code, on a listing made by hand, and what the kernel keeps to."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs the extra named demo")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# A loop whose body has a branch for addresses that are not aligned, a slow path with a call, and a predicated store.
LISTING = """
.text.kernel:
        .type           kernel,@function
kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0 EXIT ;
.L_x_0:
        /*0020*/                   IADD3 R2, R2, 0x8, RZ ;
        /*0030*/                   ISETP.NE.AND P1, PT, R0, 0x8, PT ;
        /*0040*/              @!P1 BRA P5, `(.L_x_1) ;
        /*0050*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0080*/              @P2 BRA `(.L_x_3) ;
        /*0090*/                   MUFU.RSQ R5, R4 ;
        /*00a0*/                   FFMA R5, R5, R5, R4 ;
        /*00b0*/                   BRA.U UP1, `(.L_x_4) ;
        /*00c0*/                   IMAD.U32 R5, R5, 0x10000, RZ ;
        /*00d0*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00e0*/                   CALL.REL.NOINC `($slow) ;
        /*00f0*/                   FADD R5, R5, R5 ;
.L_x_4:
        /*0100*/               @P3 STG.E desc[UR4][R2.64], R5 ;
        /*0110*/              @!P4 CALL.REL.NOINC `(.L_x_6) ;
        /*0118*/                   BRA `(.L_x_0) ;
.L_x_6:
        /*0120*/                   EXIT ;
.L_x_5:
        /*0130*/                   BRA `(.L_x_5);
        .type           $slow,@function
$slow:
        /*0140*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0150*/                   RET.REL.NODEC R2 `(kernel) ;
"""
HOT = ["IADD3", "ISETP", "BRA", "LDG", "BRA", "MUFU", "FFMA", "BRA", "STG", "CALL", "BRA"]


@pytest.fixture
def sass(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/sass.py` as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sass")


def test_hot_path_of_a_listing(sass: Any) -> None:
    blocks = sass.parse(LISTING)
    path, around = sass.hot_path(blocks, Counter({("LDG", 16): 1, ("STG", 4): 1}))
    assert [each.name for each in path] == HOT
    assert path[3].opcode == "LDG.E.128" and path[3].access == ("LDG", 16)
    assert path[2].guard == "@!P1" and path[-3].guard == "@P3"
    assert [each.name for each in around] == ["S2R", "EXIT", "EXIT"]
    slow, _ = sass.hot_path(blocks, Counter({("LDG", 1): 1, ("STG", 4): 1}))
    assert [each.name for each in slow] == [*HOT[:3], "LDG", "BRA", *HOT[4:]]
    with pytest.raises(ValueError, match="must have a loop with the accesses"):
        sass.hot_path(blocks, Counter({("LDG", 16): 2, ("STG", 4): 1}))


def test_units_of_a_listing(sass: Any) -> None:
    path, _ = sass.hot_path(sass.parse(LISTING), Counter({("LDG", 16): 1, ("STG", 4): 1}))
    expected = {"issue": 11, "float": 1, "integer": 4, "special": 8, "memory": 16 + 4}
    assert sass.busy(path, sass.CHIPS[90]) == expected
    assert sass.busy(path, sass.CHIPS[75]) == {**expected, "float": 2}


@pytest.mark.parametrize(
    ("registers", "capability", "share"),
    [(32, 90, 1.0), (33, 90, 0.75), (48, 90, 0.625), (64, 75, 1.0), (64, 86, 4 * 8 / 48), (255, 90, 0.125)],
)
def test_occupancy(sass: Any, registers: int, capability: int, share: float) -> None:
    assert sass.occupancy(registers, sass.CHIPS[capability], 256) == share


def test_bytes_of_a_step(sass: Any) -> None:
    assert {name: case.bytes_per_element for name, case in sass.CASES.items()} == {
        "fp32": 14.0625,
        "bf16, nearest": 8.0625,
        "bf16, stochastic": 8.0625,
        "bf16, compensated": 10.0625,
        "bf16, nearest, block 64": 8.125,
        "bf16, nearest, block 256": 8.03125,
        "bf16, nearest, capturable": 8.0625,
        "bf16, stochastic, flags": 8.0625,
    }


def test_cycles_that_the_memory_leaves(sass: Any) -> None:
    card = sass.Card(90, flops=2 * 128 * 1e9, bandwidth=8e9)  # one multiprocessor at 1 GHz, a byte in each cycle of 8
    assert card.cycles(8.0) == 128
    assert sass.Card(80, flops=2 * 64 * 1e9, bandwidth=8e9).cycles(8.0) == 128  # half as many units, as many issues


def test_growth_is_reported(sass: Any) -> None:
    figures = {"instructions_per_element": 40.0, "busy_per_element": 41.0, "registers": 40, "local_memory": 0}
    before = {"90": {"a": figures}}
    now = {"90": {"a": {**figures, "instructions_per_element": 42.0}, "b": figures}, "75": {"a": figures}}
    assert sass.grown(now, before) == []
    now["90"]["a"] = {**figures, "registers": 43, "local_memory": 8}
    assert sass.grown(now, before) == [
        "sm_90, a, registers: 40 -> 43",
        "sm_90, a, local memory: 0 -> 8 bytes",
    ]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cuda", "nvidia")), reason="needs NVRTC and nvdisasm"
)
def test_kernel_is_within_its_budget(tmp_path: Path) -> None:
    """An H200's memory leaves 56 cycles for a bf16 element and 98 for an fp32 one; some are to spare."""
    target = tmp_path / "sass.json"
    command = [sys.executable, BENCHMARKS / "sass.py", "--quick", "--arch", "90", "--json", target]
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Prediction, not a measurement" in done.stdout
    kernels = json.loads(target.read_text())["architectures"]["90"]
    assert kernels["bf16, nearest"]["busy_per_element"] <= 46
    assert kernels["fp32"]["busy_per_element"] <= 46
    for kernel in kernels.values():
        assert kernel["local_memory"] <= 16  # measured faster on an H200 than a kernel without
        assert kernel["occupancy"] >= 0.375
