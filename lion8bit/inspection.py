"""Reports on an optimizer's parameters and state: memory, weights that rounding keeps still, weights in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lion8bit.layout import DTYPES
from lion8bit.reference import from_compensated, to_bfloat16, to_compensated, to_float16
from lion8bit.sharding import as_part_of, check_placement, local
from lion8bit.state import STATE_TENSORS, is_compensated, is_paged, new_state, with_residual

_CHUNK = 1 << 22  # elements that are converted to fp32 at a time

Groups = Sequence[dict[str, Any]]
States = dict[Tensor, Any]


def frozen_fraction(groups: Groups, states: States, rates: Sequence[float | Tensor]) -> float:
    """See `Lion8bit.frozen_fraction`."""
    frozen, total = 0, 0
    for group, rate in zip(groups, map(float, rates), strict=True):
        for param in filter(_holds_trained_data, group["params"]):
            flat, residual = local(param).detach().reshape(-1), states.get(param, {}).get("residual")
            below = None if residual is None else local(residual).reshape(-1)
            for start in range(0, flat.numel(), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                value = _fp32(flat[chunk], None if below is None else below[chunk].to(flat.device))
                moved = [_rounded(value + step, param.dtype, group["weight_rounding"]) for step in (rate, -rate)]
                frozen += int(((moved[0] == value) & (moved[1] == value)).sum())
            total += flat.numel()
    return frozen / total if total else 0.0


def fp32_weights(model: nn.Module, states: States) -> dict[str, Tensor]:
    """See `Lion8bit.fp32_weights`."""
    weights = model.state_dict()
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.dtype in DTYPES and param.dtype != torch.float32:
            shard, residual = local(param).detach(), local(states.get(param, {}).get("residual"))
            value = _fp32(shard, None if residual is None else residual.to(shard.device))
            weights[name] = as_part_of(param, value, param.shape)
    return weights


def load_fp32_weights(model: nn.Module, weights: Mapping[str, Any], groups: Groups, states: States) -> None:
    """See `Lion8bit.load_fp32_weights`."""
    present = model.state_dict()
    if present.keys() != weights.keys():
        missing, unknown = sorted(present.keys() - weights.keys()), sorted(weights.keys() - present.keys())
        raise ValueError(f"weights must have the names of model.state_dict(), got {unknown} and lack {missing}")
    for name, value in present.items():
        if isinstance(value, Tensor) and getattr(weights[name], "shape", None) != value.shape:
            got = getattr(weights[name], "shape", type(weights[name]).__name__)
            raise ValueError(f"weights[{name!r}] must have the shape {tuple(value.shape)}, got {got}")
    owners = {param: group for group in groups for param in group["params"]}
    rounded = dict(weights)
    residuals: dict[Tensor, Tensor] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad and param in owners and is_compensated(param, owners[param]):
            check_placement(f"weights[{name!r}]", weights[name], param)
            high, residuals[param] = to_compensated(local(weights[name]).to(param.device, torch.float32))
            rounded[name] = as_part_of(param, high, param.shape)
    model.load_state_dict(rounded)
    for owner, residual in residuals.items():
        state, group = states.get(owner), owners[owner]
        states[owner] = state = with_residual(state, owner, group) if state else new_state(owner, group)
        local(state["residual"]).copy_(residual)


def memory_report(groups: Groups, states: States, buffer_bytes: int) -> dict[str, float]:
    """See `Lion8bit.memory_report`."""
    owners = {param: group for group in groups for param in group["params"]}
    trained = [param for group in groups for param in group["params"] if param.requires_grad]
    stepped = [param for group in groups for param in group["params"] if states.get(param)]
    held = {param: sum(_nbytes(states[param].get(name)) for name in STATE_TENSORS) for param in stepped}
    state_bytes = sum(held.values())
    count = sum(local(param).numel() for param in stepped)
    return {
        "parameters": sum(local(param).numel() for param in trained),
        "parameter_bytes": sum(map(_nbytes, trained)),
        "gradient_bytes": sum(_nbytes(param.grad) for param in trained),
        "state_bytes": state_bytes,
        "state_bytes_per_parameter": state_bytes / count if count else 0.0,
        "paged_bytes": sum(held[param] for param in stepped if is_paged(param, owners[param])),
        "buffer_bytes": buffer_bytes,
    }


def _fp32(param: Tensor, residual: Tensor | None) -> Tensor:
    return param.float() if residual is None else from_compensated(param, residual)


def _rounded(x: Tensor, dtype: torch.dtype, weight_rounding: str) -> Tensor:
    """What a parameter of this dtype keeps of its fp32 value; all of it in expectation where rounding is stochastic."""
    if dtype == torch.float32 or weight_rounding in ("auto", "stochastic"):
        return x
    if weight_rounding == "compensated":
        return from_compensated(*to_compensated(x))
    return (to_bfloat16 if dtype == torch.bfloat16 else to_float16)(x, None).float()


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_meta else local(tensor).numel() * tensor.element_size()


def _holds_trained_data(param: Tensor) -> bool:
    """Whether a parameter is trained and its weights can be read in this process."""
    if not param.requires_grad or param.dtype not in DTYPES or param.is_meta:
        return False
    piece = local(param)
    plain = type(piece).__torch_dispatch__ is Tensor.__torch_dispatch__  # a wrapper's storage is empty, or of others
    return plain and (not piece.numel() or piece.untyped_storage().nbytes() > 0)
