"""Gradient release: the bits of the ordinary step, one live gradient, and what cannot work is refused."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

from lion8bit import Lion, Lion8bit, fuse_into_backward
from lion8bit.backends import cpu
from lion8bit.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")


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
    return model, Lion8bit(groups, lr=1e-3, **{"min_8bit_size": 100, **options})


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


@pytest.mark.parametrize("optim_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_bits_are_those_of_the_ordinary_step(dtype: torch.dtype, checkpointing: str, optim_bits: int) -> None:
    ordinary, released = (build(dtype, checkpointing, optim_bits=optim_bits, min_8bit_size=0) for _ in range(2))
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


def test_a_graph_from_before_the_step_cannot_be_used_after_it() -> None:
    """Two forward passes and then two backward passes: the first of these must not step."""
    ordinary, released = build(), build()
    handle = fuse_into_backward(*released)
    first, second = batches(2)
    losses = [released[0](tokens) for tokens in (first, second)]
    with handle.accumulate():
        losses[0].backward()
    losses[1].backward()
    for tokens in (first, second):
        ordinary[0](tokens).backward()
    ordinary[1].step()
    released[1].step()
    assert_same_training(ordinary, released)
    losses = [released[0](tokens) for tokens in (first, second)]
    losses[0].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # docs/faq.md
        losses[1].backward()


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="compiled autograd has not been tried with older releases")
def test_compiled_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lion8bit, "step_param", torch.compiler.disable(Lion8bit.step_param))  # tracing takes long
    backward = torch.compile(lambda loss: loss.backward(), backend="eager")
    layers = [nn.Linear(70, 70, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [Lion8bit(layer.parameters(), lr=1e-3) for layer in layers]
    fuse_into_backward(layers[1], optimizers[1])
    for seed in range(3):
        x = torch.randn(4, 70, generator=torch.Generator().manual_seed(seed))
        layers[0](x).square().sum().backward()
        with torch._dynamo.config.patch(compiled_autograd=True):
            backward(layers[1](x).square().sum())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(layers[0].weight.detach(), layers[1].weight.detach(), "weight")
    assert optimizers[1].state[layers[1].weight]["step"] == 3


def fail(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("out of memory")


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize(("error", "micro"), [(fail, False), (interrupt, False), (fail, True)])
def test_training_goes_on_after_a_backward_pass_that_failed(checkpointing: str, error: Any, micro: bool) -> None:
    ordinary, released = build(torch.bfloat16, checkpointing), build(torch.bfloat16, checkpointing)
    handle = fuse_into_backward(*released)
    hooks = [model.blocks[0][2].weight.register_hook(error) for model, _ in (ordinary, released)]
    done: list[torch.Tensor] = []
    for model, optimizer in (ordinary, released):
        notes = [
            param.register_post_accumulate_grad_hook(done.append)
            for param in model.parameters()
            if param.requires_grad and model is ordinary[0]
        ]
        with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt)):
            model(next(batches(1))).backward()
        for note in notes:
            note.remove()
        if model is ordinary[0]:
            assert 0 < len(done) < 11
            optimizer.step()  # with what the failed pass has left, which the other one has stepped by now
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    if micro:
        for model, optimizer in (ordinary, released):
            with handle.accumulate():
                model(next(batches(1))).backward()
            optimizer.step()
            optimizer.zero_grad()
    train(*ordinary)
    train(*released)
    assert_same_training(ordinary, released)
    released[0](next(batches(1))).backward()
    with pytest.raises(RuntimeError, match="must get one gradient"):
        released[0](next(batches(1))).backward()


def test_training_goes_on_after_a_step_that_failed() -> None:
    model, optimizer = build()
    fuse_into_backward(model, optimizer)
    extra = nn.Parameter(torch.ones(64))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.zeros(64).to_sparse()
    model(next(batches(1))).backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    extra.grad = None
    train(model, optimizer, steps=2)
    assert optimizer.state[model.head.weight]["step"] == 3


@pytest.mark.parametrize("kept", ["nothing", "handle", "model"])
def test_optimizers_and_models_are_freed(kept: str) -> None:
    model, optimizer = build()
    handle = fuse_into_backward(model, optimizer)
    train(model, optimizer, steps=2)  # with a scheduler
    gone = [weakref.ref(optimizer), *(weakref.ref(param) for param in model.parameters() if kept != "model")]
    keep = {"nothing": None, "handle": handle, "model": model}.get(kept)
    weight = model.head.weight if kept == "model" else None
    del model, optimizer, handle
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
    if kept == "model":
        assert weight is not None and not weight._post_accumulate_grad_hooks
        keep(next(batches(1))).backward()
        assert weight.grad is not None


def test_a_rebuilt_optimizer_takes_over() -> None:
    ordinary, released = build(), build()
    fuse_into_backward(*released)
    rebuilt = []
    for model, optimizer in (ordinary, released):
        train(model, optimizer, steps=2)  # with a scheduler, so that it waits for the collector
        rebuilt.append(Lion8bit(model.parameters(), lr=1e-5))
    del optimizer
    ordinary, released = (ordinary[0], rebuilt[0]), (released[0], rebuilt[1])
    fuse_into_backward(*released)
    train(*ordinary, steps=2)
    train(*released, steps=2)
    assert_same_training(ordinary, released)


def test_two_handles_of_one_optimizer() -> None:
    ordinary, released = build(), build()
    first, second = (fuse_into_backward(block, released[1]) for block in released[0].blocks)
    train(*ordinary, steps=2)
    train(*released, steps=2)
    first.remove()
    assert released[1]._step_supports_amp_scaling
    train(*ordinary, steps=2)
    train(*released, steps=2)
    second.remove()
    assert not released[1]._step_supports_amp_scaling
    assert_same_training(ordinary, released)


# ---- Cost -----------------------------------------------------------------------------------------------------------


class Meter:
    """Counts Python's instructions, and elements that are taken from an optimizer's lists of parameters and its state.

    Loops in C are then counted as well.
    """

    def __init__(self) -> None:
        self.count = 0

    def watch(self, optimizer: Lion8bit) -> None:
        meter = self

        class Params(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                meter.count += len(self)
                return super().__iter__()

        class State(defaultdict[Any, Any]):
            def values(self) -> Any:
                return Values(super().values())

        class Values:
            def __init__(self, values: Any) -> None:
                self.held = values

            def __len__(self) -> int:
                return len(self.held)

            def __iter__(self) -> Iterator[Any]:
                meter.count += len(self)
                return iter(self.held)

        optimizer.state = State(dict, optimizer.state)
        for group in optimizer.param_groups:
            group["params"] = Params(group["params"])

    def run(self, work: Callable[[], object]) -> int:
        def trace(frame: Any, event: str, argument: Any) -> Any:
            frame.f_trace_opcodes = True
            self.count += event == "opcode"
            return trace

        before, self.count = sys.gettrace(), 0
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at this in settrace
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(before)
        return self.count


@pytest.mark.parametrize("counted_on", ["host", "device"])
@pytest.mark.parametrize("gaps", [False, True])
def test_work_is_linear_in_the_number_of_parameters(
    counted_on: str, gaps: bool, use_backend: Callable[..., None]
) -> None:
    """In the first backward pass, the second one, and the first one after loading; parameters with gaps are copied."""
    if counted_on == "device":
        use_backend(lambda *arguments: None, decides=True)
    work: dict[int, list[int]] = {}
    for count in (25, 100):
        model = nn.ParameterList(nn.Parameter(torch.zeros(4, 5)[:, : 4 if gaps else 5]) for _ in range(count))
        optimizer = Lion8bit(model.parameters(), fused=counted_on == "device")
        fuse_into_backward(model, optimizer)
        meter = Meter()
        work[count] = []
        for iteration in range(3):
            if iteration == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            meter.watch(optimizer)
            loss = torch.stack([param.sum() for param in model]).sum()
            work[count].append(meter.run(loss.backward))
            optimizer.step()
            assert {int(state["step"]) for state in optimizer.state.values()} <= {0, iteration, iteration + 1}
    ratios = [more / less for less, more in zip(work[25], work[100], strict=True)]
    assert max(ratios) < 4.2, f"four times the parameters take {ratios} times the work"


# ---- step_param -----------------------------------------------------------------------------------------------------


def test_parameters_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(torch.bfloat16)
    fuse_into_backward(model, optimizer)
    train(model, optimizer, steps=1)
    monkeypatch.setattr(Stepper, "build", None)  # a call would fail
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


CHANGES: dict[str, Callable[[Lion8bit], object]] = {
    "the first group leaves": lambda o: o.param_groups.pop(0),
    "a parameter leaves": lambda o: o.param_groups[0]["params"].pop(0),
    "another one takes its place": lambda o: o.param_groups[0]["params"].__setitem__(0, nn.Parameter(torch.ones(9))),
    "two change places": lambda o: o.param_groups[1]["params"].reverse(),
    "groups change places": lambda o: o.param_groups.reverse(),
    "a group comes": lambda o: o.add_param_group({"params": nn.Parameter(torch.ones(9)), "lr": 0.1}),
    "groups are made again": lambda o: o.load_state_dict(o.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_takes_the_options_and_the_seed_of_its_own_place(change: str) -> None:
    """Whatever group it comes with, and however groups have changed since its last step."""
    results = []
    for how in ("step_param", "step"):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(70, 90, generator=generator).bfloat16()) for _ in range(6)]
        groups = [{"params": params[2 * i : 2 * i + 2], "lr": 10.0**-i, "weight_decay": 0.1 * i} for i in range(3)]
        optimizer = Lion8bit(groups)
        given = [{}, *optimizer.param_groups]
        for step in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            if step:
                CHANGES[change](optimizer)
            held = {param for group in optimizer.param_groups for param in group["params"]}
            if how == "step":
                if step:
                    optimizer = fresh_plan(optimizer)
                optimizer.step()
                continue
            for number, param in enumerate(params):
                if param in held:
                    optimizer.step_param(param, given[(number + step) % 4])
                else:
                    with pytest.raises(ValueError, match="one of this optimizer's parameters"):
                        optimizer.step_param(param, given[number % 4])
        results.append(params)
    for number, (one, other) in enumerate(zip(*results, strict=True)):
        assert_same(one.detach(), other.detach(), f"parameter {number}")


def fresh_plan(optimizer: Lion8bit) -> Lion8bit:
    optimizer._stepper.plan = None
    return optimizer


def test_a_stranger_is_refused_before_anything_is_written() -> None:
    model, optimizer = build()
    train(model, optimizer, steps=1)
    stranger = nn.Parameter(torch.ones(70, 90))
    stranger.grad = torch.ones_like(stranger)
    for group in (optimizer.param_groups[0], {}):
        with pytest.raises(ValueError, match=r"one of this optimizer's parameters, got shape \(70, 90\)"):
            optimizer.step_param(stranger, group)
    assert stranger not in optimizer.state and torch.equal(stranger, torch.ones(70, 90))
    optimizer.load_state_dict(optimizer.state_dict())


def test_two_threads(use_backend: Callable[..., None]) -> None:
    """Autograd has one for each device. They share dictionaries and the counter of skipped elements."""
    inside = []

    def one_at_a_time(*arguments: Any) -> None:
        inside.append(threading.get_ident())
        time.sleep(1e-4)  # another thread has its turn
        assert len(set(inside)) == 1
        cpu.update_(*arguments)
        inside.clear()

    use_backend(one_at_a_time)
    results = []
    for how in ("step", "two threads"):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(70, 90, generator=generator).bfloat16()) for _ in range(40)]
        optimizer = Lion8bit(params)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).bfloat16()
                param.grad[0, 0] = torch.nan
            if how == "step":
                optimizer.step()
                continue
            errors: list[Exception] = []

            def backward(part: list[torch.Tensor]) -> None:
                try:
                    for param in part:
                        optimizer.step_param(param, {})  # noqa: B023
                except Exception as error:
                    errors.append(error)  # noqa: B023

            threads = [threading.Thread(target=backward, args=(params[i::2],)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]
        assert optimizer.nonfinite_count() == 120
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert_same(one.detach(), other.detach(), "parameter")


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


@pytest.mark.parametrize("inside", [False, True])
def test_ddp_around_the_model_is_refused(inside: bool, process_group: None) -> None:
    """It is made after `fuse_into_backward`, as Accelerate does, or before, and its ``.module`` is fused."""
    model, optimizer = build()
    nn.parallel.DistributedDataParallel(model)  # nobody holds it
    handle = fuse_into_backward(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    whole = nn.ModuleDict({"model": model}) if inside else model
    wrapped = nn.parallel.DistributedDataParallel(whole)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not be wrapped in DistributedDataParallel"):
            (model if inside else wrapped)(next(batches(1))).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle.remove()
    with pytest.raises(TypeError, match="not be wrapped in DistributedDataParallel"):
        fuse_into_backward(model, optimizer)
    fuse_into_backward(*build())  # another model
    del wrapped, whole
    fuse_into_backward(model, optimizer)
    train(model, optimizer, steps=2)


@pytest.mark.parametrize("accumulating", [False, True])
def test_gradients_that_come_after_the_hooks_are_refused(accumulating: bool) -> None:
    """As a DDP that nobody has seen would write them, or a loop of one's own that averages."""
    model, optimizer = build()
    handle = fuse_into_backward(model, optimizer)
    train(model, optimizer, steps=1)
    model(next(batches(1))).backward()
    before = copy.deepcopy(model.state_dict())
    if accumulating:
        with handle.accumulate():
            model(next(batches(1))).backward()
    else:
        model.head.weight.grad = torch.zeros_like(model.head.weight)
    with pytest.raises(RuntimeError, match="must have no gradient when step"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_optimizer_is_refused_while_the_first_one_lives() -> None:
    model, optimizer = build()
    handle = fuse_into_backward(model, optimizer)
    for second in (Lion8bit(model.parameters()), optimizer):
        with pytest.raises(ValueError, match=r"got embedding\.weight; first call remove\(\)"):
            fuse_into_backward(model, second)
    handle.remove()
    fuse_into_backward(model, Lion8bit(model.parameters())).remove()
    handle.remove()  # again: nothing happens
    fuse_into_backward(model, optimizer)


def test_other_optimizers_and_models_are_refused() -> None:
    model, optimizer = build()
    with pytest.raises(TypeError, match="must be a Lion8bit, got Lion"):
        fuse_into_backward(model, Lion(model.parameters()))
    with pytest.raises(ValueError, match="trainable parameters of the optimizer"):
        fuse_into_backward(copy.deepcopy(model), optimizer)
