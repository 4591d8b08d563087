"""The state of one parameter: which tensors it has, where they are, and whether they are valid."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lion8bit.layout import (
    CODES,
    DTYPES,
    FORMAT_VERSION,
    LOADED_VERSIONS,
    code_bits,
    is_narrow,
    mark_order,
    memory_order,
    packed_shape,
    rows_and_cols,
    scales_shape,
    unmark_order,
)
from lion8bit.quantization import check_codes, check_momentum, check_scales, dequantize, quantize
from lion8bit.sharding import as_part_of, is_dtensor, is_flattened, keeps_blocks_whole, local, local_state

STATE_TENSORS = ("codes", "scales", "momentum", "residual")
MIN_PAGED_SIZE = 1 << 16  # elements; the state of a smaller parameter is smaller than the cost of its copies
PAGED_DEVICES = {"cuda"}  # types of devices with a separate memory

_STEP_LIMIT = 1 << 62  # counts are int64 on devices


# ---- Place -----------------------------------------------------------------------------------------------------------


def is_paged(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter is in host memory while the parameter is not.

    Raises:
        ValueError: the group asks for it, and the parameter is a DTensor.
    """
    if not group["is_paged"] or local(param).device.type not in PAGED_DEVICES:
        return False
    if is_dtensor(param):
        raise ValueError(
            "is_paged must be False for DTensor parameters on a GPU, got True; "
            "fully_shard(..., offload_policy=CPUOffloadPolicy()) keeps their state in host memory"
        )
    return param.numel() >= MIN_PAGED_SIZE


