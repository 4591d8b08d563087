"""Where a test steps: on the CPU, in plain torch, through the CUDA kernel on the emulator, or on a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from cases import assert_same
from emulated import COMPILER, Emulated, needs_gpu

from lion8bit import Lion8bit
from lion8bit.backends import nvrtc

ON_EMULATOR = pytest.param("emulated", marks=pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"))
ON_GPU = pytest.param("cuda", marks=needs_gpu, id="on_gpu")


class Place:
    """Where a test steps: a device, and the backend that takes its batches."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"
        self.launches: list[tuple[nvrtc.Kernel, int, ctypes.Structure]] = []


class Recorder(Emulated):
    """Keeps a copy of each launch."""

    def __init__(self, library: ctypes.CDLL, launches: list[tuple[nvrtc.Kernel, int, ctypes.Structure]]) -> None:
        super().__init__(library)
        self.launches = launches

    def run(self, kernel: nvrtc.Kernel, grid: int, launch: ctypes.Structure, done: list[Any]) -> None:
        self.launches.append((kernel, grid, type(launch).from_buffer_copy(launch)))
        super().run(kernel, grid, launch, done)


def set_grads(params: list[torch.Tensor], seed: int, scale: float = 1.0, inf: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype) * scale
        if inf and grad.numel():
            grad.view(-1)[3] = float("inf")
        param.grad = grad.to(param.device)


def contents(optimizer: Lion8bit) -> list[Any]:
    """Copies of all that a checkpoint holds, and of the parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = optimizer.state_dict()["state"]
    values = [param.detach().cpu().clone() for param in params]
    for number in sorted(state):
        for name in sorted(state[number]):
            value = state[number][name]
            values.append(value.cpu().clone() if isinstance(value, torch.Tensor) else value)
    return values


def assert_same_contents(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert_same(a, b, f"value {index}")
        else:
            assert a == b


def scaler_for(place: Place, scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(place.device, init_scale=scale, growth_interval=3)
    scaler.scale(torch.zeros((), device=place.device))  # makes the scale's tensor
    return scaler
