"""torch.compile of the step: one graph, no breaks, no needless compilations, and the bits of the eager step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import assert_same
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lion8bit import Lion8bit, compiled
from lion8bit.state import STATE_TENSORS

Params = list[torch.nn.Parameter]

# "eager" runs a graph on the optimizer's own tensors, as inductor does. "aot_eager" gives copies to the operator.
BACKENDS = ("eager", "aot_eager")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "32 bits": {"optim_bits": 32},
    "4 bits": {"optim_bits": 4},
    "4 bits, compensated": {"optim_bits": 4, "weight_rounding": "compensated"},
    "block 64": {"block_size": 64},
    "nearest": {"weight_rounding": "nearest"},
    "compensated": {"weight_rounding": "compensated"},
    "listing": {"momentum_first": True, "decoupled_weight_decay": False},
    "decouple_lr": {"decouple_lr": True},
    "cautious": {"cautious": True},
    "maximize": {"maximize": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}
CASES = [
    *((name, torch.bfloat16, "aot_eager") for name in OPTIONS),
    ("plain", torch.float32, "aot_eager"),
    ("plain", torch.float16, "aot_eager"),
    *(("plain", dtype, "eager") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ("compensated", torch.bfloat16, "eager"),
    ("4 bits, compensated", torch.bfloat16, "eager"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def params_of(dtype: torch.dtype = torch.float32) -> Params:
    """Quantized and small ones, a transposed one, an empty one."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(72, 90), (50,), (5000,), (0, 7)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors.append(torch.randn(60, 80, generator=generator).to(dtype).t())
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def optimizer_of(params: Params, **options: Any) -> Lion8bit:
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 3e-3}]
    return Lion8bit(groups, **copy.deepcopy({"lr": 1e-3, **options}))


