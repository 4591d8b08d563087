"""DTensor parameters in one process: local tensors, their place in the whole, and how state is sharded.

A plain tensor is its own local tensor, so callers need not distinguish the two. What all ranks must decide alike is
decided from global shape, mesh and placements. Nothing here imports `torch.distributed` for a plain tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lion8bit.layout import is_narrow


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`."""
    return hasattr(tensor, "device_mesh")


def is_flattened(param: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) has put a parameter into a flat one, or it is that one."""
    return getattr(param, "_fsdp_flattened", False)


def local(tensor: Any) -> Any:
    """The tensor in this process's memory: the local part of a DTensor, or the tensor itself; None for None."""
    return getattr(tensor, "_local_tensor", tensor)


def as_part_of(param: Any, shard: Tensor, shape: Sequence[int]) -> Tensor:
    """The DTensor of global ``shape`` that has ``shard`` here and is placed as ``param``; ``shard`` for a plain one."""
    if not is_dtensor(param):
        return shard
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        shard,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=torch.Size(shape),  # does not follow from the local one: shards may be uneven or empty
        stride=torch.empty(shape, device="meta").stride(),
    )
    return whole.to(shard.device)  # from_local moves to the mesh's device, but offloaded shards stay on the host


def keeps_blocks_whole(param: Any, block_size: int) -> bool:
    """Whether codes and scales can be placed as ``param`` so that every rank holds whole blocks and their scales.

    A shard along dimension 0 does. Along dimension 1, the dimension has to divide evenly and each rank's share of a row
    must be a multiple of ``block_size``. No further dimension does. Nor does what is a single row to the blocks: a
    vector, or a parameter whose rows are shorter than a block.
    """
    if not is_dtensor(param):
        return True
    if param.dim() < 2 or is_narrow(param.shape, block_size):
        return False
    parts = 1
    for placement, ranks in zip(param.placements, param.device_mesh.shape, strict=True):
        dim = getattr(placement, "dim", 0) if ranks > 1 else 0  # a replica has no dim
        if dim > 1:
            return False
        parts *= ranks if dim == 1 else 1
    cols = math.prod(param.shape[1:])
    return parts == 1 or (param.shape[1] % parts == 0 and cols % (parts * block_size) == 0)


def place_in_whole(param: Any) -> tuple[tuple[int, int], int, int]:
    """Where the elements of a DTensor's local part lie in the whole, of which stochastic rounding is a function.

    Returns:
        [rows, cols] of the local part, such that elements of a row are neighbours in the whole too; the index of its
        first element there; and how far apart the starts of rows are there. Where more than one dimension beyond the
        first is cut, no such rows exist, and it is as if only the last of them were.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, shard = param.shape, local(param).shape
    if len(shape) < 2:
        shape, shard = (1, *shape), (1, *shard)
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(index * stride for index, stride in zip(offset, strides[len(shape) - len(offset) :], strict=True))
    cut = max((dim for dim in range(1, len(shape)) if shard[dim] != shape[dim]), default=1)
    return (math.prod(shard[:cut]), math.prod(shard[cut:])), first, strides[cut - 1]


def gradients(params: Sequence[Any], grads: list[Any]) -> list[Tensor]:
    """The part of gradients in this process's memory, placed as the parameters; communicates to place them so."""
    if {*map(type, grads)} <= {Tensor}:
        return grads
    return [
        grad if type(grad) is Tensor else _local_gradient(param, grad)
        for param, grad in zip(params, grads, strict=True)
    ]


def _local_gradient(param: Any, grad: Any) -> Tensor:
    spec, wanted = getattr(grad, "_spec", None), getattr(param, "_spec", None)
    if spec is None or wanted is None:
        return grad  # type: ignore[no-any-return]
    if spec is not wanted and spec.placements != wanted.placements:
        grad = grad.redistribute(placements=wanted.placements)
    shard: Any = grad._local_tensor
    result: Tensor = shard.wait() if hasattr(shard, "wait") else shard  # a collective may still be under way
    return result


def local_state(state: Mapping[str, Any], names: Sequence[str], param: Any, block_size: int) -> dict[str, Tensor]:
    """The local tensors of a parameter's state, those of ``names`` that it has.

    Raises:
        ValueError: they are not placed as the parameter, or blocks would be cut.
    """
    tensors = {name: state[name] for name in names if name in state}
    for name, tensor in tensors.items():
        check_placement(name, tensor, param)
    if "scales" in tensors and not keeps_blocks_whole(param, block_size):
        raise ValueError(
            f"state must be fp32 momentum where shards do not hold whole blocks of {block_size}, got codes and scales"
        )
    return {name: local(tensor) for name, tensor in tensors.items()}


def check_placement(name: str, tensor: Any, param: Any) -> None:
    """Raises ValueError unless a tensor lies on the parameter's mesh as the parameter does, or both are plain."""
    if _placement(tensor) != _placement(param):
        raise ValueError(
            f"{name} must be {_placement_text(param)} as the parameter is, got {_placement_text(tensor)}; load it with "
            "set_optimizer_state_dict or set_model_state_dict of torch.distributed.checkpoint.state_dict"
        )


def _placement(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


def _placement_text(tensor: Any) -> str:
    return f"a DTensor placed {tensor.placements} on {tensor.device_mesh}" if is_dtensor(tensor) else "a plain tensor"
