"""Checkpoint files converted by the command line load into the real libraries and step on as before."""

from __future__ import annotations

import json
import os
import random
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same
from command import Done, run_cli
from peers import DAMAGED, OPTIONS, PEERS, REFUSED, damaged, parameters, peer_momentum, step
from torch import nn

import lion8bit.tools.convert
from lion8bit import Lion4bit, Lion8bit, convert_state_dict, dequantize, quantize, reference
from lion8bit.tools.convert import ConversionError, convert_file

KINDS = {"torch-optimi": "optimi", "bitsandbytes": "bitsandbytes Lion8bit", "lion-pytorch": "lion-pytorch"}


Invoke = Callable[..., Done]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    return partial(run_cli, capsys, "convert")


def saved_by(name: str, path: Path) -> torch.optim.Optimizer:
    """An optimizer that has stepped twice; its state lies in the file."""
    params = parameters()
    own = {"lion8bit": Lion8bit, "lion4bit": Lion4bit}
    optimizer = PEERS[name](params) if name in PEERS else own[name](params, **OPTIONS)
    for seed in range(2):
        step(params, optimizer, seed)
    torch.save(optimizer.state_dict(), path)
    return optimizer


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", KINDS.values())
def test_into_lion8bit_as_load_state_dict_does(name: str, bits: int, tmp_path: Path) -> None:
    peer = saved_by(name, tmp_path / "theirs.pt")
    options: dict[str, Any] = {"optim_bits": 4} if bits == 4 else {"block_size": 64}
    summary = convert_file(tmp_path / "theirs.pt", tmp_path / "ours.pt", **options)
    assert summary["with_state"] == summary["parameters"] == 4 and summary["optimizers"] == 1
    assert summary["elements"] == 70 * 90 + 40 * 131 + 5 + 6000
    wanted, got = Lion8bit(parameters(), **options), Lion8bit(parameters())
    wanted.load_state_dict(peer.state_dict())
    got.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    assert got.param_groups[0]["optim_bits"] == bits and any("codes" in state for state in got.state.values())
    assert got.param_groups[0]["block_size"] == 64 and got.param_groups[0]["lr"] == OPTIONS["lr"]
    for one, other in zip(got.state.values(), wanted.state.values(), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"step"}:
            assert_same(one[key], other[key], key)


@pytest.mark.parametrize("name", ["lion4bit", "lion8bit"])
@pytest.mark.parametrize("to", KINDS)
def test_out_of_lion8bit(to: str, name: str, tmp_path: Path, invoke: Invoke) -> None:
    ours = saved_by(name, tmp_path / "ours.pt")
    done = invoke(tmp_path / "ours.pt", tmp_path / "theirs.pt", "--to", to, "--json")
    summary = json.loads(done.stdout)
    assert done.exit_code == 0 and (summary["from"], summary["to"]) == ("lion8bit", to)
    assert summary["elements"] == 70 * 90 + 40 * 131 + 5 + 6000
    params = parameters()
    peer = PEERS[KINDS[to]](params)
    peer.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True))
    assert peer.param_groups[0]["lr"] == OPTIONS["lr"]
    for param, own in zip(params, ours.param_groups[0]["params"], strict=True):
        assert_same(peer_momentum(peer.state[param]), ours.momentum(own), "momentum")
    step(params, peer, 3)


LAYOUTS_OF_FILES = {
    "odd rows": lambda: torch.randn(50, 131),
    "narrow rows": lambda: torch.randn(999, 5),
    "vector": lambda: torch.randn(4999),
    "image": lambda: torch.randn(32, 16, 3, 3),
    "channels last": lambda: torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last),
    "small": lambda: torch.randn(3, 5),
}


