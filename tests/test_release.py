"""Gradient release: the bits of the ordinary step, one live gradient, and what cannot work is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

from lion8bit import Lion, Lion8bit, fuse_into_backward


class Model(nn.Module):
    """Tied embedding, a frozen layer, blocks that may be checkpointed."""

    def __init__(self, checkpointing: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 70), nn.Linear(70, 64)) for _ in "ab")
        self.head = nn.Linear(64, 90, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[0][1].requires_grad_(False)
        self.checkpointing = checkpointing

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            run = block.forward
            if self.checkpointing != "none":
                x = x + checkpoint(run, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = x + run(x)
        return nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), tokens.roll(1).flatten())


def build(dtype: torch.dtype = torch.float32, checkpointing: str = "none", **options: Any) -> tuple[Model, Lion8bit]:
    torch.manual_seed(0)
    model = Model(checkpointing).to(dtype)
    small = [param for param in model.parameters() if param.dim() < 2]
    large = [param for param in model.parameters() if param.dim() > 1]
    groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "lr": 3e-3, "block_size": 64}]
    return model, Lion8bit(groups, lr=1e-3, min_8bit_size=100, **options)


def batches(count: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(90, (3, 8), generator=generator)


def train(model: Model, optimizer: Lion8bit, steps: int = 4) -> None:
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, steps)
    for tokens in batches(steps):
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def assert_same_training(one: tuple[Model, Lion8bit], other: tuple[Model, Lion8bit]) -> None:
    names = [name for name, _ in one[0].named_parameters()]
    for name, a, b in zip(names, one[0].parameters(), other[0].parameters(), strict=True):
        assert_same(a.detach(), b.detach(), name)
        for key, value in one[1].state.get(a, {}).items():
            assert_same(torch.as_tensor(value), torch.as_tensor(other[1].state[b][key]), f"{key} of {name}")
        assert one[1].state.get(a, {}).keys() == other[1].state.get(b, {}).keys()


# ---- What it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_bits_are_those_of_the_ordinary_step(dtype: torch.dtype, checkpointing: str) -> None:
    ordinary, released = build(dtype, checkpointing), build(dtype, checkpointing)
    start = copy.deepcopy(ordinary[0])
    fuse_into_backward(*released)
    train(*ordinary)
    train(*released)
    assert_same_training(ordinary, released)
    assert not torch.equal(start.head.weight, released[0].head.weight)
    assert torch.equal(start.blocks[0][1].weight, released[0].blocks[0][1].weight)
    assert released[1].state[released[0].head.weight]["step"] == 4  # tied: once in each step
    assert released[1].param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_one_gradient_is_alive_at_a_time(checkpointing: str) -> None:
    model, optimizer = build(checkpointing=checkpointing)
    alive = []

    def count(param: torch.Tensor) -> None:
        alive.append(sum(other.grad is not None for other in model.parameters()))

    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(count)
    fuse_into_backward(model, optimizer)
    model(next(batches(1))).backward()
    assert alive == [1] * 11
    assert all(param.grad is None for param in model.parameters())


def test_gradients_are_freed() -> None:
    model, optimizer = build()
    fuse_into_backward(model, optimizer)
    for tokens in batches(2):
        model(tokens).backward()
        optimizer.step()
    gc.collect()
    shape = model.head.weight.shape
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point() and t.shape == shape]
    assert not tensors


def test_closure() -> None:
    ordinary, released = build(), build()
    fuse_into_backward(*released)
    for model, optimizer in (ordinary, released):
        for tokens in batches(3):

            def closure(model: Model = model, tokens: torch.Tensor = tokens) -> torch.Tensor:
                model.zero_grad()
                loss = model(tokens)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0
    assert_same_training(ordinary, released)


def test_removal_and_loading_in_the_middle() -> None:
    ordinary, released = build(torch.bfloat16), build(torch.bfloat16)
    handle = fuse_into_backward(*released)
    train(*ordinary, steps=2)
    train(*released, steps=2)
    released[1].load_state_dict(copy.deepcopy(released[1].state_dict()))
    train(*ordinary, steps=2)
    train(*released, steps=2)
    handle.remove()
    released[0](next(batches(1))).backward()
    assert all(param.grad is not None for param in released[0].parameters() if param.requires_grad)
    released[0].zero_grad()
    train(*ordinary, steps=2)
    train(*released, steps=2)
    assert_same_training(ordinary, released)


def test_parameters_without_a_hook_wait_for_the_step() -> None:
    """One that is not in the model, and one that is unfrozen later."""
    ordinary, released = build(), build()
    extras = []
    for model, optimizer in (ordinary, released):
        extras.append(nn.Parameter(torch.ones(64)))
        optimizer.add_param_group({"params": [extras[-1]]})
        if model is released[0]:
            fuse_into_backward(model, optimizer)
        model.blocks[0][1].requires_grad_(True)
        for tokens in batches(3):
            (model(tokens) * (extras[-1] ** 2).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(ordinary, released)
    assert_same(*(extra.detach() for extra in extras), "parameter outside the model")
    assert extras[0].detach()[0] != 1


@pytest.mark.parametrize("last_outside", [True, False])
def test_micro_batches(last_outside: bool) -> None:
    ordinary, released = build(), build()
    handle = fuse_into_backward(*released)
    for first, second in zip(batches(6), batches(6), strict=True):
        for model, optimizer in (ordinary, released):
            with handle.accumulate():
                model(first).backward()
                if not last_outside:
                    model(second).backward()
            if last_outside:
                model(second).backward()
            if model is released[0]:
                assert (model.head.weight.grad is None) == last_outside
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(ordinary, released)


# ---- step_param -----------------------------------------------------------------------------------------------------


def test_parameters_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(torch.bfloat16)
    fuse_into_backward(model, optimizer)
    train(model, optimizer, steps=1)
    monkeypatch.setattr(Lion8bit, "_build", None)  # a call would fail
    train(model, optimizer, steps=2)


def test_changes_are_noticed() -> None:
    """Memory, state and options that change between steps of one parameter, against whole steps."""
    params = [nn.Parameter(torch.randn(70, 90).bfloat16()) for _ in range(2)]
    params[1].data.copy_(params[0].data)
    optimizers = [Lion8bit([param], lr=1e-3) for param in params]
    changes: list[Callable[[Any, Lion8bit], object]] = [
        lambda p, o: None,
        lambda p, o: o.state[p].update(codes=o.state[p]["codes"].clone()),
        lambda p, o: o.state.__setitem__(p, dict(o.state[p])),
        lambda p, o: o.param_groups[0].update(weight_rounding="compensated"),
        lambda p, o: o.param_groups[0].update(lr=3e-3, weight_decay=0.3, weight_rounding="nearest"),
        lambda p, o: p.__setattr__("data", p.data.clone()),
        lambda p, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
        lambda p, o: o.param_groups[0].update(lr=1e-2),
    ]
    stale = optimizers[0].param_groups[0]
    for seed, change in enumerate(changes):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
            change(param, optimizer)
        optimizers[0].step_param(params[0], stale)
        optimizers[1].step()
        assert_same(params[0].detach(), params[1].detach(), f"parameter after change {seed}")
        assert_same(optimizers[0].momentum(params[0]), optimizers[1].momentum(params[1]), "momentum")
        assert optimizers[0].state[params[0]]["step"] == seed + 1
    assert optimizers[0].param_groups[0] is not stale
    param, optimizer = copy.deepcopy((params[0], optimizers[0]))
    param.grad = params[0].grad.clone()
    for p, o in ((param, optimizer), (params[0], optimizers[0])):
        o.step_param(p, stale)
    assert_same(param.detach(), params[0].detach(), "copied parameter")


def test_parameters_that_are_gone_are_let_go_of() -> None:
    params = [nn.Parameter(torch.randn(70, 90)) for _ in range(2)]
    optimizer = Lion8bit(params)
    group = optimizer.param_groups[0]
    for param in params:
        param.grad = torch.ones_like(param)
        optimizer.step_param(param, group)
    gone = weakref.ref(params[0])
    group["params"][0] = params[0] = param = nn.Parameter(torch.randn(70, 90))
    optimizer.state.pop(gone())
    param.grad = torch.ones_like(param)
    optimizer.step_param(param, group)
    gc.collect()
    assert gone() is None


# ---- What it refuses ------------------------------------------------------------------------------------------------


def test_a_second_gradient_is_refused() -> None:
    model, optimizer = build()
    fuse_into_backward(model, optimizer)
    tokens = next(batches(1))
    model(tokens).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"(weight|bias) must get one gradient .* under accumulate\(\)"):
        model(tokens).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shared_parameters_in_reentrant_checkpoints_are_refused() -> None:
    layer = nn.Linear(80, 80)
    optimizer = Lion8bit(layer.parameters())
    fuse_into_backward(layer, optimizer)
    x = torch.randn(2, 80, requires_grad=True)
    twice = checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)
    twice.sum().backward()
    assert optimizer.state[layer.weight]["step"] == 1
    optimizer.step()
    twice = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        twice.sum().backward()


@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler_is_refused(unscale: bool) -> None:
    model, optimizer = build()
    handle = fuse_into_backward(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(model(next(batches(1)))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="got a GradScaler"):
        scaler.step(optimizer)
    handle.remove()
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(model(next(batches(1)))).backward()
    scaler.step(optimizer)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_wrappers_are_refused(wrapper: str, process_group: None) -> None:
    model, optimizer = build()
    if wrapper == "DistributedDataParallel":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(TypeError, match=f"not be wrapped in {wrapper}"):
        fuse_into_backward(nn.Sequential(wrapped), optimizer)


def test_other_optimizers_and_models_are_refused() -> None:
    model, optimizer = build()
    with pytest.raises(TypeError, match="must be a Lion8bit, got Lion"):
        fuse_into_backward(model, Lion(model.parameters()))
    with pytest.raises(ValueError, match="trainable parameters of the optimizer"):
        fuse_into_backward(copy.deepcopy(model), optimizer)
