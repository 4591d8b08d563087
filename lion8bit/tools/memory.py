"""Memory of optimizers: bytes of their state and of their checkpoints, and a limit for this process on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Finds tensors in dictionaries, lists, tuples, FlashOptim's objects and wrappers (torchao's types, DTensor)."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        yield from tensors_in([getattr(value, name) for name in names])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
    elif type(value).__module__.partition(".")[0] == "flashoptim":
        yield from tensors_in(vars(value))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; a tensor that is shared counts once."""
    held = tensors_in([*optimizer.state.values()])
    return sum({(t.device, t.data_ptr(), t.nbytes): t.nbytes for t in held}.values())


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size in bytes of `torch.save(optimizer.state_dict(), file)`."""
    with tempfile.TemporaryFile() as file:
        torch.save(optimizer.state_dict(), file)
        return file.tell()


def limit_gpu_memory(device: torch.device, size: float) -> None:
    """Limits this process to `size` bytes of a GPU's memory; infinity removes the limit."""
    # torch refuses a device without an index here.
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), index)
