"""Converts checkpoint files between optimizers; the formats themselves are in `lion8bit.checkpoints`."""

from __future__ import annotations

import importlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion8bit.checkpoints import SHAPED, convert_state_dict, export_state_dict, parts_of
from lion8bit.files import write_whole
from lion8bit.layout import check_block_size, packed_shape
from lion8bit.loading import check_structure, naming
from lion8bit.optimizer import Lion8bit
from lion8bit.state import check_tensor, momentum_bits, saved_shape

OWN = "lion8bit"
WRAPPERS = ("optimizer", "optimizer_state_dict", "optimizer_states")  # where trainers put the optimizer's state


class ConversionError(ValueError):
    """A file or a name that cannot be converted; the message says how to fix it."""


# Libraries that can load the result. Module and class of an optimizer that defines the options of a group;
# None where `export_state_dict` knows them.
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
    block_size: int | None = None,
    min_8bit_size: int = 4096,
    optim_bits: int = 8,
    force: bool = False,
) -> dict[str, Any]:
    """Converts the optimizer's state in a file of `torch.save`; everything else in it stays as it is.

    No model is needed, because the state has the shape of its parameter.

    Args:
        source: holds the ``state_dict()`` of a Lion, itself or under one of `WRAPPERS`. It is read with weights_only,
            so that it cannot run code.
        target: the file to write; it appears complete or not at all. A new file gets the permissions of the umask, one
            that ``force`` overwrites keeps its own. A symbolic link is followed.
        to: `OWN` or one of `PEERS`. Peers get the momentum in fp32.
        block_size, min_8bit_size, optim_bits: of `Lion8bit`, where ``to`` is that.
        force: overwrite ``target``.

    Returns:
        ``from``, ``to`` (libraries), ``optimizers``, ``parameters``, ``with_state``, ``elements``, ``bytes_before`` and
        ``bytes_after`` (of the state's tensors).

    Raises:
        ConversionError: the source cannot be read, holds no Lion's state, or is damaged; the target exists, is not a
            regular file, or cannot be written.
    """
    if to != OWN and to not in PEERS:
        raise ConversionError(f"to must be one of {', '.join((OWN, *PEERS))}, got {to!r}")
    _check_target(target, force)
    checkpoint = _read(source)
    options = {"block_size": block_size, "min_8bit_size": min_8bit_size, "optim_bits": optim_bits}
    library, total = "", Counter[str]()
    for holder, key in _places(checkpoint):
        before = holder[key]
        after = holder[key] = _converted(before, source, to, options)
        library = _library(before)
        total.update(
            optimizers=1,
            parameters=sum(len(group["params"]) for group in before["param_groups"]),
            with_state=len(after["state"]),
            elements=sum(_elements(state) for state in _states(before)),
            bytes_before=_bytes(before),
            bytes_after=_bytes(after),
        )
    if not total:
        raise ConversionError(
            f"{source} must hold an optimizer's state_dict(), itself or under {', '.join(WRAPPERS)}, got neither; "
            "save one with torch.save(optimizer.state_dict(), path)"
        )
    _check_target(target, force)  # a conversion may take minutes
    try:
        write_whole(Path(os.path.realpath(target)), partial(torch.save, checkpoint["checkpoint"]), keep=True)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise ConversionError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return {"from": library, "to": to, **total}


def _converted(before: Any, source: Path, to: str, options: dict[str, Any]) -> dict[str, Any]:
    try:
        check_structure(before)
        return _to_own(before, options) if to == OWN else _to_peer(before, to)
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from error
    except ImportError as error:
        raise ConversionError(f"{to} must be installed for its options, got {error}; pip install {to}") from error
    except (RuntimeError, MemoryError) as error:
        raise ConversionError(f"{source} cannot be converted: {error}".partition("\n")[0]) from error


def _check_target(target: Path, force: bool) -> None:
    if os.path.lexists(target) and not force:
        raise ConversionError(f"{target} exists already; choose another name, or overwrite it with --force")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ConversionError(f"{target} must be a regular file, got a folder, a pipe or a device; choose another name")


