"""Checkpoint files converted by the command line load into the real libraries and step on as before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same
from test_checkpoints import OPTIONS, PEERS, parameters, peer_momentum, step

from lion8bit import Lion8bit, dequantize, quantize, reference
from lion8bit.cli import build_app
from lion8bit.convert import ConversionError, convert_file

CliRunner = pytest.importorskip("typer.testing", reason="needs the extra named cli").CliRunner
KINDS = {"torch-optimi": "optimi", "bitsandbytes": "bitsandbytes Lion8bit", "lion-pytorch": "lion-pytorch"}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), ["convert", *map(str, arguments)])


def saved_by(name: str, path: Path) -> torch.optim.Optimizer:
    """An optimizer that has stepped twice; its state lies in the file."""
    params = parameters()
    optimizer = PEERS[name](params) if name in PEERS else Lion8bit(params, **OPTIONS)
    for seed in range(2):
        step(params, optimizer, seed)
    torch.save(optimizer.state_dict(), path)
    return optimizer


@pytest.mark.parametrize("name", KINDS.values())
def test_into_lion8bit_as_load_state_dict_does(name: str, tmp_path: Path) -> None:
    peer = saved_by(name, tmp_path / "theirs.pt")
    summary = convert_file(tmp_path / "theirs.pt", tmp_path / "ours.pt", block_size=64)
    assert summary["with_state"] == summary["parameters"] == 4 and summary["optimizers"] == 1
    assert summary["elements"] == 70 * 90 + 40 * 131 + 5 + 6000
    wanted, got = Lion8bit(parameters(), block_size=64), Lion8bit(parameters())
    wanted.load_state_dict(peer.state_dict())
    got.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    assert got.param_groups[0]["block_size"] == 64 and got.param_groups[0]["lr"] == OPTIONS["lr"]
    for one, other in zip(got.state.values(), wanted.state.values(), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"step"}:
            assert_same(one[key], other[key], key)


@pytest.mark.parametrize("to", KINDS)
def test_out_of_lion8bit(to: str, tmp_path: Path) -> None:
    ours = saved_by("lion8bit", tmp_path / "ours.pt")
    done = invoke(tmp_path / "ours.pt", tmp_path / "theirs.pt", "--to", to, "--json")
    summary = json.loads(done.stdout)
    assert done.exit_code == 0 and (summary["from"], summary["to"]) == ("lion8bit", to)
    params = parameters()
    peer = PEERS[KINDS[to]](params)
    peer.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True))
    assert peer.param_groups[0]["lr"] == OPTIONS["lr"]
    for param, own in zip(params, ours.param_groups[0]["params"], strict=True):
        assert_same(peer_momentum(peer.state[param]), ours.momentum(own), "momentum")
    step(params, peer, 3)


def test_a_file_of_version_2_becomes_one_of_version_3(tmp_path: Path) -> None:
    """Its narrow matrix, [70, 90], has a scale for each row."""
    ours = saved_by("lion8bit", tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    saved["param_groups"][0]["format_version"] = 2
    codes, scales = reference.encode(ours.momentum(ours.param_groups[0]["params"][0]), 128)
    saved["state"][0] |= {"codes": codes.contiguous(), "scales": scales}
    torch.save(saved, tmp_path / "a.pt")
    convert_file(tmp_path / "a.pt", tmp_path / "b.pt")
    converted = torch.load(tmp_path / "b.pt", weights_only=True)
    assert converted["param_groups"][0]["format_version"] == 3
    per_row = dequantize(codes.contiguous(), scales)
    for name, wanted in zip(("codes", "scales"), quantize(per_row), strict=True):
        assert_same(converted["state"][0][name], wanted, name)
        assert_same(converted["state"][1][name], saved["state"][1][name], name)


def test_another_block_size_keeps_the_options(tmp_path: Path) -> None:
    params = parameters(torch.bfloat16)
    ours = Lion8bit(params, lr=1e-3, momentum_first=True, cautious=True, weight_rounding="compensated")
    step(params, ours, 0)
    torch.save({"optimizer": ours.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    assert invoke(tmp_path / "a.pt", tmp_path / "b.pt", "--optim-bits", 32).exit_code == 0
    converted = torch.load(tmp_path / "b.pt", weights_only=True)
    assert converted["epoch"] == 3
    wide = Lion8bit(params)
    wide.load_state_dict(converted["optimizer"])
    expected = {**ours.param_groups[0], "optim_bits": 32}
    assert {k: v for k, v in wide.param_groups[0].items() if k != "params"} == {
        k: v for k, v in expected.items() if k != "params"
    }
    for param in params:
        assert_same(wide.momentum(param), ours.momentum(param), "momentum")
        assert_same(wide.state[param]["residual"], ours.state[param]["residual"], "residual")
        assert wide.state[param]["step"] == 1


def test_parameters_without_state_and_lists_of_optimizers(tmp_path: Path) -> None:
    params = parameters()
    peer = PEERS["lion-pytorch"](params)
    step(params[1:3], peer, 0)
    torch.save({"optimizer_states": [peer.state_dict(), peer.state_dict()]}, tmp_path / "lightning.ckpt")
    summary = convert_file(tmp_path / "lightning.ckpt", tmp_path / "ours.ckpt")
    assert (summary["optimizers"], summary["parameters"], summary["with_state"]) == (2, 8, 4)
    for state in torch.load(tmp_path / "ours.ckpt", weights_only=True)["optimizer_states"]:
        ours = Lion8bit(params)
        ours.load_state_dict(state)
        assert set(ours.state) == set(params[1:3])


class Code:
    """What weights_only must not run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_errors_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, out = tmp_path / "good.pt", tmp_path / "out.pt"
    saved_by("lion-pytorch", good)
    adam = torch.optim.AdamW(parameters())
    step(adam.param_groups[0]["params"], adam, 0)
    torch.save(adam.state_dict(), tmp_path / "adam.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    torch.save(Code(), tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, message in {
        "absent.pt": "cannot be read: No such file",
        "adam.pt": "start Lion without their state",
        "weights.pt": "save one with torch.save(optimizer.state_dict(), path)",
        "code.pt": "save the optimizer's state_dict() alone",
        "text.pt": "must be a file of torch.save with tensors and plain values, got something else (Unsupported",
        ".": "dcp_to_torch",
    }.items():
        done = invoke(tmp_path / name, out)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.startswith("error: "), done.output
        assert "ran" not in done.stdout
    assert not out.exists()
    with pytest.raises(ConversionError, match="block_size must be"):
        convert_file(good, out, block_size=100)
    with pytest.raises(ConversionError, match="to must be one of lion8bit, lion-pytorch"):
        convert_file(good, out, "adam")
    out.write_text("mine")
    assert "overwrite it with --force" in invoke(good, out).stderr and out.read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_file(good, out, force=True)
    assert out.read_text() == "mine" and len(list(tmp_path.glob(".out*"))) == 0
    assert invoke(good, out, "--force").exit_code == 0
    assert torch.load(out, weights_only=True)["state"]


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by("lion-pytorch", tmp_path / "theirs.pt")
    monkeypatch.setitem(sys.modules, "optimi", None)
    with pytest.raises(ConversionError, match="pip install torch-optimi"):
        convert_file(tmp_path / "theirs.pt", tmp_path / "out.pt", "torch-optimi")
