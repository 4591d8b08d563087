"""Loading of state dicts: their structure, and state tensors that keep their dtypes, which torch would cast."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lion8bit.layout import memory_order
from lion8bit.sharding import is_dtensor
from lion8bit.state import kind_of, momentum_bits


def check_structure(saved: Any) -> None:
    """Raises ValueError unless a state dict has the dicts and lists that torch's optimizers save."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        raise ValueError(f"state_dict must be a dict with a dict named state, got {kind_of(saved)}")
    groups = saved.get("param_groups")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"param_groups must be a list of dicts, got {kind_of(groups)}")
    for place, group in enumerate(groups):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, (list, tuple)) or not all(isinstance(number, (int, str)) for number in params):
            raise ValueError(f"param_groups[{place}] must be a dict with a list of numbers or names as its params")
        for number in params:
            state = saved["state"].get(number, {})
            if not isinstance(state, Mapping):
                raise ValueError(f"state of a parameter must be a dict, got {kind_of(state)} (parameter {number})")


def check_numbers(groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where saved groups give one number to several of the parameters, who would share its state."""
    owners: dict[Any, Tensor] = {}
    for number, param, _saved in pair(groups, saved_groups):
        if owners.setdefault(number, param) is not param:
            with naming(number, param):
                raise ValueError("param_groups must give each parameter a separate number, got one twice")


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
                tensors = {name: state[name] for name in names if isinstance(state.get(name), Tensor)}
                # The kernels read memory, which torch's lazy negation has not reached.
                copies[param] = {name: place(tensor.detach().resolve_neg(), param) for name, tensor in tensors.items()}
                shown["state"][number] = {name: value for name, value in state.items() if name not in tensors}
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


def warn_of_copies(optimizer: torch.optim.Optimizer) -> None:
    """Warns once of all parameters that each step copies, because their state has another order in memory."""
    copied = []
    for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        state = optimizer.state.get(param)
        if state and not is_dtensor(param) and momentum_bits(state) != 4:  # 4 bits have no other order
            order, kept = memory_order(param), state["codes" if "codes" in state else "momentum"]
            if order is not None and order != memory_order(kept):
                copied.append(f"{number}, shape {tuple(param.shape)}")
    if copied:
        warnings.warn(
            f"the loaded state of {len(copied)} parameters has another order in memory than they have, so every "
            "step copies them; load lion8bit.convert_state_dict(state_dict, optimizer) to have it quantized again "
            f"in their order (the first is parameter {copied[0]})",
            stacklevel=3,
        )


def pair(
    groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """The number that a saved state gives to a parameter, that parameter, and its saved group.

    Groups that do not match are left to torch, which refuses them before it changes anything.
    """
    for group, saved in zip(groups, saved_groups, strict=False):
        for param, number in zip(group["params"], saved["params"], strict=False):
            yield number, param, saved
