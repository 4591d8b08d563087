"""Conversion of state between optimizers: what other Lions save into `Lion8bit`'s state, and its state into theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lion8bit.layout import FORMAT_VERSION, blocks_per_row, memory_order
from lion8bit.loading import check_numbers, check_structure, naming
from lion8bit.options import group_hyper
from lion8bit.quantization import check_momentum
from lion8bit.sharding import check_placement, local
from lion8bit.state import (
    check_tensor,
    check_version,
    checked_state,
    fp32_momentum,
    momentum_bits,
    momentum_of,
    new_state,
    quantized,
    step_count,
)

# Mean the same to all.
_SHARED_OPTIONS = ("lr", "betas", "weight_decay", "initial_lr", "maximize", "decouple_lr", "peak_lr")
_NOT_MOMENTUM = {"step", "group", "kahan_comp", "error_bits"}
_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"
_BITSANDBYTES_BLOCKS = (256, 2048)  # now and formerly
_FLASHOPTIM_BLOCK = 32
SHAPED = ("codes", "momentum", "exp_avg", "state1", "exp_avg::quantized")  # as the parameter is, but for 4-bit codes
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def convert_state_dict(state_dict: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of any Lion as ``optimizer`` would have saved it with its present options.

    Known are lion-pytorch, timm, torch-optimi and `lion8bit.Lion` (``exp_avg`` or ``momentum``), bitsandbytes' Lion and
    Lion8bit (``state1``, ``qmap1``, ``absmax1``, wrapped or not), flashoptim's FlashLion (quantized or not) and
    `Lion8bit`. `Lion8bit.load_state_dict` calls this for the state of all but the last. Call it on state of one's own
    to load that with another ``block_size`` or ``optim_bits``, where plain loading returns to the saved options, or
    into parameters with another order in memory, such as channels_last, which would be copied at every step.

    The momentum is exact where it is kept in fp32 or already has the wanted format, else within the bound of
    `quantize`. Of each saved group the options lr, betas, weight_decay, initial_lr, maximize, decouple_lr and peak_lr
    (torch-optimi's max_lr) are taken over where it has them (betas not into ``momentum_first``, where they mean
    something else); all others stay as they are. What peers keep to correct 16-bit weights (``kahan_comp``,
    ``error_bits``) is dropped.

    Args:
        state_dict: what the other optimizer's ``state_dict()`` returned; left as it is.
        optimizer: over parameters of the same shapes in the same order.

    Returns:
        What ``optimizer.load_state_dict`` takes.

    Raises:
        ValueError: the state is not a Lion's, does not fit the parameters or is damaged; the message names the
            parameter.
    """
    check_structure(state_dict)
    saved_groups = state_dict["param_groups"]
    _check_groups(optimizer.param_groups, saved_groups)
    check_numbers(optimizer.param_groups, saved_groups)
    groups = [_adopt(group, saved) for group, saved in zip(optimizer.param_groups, saved_groups, strict=True)]
    for place, (adopted, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        own = "format_version" in saved
        check_saved_group({**optimizer.defaults, "block_size": None, **saved} if own else adopted, place)
    state = {}
    for number, param, group, saved in _params(optimizer.param_groups, saved_groups):
        with naming(number, param):
            theirs = parts_of(state_dict["state"].get(number, {}))
            if theirs:
                state[number] = _converted(theirs, param, group, saved)
    return {**state_dict, "state": state, "param_groups": groups}


def check_saved_group(saved: dict[str, Any], place: int) -> None:
    """Raises ValueError unless the options of a saved group are such as `Lion8bit` accepts, in a known format."""
    try:
        check_version(saved.get("format_version"))
        group_hyper(dict(saved))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # of values that are no numbers, or on "meta"
        raise ValueError(f"{error} (group {place} of the saved state)") from error


def parts_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter's saved state holds, taken out of bitsandbytes' wrapper.

    Raises:
        ValueError: the wrapper is not a dict.
    """
    parts = dict(saved)
    wrapped = parts.pop(_BITSANDBYTES_WRAPPER, {})
    if not isinstance(wrapped, Mapping):
        raise ValueError(f"{_BITSANDBYTES_WRAPPER} must be a dict, got {type(wrapped).__name__}")
    return {**parts, **wrapped}


def _converted(
    theirs: dict[str, Any], param: Tensor, group: dict[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    saved_residual = None
    if "format_version" in saved:
        theirs = checked_state(theirs, param, saved)
        saved_residual = theirs.pop("residual", None)
    elif "codes" in theirs:
        raise ValueError(f"state must have format_version {FORMAT_VERSION}, got None")
    ours = new_state(param, group)
    residual = ours.pop("residual", None)
    same_blocks = "codes" not in ours or saved.get("block_size") == group["block_size"]
    if ours.keys() == theirs.keys() and same_blocks and _order(ours) == _order(theirs):
        ours = theirs  # to decode and encode it would round it again
    else:
        own = "codes" in theirs
        momentum = (momentum_of(theirs, param, saved["block_size"]) if own else _decode(theirs, param, saved)).float()
        check_momentum(local(momentum))
        ours["step"] = step_count(theirs.get("step", 0))
        _fill(ours, momentum, group["block_size"])
    if residual is not None:
        ours["residual"] = residual if saved_residual is None else residual.copy_(saved_residual)
    return ours


def _order(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    return memory_order(local(state["codes" if "codes" in state else "momentum"]))


def export_state_dict(optimizer: torch.optim.Optimizer, peer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """The momentum in fp32 under the names that another library's Lion loads.

    Args:
        optimizer: the one to leave.
        peer: the one to enter, over parameters of the same shapes in the same order; its options stay, except those
            that `convert_state_dict` takes over. None suits lion-pytorch, timm and FlashLion, not torch-optimi and
            bitsandbytes, which need more in a group than is known here.

    Returns:
        What ``peer.load_state_dict`` takes. Parameters that have not been stepped have no state. bitsandbytes' Lion8bit
        goes on in fp32 with it: it does not quantize what it loads.

    Raises:
        ValueError: the peer's groups hold other numbers of parameters, or the state is damaged.
    """
    own_groups = optimizer.state_dict()["param_groups"]
    if peer is None:
        kept = ("params", "param_names", *_SHARED_OPTIONS)
        groups = [{name: own[name] for name in kept if name in own} for own in own_groups]
    else:
        groups = peer.state_dict()["param_groups"]
    _check_groups(own_groups, groups)
    state: dict[int, dict[str, Any]] = {}
    for number, param, own_group, group in _params(optimizer.param_groups, groups):
        if not optimizer.state.get(param):
            continue
        with naming(number, param):
            own_state = checked_state(optimizer.state[param], param, own_group)
        momentum = fp32_momentum(own_state, param, own_group["block_size"])
        if hasattr(peer, "name2qmap"):  # bitsandbytes
            state[number] = {"state1": momentum.contiguous(), "step": own_state["step"]}
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
        if own["decouple_lr"] and "beta1" in group:
            group["max_lr"] = own.get("peak_lr", own["lr"])
    return {"state": state, "param_groups": groups}


def _adopt(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    taken = {name: saved[name] for name in ("params", "param_names", *_SHARED_OPTIONS) if name in saved}
    if "decouple_lr" in saved:
        kept.pop("peak_lr", None)  # of another rate
    if "beta1" in saved:  # torch-optimi
        taken["betas"] = (saved["beta1"], saved.get("beta2"))
        if saved.get("decouple_lr"):
            taken["peak_lr"] = saved.get("max_lr")
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


def _fill(state: dict[str, Any], momentum: Tensor, block_size: int) -> None:
    if "momentum" in state:
        state["momentum"].copy_(momentum)
        return
    bits = momentum_bits(state)
    if bits == 8:
        momentum = torch.empty_like(state["codes"], dtype=torch.float32).copy_(momentum)  # in the parameter's order
    state |= quantized(momentum, block_size, bits)


# ---- Formats of the momentum ---------------------------------------------------------------------------------------


def _decode(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The momentum of another library's state, on the device where it is."""
    names = frozenset(state) - _NOT_MOMENTUM
    if names not in _DECODERS:
        raise ValueError(
            f"state must be a Lion's momentum under one of {[sorted(known) for known in _DECODERS]}, got "
            f"{sorted(map(str, state))}; what other optimizers average is not Lion's momentum, so start Lion without "
            "their state"
        )
    for name in sorted(names):
        check_tensor(name, state[name])
        if name in SHAPED:
            check_placement(name, state[name], param)
            if state[name].shape != param.shape:
                raise ValueError(f"{name} must have the parameter's shape, got {tuple(state[name].shape)}")
    return _DECODERS[names](state, group)


def _plain(state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    (name,) = state.keys() & {"exp_avg", "momentum", "state1"}
    return _of_dtype(name, state, *_FLOATS)


def _bitsandbytes(state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """``m = qmap1[state1] * absmax1`` per block of the flattened tensor, or fp32 ``state1``."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not betas[1]:
        raise ValueError(
            "state must be a Lion's, got that of bitsandbytes' SGD, RMSprop, LARS or Adagrad; start without this state"
        )
    codes = _contiguous("state1", state)  # its kernels for CPU and CUDA walk others in different orders
    if "qmap1" not in state:
        return _plain(state, group)
    values = _of_dtype("qmap1", state, *_FLOATS).to(codes.device)
    if values.shape != (256,):
        raise ValueError(f"qmap1 must have 256 values, got shape {tuple(values.shape)}")
    blocks = state["absmax1"].numel()
    block_size = next((b for b in _BITSANDBYTES_BLOCKS if blocks_per_row(codes.numel(), b) == blocks), 0)
    return _scaled(values[_of_dtype("state1", state, torch.uint8).long()], state["absmax1"], block_size)


def _flashoptim(state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """``y = q/127; m = y/(2-|y|) * scale`` per block of the flattened tensor."""
    _contiguous("exp_avg::quantized", state)
    y = _of_dtype("exp_avg::quantized", state, torch.int8).float() / 127
    scales = _of_dtype("exp_avg::scales", state, *_FLOATS)
    if scales.dtype == torch.bfloat16:  # how it saves the bits of fp16 beside bf16 parameters
        scales = scales.view(torch.float16)
    return _scaled(y / (2 - y.abs()), scales.float(), _FLASHOPTIM_BLOCK)


def _of_dtype(name: str, state: dict[str, Any], *dtypes: torch.dtype) -> Tensor:
    tensor: Tensor = state[name]
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be of {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    return tensor


def _contiguous(name: str, state: dict[str, Any]) -> Tensor:
    tensor: Tensor = state[name]
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; start without this state")
    return tensor


def _scaled(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    if not block_size or blocks_per_row(values.numel(), block_size) != scales.numel():
        raise ValueError(f"state must have one scale per block, got {scales.numel()} for {tuple(values.shape)}")
    if not bool((scales >= 0).all()):
        raise ValueError("state must have scales of at least 0, got NaN or a negative one")
    return (values.view(-1) * scales.repeat_interleave(block_size)[: values.numel()]).view(values.shape)


_DECODERS: dict[frozenset[str], Callable[[dict[str, Any], Mapping[str, Any]], Tensor]] = {
    frozenset({"exp_avg"}): _plain,
    frozenset({"momentum"}): _plain,
    frozenset({"state1"}): _bitsandbytes,
    frozenset({"state1", "qmap1", "absmax1"}): _bitsandbytes,
    frozenset({"exp_avg::quantized", "exp_avg::scales"}): _flashoptim,
}