def _read(source: Path) -> dict[str, Any]:
    if os.path.isdir(source):
        raise ConversionError(
            f"{source} must be a file of torch.save, got a folder; make one of a distributed checkpoint with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    if os.path.exists(source) and not os.path.isfile(source):
        raise ConversionError(f"{source} must be a regular file, got a pipe or a device")
    try:
        return {"checkpoint": torch.load(source, map_location="cpu", weights_only=True)}
    except OSError as error:
        raise ConversionError(f"{source} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged files make torch raise almost anything
        # torch's message begins with advice on loading untrusted files; the reason follows.
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
    groups = []
    for group, params in zip(saved["param_groups"], _parameters(saved), strict=True):
        kept = {name: value for name, value in group.items() if own and name != "format_version"}
        groups.append({**kept, **options, **params})
    try:
        optimizer = Lion8bit(groups)
    except TypeError as error:  # of saved options that are no numbers
        raise ValueError(f"{error} (a group of the saved state)") from error
    return convert_state_dict(saved, optimizer)


def _to_peer(saved: dict[str, Any], to: str) -> dict[str, Any]:
    # The file does not say the dtype of the parameters. torch-optimi needs the Kahan sums of 16-bit parameters, or it
    # continues without any; it ignores those of fp32 parameters.
    dtype = torch.bfloat16 if to == "torch-optimi" else torch.float32
    optimizer = Lion8bit(_parameters(saved, dtype), optim_bits=32)
    optimizer.load_state_dict(saved)
    peer, found = None, PEERS[to]
    if found is not None:
        peer = getattr(importlib.import_module(found[0]), found[1])(_parameters(saved, dtype), lr=1e-4)
    exported = export_state_dict(optimizer, peer)
    for group, before in zip(exported["param_groups"], saved["param_groups"], strict=True):
        if before.get("param_names"):
            group["param_names"] = before["param_names"]
    return exported


def _parameters(saved: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Groups of parameters with the shape and strides of their momentum; empty parameters where there is none."""
    groups = []
    for group in saved["param_groups"]:
        params = []
        for number in group["params"]:
            with naming(number):
                state = parts_of(saved["state"].get(number, {}))
                like = torch.bfloat16 if "residual" in state else dtype
                params.append(_parameter(state, group, like))
        groups.append({"params": params})
    return groups


def _parameter(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """A parameter that the state fits; empty where there is none."""
    tensor = _momentum_like(state)
    if momentum_bits(state) != 4:
        return torch.empty_like(tensor, dtype=dtype)
    check_block_size(group.get("block_size"))
    shape = saved_shape(state)
    wanted = packed_shape(shape, group["block_size"])
    if tuple(tensor.shape) != wanted:  # else a damaged shape could ask for any amount of memory
        raise ValueError(f"codes must be {wanted} for a parameter of shape {shape}, got {tuple(tensor.shape)}")
    return torch.empty(shape, dtype=dtype)


def _momentum_like(state: dict[str, Any]) -> Tensor:
    """The tensor of a parameter's state that has the parameter's shape, or its 4-bit codes."""
    for name in SHAPED:
        if name in state:
            check_tensor(name, state[name])
            tensor: Tensor = state[name]
            return tensor
    return torch.empty(0)


def _elements(state: dict[str, Any]) -> int:
    return math.prod(saved_shape(state)) if momentum_bits(state) == 4 else _momentum_like(state).numel()


def _states(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """The state of every parameter that has some."""
    numbers = (number for group in saved["param_groups"] for number in group["params"])
    return [parts_of(saved["state"][number]) for number in dict.fromkeys(numbers) if saved["state"].get(number)]


def _library(saved: dict[str, Any]) -> str:
    names = {name for state in _states(saved) for name in state}
    if any("format_version" in group for group in saved["param_groups"]):
        return OWN
    if "state1" in names:
        return "bitsandbytes"
    return "flashoptim" if "exp_avg::quantized" in names else "lion-pytorch, timm or torch-optimi"


def _bytes(saved: dict[str, Any]) -> int:
    tensors = (value for state in _states(saved) for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
