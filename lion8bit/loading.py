"""Owns loading optimizer state as it was saved: torch casts every tensor of it to its parameter's dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def keeping_dtypes(
    optimizer: torch.optim.Optimizer,
    names: Collection[str],
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda incoming: incoming,
    place: Callable[[Tensor, Tensor], Tensor] = lambda value, param: value.to(device=param.device, copy=True),
) -> Iterator[None]:
    """Within this context ``optimizer.load_state_dict`` copies state tensors of these names without a cast.

    They are hidden from torch and put in their places afterwards, both by hooks, so that hooks of others see complete
    state before and after.

    Args:
        optimizer: the one that is about to load.
        names: keys of a parameter's state.
        prepare: is given the state dict after the hooks of others, and returns the one to load.
        place: is given a tensor and its parameter, and returns a copy where it belongs.
    """
    hidden: dict[Tensor, dict[str, Tensor]] = {}

    def hide(_: torch.optim.Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
        incoming = prepare(incoming)
        shown = {**incoming, "state": dict(incoming["state"])}
        for number, param, _group in pair(optimizer.param_groups, incoming["param_groups"]):
            if number in shown["state"]:
                state = shown["state"][number]
                hidden[param] = {name: state[name] for name in names if name in state}
                shown["state"][number] = {name: value for name, value in state.items() if name not in names}
        return shown

    def restore(_: torch.optim.Optimizer) -> None:
        for param, tensors in hidden.items():
            for name, value in tensors.items():
                optimizer.state[param][name] = place(value.detach(), param)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(hide),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
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