@pytest.mark.parametrize("target", [4, 8, 32])
@pytest.mark.parametrize("source", [4, 8, 32])
def test_between_bits_as_convert_state_dict_does(source: int, target: int, tmp_path: Path, invoke: Invoke) -> None:
    """Without a model, whatever shape and order its parameters have; only 4 bits do not keep the order."""
    torch.manual_seed(0)
    params = [nn.Parameter(make().bfloat16()) for make in LAYOUTS_OF_FILES.values()]
    ours = Lion8bit(params, lr=1e-3, weight_rounding="compensated", optim_bits=source)
    step(params, ours, 0)
    torch.save(ours.state_dict(), tmp_path / "a.pt")
    done = invoke(tmp_path / "a.pt", tmp_path / "b.pt", "--optim-bits", target)
    assert done.exit_code == 0, done.stderr
    wanted, got = (Lion8bit(params, weight_rounding="compensated", optim_bits=target) for _ in range(2))
    wanted.load_state_dict(convert_state_dict(ours.state_dict(), wanted))
    with warnings.catch_warnings():
        if source != 4:  # a file does not say the order that 4-bit codes had
            warnings.simplefilter("error")
        else:
            warnings.simplefilter("ignore")
        got.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    assert got.param_groups[0]["block_size"] == (64 if target == 4 else 128)
    for name, param in zip(LAYOUTS_OF_FILES, params, strict=True):
        assert got.state[param].keys() == wanted.state[param].keys()
        assert got.state[param]["step"] == 1
        assert_same(got.state[param]["residual"], wanted.state[param]["residual"], f"residual of {name}")
        if (source, target, name) != (4, 8, "channels last"):  # blocks in another order
            assert_same(got.momentum(param), wanted.momentum(param), f"momentum of {name}")
    step(params, got, 1)


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
    assert converted["param_groups"][0]["format_version"] == 4
    per_row = dequantize(codes.contiguous(), scales)
    for name, wanted in zip(("codes", "scales"), quantize(per_row), strict=True):
        assert_same(converted["state"][0][name], wanted, name)
        assert_same(converted["state"][1][name], saved["state"][1][name], name)


def test_another_block_size_keeps_the_options(tmp_path: Path, invoke: Invoke) -> None:
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


def test_errors_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
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
        assert done.exit_code == 2 and message in done.stderr and done.stderr.startswith("error: "), done
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
    assert out.read_text() == "mine" and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert invoke(good, out, "--force").exit_code == 0
    assert torch.load(out, weights_only=True)["state"]


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by("lion-pytorch", tmp_path / "theirs.pt")
    monkeypatch.setitem(sys.modules, "optimi", None)
    with pytest.raises(ConversionError, match="pip install torch-optimi"):
        convert_file(tmp_path / "theirs.pt", tmp_path / "out.pt", "torch-optimi")


