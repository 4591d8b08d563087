"""Owns converting checkpoint files between optimizers; the formats themselves are in `lion8bit.checkpoints`."""

from __future__ import annotations

import importlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion8bit.checkpoints import convert_state_dict, export_state_dict
from lion8bit.optimizer import Lion8bit

OWN = "lion8bit"
WRAPPERS = ("optimizer", "optimizer_state_dict", "optimizer_states")  # where trainers put the optimizer's state
_SHAPED = ("codes", "momentum", "exp_avg", "state1", "exp_avg::quantized")  # as the parameter is


class ConversionError(ValueError):
    """A file or a name that cannot be converted; the message tells the remedy."""


# Who loads the result: module and class of the optimizer that tells what it keeps in a group, None where
# `export_state_dict` knows that.
PEERS: dict[str, tuple[str, str] | None] = {
    "lion-pytorch": None,
    "timm": None,
    "flashoptim": None,
    "torch-optimi": ("optimi", "Lion"),
    "bitsandbytes": ("bitsandbytes.optim", "Lion8bit"),
}


def convert_file(
    source: Path,
    target: Path,
    to: str = OWN,
    *,
    block_size: int = 128,
    min_8bit_size: int = 4096,
    optim_bits: int = 8,
    force: bool = False,
) -> dict[str, Any]:
    """Converts the optimizer's state in a file of `torch.save`; everything else in it stays as it is.

    The state alone has all that is needed: no model is asked for, as the momentum has the shape of its parameter.

    Args:
        source: holds the ``state_dict()`` of a Lion, itself or under one of `WRAPPERS`. It is read with weights_only,
            so that it cannot run code.
        target: the file to write; it appears complete or not at all.
        to: `OWN` or one of `PEERS`. Peers get the momentum in fp32.
        block_size, min_8bit_size, optim_bits: of `Lion8bit`, where ``to`` is that.
        force: overwrite ``target``.

    Returns:
        ``from``, ``to`` (libraries), ``optimizers``, ``parameters``, ``with_state``, ``elements``, ``bytes_before`` and
        ``bytes_after`` (of the state's tensors).

    Raises:
        ConversionError: the source cannot be read, holds no Lion's state, or the target exists.
    """
    if to != OWN and to not in PEERS:
        raise ConversionError(f"to must be one of {', '.join((OWN, *PEERS))}, got {to!r}")
    if target.exists() and not force:
        raise ConversionError(f"{target} exists already; choose another name, or overwrite it with --force")
    checkpoint = _read(source)
    options = {"block_size": block_size, "min_8bit_size": min_8bit_size, "optim_bits": optim_bits}
    summary: dict[str, Any] = {"from": "", "to": to, "optimizers": 0, "parameters": 0, "with_state": 0, "elements": 0}
    summary |= {"bytes_before": 0, "bytes_after": 0}
    for holder, key in _places(checkpoint):
        before = holder[key]
        try:
            after = _to_own(before, options) if to == OWN else _to_peer(before, to)
        except ValueError as error:
            raise ConversionError(f"{source}: {error}") from error
        except ModuleNotFoundError as error:
            raise ConversionError(f"{to} must be installed for its options, got {error}; pip install {to}") from error
        holder[key] = after
        summary["from"] = _library(before)
        summary["optimizers"] += 1
        summary["parameters"] += sum(len(group["params"]) for group in before["param_groups"])
        summary["with_state"] += len(after["state"])
        summary["elements"] += sum(_shape(state).numel() for state in before["state"].values())
        summary["bytes_before"] += _bytes(before["state"])
        summary["bytes_after"] += _bytes(after["state"])
    if not summary["optimizers"]:
        wrappers = ", ".join(WRAPPERS)
        raise ConversionError(
            f"{source} must hold an optimizer's state_dict(), itself or under {wrappers}, got neither; "
            "save one with torch.save(optimizer.state_dict(), path)"
        )
    _write(checkpoint["checkpoint"], target)
    return summary


def _read(source: Path) -> dict[str, Any]:
    if source.is_dir():
        raise ConversionError(
            f"{source} must be a file of torch.save, got a folder; make one of a distributed checkpoint with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    try:
        return {"checkpoint": torch.load(source, map_location="cpu", weights_only=True)}
    except OSError as error:
        raise ConversionError(f"{source} cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # What torch says first is how to load anything at all, trusted or not.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(". ")[0]
        raise ConversionError(
            f"{source} must be a file of torch.save with tensors and plain values, got something else "
            f"({reason or type(error).__name__}); save the optimizer's state_dict() alone"
        ) from error


def _places(checkpoint: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The container and key of each optimizer's state: the whole file, a known entry, or a list there."""
    whole = checkpoint["checkpoint"]
    if _is_state(whole):
        yield checkpoint, "checkpoint"
    elif isinstance(whole, dict):
        for name in WRAPPERS:
            if _is_state(whole.get(name)):
                yield whole, name
            elif isinstance(whole.get(name), list):
                yield from ((whole[name], i) for i, each in enumerate(whole[name]) if _is_state(each))


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


def _to_own(saved: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    own = all("format_version" in group for group in saved["param_groups"])
    kept = [
        {name: value for name, value in group.items() if own and name not in ("params", "format_version")}
        for group in saved["param_groups"]
    ]
    groups = [{**kept, **options, **group} for kept, group in zip(kept, _parameters(saved), strict=True)]
    return convert_state_dict(saved, Lion8bit(groups))


def _to_peer(saved: dict[str, Any], to: str) -> dict[str, Any]:
    optimizer = Lion8bit(_parameters(saved), optim_bits=32)
    optimizer.load_state_dict(saved)
    peer, found = None, PEERS[to]
    if found is not None:
        peer = getattr(importlib.import_module(found[0]), found[1])(_parameters(saved), lr=1e-4)
    exported = export_state_dict(optimizer, peer)
    names = [group.get("param_names") for group in saved["param_groups"]]
    for group, each in zip(exported["param_groups"], names, strict=True):
        group |= {"param_names": each} if each else {}
    return exported


def _parameters(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of parameters with the shapes of their momentum; empty where there is none, as nothing depends on them."""
    groups = []
    for group in saved["param_groups"]:
        params = []
        for number in group["params"]:
            state = saved["state"].get(number) or {}
            dtype = torch.bfloat16 if "residual" in state else torch.float32
            params.append(torch.empty(_shape(state), dtype=dtype))
        groups.append({"params": params})
    return groups


def _shape(state: dict[str, Any]) -> torch.Size:
    held = {**state, **state.get("__bnb_optimizer_quant_state__", {})}
    return next((held[name].shape for name in _SHAPED if isinstance(held.get(name), Tensor)), torch.Size([0]))


def _library(saved: dict[str, Any]) -> str:
    names = {name for state in saved["state"].values() for name in state}
    if any("format_version" in group for group in saved["param_groups"]):
        return OWN
    if names & {"state1", "__bnb_optimizer_quant_state__"}:
        return "bitsandbytes"
    return "flashoptim" if "exp_avg::quantized" in names else "lion-pytorch, timm or torch-optimi"


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0


def _write(checkpoint: Any, target: Path) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise ConversionError(f"{target} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
