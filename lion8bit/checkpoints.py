"""Owns moving momentum between optimizers: what other Lions save into `Lion8bit`, and its own out to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lion8bit.layout import blocks_per_row
from lion8bit.optimizer import Lion8bit, _new_state, check_version
from lion8bit.reference import dequantize, quantize

_SHARED_OPTIONS = ("lr", "betas", "weight_decay", "initial_lr", "maximize", "decouple_lr")  # mean the same to all
_NOT_MOMENTUM = {"step", "group", "kahan_comp", "error_bits"}
_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"
_BITSANDBYTES_BLOCKS = (256, 2048)  # now and formerly
_FLASHOPTIM_BLOCK = 32


def convert_state_dict(state_dict: dict[str, Any], optimizer: Lion8bit) -> dict[str, Any]:
    """The state of any Lion as ``optimizer`` would have saved it with its present options.

    Known are lion-pytorch, timm, torch-optimi and `lion8bit.Lion` (``exp_avg`` or ``momentum``), bitsandbytes' Lion and
    Lion8bit (``state1``, ``qmap1``, ``absmax1``, wrapped or not), flashoptim's FlashLion (quantized or not) and
    `Lion8bit`. `Lion8bit.load_state_dict` calls this for the state of all but the last. Call it on state of one's own
    to load that with another ``block_size`` or ``optim_bits``: plain loading returns to the saved options.

    The momentum is exact where it is kept in fp32 or already has the wanted format, else within the bound of
    `quantize`. Of each saved group the options lr, betas, weight_decay, initial_lr, maximize and decouple_lr are taken
    over where it has them (betas not into ``momentum_first``, where they mean something else); all others stay as they
    are. What peers keep to correct 16-bit weights (``kahan_comp``, ``error_bits``) is dropped.

    Args:
        state_dict: what the other optimizer's ``state_dict()`` returned; left as it is.
        optimizer: over parameters of the same shapes in the same order.

    Returns:
        What ``optimizer.load_state_dict`` takes.

    Raises:
        ValueError: the state is not a Lion's or does not fit the parameters; the message names the parameter.
    """
    saved_groups = state_dict["param_groups"]
    _check_groups(optimizer.param_groups, saved_groups)
    state = {}
    for number, param, group, saved in _params(optimizer.param_groups, saved_groups):
        theirs = dict(state_dict["state"].get(number, {}))
        theirs |= theirs.pop(_BITSANDBYTES_WRAPPER, {})
        if not theirs:
            continue
        ours = _new_state(param, group)
        residual, saved_residual = ours.pop("residual", None), theirs.pop("residual", None)
        try:
            if "codes" in theirs:
                check_version(saved)
            same_block_size = saved.get("block_size") == group["block_size"]
            if ours.keys() == theirs.keys() and same_block_size and _scales_shape(ours) == _scales_shape(theirs):
                ours = theirs  # to decode and encode it would round it again
            else:
                momentum = _decode(theirs, param, saved)
                ours["step"] = int(theirs.get("step", 0))
                _fill(ours, momentum, group["block_size"])
        except ValueError as error:
            raise ValueError(f"{error} (parameter {number}, shape {tuple(param.shape)})") from error
        if residual is not None:
            ours["residual"] = residual if saved_residual is None else saved_residual
        state[number] = ours
    groups = [_adopt(group, saved) for group, saved in zip(optimizer.param_groups, saved_groups, strict=True)]
    return {**state_dict, "state": state, "param_groups": groups}


def export_state_dict(optimizer: Lion8bit, peer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """The momentum in fp32 under the names that another library's Lion loads.

    Args:
        optimizer: the one to leave.
        peer: the one to enter, over parameters of the same shapes in the same order; its options stay but for those
            that `convert_state_dict` takes over. None suits lion-pytorch, timm and FlashLion, not torch-optimi and
            bitsandbytes, which need more in a group than is known here.

    Returns:
        What ``peer.load_state_dict`` takes. Parameters that have not been stepped have no state. bitsandbytes' Lion8bit
        goes on in fp32 with it: it does not quantize what it loads.

    Raises:
        ValueError: the peer's groups hold other numbers of parameters.
    """
    own_groups = optimizer.state_dict()["param_groups"]
    if peer is None:
        kept = ("params", "param_names", *_SHARED_OPTIONS)
        groups = [{name: own[name] for name in kept if name in own} for own in own_groups]
    else:
        groups = peer.state_dict()["param_groups"]
    _check_groups(own_groups, groups)
    state: dict[int, dict[str, Any]] = {}
    for number, param, _, group in _params(optimizer.param_groups, groups):
        if not optimizer.state.get(param):
            continue
        momentum = optimizer.momentum(param)
        if hasattr(peer, "name2qmap"):  # bitsandbytes
            state[number] = {"state1": momentum.contiguous(), "step": optimizer.state[param]["step"]}
        else:
            state[number] = {"exp_avg": momentum}
        if "kahan_sum" in group:  # torch-optimi, which takes state without kahan_comp for none
            kahan = param.dtype != torch.float32 and group["kahan_sum"] is not False
            state[number]["kahan_comp"] = torch.zeros_like(param) if kahan else param.new_zeros(1)
            group["kahan_sum"] = kahan or group["kahan_sum"]
    for own, group in zip(own_groups, groups, strict=True):
        beta1, beta2 = own["betas"]
        if own["momentum_first"]:
            beta1, beta2 = beta1 * beta2, beta1
        group |= {name: own[name] for name in _SHARED_OPTIONS if name in own and name in group}
        group |= {"beta1": beta1, "beta2": beta2} if "beta1" in group else {"betas": (beta1, beta2)}
        if own["decouple_lr"] and "max_lr" in group:
            group["max_lr"] = own["initial_lr"]
    return {"state": state, "param_groups": groups}


def _adopt(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    taken = {name: saved[name] for name in ("params", "param_names", *_SHARED_OPTIONS) if name in saved}
    if "beta1" in saved:  # torch-optimi
        taken["betas"] = (saved["beta1"], saved["beta2"])
        if saved["decouple_lr"]:
            taken["initial_lr"] = saved["max_lr"]
    if saved.get("momentum_first", False) != group["momentum_first"]:
        taken.pop("betas", None)
    return {**kept, **taken}


def _check_groups(groups: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    ours, theirs = ([len(group["params"]) for group in side] for side in (groups, others))
    if ours != theirs:
        raise ValueError(f"both optimizers must have groups of as many parameters, got {ours} and {theirs}")


def _params(
    groups: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, Tensor, dict[str, Any], dict[str, Any]]]:
    """The other's number of each parameter, the parameter, its group and the other's group."""
    for group, other in zip(groups, others, strict=True):
        for param, number in zip(group["params"], other["params"], strict=True):
            yield number, param, group, other


def _scales_shape(state: dict[str, Any]) -> torch.Size | None:
    return getattr(state.get("scales"), "shape", None)


def _fill(state: dict[str, Any], momentum: Tensor, block_size: int) -> None:
    if "momentum" in state:
        state["momentum"].copy_(momentum)
        return
    in_order = torch.empty_like(state["codes"], dtype=torch.float32).copy_(momentum)
    state["codes"], state["scales"] = quantize(in_order, block_size)


# ---- Formats of the momentum ---------------------------------------------------------------------------------------


def _decode(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> Tensor:
    """The momentum of a parameter's saved state in fp32, on the device where it is."""
    names = frozenset(state) - _NOT_MOMENTUM
    if names not in _DECODERS:
        raise ValueError(
            f"state must be a Lion's momentum under one of {[sorted(known) for known in _DECODERS]}, got "
            f"{sorted(state)}; what other optimizers average is not Lion's momentum, so start Lion without their state"
        )
    momentum = _DECODERS[names](state, group).float()
    if momentum.shape != param.shape:
        raise ValueError(f"momentum must have the parameter's shape, got {tuple(momentum.shape)}")
    if not bool((momentum.abs() < 2.0**127).all()):
        raise ValueError("momentum must be finite and below 2^127 in magnitude, got NaN, inf or larger")
    return momentum


