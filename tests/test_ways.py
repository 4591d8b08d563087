"""However a step is asked for, and whatever torch's global modes are, its bits are the same."""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lion8bit import Lion8bit
from lion8bit.backends import portable

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the loaded state of"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection"),
]
SHAPES = [(64, 96), (5000,), (33,), (4096, 2), (16, 3, 8, 8), (256, 128), (7, 1000), (1,), (), (0, 5), (129, 127)]
TRIALS = 60


def some_params(choose: random.Random, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Of some shapes, laid out in memory in some way."""
    generator = torch.Generator().manual_seed(1)
    params = []
    for shape in choose.sample(SHAPES, choose.randint(1, 6)):
        value, way = torch.randn(shape, generator=generator).to(dtype), choose.random()
        if value.dim() == 4 and way < 0.5:
            value = value.contiguous(memory_format=torch.channels_last)
        elif value.dim() == 2 and way < 0.3:
            value = torch.stack([value, value], -1)[..., 0]  # with gaps
        elif value.dim() == 2 and way < 0.6:
            value = value.t().contiguous().t()
        params.append(torch.nn.Parameter(value))
    return params


def some_options(choose: random.Random, dtype: torch.dtype) -> dict[str, Any]:
    compensated = ["compensated"] if dtype == torch.bfloat16 else []
    return {
        "block_size": choose.choice([64, 128, 256]),
        "optim_bits": choose.choice([4, 8, 32]),
        "min_8bit_size": choose.choice([0, 1, 4096]),
        "weight_rounding": choose.choice(["auto", "nearest", *compensated]),
        "weight_decay": choose.choice([0.0, 0.1]),
        **{name: choose.random() < 0.2 for name in ("cautious", "maximize", "momentum_first")},
        "decoupled_weight_decay": choose.random() < 0.8,
    }


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if param.dim() == 4 and step % 2:
            param.grad = param.grad.contiguous(memory_format=torch.channels_last)


Pair = tuple[list[torch.nn.Parameter], Lion8bit]


def one_by_one(params: list[torch.nn.Parameter], optimizer: Lion8bit) -> Pair:
    for param in reversed(params):
        optimizer.step_param(param, optimizer.param_groups[0])
    return params, optimizer


def in_two_halves(params: list[torch.nn.Parameter], optimizer: Lion8bit) -> Pair:
    for half in (0, 1):
        kept = [param.grad for param in params]
        for param in params[half::2]:
            param.grad = None
        optimizer.step()
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad
    return params, optimizer


def after_a_checkpoint(params: list[torch.nn.Parameter], optimizer: Lion8bit) -> Pair:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = Lion8bit(params, lr=1.0, seed=99)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.step()
    return params, other


def in_a_copy(params: list[torch.nn.Parameter], optimizer: Lion8bit) -> Pair:
    grads = [param.grad for param in params]
    params, optimizer = copy.deepcopy((params, optimizer))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    return params, optimizer


WAYS: list[Callable[[list[torch.nn.Parameter], Lion8bit], Pair]]
WAYS = [one_by_one, in_two_halves, after_a_checkpoint, in_a_copy]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_sequence_of_ways_gives_the_bits_of_plain_steps(dtype: torch.dtype) -> None:
    """Random shapes, layouts, options and sequences."""
    for trial in range(TRIALS // 3):
        choose = random.Random(f"{dtype} {trial}")
        params, options = some_params(choose, dtype), some_options(choose, dtype)
        others = copy.deepcopy(params)
        plain, optimizer = (Lion8bit(each, lr=1e-3, seed=3, **options) for each in (params, others))
        for step in range(5):
            give_gradients(params, step)
            give_gradients(others, step)
            plain.step()
            way = choose.choice(WAYS)
            others, optimizer = way(others, optimizer)
            for one, other in zip(params, others, strict=True):
                what = f"trial {trial}, step {step}, {way.__name__}, shape {tuple(one.shape)}, {options}"
                assert torch.equal(one, other), what
                assert torch.equal(plain.momentum(one), optimizer.momentum(other)), what


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients enabled": torch.enable_grad,
    "anomaly mode": torch.autograd.detect_anomaly,
    "deterministic algorithms": deterministic,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_global_modes_do_not_enter_a_step(mode: str, backend: str, use_backend: Callable[..., None]) -> None:
    if backend == "portable":
        use_backend(portable.update_)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results = []
        for context in (contextlib.nullcontext, MODES[mode]):
            params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
            groups = [{"params": params[::2]}, {"params": params[1::2], "optim_bits": 4}]
            optimizer = Lion8bit(groups, lr=1e-3, weight_decay=0.1)
            for step in range(3):
                give_gradients(params, step)
                with context():
                    optimizer.step()
            results.append([*params, *map(optimizer.momentum, params)])
        assert all(map(torch.equal, *results)), dtype
