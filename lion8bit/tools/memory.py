"""Memory: bytes of an optimizer's state and checkpoint, and a limit for this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30


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


def limit_memory(device: torch.device, gib: float) -> None:
    """Limits this process to `gib` GiB of a GPU's memory, or, for the CPU, to so many more than it has now (Linux)."""
    if device.type == "cuda":
        limit_gpu_memory(device, gib * GIB)
        return
    import resource  # not on Windows

    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(gib * GIB), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of a GPU or of the host is exhausted."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