# ---- Kahan sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", ["lion8bit", "torch-optimi"])
def test_optimi_goes_on_with_kahan_sums(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The dtype is not in the file. 16-bit weights that lose steps without sums have to keep them."""
    old = parameters(dtype)
    first = Lion8bit(old, lr=1e-5) if source == "lion8bit" else PEERS["optimi"](old)
    step(old, first, 1)
    torch.save(first.state_dict(), tmp_path / "ours.pt")
    convert_file(tmp_path / "ours.pt", tmp_path / "theirs.pt", "torch-optimi")
    params = parameters(dtype)
    peer = PEERS["optimi"](params)
    peer.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True))
    for param, own in zip(params, old, strict=True):
        momentum = first.momentum(own) if isinstance(first, Lion8bit) else first.state[own]["exp_avg"]
        assert_same(peer.state[param]["exp_avg"], momentum.to(dtype), "momentum")
    peer.param_groups[0]["lr"] = 1e-5
    before = [param.detach().clone() for param in params]
    for seed in range(40):
        step(params, peer, seed % 2)
    moved = sum(int((param != start).sum()) for param, start in zip(params, before, strict=True))
    assert moved > 0.1 * sum(param.numel() for param in params)
    assert all(peer.state[param]["kahan_comp"].any() == (dtype != torch.float32) for param in params)


def test_the_order_in_memory_is_kept(tmp_path: Path) -> None:
    params = [nn.Parameter(torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last))]
    for name, make in (("theirs", PEERS["lion-pytorch"]), ("ours", lambda p: Lion8bit(p, lr=1e-3))):
        optimizer = make(params)
        step(params, optimizer, 1)
        torch.save(optimizer.state_dict(), tmp_path / f"{name}.pt")
        convert_file(tmp_path / f"{name}.pt", tmp_path / "out.pt", block_size=64, force=True)
        state = torch.load(tmp_path / "out.pt", weights_only=True)["state"][0]
        assert state["codes"].stride() == params[0].stride() and state["scales"].shape == (1, 1, 32, 3)


# ---- Damaged files ---------------------------------------------------------------------------------------------------


def assert_converts_or_says(source: Path) -> bool:
    """Whether it converts; what cannot be converted ends in `ConversionError` and leaves no file behind."""
    done = []
    for to in ("lion8bit", "torch-optimi"):
        target = source.parent / "out.pt"
        try:
            convert_file(source, target, to, block_size=64)
        except ConversionError:
            done.append(False)
        else:
            done.append(True)
            target.unlink()
        assert [path.name for path in source.parent.iterdir()] == [source.name]
    return any(done)


@pytest.mark.parametrize("case", [*DAMAGED, *REFUSED])
def test_damaged_state_is_not_converted(case: str, tmp_path: Path) -> None:
    if case == "freed codes":  # torch saves no such tensor
        return
    saved = damaged(case)[0] if case in DAMAGED else REFUSED[case][0]()
    torch.save(saved, tmp_path / "in.pt")
    whole = case in ("shape", "groups")  # only beside the parameters something is wrong
    assert assert_converts_or_says(tmp_path / "in.pt") == whole


@pytest.mark.parametrize("sizes", [(2**20, 2**20), (2**40, 2**40), (90, 70)])
def test_a_shape_that_codes_do_not_have_takes_no_memory(sizes: tuple[int, int], tmp_path: Path) -> None:
    saved_by("lion4bit", tmp_path / "in.pt")
    saved = torch.load(tmp_path / "in.pt", weights_only=True)
    saved["state"][0]["shape"] = torch.tensor(sizes)
    torch.save(saved, tmp_path / "in.pt")
    for to in ("lion8bit", "lion-pytorch"):
        with pytest.raises(ConversionError, match=r"codes must be \(.*, got \(70, 45\) \(parameter 0\)"):
            convert_file(tmp_path / "in.pt", tmp_path / "out.pt", to)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in dicts and lists, themselves included."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


JUNK: list[Callable[[], Any]] = [
    lambda: None,
    lambda: 3,
    lambda: -1.5,
    lambda: "text",
    lambda: [],
    lambda: {},
    lambda: {1: 2},
    lambda: [1, "a"],
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.full((70, 90), float("nan")),
    lambda: torch.zeros(70, 90, dtype=torch.int64),
    lambda: torch.zeros(70, 90, dtype=torch.bool),
    lambda: torch.zeros(70, 90, device="meta"),
    lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
    lambda: torch.zeros(70, 90).to_sparse(),
]


@pytest.mark.parametrize("name", ["lion4bit", "lion8bit", "lion-pytorch", "optimi", "bitsandbytes Lion8bit"])
def test_any_value_in_any_place(name: str, tmp_path: Path) -> None:
    """Every part of a state is replaced by each kind of value that has no business there, or left out."""
    saved_by(name, tmp_path / "in.pt")
    paths = list(leaves(torch.load(tmp_path / "in.pt", weights_only=True)))
    random.Random(name).shuffle(paths)
    converted = 0
    for turn, path in enumerate(paths[:25]):
        tree = {"root": torch.load(tmp_path / "in.pt", weights_only=True)}
        holder: Any = tree
        *above, last = ("root", *path)
        for key in above:
            holder = holder[key]
        if isinstance(holder, tuple):
            continue
        (tmp_path / "case").mkdir(exist_ok=True)
        for junk in [*JUNK[turn % 4 :: 4], None]:
            kept = holder[last]
            if junk is None:
                del holder[last]
            else:
                holder[last] = junk()
            torch.save(tree.get("root"), tmp_path / "case" / "in.pt")
            converted += assert_converts_or_says(tmp_path / "case" / "in.pt")
            if junk is None and isinstance(holder, list):
                holder.insert(last, kept)
            else:
                holder[last] = kept
    assert converted


@pytest.mark.parametrize("name", ["lion4bit", "lion8bit"])
def test_cut_and_flipped_bytes(name: str, tmp_path: Path) -> None:
    saved_by(name, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    rng = random.Random(0)
    (tmp_path / "case").mkdir()
    source = tmp_path / "case" / "in.pt"
    pickle_at = whole.index(b"data.pkl")
    for turn in range(60):
        damaged_bytes = bytearray(whole)
        if turn % 3 == 0:
            del damaged_bytes[rng.randrange(len(whole)) :]
        else:
            for _ in range(rng.choice([1, 3, 30])):
                at = rng.randrange(len(whole)) if turn % 3 == 1 else pickle_at + rng.randrange(2500)
                damaged_bytes[at] ^= 1 << rng.randrange(8)
        source.write_bytes(damaged_bytes)
        assert_converts_or_says(source)


def test_memory_that_runs_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by("lion-pytorch", tmp_path / "in.pt")

    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory\nframe #0")

    monkeypatch.setattr(lion8bit.tools.convert, "convert_state_dict", fail)
    with pytest.raises(ConversionError, match=r"cannot be converted: .*not enough memory$"):
        convert_file(tmp_path / "in.pt", tmp_path / "out.pt")


# ---- What is written -------------------------------------------------------------------------------------------------

on_posix = pytest.mark.skipif(os.name == "nt", reason="modes, links and pipes of POSIX")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@on_posix
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask: int, expected: int, tmp_path: Path) -> None:
    saved_by("lion-pytorch", tmp_path / "in.pt")
    before = os.umask(umask)
    try:
        convert_file(tmp_path / "in.pt", tmp_path / "out.pt")
        assert mode(tmp_path / "out.pt") == expected
        (tmp_path / "out.pt").chmod(0o646)
        convert_file(tmp_path / "in.pt", tmp_path / "out.pt", force=True)
        assert mode(tmp_path / "out.pt") == 0o646  # an existing file keeps its own
    finally:
        os.umask(before)


@on_posix
def test_links_are_followed_and_nothing_but_files_is_written(tmp_path: Path) -> None:
    source, link, real = tmp_path / "in.pt", tmp_path / "link", tmp_path / "elsewhere" / "real.pt"
    saved_by("lion-pytorch", source)
    real.parent.mkdir()
    link.symlink_to(real)
    with pytest.raises(ConversionError, match="exists already"):
        convert_file(source, link)  # also where it leads nowhere yet
    for _ in range(2):
        convert_file(source, link, force=True)
        assert link.is_symlink() and torch.load(real, weights_only=True)["state"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "to pipe"):
        for force in (False, True):
            with pytest.raises(ConversionError, match="must be a regular file" if force else "exists already"):
                convert_file(source, tmp_path / name, force=force)
    with pytest.raises(ConversionError, match="must be a regular file"):
        convert_file(tmp_path / "pipe", tmp_path / "out.pt")
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode) and (tmp_path / "to pipe").is_symlink()
    with pytest.raises(ConversionError, match="cannot be written: No such file"):
        convert_file(source, tmp_path / "absent" / "out.pt")


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by("lion-pytorch", tmp_path / "in.pt")

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConversionError, match="cannot be written: PytorchStreamWriter"):
        convert_file(tmp_path / "in.pt", tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]