def set_grads(params: Params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def assert_same_contents(one: Lion8bit, other: Lion8bit) -> None:
    for group, same in zip(one.param_groups, other.param_groups, strict=True):
        for number, (param, twin) in enumerate(zip(group["params"], same["params"], strict=True)):
            assert_same(twin, param, f"parameter {number}")
            assert other.state[twin].keys() == one.state[param].keys()
            for name, value in one.state[param].items():
                if isinstance(value, torch.Tensor):
                    assert_same(other.state[twin][name], value, f"{name} of parameter {number}")
                else:
                    assert other.state[twin][name] == value, f"{name} of parameter {number}"


class Pair:
    """An optimizer stepped eagerly, and one like it whose step is compiled."""

    def __init__(self, backend: Any = "eager", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.eager = optimizer_of(params_of(dtype), **options)
        self.compiled = optimizer_of(params_of(dtype), **options)
        self.counter = CompileCounterWithBackend(backend)
        self.run = self.compile(self.compiled.step)
        self.seed = 0

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=self.counter, fullgraph=True)

    @property
    def both(self) -> tuple[Lion8bit, Lion8bit]:
        return self.eager, self.compiled

    @property
    def graphs(self) -> int:
        return self.counter.frame_count

    def set_grads(self) -> None:
        self.seed += 1
        for optimizer in self.both:
            set_grads([param for group in optimizer.param_groups for param in group["params"]], self.seed)

    def step(self) -> None:
        self.set_grads()
        self.eager.step()
        self.run()
        assert not counters["graph_break"]
        assert_same_contents(*self.both)

    def set_lr(self, lr: float) -> None:
        for optimizer in self.both:
            optimizer.param_groups[1]["lr"] = lr


# ---- Bits and graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, dtype, backend", CASES, ids=str)
def test_bits_are_those_of_the_eager_step(name: str, dtype: torch.dtype, backend: str) -> None:
    pair = Pair(backend, dtype, **OPTIONS[name])
    for _ in range(4):
        pair.step()
    assert pair.graphs == 1


def test_inductor_steps_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("inductor", torch.bfloat16, weight_rounding="compensated")
    monkeypatch.setattr(compiled, "_as", None)  # which copies would need
    for lr in (3e-3, 2e-3, 1e-3):
        pair.set_lr(lr)
        pair.step()
    assert pair.graphs == 2


def test_the_operator_keeps_its_promises() -> None:
    optimizer = optimizer_of(params_of())
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_grads(params, 1)
    optimizer.step()
    arguments = (
        [param.detach() for param in params],
        [param.grad for param in params],
        [optimizer.state[param][name] for param in params for name in STATE_TENSORS if name in optimizer.state[param]],
        [torch.tensor(1e-3), torch.tensor(1e-3)],
        [0, 1, 2, 3, 4],
        compiled.enroll(optimizer),
    )
    torch.library.opcheck(torch.ops.lion8bit.step_.default, arguments)


# ---- What changes between steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changing_lr_is_compiled_once_more(backend: str) -> None:
    pair = Pair(backend)
    for lr in (1e-3, 2e-3, 0.0, 5e-4, 3e-4):
        pair.set_lr(lr)
        pair.step()
    assert pair.graphs == 2


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_tensor_lr_is_compiled_once(shape: tuple[int, ...]) -> None:
    pair = Pair("aot_eager", lr=torch.full(shape, 1e-3))
    for lr in (1e-3, 2e-3, 0.0, 5e-4):
        for optimizer in pair.both:
            optimizer.param_groups[0]["lr"].fill_(lr)
        pair.step()
    assert pair.graphs == 1


@pytest.mark.filterwarnings("ignore:Detected call of")  # the scheduler does not see the compiled step
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_schedulers(tensor: bool, whole: bool) -> None:
    pair = Pair(lr=torch.tensor(1e-3) if tensor else 1e-3, decouple_lr=True)
    one, other = (torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in pair.both)
    # A scheduler puts a wrapper around step that torch.compile does not enter, so fullgraph=True has to come before it.
    if whole:
        pair.run = torch.compile(lambda: (pair.compiled.step(), other.step()), backend=pair.counter)
    for _ in range(5):
        pair.set_grads()
        pair.eager.step()
        one.step()
        pair.run()
        if not whole:
            other.step()
        assert_same_contents(*pair.both)
    assert pair.graphs == 2


@pytest.mark.parametrize("option", [{"weight_decay": 0.2}, {"betas": (0.8, 0.9)}, {"cautious": True}], ids=str)
def test_other_options_may_change(option: dict[str, Any]) -> None:
    pair = Pair()
    pair.step()
    for optimizer in pair.both:
        optimizer.param_groups[0].update(option)
    pair.step()
    assert pair.graphs == 2


def test_compensation_may_begin_and_end() -> None:
    pair = Pair("aot_eager", torch.bfloat16)
    for rounding in ("nearest", "compensated", "auto"):
        for optimizer in pair.both:
            optimizer.param_groups[0]["weight_rounding"] = rounding
        pair.step()


def test_new_gradient_tensors_cost_nothing() -> None:
    pair = Pair()
    for _ in range(3):
        for optimizer in pair.both:
            optimizer.zero_grad()
        pair.step()
    assert pair.graphs == 1


def test_eager_and_compiled_steps_alternate() -> None:
    pair = Pair()
    compiled_step = pair.run
    for run in (pair.compiled.step, compiled_step, pair.compiled.step, compiled_step):
        pair.run = run
        pair.step()
    assert pair.graphs == 1


def test_gradients_that_come_and_go() -> None:
    pair = Pair("aot_eager")
    for missing in (None, 1, 2, None):
        pair.set_grads()
        for optimizer in pair.both:
            if missing is not None:
                optimizer.param_groups[1]["params"][missing].grad = None
        pair.eager.step()
        pair.run()
        assert_same_contents(*pair.both)
    assert [state["step"] for state in pair.compiled.state.values()].count(3) == 2


def test_state_may_be_replaced() -> None:
    pair = Pair("aot_eager")
    pair.step()
    saved = copy.deepcopy(pair.compiled.state_dict())
    pair.step()
    for optimizer in pair.both:
        optimizer.load_state_dict(saved)
    pair.step()
    for optimizer in pair.both:
        optimizer.state.clear()
    pair.step()


def test_bad_gradients_are_counted() -> None:
    pair = Pair("aot_eager")
    for optimizer in pair.both:
        set_grads([param for group in optimizer.param_groups for param in group["params"]], 7)
        optimizer.param_groups[0]["params"][0].grad[3, 5] = float("nan")
    pair.eager.step()
    pair.run()
    assert_same_contents(*pair.both)
    assert pair.compiled.nonfinite_count() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_changes_nothing(backend: str) -> None:
    pair = Pair(backend, fused=True)
    pair.step()
    for found_inf in (1.0, 0.0):
        for optimizer in pair.both:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(found_inf)
        pair.step()
    assert {state["step"] for state in pair.compiled.state.values()} == {2}


# ---- In a function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_function_does_before_and_after(backend: str) -> None:
    pair = Pair(backend)

    def clip_step_and_average(optimizer: Lion8bit, average: torch.Tensor) -> torch.Tensor:
        param = optimizer.param_groups[0]["params"][0]
        before = param.detach().clone()
        param.grad.clamp_(-0.5, 0.5)
        with torch.no_grad():
            param.mul_(0.99)
        optimizer.param_groups[0]["lr"] = 0.02
        optimizer.step()
        average.lerp_(param.detach(), 0.1)
        return before + param.detach()

    averages = [torch.zeros(72, 90) for _ in pair.both]
    compiled_function = pair.compile(clip_step_and_average)
    for _ in range(3):
        pair.set_grads()
        expected = clip_step_and_average(pair.eager, averages[0])
        actual = compiled_function(pair.compiled, averages[1])
        assert_same(actual, expected, "result")
        assert_same(averages[1], averages[0], "average")
        assert_same_contents(*pair.both)


def test_two_optimizers_in_one_function() -> None:
    pairs = [Pair(), Pair(weight_rounding="nearest")]
    step_both = pairs[0].compile(lambda: [pair.compiled.step() for pair in pairs])
    for _ in range(2):
        for pair in pairs:
            pair.set_grads()
            pair.eager.step()
        step_both()
        for pair in pairs:
            assert_same_contents(*pair.both)
    assert pairs[0].graphs == 1


def test_a_closure_with_a_backward_pass() -> None:
    pair = Pair("aot_eager")
    step = torch.compile(pair.compiled.step, backend="aot_eager")  # a backward pass breaks the graph

    def closure_of(optimizer: Lion8bit) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            params = [param for group in optimizer.param_groups for param in group["params"]]
            loss = torch.stack([(param * param).sum() for param in params]).sum()
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        expected = pair.eager.step(closure_of(pair.eager))
        assert_same(step(closure_of(pair.compiled)).detach(), expected.detach(), "loss")
        assert_same_contents(*pair.both)


def test_hooks_run() -> None:
    pair = Pair()
    calls: list[str] = []
    pair.compiled.register_step_pre_hook(lambda *arguments: calls.append("before"))
    pair.compiled.register_step_post_hook(lambda *arguments: calls.append("after"))
    pair.step()
    pair.step()
    assert calls == ["before", "after"] * 2


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_what_cannot_be_stepped_with_changes_nothing(warm: bool) -> None:
    pair = Pair()
    if warm:
        pair.step()
    before = [param.detach().clone() for group in pair.compiled.param_groups for param in group["params"]]
    pair.set_grads()
    pair.compiled.param_groups[1]["betas"] = (0.9, 1.5)
    with pytest.raises(Exception, match=r"betas must be|Invalid beta"):
        pair.run()
    after = [param.detach() for group in pair.compiled.param_groups for param in group["params"]]
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert_same(other, one, f"parameter {number}")
