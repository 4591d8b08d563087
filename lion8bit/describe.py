"""Owns what a step does with many Python objects at once: fetches gradients, looks at tensors, counts in dicts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lion8bit.backends import cpu

if TYPE_CHECKING:  # numpy does not import it by itself
    import numpy.typing as npt

    Addresses = npt.NDArray[np.uint64]


def gradients_of(params: list[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one."""
    native = _native()
    if native is None or type(params) is not list:
        return [grad for param in params if (grad := param.grad) is not None]
    grads: list[Any] = [None] * len(params)
    complete = native.gradients(params, "grad", grads) == len(params)
    return grads if complete else [grad for grad in grads if grad is not None]


def describe(columns: list[Any]) -> Any:
    """What is seen of the tensors of columns: dtypes, devices, shapes and strides, and which objects lie where.

    Args:
        columns: two items each, tensors with None or dicts with their key: ``[tensors, None, dicts, "name", ...]``.
            Dense tensors of any device; those of the first column may be others at the next look, and elsewhere.

    Raises:
        RuntimeError: a tensor has no memory or no strides.
    """
    native = _native()
    if native is None:
        return _portable(columns)[1]
    addresses = np.empty(len(columns[0]), np.uint64)
    words = native.describe(columns, addresses.ctypes.data, None, 0, False)
    if words < 0:
        raise RuntimeError("tensors must have memory and strides, got one without")
    seen = np.empty(words, np.int64)
    native.describe(columns, addresses.ctypes.data, seen.ctypes.data, words, False)
    return seen.tobytes()


def look_again(columns: list[Any], seen: Any) -> Addresses | None:
    """Where in memory the tensors of the first column are, [count] uint64; None where `describe` would see others."""
    native = _native()
    if native is not None:
        addresses = np.empty(len(columns[0]), np.uint64)
        words = native.describe(columns, addresses.ctypes.data, seen, len(seen) // 8, True)
        return addresses if 8 * words == len(seen) else None
    addresses, present = _portable(columns)
    return addresses if present == seen else None


def _portable(columns: list[Any]) -> tuple[Addresses, Any]:
    tensors = [*listed(columns)]
    first, *others = ([*map(Tensor.data_ptr, column)] for column in tensors)
    layouts = [(tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in chain(*tensors)]
    return np.array(first, np.uint64), (layouts, [*map(id, chain(*tensors[1:]))], others)


def listed(columns: list[Any]) -> Iterator[list[Tensor]]:
    """The tensors of each column, as `describe` takes them."""
    for objects, key in zip(columns[::2], columns[1::2], strict=True):
        yield objects if key is None else [*map(itemgetter(key), objects)]


def replace(dicts: list[dict[str, Any]], key: str, former: Any, item: Any) -> bool:
    """Puts an item under a key of every dict if all have this very ``former`` there; whether they had."""
    native = _native()
    if native is not None:
        return bool(native.replace(dicts, key, former, item))
    if any(each[key] is not former for each in dicts):
        return False
    for each in dicts:
        each[key] = item
    return True


# What fills `struct Calls` of describe.cpp, before None, the class of tensors and `_handle`.
_PYTHON = (
    "PyList_Size",
    "PyList_GetItem",
    "PyList_SetItem",
    "PyDict_GetItemWithError",
    "PyDict_SetItem",
    "PyObject_GetAttr",
    "PyObject_IsInstance",
)
_TORCH = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
)


@dataclass(frozen=True)
class _Native:
    """The functions of describe.cpp."""

    gradients: Callable[..., int]
    describe: Callable[..., int]
    replace: Callable[..., int]


@cache
def _native() -> _Native | None:
    """The native functions, several times faster; None without the library, or where torch keeps tensors otherwise."""
    library, handle = cpu.load_library(), _handle()
    if isinstance(library, str) or handle is None:
        return None
    try:
        torch_c = ctypes.CDLL("torch_cpu.dll" if os.name == "nt" else torch._C.__file__)
        functions = [getattr(ctypes.pythonapi, name) for name in _PYTHON] + [getattr(torch_c, name) for name in _TORCH]
    except (OSError, AttributeError):
        return None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    calls = (ctypes.c_void_p * (len(addresses) + 3))(*addresses, id(None), id(Tensor), handle)
    locked = ctypes.PyDLL(library._name, handle=library._handle)  # keeps Python's lock, and raises what a call has set

    def function(name: str, restype: Any, *argtypes: Any) -> Callable[..., int]:
        found = getattr(locked, f"lion8bit_{name}")
        found.restype, found.argtypes = restype, [ctypes.c_void_p, *argtypes]
        return partial(found, calls)

    pointer, item, words = ctypes.c_void_p, ctypes.py_object, ctypes.c_int64
    return _Native(
        gradients=function("gradients", words, item, item, item),
        describe=function("describe", words, item, pointer, pointer, words, ctypes.c_int32),
        replace=function("replace", ctypes.c_int32, item, item, item, item),
    )


def _handle() -> int | None:
    """Where in a tensor's Python object is what torch's C functions take for the tensor, in bytes; None if not known.

    They take the address of a pointer that Python shows as ``_cdata``, and the Python object has such a pointer too.
    Both are looked up on a tensor, so that nothing is assumed of a torch that is yet to come.
    """
    tensor = torch.empty(1, device="cpu")
    try:
        made = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor)
        get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        handle = get_pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(made, None)
        pointer = ctypes.c_size_t.from_address(handle).value
        torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(made)
    except (AttributeError, TypeError):
        return None
    words = [*(ctypes.c_size_t * (Tensor.__basicsize__ // 8)).from_address(id(tensor))]
    return 8 * words.index(pointer) if pointer == tensor._cdata and pointer in words else None
