"""Parameter groups from names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from torch import Tensor, nn


def keep_32bit(model: nn.Module, patterns: str | Sequence[str]) -> list[dict[str, Any]]:
    """Parameter groups that keep fp32 momentum where a name matches, and the optimizer's ``optim_bits`` elsewhere.

    For example ``Lion8bit(keep_32bit(model, ["*embed*", "*.norm"]), lr=1e-4)``.

    Args:
        model: its parameters, each once, in their order.
        patterns: with the wildcards of `fnmatch`, for whole names of parameters (``"head.weight"``) or of modules
            that hold them (``"layers.0"``, ``"*.norm"``); ``*`` also matches dots. One name of a tied
            parameter is enough.

    Returns:
        The group of the others, then the group with ``optim_bits=32``; without those that would be empty.

    Raises:
        ValueError: a pattern matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    unused = set(patterns)
    matched: set[Tensor] = set()
    for name, param in model.named_parameters(remove_duplicate=False):
        holders = [*accumulate(name.split("."), "{}.{}".format)]  # a, a.b, a.b.weight
        hits = {pattern for pattern in patterns if any(fnmatchcase(holder, pattern) for holder in holders)}
        unused -= hits
        if hits:
            matched.add(param)
    if unused:
        names = [name for name, _ in model.named_parameters()]
        raise ValueError(f"patterns must each match a parameter or module, got {sorted(unused)} among {names[:8]}, ...")
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [param for param in params if param not in matched]},
        {"params": [param for param in params if param in matched], "optim_bits": 32},
    ]
    return [group for group in groups if group["params"]]