def _place(param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Where the state of a parameter is, as arguments of torch's factory functions."""
    if not is_paged(param, group):
        return {"device": local(param).device}
    return {"device": torch.device("cpu"), "pin_memory": param.device.type == "cuda"}


def to_place(tensor: Tensor, param: Tensor, group: Mapping[str, Any], copy: bool = False) -> Tensor:
    """A state tensor in the memory that the group asks for; without ``copy`` itself if it is there already."""
    place = _place(param, group)
    if "pin_memory" not in place:
        return tensor.to(param.device, copy=copy)
    if not copy and tensor.device == place["device"] and (tensor.is_pinned() or not place["pin_memory"]):
        return tensor
    return torch.empty_like(tensor, **place).copy_(tensor)


# ---- Making and changing -----------------------------------------------------------------------------------------


def new_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter before its first step: zeros."""
    # All ranks must choose alike, so the choice depends on the whole parameter. Rows of a DTensor run along shape[0].
    shard, block_size, place = local(param), group["block_size"], _place(param, group)
    like = {"memory_format": torch.contiguous_format, **place} if is_dtensor(param) else place
    bits = _wanted_bits(param, group)
    if bits == 32:
        momentum = torch.zeros_like(shard, dtype=torch.float32, requires_grad=False, **like)
        return with_residual({"step": 0, "momentum": as_part_of(param, momentum, param.shape)}, param, group)
    if bits == 4:
        codes = torch.zeros(packed_shape(shard.shape, block_size), dtype=CODES[4], **place)
        scales = torch.zeros(scales_shape(shard.shape, block_size), dtype=torch.float32, **place)
    else:
        codes = torch.zeros_like(shard, dtype=CODES[8], requires_grad=False, **like)
        order = memory_order(codes)
        assert order is not None  # zeros_like makes dense tensors
        shape = scales_shape([shard.shape[dim] for dim in order], block_size)
        scales = mark_order(torch.zeros(shape, dtype=torch.float32, **place), order)
    return with_residual({"step": 0, **_placed(codes, scales, param, block_size)}, param, group)


def _placed(codes: Tensor, scales: Tensor, param: Tensor, block_size: int) -> dict[str, Any]:
    """Codes and scales of the local part of a parameter as its state, placed as it is."""
    placed_scales = as_part_of(param, scales, scales_shape(param.shape, block_size))
    if code_bits(codes) == 8:
        return {"codes": as_part_of(param, codes, param.shape), "scales": placed_scales}
    whole_codes = as_part_of(param, codes, packed_shape(param.shape, block_size))
    # A tensor, because torch.distributed.checkpoint flattens state of tensors and numbers only.
    shape = torch.tensor(param.shape, dtype=torch.int64, device="cpu")
    return {"shape": shape, "codes": whole_codes, "scales": placed_scales}


def as_group_asks(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state with the tensors that the group's present options ask for: bits, residual, memory."""
    state = with_residual(state, param, group)
    block_size = group["block_size"]
    bits = momentum_bits(state)
    if bits != 32 and bits != _asked_bits(param, group):
        check_state(state, param, block_size)
        state = {"momentum": momentum_of(state, param, block_size), **_without_momentum(state)}
        if bits == 4:
            in_order = ("momentum", "residual")
            state |= {name: _in_order_of(param, state[name]) for name in in_order if name in state}
    wanted = _wanted_bits(param, group)
    if "momentum" in state and wanted != 32:
        state = {**quantized(state["momentum"], block_size, wanted), **_without_momentum(state)}
        if wanted == 4 and "residual" in state:
            state["residual"] = state["residual"].contiguous()
    paged = is_paged(param, group)
    tensors = {name: state[name] for name in STATE_TENSORS if isinstance(state.get(name), Tensor)}
    tensors = {name: tensor for name, tensor in tensors.items() if paged or tensor.device.type == "cpu"}
    moved = {name: to_place(tensor, param, group) for name, tensor in tensors.items()}
    return state if all(map(is_, moved.values(), tensors.values())) else {**state, **moved}


def _in_order_of(param: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the parameter's order in memory, as new state has it."""
    if is_dtensor(param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype, device=tensor.device, requires_grad=False).copy_(tensor)


def _without_momentum(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in ("codes", "scales", "shape", "momentum")}


def momentum_bits(state: Mapping[str, Any]) -> int:
    """How many bits the momentum of a parameter's state has: 4, 8 or 32."""
    if "codes" not in state:
        return 32
    return code_bits(state["codes"]) if isinstance(state["codes"], Tensor) else 8  # `check_state` refuses the others


def _asked_bits(param: Tensor, group: Mapping[str, Any]) -> int:
    return 32 if param.numel() < group["min_8bit_size"] else int(group["optim_bits"])


def _wanted_bits(param: Tensor, group: Mapping[str, Any]) -> int:
    return _asked_bits(param, group) if keeps_blocks_whole(param, group["block_size"]) else 32


def is_compensated(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the parameter has a residual in this group: a bf16 one has, an fp32 one needs none."""
    compensated: bool = group["weight_rounding"] == "compensated"
    if compensated and param.dtype == torch.float16:
        raise ValueError(
            "weight_rounding must be 'stochastic' or 'nearest' for float16 parameters, got 'compensated'; "
            "use bfloat16 parameters, or a separate group"
        )
    return compensated and param.dtype == torch.bfloat16


def with_residual(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state with a residual, at first 0, if the group's option asks for one, and without one otherwise."""
    compensated = is_compensated(param, group)
    if compensated == ("residual" in state):
        return state if type(state) is dict else dict(state)
    if compensated:
        return {**state, "residual": _zero_residual(state, param)}
    return {name: value for name, value in state.items() if name != "residual"}


def _zero_residual(state: Mapping[str, Any], param: Tensor) -> Tensor:
    """With the order in memory, the device and the placement of the momentum."""
    if momentum_bits(state) != 4:
        return torch.zeros_like(state["codes"] if "codes" in state else state["momentum"], dtype=torch.int8)
    codes = local(state["codes"])
    residual = torch.zeros(local(param).shape, dtype=torch.int8, device=codes.device, pin_memory=codes.is_pinned())
    return as_part_of(param, residual, param.shape)


def momentum_of(state: Mapping[str, Any], param: Tensor, block_size: int) -> Tensor:
    """The fp32 momentum that codes and scales stand for, placed as the parameter and on the device of the codes."""
    codes, scales = local(state["codes"]), unmark_order(local(state["scales"]))
    return as_part_of(param, dequantize(codes, scales, block_size, local(param).shape), param.shape)


def fp32_momentum(state: Mapping[str, Any], param: Tensor, block_size: int) -> Tensor:
    """The momentum in fp32, placed as the parameter and on its device; a copy."""
    if "codes" not in state:
        momentum: Tensor = state["momentum"]
        return momentum.to(param.device, copy=True)
    here = {name: local(state[name]).to(local(param).device) for name in ("codes", "scales")}
    return momentum_of(here, param, block_size)


def quantized(momentum: Tensor, block_size: int, bits: int = 8) -> dict[str, Any]:
    """The codes and scales of an fp32 momentum, placed as it is; those of 8 bits in its memory order."""
    codes, scales = quantize(local(momentum), block_size, bits)
    if bits == 8:
        order = memory_order(codes)
        assert order is not None  # `quantize` accepts no others
        scales = mark_order(scales, order)
    return _placed(codes, scales, momentum, block_size)


def check_param(param: Tensor, group: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError if a parameter cannot be in a group with these options."""
    if is_flattened(param) and group["optim_bits"] != 32:
        raise TypeError(
            "parameters must not be flattened to have quantized state, got those of FullyShardedDataParallel "
            "(FSDP1), which cannot save it; use FSDP2's fully_shard, or optim_bits=32"
        )
    if not param.requires_grad:  # of any dtype, as in QLoRA; `step` checks what has a gradient
        return
    if param.dtype not in DTYPES:
        raise TypeError(f"parameters must be float32, bfloat16 or float16, got {param.dtype}")
    is_compensated(param, group)
    is_paged(param, group)


# ---- Validity --------------------------------------------------------------------------------------------------------


def check_state(state: Mapping[str, Any], param: Tensor, block_size: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Checks that a parameter's state is complete and has the dtypes and shapes of the format.

    Returns:
        The memory order of the momentum in this process, for 4 bits row-major, and its [rows, cols] as `rows_and_cols`
        defines them.

    Raises:
        ValueError: it does not; the message says what differs.
    """
    names = state.keys() & STATE_TENSORS
    known = names - {"residual"} in ({"codes", "scales"}, {"momentum"}) and "step" in state
    if not known or not all(isinstance(state[name], Tensor) for name in names):
        raise ValueError(f"state must hold step with codes and scales, or with momentum; got {sorted(map(str, state))}")
    shape = tuple(param.shape)
    tensors, param = local_state(state, STATE_TENSORS, param, block_size), local(param)
    if momentum_bits(state) == 4:
        _check_4_bits(tensors, param, block_size)
        if saved_shape(state) != shape:
            raise ValueError(f"shape must be the parameter's, {shape}, got {saved_shape(state)}")
        return (*range(param.dim()),), rows_and_cols(param.shape, block_size)
    name, dtype = ("codes", CODES[8]) if "codes" in state else ("momentum", torch.float32)
    momentum = tensors[name]
    order = memory_order(momentum)
    if momentum.dtype != dtype or momentum.shape != param.shape or order is None:
        got = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
        raise ValueError(f"{name} must be a dense {dtype} tensor of shape {tuple(param.shape)}, got {got}")
    if "residual" in tensors:
        _check_residual(tensors["residual"], param, name, order)
    ordered_shape = [param.shape[dim] for dim in order]
    if "scales" in tensors:
        _check_scales_shape(tensors["scales"], order, scales_shape(ordered_shape, block_size), block_size)
    return order, rows_and_cols(ordered_shape, block_size)


def saved_shape(state: Mapping[str, Any]) -> tuple[int, ...]:
    """The parameter's whole shape from state with 4-bit codes, which do not say it.

    Raises:
        ValueError: it is missing or no shape.
    """
    check_tensor("shape", state.get("shape"))
    shape = local(state["shape"])
    if shape.dtype == torch.int64 and shape.dim() == 1 and bool((shape >= 0).all()):
        return (*shape.tolist(),)
    got = f"{shape.dtype} of shape {tuple(shape.shape)}"
    raise ValueError(f"shape must be an int64 vector of the parameter's sizes, got {got}")


def _check_4_bits(tensors: Mapping[str, Tensor], param: Tensor, block_size: int) -> None:
    codes, wanted = tensors["codes"], packed_shape(param.shape, block_size)
    if tuple(codes.shape) != wanted or not codes.is_contiguous():
        raise ValueError(
            f"codes must be contiguous {CODES[4]} {wanted} at block_size {block_size}, got {tuple(codes.shape)}"
        )
    order = (*range(param.dim()),)
    if "residual" in tensors:
        _check_residual(tensors["residual"], param, "a contiguous tensor", order)
    _check_scales_shape(tensors["scales"], order, scales_shape(param.shape, block_size), block_size)


def _check_residual(residual: Tensor, param: Tensor, name: str, order: tuple[int, ...]) -> None:
    if residual.dtype != torch.int8 or residual.shape != param.shape or memory_order(residual) != order:
        got = f"{residual.dtype} of shape {tuple(residual.shape)} with strides {residual.stride()}"
        raise ValueError(f"residual must be an int8 tensor with the shape and memory order of {name}, got {got}")
    if param.dtype != torch.bfloat16:
        raise ValueError(
            f"residual must belong to a bfloat16 parameter, got {param.dtype}; "
            "delete it from the state, and take the weights from `fp32_weights` of the optimizer that saved it"
        )


def _check_scales_shape(scales: Tensor, order: tuple[int, ...], shape: tuple[int, ...], block_size: int) -> None:
    if order != (*range(len(order)),):
        scales = unmark_order(scales)
    elif scales is not unmark_order(scales):
        raise ValueError(
            "codes must have the order in memory that their scales were made for, got contiguous codes and scales "
            f"{tuple(scales.shape)}, which belong to another order such as channels_last; load a file of "
            "torch.save, which keeps strides, or into a model and an optimizer in the memory format that was saved"
        )
    if scales.dtype != torch.float32 or tuple(scales.shape) != shape:
        got = f"{scales.dtype} {tuple(scales.shape)}"
        raise ValueError(f"scales must be float32 {shape} at block_size {block_size}, got {got}")


def check_version(version: Any) -> None:
    """Raises ValueError unless state of this format version can be loaded."""
    if version not in LOADED_VERSIONS:
        raise ValueError(f"state must have format_version {FORMAT_VERSION}, got {version}")


def checked_state(state: Mapping[str, Any], param: Tensor, saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's saved state in the present format, its ``step`` an int.

    Raises:
        ValueError: a part of it is missing or not of the format, or it does not fit ``param``.
    """
    for name in STATE_TENSORS:
        if name in state:
            check_tensor(name, state[name])
    checked = {**state, "step": step_count(state["step"])} if "step" in state else dict(state)
    if saved_group["format_version"] != FORMAT_VERSION:
        checked = _in_present_format(checked, saved_group["block_size"])
    order, _ = check_state(checked, param, saved_group["block_size"])
    if "momentum" in checked:
        check_momentum(local(checked["momentum"]))
    else:
        shape = local(param).shape
        check_codes(local(checked["codes"]), rows_and_cols(shape, saved_group["block_size"])[1])
        check_scales(local(checked["scales"]))
        checked["scales"] = mark_order(checked["scales"].contiguous(), order)
    return checked


def _in_present_format(state: dict[str, Any], block_size: int) -> dict[str, Any]:
    """State of format version 2 or 3 in the present format.

    In both, the code of an exact zero was -128. In version 2, rows that are shorter than a block had a scale each.
    """
    codes, scales = (local(state.get(name)) for name in ("codes", "scales"))
    if getattr(codes, "dtype", None) != torch.int8 or getattr(scales, "dtype", None) != torch.float32:
        return state  # fp32 momentum, or `check_state` will report what is wrong
    codes = codes.masked_fill(codes == -128, 0)
    state = {**state, "codes": as_part_of(state["codes"], codes, state["codes"].shape)}
    order = memory_order(codes)
    narrow = order is not None and is_narrow([codes.shape[dim] for dim in order], block_size)
    if not narrow or unmark_order(scales).dim() != 2:
        return state
    check_scales(scales)
    momentum, others = momentum_of(state, state["codes"], block_size), _without_momentum(state)
    if keeps_blocks_whole(momentum, block_size):
        return {**others, **quantized(momentum, block_size)}
    return {**others, "momentum": momentum}


def check_tensor(name: str, value: Any) -> None:
    """Raises ValueError unless a value of a parameter's state is a dense tensor of real numbers that can be read."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {kind_of(value)}")
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
    got = repr(number) if isinstance(number, (int, float)) else kind_of(value)
    raise ValueError(f"step must be a whole number of updates, at least 0, got {got}")


def kind_of(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