def _plain(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    (name,) = state.keys() & {"exp_avg", "momentum"}
    momentum: Tensor = state[name]
    return momentum


def _own(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    return dequantize(state["codes"], state["scales"], group["block_size"])


def _bitsandbytes(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """``m = qmap1[state1] * absmax1`` per block of the flattened tensor, or fp32 ``state1``."""
    if not group["betas"][1]:
        raise ValueError("state must be a Lion's, got that of bitsandbytes' SGD, RMSprop, LARS or Adagrad; start anew")
    codes = _contiguous("state1", state)  # its kernels for CPU and CUDA walk others in different orders
    if "qmap1" not in state:
        return codes
    blocks = state["absmax1"].numel()
    block_size = next((b for b in _BITSANDBYTES_BLOCKS if blocks_per_row(codes.numel(), b) == blocks), 0)
    return _scaled(state["qmap1"][codes.long()], state["absmax1"], block_size)


def _flashoptim(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """``y = q/127; m = y/(2-|y|) * scale`` per block of the flattened tensor."""
    y = _contiguous("exp_avg::quantized", state).float() / 127
    scales: Tensor = state["exp_avg::scales"]
    if scales.dtype == torch.bfloat16:  # how it saves the bits of fp16 beside bf16 parameters
        scales = scales.view(torch.float16)
    return _scaled(y / (2 - y.abs()), scales.float(), _FLASHOPTIM_BLOCK)


def _contiguous(name: str, state: dict[str, Any]) -> Tensor:
    tensor: Tensor = state[name]
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; start without this state")
    return tensor


def _scaled(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    if not block_size or blocks_per_row(values.numel(), block_size) != scales.numel():
        raise ValueError(f"state must have one scale per block, got {scales.numel()} for {tuple(values.shape)}")
    return (values.view(-1) * scales.repeat_interleave(block_size)[: values.numel()]).view(values.shape)


_DECODERS: dict[frozenset[str], Callable[[dict[str, Any], dict[str, Any]], Tensor]] = {
    frozenset({"exp_avg"}): _plain,
    frozenset({"momentum"}): _plain,
    frozenset({"codes", "scales"}): _own,
    frozenset({"state1"}): _bitsandbytes,
    frozenset({"state1", "qmap1", "absmax1"}): _bitsandbytes,
    frozenset({"exp_avg::quantized", "exp_avg::scales"}): _flashoptim,
}
