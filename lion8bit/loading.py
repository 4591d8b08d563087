"""Owns what saved state may hold, and loading it as it was saved: torch casts every tensor to its parameter's dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lion8bit.layout import MIN_SCALE, MOMENTUM_LIMIT, memory_order
from lion8bit.sharding import local

_PIECE = 1 << 20  # elements that are looked at at a time
_STEP_LIMIT = 1 << 62  # counts are int64 on devices

# ---- What is legal ---------------------------------------------------------------------------------------------------


def check_structure(saved: Any) -> None:
    """Raises ValueError unless a state dict has the dicts and lists that torch's optimizers save."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        raise ValueError(f"state_dict must be a dict with a dict named state, got {_kind(saved)}")
    groups = saved.get("param_groups")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"param_groups must be a list of dicts, got {_kind(groups)}")
    for place, group in enumerate(groups):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, (list, tuple)) or not all(isinstance(number, (int, str)) for number in params):
            raise ValueError(f"param_groups[{place}] must be a dict with a list of numbers or names as its params")
        for number in params:
            state = saved["state"].get(number, {})
            if not isinstance(state, Mapping):
                raise ValueError(f"state of a parameter must be a dict, got {_kind(state)} (parameter {number})")


def check_numbers(groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where saved groups give one number to several of the parameters, who would share its state."""
    owners: dict[Any, Tensor] = {}
    for number, param, _saved in pair(groups, saved_groups):
        if owners.setdefault(number, param) is not param:
            with naming(number, param):
                raise ValueError("param_groups must give each parameter a number of its own, got one twice")


def check_tensor(name: str, value: Any) -> None:
    """Raises ValueError unless a value of a parameter's state is a dense tensor of real numbers that can be read."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {_kind(value)}")
    tensor = local(value)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"{name} must be a dense tensor of real numbers, got {tensor.dtype} {tensor.layout}")
    if tensor.is_meta or (tensor.numel() and not tensor.data_ptr()):
        raise ValueError(f"{name} must hold data, got a tensor without memory on {tensor.device}")
    if memory_order(tensor) is None:
        raise ValueError(
            f"{name} must be dense, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
            "save its .contiguous()"
        )


def step_count(value: Any) -> int:
    """A saved update count as an int: other optimizers count in floats and in tensors of one element.

    Raises:
        ValueError: it is not a whole number, or negative.
    """
    number = value
    if isinstance(value, Tensor):
        held = local(value)
        number = held.item() if held.numel() == 1 and not held.is_meta and held.layout == torch.strided else None
    if isinstance(number, (int, float)) and 0 <= number < _STEP_LIMIT and number == int(number):
        return int(number)
    got = repr(number) if isinstance(number, (int, float)) else _kind(value)
    raise ValueError(f"step must be a whole number of updates, at least 0, got {got}")


def check_momentum(momentum: Tensor) -> None:
    """Raises ValueError unless all of a tensor is finite and in the range of the format."""
    bad = _first_not(lambda piece: piece.abs() < MOMENTUM_LIMIT, momentum)
    if bad is not None:
        raise ValueError(f"momentum must be finite and below 2^127 in magnitude, got {bad}")


def check_scales(scales: Tensor) -> None:
    """Raises ValueError unless all scales are such as the format has: 0, or in [2^-100, 2^127), with any dither."""
    bad = _first_not(lambda piece: (piece == 0) | (piece >= MIN_SCALE) & (piece < MOMENTUM_LIMIT), scales)
    if bad is not None:
        raise ValueError(f"scales must be 0 or in [2^-100, 2^127), got {bad}")


def check_codes(codes: Tensor) -> None:
    """Raises ValueError where codes are none of the format, which has those from -127 to 127."""
    bad = _first_not(lambda piece: piece >= -127, codes)
    if bad is not None:
        raise ValueError(f"codes must be in [-127, 127], got {bad:.0f}")


def _first_not(legal: Callable[[Tensor], Tensor], tensor: Tensor) -> float | None:
    """The first element that is not legal, or None."""
    order = memory_order(tensor)
    flat = (tensor if order is None or tensor.dim() < 2 else tensor.permute(*order)).detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].float()
        passed = legal(piece)
        if not bool(passed.all()):
            return float(piece[~passed][0])
    return None


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# ---- Loading ---------------------------------------------------------------------------------------------------------


@contextmanager
def naming(number: Any, param: Tensor | None = None) -> Iterator[None]:
    """Within this context a ValueError names the parameter, by the number that a saved state gives to it."""
    try:
        yield
    except ValueError as error:
        shape = "" if param is None else f", shape {tuple(param.shape)}"
        raise ValueError(f"{error} (parameter {number}{shape})") from error


@contextmanager
def keeping_dtypes(
    optimizer: torch.optim.Optimizer,
    names: Collection[str],
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda incoming: incoming,
    place: Callable[[Tensor, Tensor], Tensor] = lambda value, param: value.to(device=param.device, copy=True),
) -> Iterator[None]:
    """Within this context ``optimizer.load_state_dict`` copies state tensors of these names without a cast.

    They are hidden from torch and put in their places afterwards, both by hooks, so that hooks of others see complete
    state before and after. All copies are made before anything of the optimizer is replaced, and what raises leaves it
    with the state and the groups that it had.

    Args:
        optimizer: the one that is about to load.
        names: keys of a parameter's state.
        prepare: is given the state dict after the hooks of others, and returns the one to load.
        place: is given a tensor and its parameter, and returns a copy where it belongs.
    """
    copies: dict[Tensor, dict[str, Tensor]] = {}

    def hide(_: torch.optim.Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
        incoming = prepare(incoming)
        shown = {**incoming, "state": dict(incoming["state"])}
        for number, param, _group in pair(optimizer.param_groups, incoming["param_groups"]):
            if number in shown["state"]:
                state = incoming["state"][number]
                # The kernels read memory, which torch's lazy negation has not reached.
                copies[param] = {
                    name: place(state[name].detach().resolve_neg(), param) for name in names if name in state
                }
                shown["state"][number] = {name: value for name, value in state.items() if name not in names}
        return shown

    def restore(_: torch.optim.Optimizer) -> None:
        for param, tensors in copies.items():
            optimizer.state[param].update(tensors)

    before = optimizer.state, optimizer.param_groups
    hooks = [
        optimizer.register_load_state_dict_pre_hook(hide),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    except BaseException:
        optimizer.state, optimizer.param_groups = before
        raise
    finally:
        for hook in hooks:
            hook.remove()


def pair(
    groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """The number that a saved state gives to a parameter, that parameter, and its saved group.

    Groups that do not match are left to torch, which refuses them before it changes anything.
    """
    for group, saved in zip(groups, saved_groups, strict=False):
        for param, number in zip(group["params"], saved["params"], strict=False):
            yield number, param, saved
