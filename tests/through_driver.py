"""Steps parameters through cuda-bindings down to a stand-in for NVIDIA's driver; a program that `test_cuda.py` runs.

Arguments: the libraries built from `emulator/fake_driver.cpp` and `emulator/emulated_kernel.cpp`.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import hyper_for
from emulated import Batch, Emulated, Pair, run_steps

from lion8bit.backends import cuda, nvrtc
from lion8bit.layout import TensorRow
from lion8bit.table import hyper_array

STREAM = 85
LAUNCHED = ctypes.CFUNCTYPE(
    None, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_size_t
)  # function, grid, threads, stream, address of the Launch


def main() -> None:
    """Raises where a call does not arrive as it must, or the steps differ from the reference's."""
    # NVRTC breaks off where it meets a driver that has nothing else, so the images are made before.
    for kind in [(1, 1, 8), (1, 1, 32), (0, 0, 4)]:
        nvrtc.image(nvrtc.Kernel(*kind, 128, 0, False, nvrtc.SMALL), "sm_90")
    driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    emulated = Emulated(ctypes.CDLL(sys.argv[2]), large=False)
    capturing = [False]
    stand_in: dict[str, Any] = {
        "current_device": lambda: 0,
        "current_stream": lambda index: SimpleNamespace(cuda_stream=STREAM),
        "device": lambda index: contextlib.nullcontext(),
        "get_device_capability": lambda index: (8, 0),
        "is_current_stream_capturing": lambda: capturing[0],
    }
    for name, function in stand_in.items():
        setattr(torch.cuda, name, function)
    gpu = cuda._device(0)
    gpu._large = False  # the emulator has one kernel only of the large capacity
    raised: list[BaseException] = []

    @LAUNCHED
    def launched(function: int, grid: int, threads: int, stream: int, address: int) -> None:
        try:  # ctypes would only print what a callback raises
            kernel = next(kernel for kernel, known in gpu._functions.items() if int(known) == function)
            assert (threads, stream) == (kernel.tuning.threads, STREAM)
            emulated.run(kernel, grid, cuda.launch_type(kernel.capacity).from_address(address), [])
        except BaseException as error:
            raised.append(error)

    ctypes.c_void_p.in_dll(driver, "fake_launched").value = ctypes.cast(launched, ctypes.c_void_p).value
    modules = ctypes.c_int32.in_dll(driver, "fake_modules")
    pairs = [
        Pair(shape, dtype, dtype, 128, bits=bits, seed=i)
        for i, (shape, dtype, bits) in enumerate(
            [((3, 1000), torch.bfloat16, 8), ((1, 70), torch.bfloat16, 32), ((64, 256), torch.float32, 4)] * 20
        )
    ]
    run_steps(pairs, [hyper_for("decay", 128)], cuda.update_, steps=2)
    if raised:
        raise raised[0]
    assert modules.value == len(gpu._functions) == 3, "each kernel is loaded once"
    assert len(emulated.log) == 2 * 3, "60 tensors of three kinds fit into three launches"

    def step_one(dtype: torch.dtype) -> None:
        pair, hypers = Pair((2, 300), dtype, dtype, 128), hyper_array([hyper_for("decay", 128)])
        batch = Batch(torch.device("cpu"), (TensorRow * 1)(pair.row()))
        cuda.update_(batch, hypers, torch.zeros(1, dtype=torch.int64))

    capturing[0] = True
    step_one(torch.bfloat16)
    with pytest.raises(RuntimeError, match="must be loaded before CUDA graph capture"):
        step_one(torch.float16)
    ctypes.c_int32.in_dll(driver, "fake_failure").value = 719
    with pytest.raises(RuntimeError, match="cuLaunchKernel must succeed, got CUDA_ERROR_LAUNCH_FAILED"):
        step_one(torch.bfloat16)
    print("sound")


if __name__ == "__main__":
    main()
