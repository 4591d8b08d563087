"""What torch's test/test_optim.py demands of every optimizer holds for Lion8bit and Lion, by torch's own machinery."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import assert_same
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lion8bit import Lion, Lion8bit

pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

SHARED_INPUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "betas": {"betas": (0.5, 0.8)},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "tensor lr": {"lr": torch.tensor(0.001)},
}
LION8BIT_INPUTS: dict[str, dict[str, Any]] = {
    "fp32 momentum": {"optim_bits": 32},
    "4 bits": {"optim_bits": 4},
    "block of 64": {"block_size": 64},
    "listing": {"momentum_first": True, "decoupled_weight_decay": False, "weight_decay": 0.1},
    "decoupled lr": {"decouple_lr": True, "weight_decay": 0.01},
    "cautious": {"cautious": True},
}


def inputs_of_lion(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [OptimizerInput(None, copy.deepcopy(options), desc) for desc, options in SHARED_INPUTS.items()]


def inputs_of_lion8bit(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    # The generic checks have few elements to a parameter; without min_8bit_size=0 nothing would be quantized.
    named = {**SHARED_INPUTS, **LION8BIT_INPUTS}
    quantized = [OptimizerInput(None, {"min_8bit_size": 0, **copy.deepcopy(o)}, desc) for desc, o in named.items()]
    return [*quantized, OptimizerInput(None, {}, "small parameters in fp32")]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    def wrong(kwargs: dict[str, Any], regex: str) -> ErrorOptimizerInput:
        return ErrorOptimizerInput(OptimizerInput(None, kwargs, str(kwargs)), error_type=ValueError, error_regex=regex)

    return [
        *get_error_inputs_for_all_optims(device, dtype),
        wrong({"lr": -1.0}, "Invalid learning rate: -1.0"),
        wrong({"lr": torch.tensor(-0.5)}, "Invalid learning rate: -0.5"),
        wrong({"betas": (1.0, 0.0)}, "Invalid beta1: 1.0"),
        wrong({"betas": (0.9, -0.1)}, "Invalid beta2: -0.1"),
        wrong({"betas": (0.9,)}, "betas must be two numbers"),
        wrong({"weight_decay": -1}, "Invalid weight_decay: -1"),
    ]


SCHEDULERS: list[list[Callable[[torch.optim.Optimizer], Any]]] = [
    [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4)],
    [lambda opt: lr_scheduler.ReduceLROnPlateau(opt)],
    [
        lambda opt: lr_scheduler.StepLR(opt, gamma=0.99, step_size=10),
        lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.99),
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
    ],
]

INFOS = [
    OptimizerInfo(
        Lion8bit,
        optim_inputs_func=inputs_of_lion8bit,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=(),
        not_og_supported_flags=tuple(Lion8bit([torch.zeros(1)]).defaults.keys() - {"lr", "betas", "weight_decay"}),
        supports_complex=False,
    ),
    OptimizerInfo(
        Lion,
        optim_inputs_func=inputs_of_lion,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=(),
        not_og_supported_flags=("maximize",),
        supports_complex=False,
    ),
]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

pytestmark = [
    pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name),
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(info: OptimizerInfo, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every configuration of an optimizer: its name and its options."""
    for case in _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, info):
        yield case.desc, case.kwargs


class Problem:
    """The least squares that torch's checks use: ``|W x + b|^2`` for one x."""

    def __init__(self, device: str, contiguous: bool = True) -> None:
        def make(*shape: int) -> nn.Parameter:
            strided = torch.randn(*shape, 2, device=device)[..., 0]
            return nn.Parameter(strided.contiguous() if contiguous else strided)

        self.weight, self.bias = make(10, 5), make(10)
        self.x = torch.randn(5, device=device)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def loss(self) -> Tensor:
        return (self.weight.mv(self.x) + self.bias).pow(2).sum()

    def step(self, optimizer: torch.optim.Optimizer) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return optimizer.step(closure)

    def twin(self) -> Problem:
        return copy.deepcopy(self)


def assert_same_params(one: Problem, other: Problem, what: str) -> None:
    for a, b in zip(one.params, other.params, strict=True):
        assert_same(a.detach().cpu(), b.detach().cpu(), what)


def assert_right_direction(problem: Problem, before: float, maximize: bool, what: str) -> None:
    after = problem.loss().item()
    assert after > before if maximize else after < before, f"{what}: {before} to {after}"


# ---- Steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("with_schedulers", [False, True])
def test_goes_right_direction(info: OptimizerInfo, device: str, contiguous: bool, with_schedulers: bool) -> None:
    for schedules in info.scheduler_inputs if with_schedulers else [[]]:
        for desc, options in inputs(info, device):
            problem = Problem(device, contiguous)
            optimizer = info.optim_cls(problem.params, **options)
            schedulers = [make(optimizer) for make in schedules]
            before = problem.loss().item()
            for _ in range(20):
                loss = problem.step(optimizer)
                for scheduler in schedulers:
                    scheduler.step(*[loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
            assert_right_direction(problem, before, options.get("maximize", False), desc)


def test_param_groups_with_schedulers_go_right_direction(info: OptimizerInfo, device: str) -> None:
    for schedules in info.scheduler_inputs:
        for desc, options in inputs(info, device):
            problem = Problem(device)
            groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
            optimizer = info.optim_cls(groups, **options)
            schedulers = [make(optimizer) for make in schedules]
            before = problem.loss().item()
            for _ in range(20):
                loss = problem.step(optimizer)
                for scheduler in schedulers:
                    scheduler.step(*[loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
            assert_right_direction(problem, before, options.get("maximize", False), desc)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_lr(info: OptimizerInfo, device: str, shape: tuple[int, ...]) -> None:
    # PyTorch 2.6's schedulers replace a tensor, or take none that has a dimension.
    known = info.scheduler_inputs if hasattr(lr_scheduler, "_update_param_group_val") else []
    for schedules in [[], *known]:
        for desc, options in inputs(info, device):
            if isinstance(options.get("lr"), Tensor):
                continue
            lr = options.pop("lr", 1e-3)
            one = Problem(device)
            other = one.twin()
            by_float = info.optim_cls(one.params, lr=lr, **options)
            by_tensor = info.optim_cls(other.params, lr=torch.full(shape, lr, dtype=torch.float64), **options)
            schedulers = [[make(optimizer) for make in schedules] for optimizer in (by_float, by_tensor)]
            for _ in range(12):
                for problem, optimizer, own in zip((one, other), (by_float, by_tensor), schedulers, strict=True):
                    loss = problem.step(optimizer)
                    for scheduler in own:
                        scheduler.step(*[loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
            torch.testing.assert_close(other.params, one.params, msg=desc)
            assert isinstance(by_tensor.param_groups[0]["lr"], Tensor), "a scheduler has replaced the tensor"


@pytest.mark.parametrize("shared", [{}, {"lr": 1e-3}])
def test_param_groups_lr(info: OptimizerInfo, device: str, shared: dict[str, Any]) -> None:
    for desc, options in inputs(info, device):
        problem = Problem(device)
        before, bias = problem.loss().item(), problem.bias.detach().clone()
        options = {**options, "weight_decay": 0.0, **shared}
        groups = [{"params": [problem.weight], "lr": 0.01}, {"params": [problem.bias], "lr": 0.0}]
        optimizer = info.optim_cls(groups, **options)
        for _ in range(20):
            problem.step(optimizer)
        assert_same(problem.bias.detach(), bias, desc)
        assert_right_direction(problem, before, options.get("maximize", False), desc)


def test_param_groups_weight_decay(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        problem = Problem(device)
        groups = [
            {"params": [problem.weight], **options, "weight_decay": 0.5, "lr": 1e-2},
            {"params": [problem.bias], **options, "weight_decay": 0.0, "lr": 1e-2},
        ]
        optimizer = info.optim_cls(groups)
        for param in problem.params:
            param.grad = torch.zeros_like(param)
        weight, bias = problem.weight.detach().clone(), problem.bias.detach().clone()
        optimizer.step()
        assert not torch.equal(problem.weight, weight), desc
        assert_same(problem.bias.detach(), bias, desc)


def test_step_is_noop_when_params_have_no_grad(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        param = nn.Parameter(torch.randn(5, 1, device=device))
        before = param.detach().clone()
        optimizer = info.optim_cls([param], **options)
        assert optimizer.step(lambda: torch.tensor([1.0])).item() == 1.0
        assert_same(param.detach(), before, desc)
        assert not optimizer.state, desc


def test_step_is_noop_for_zero_grads(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        if options.get("weight_decay"):
            continue
        param = nn.Parameter(torch.randn(5, 1, device=device))
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        info.optim_cls([param], **options).step(lambda: torch.tensor([1.0]))
        assert_same(param.detach(), before, desc)


def test_state_is_not_empty(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        problem = Problem(device)
        optimizer = info.optim_cls(problem.params, **options)
        problem.step(optimizer)
        assert set(optimizer.state) == set(problem.params), desc
        assert all(optimizer.state.values()), desc


def test_default_dtype_does_not_matter(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        one = Problem(device)
        other = one.twin()
        optimizer, unusual = (info.optim_cls(problem.params, **options) for problem in (one, other))
        for _ in range(3):
            one.step(optimizer)
            torch.set_default_dtype(torch.float64)
            try:
                other.step(unusual)
            finally:
                torch.set_default_dtype(torch.float32)
        assert_same_params(other, one, desc)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_goes_right_direction_on_many_devices(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        problems = [Problem("cuda:0"), Problem("cuda:1"), Problem("cpu")]
        optimizer = info.optim_cls([param for problem in problems for param in problem.params], **options)
        before = [problem.loss().item() for problem in problems]
        for _ in range(20):
            optimizer.zero_grad()
            for problem in problems:
                problem.loss().backward()
            optimizer.step()
        for problem, loss in zip(problems, before, strict=True):
            assert_right_direction(problem, loss, options.get("maximize", False), desc)


# ---- Errors ---------------------------------------------------------------------------------------------------------


def test_errors(info: OptimizerInfo, device: str) -> None:
    for case in info.optim_error_inputs_func(device=device, dtype=torch.float32):
        wrong = case.optimizer_error_input
        params = wrong.params if wrong.params is not None else [nn.Parameter(torch.randn(2, 3, device=device))]
        assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        expected = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expected(case.error_type, match=case.error_regex):
            info.optim_cls(params, **wrong.kwargs)


@pytest.mark.parametrize("in_group", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1}])
def test_errors_in_groups(info: OptimizerInfo, device: str, in_group: dict[str, Any]) -> None:
    optimizer = info.optim_cls([nn.Parameter(torch.randn(2, device=device))])
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2, device=device))], **in_group})
    assert len(optimizer.param_groups) == 1


def test_sparse_and_complex_are_refused(info: OptimizerInfo, device: str) -> None:
    assert not info.supports_sparse and not info.supports_complex
    param = nn.Parameter(torch.randn(3, 4, device=device))
    param.grad = torch.eye(3, 4, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse"):
        info.optim_cls([param]).step()
    param = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64, device=device))
    param.grad = torch.ones_like(param)
    with pytest.raises((TypeError, RuntimeError), match="complex"):
        info.optim_cls([param]).step()


# ---- State dicts ----------------------------------------------------------------------------------------------------


def assert_equal_trees(one: Any, other: Any, what: str) -> None:
    assert type(one) is type(other), what
    if isinstance(one, Tensor):
        assert_same(one, other, what)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key in one:
            assert_equal_trees(one[key], other[key], f"{what}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), what
        for a, b in zip(one, other, strict=True):
            assert_equal_trees(a, b, what)
    else:
        assert one == other, what


def named(problem: Problem) -> list[tuple[str, nn.Parameter]]:
    return [("0.weight", problem.weight), ("0.bias", problem.bias)]


@pytest.mark.parametrize("names", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_state_dict_is_deterministic(info: OptimizerInfo, device: str, names: tuple[bool, bool]) -> None:
    for desc, options in inputs(info, device):
        one = Problem(device)
        optimizer = info.optim_cls(named(one) if names[0] else one.params, **options)
        for _ in range(3):
            one.step(optimizer)
        saved = optimizer.state_dict()
        pristine = copy.deepcopy(saved)
        other = one.twin()
        second = info.optim_cls(named(other) if names[1] else other.params, **options)
        second.load_state_dict(saved)
        assert_equal_trees(second.state_dict()["state"], pristine["state"], desc)
        for _ in range(3):
            one.step(optimizer)
            other.step(second)
            assert_same_params(other, one, desc)
        assert_equal_trees(second.state_dict()["state"], optimizer.state_dict()["state"], desc)
        # Loading has aliased nothing, and groups that hold the same parameters pack the same.
        second.load_state_dict(pristine)
        assert_equal_trees(pristine["state"], second.state_dict()["state"], desc)
        optimizer.param_groups.extend(optimizer.param_groups)
        second.param_groups.extend(second.param_groups)
        one_groups, other_groups = (o.state_dict()["param_groups"] for o in (optimizer, second))
        assert [group["params"] for group in one_groups] == [group["params"] for group in other_groups]


def test_older_state_dicts_load(info: OptimizerInfo, device: str) -> None:
    """Options that came later are missing from what older versions saved; loading gives them their defaults."""
    for desc, options in inputs(info, device):
        problem = Problem(device)
        optimizer = info.optim_cls(problem.params, **options)
        for _ in range(3):
            problem.step(optimizer)
        for flag in info.not_og_supported_flags:
            old = copy.deepcopy(optimizer.state_dict())
            if old["param_groups"][0][flag] != optimizer.defaults[flag] or flag == "block_size":
                continue
            for group in old["param_groups"]:
                del group[flag]
            twin = problem.twin()
            fresh = info.optim_cls(twin.params, **options)
            fresh.load_state_dict(old)
            assert fresh.param_groups[0][flag] == optimizer.param_groups[0][flag], f"{desc}, {flag}"
            assert_equal_trees(fresh.state_dict()["state"], optimizer.state_dict()["state"], f"{desc}, {flag}")
            twin.step(fresh)


@pytest.mark.parametrize("names", [(True, False), (False, True), (True, True)], ids=str)
def test_named_state_dicts_load(info: OptimizerInfo, device: str, names: tuple[bool, bool]) -> None:
    for desc, options in inputs(info, device):
        one = Problem(device)
        optimizer = info.optim_cls(named(one) if names[0] else one.params, **options)
        one.step(optimizer)
        other = one.twin()
        renamed = [(f"other.{name}", param) for name, param in named(other)]
        second = info.optim_cls(renamed if names[1] else other.params, **options)
        second.load_state_dict(optimizer.state_dict())
        one.step(optimizer)
        other.step(second)
        assert_same_params(other, one, desc)
        group = second.state_dict()["param_groups"][0]
        expected = named(one) if names[0] else renamed  # torch lets saved names override
        assert group["param_names"] == [name for name, _ in expected], desc


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_save_and_load_are_equal(info: OptimizerInfo, device: str, dtype: torch.dtype, weights_only: bool) -> None:
    for desc, options in inputs(info, device):
        params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in ((10, 5), (7,), ())]
        optimizer = info.optim_cls(params, **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=weights_only)
        assert_equal_trees(loaded, optimizer.state_dict(), desc)
        fresh = info.optim_cls(params, **options)
        fresh.load_state_dict(loaded)
        assert_equal_trees(fresh.state_dict(), optimizer.state_dict(), desc)


def test_steps_load_as_numbers_or_tensors(info: OptimizerInfo, device: str) -> None:
    """Other optimizers count in tensors; whoever has turned the count into one, or back, can go on."""
    for desc, options in inputs(info, device):
        one = Problem(device)
        optimizer = info.optim_cls(one.params, **options)
        one.step(optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = torch.tensor(float(state["step"]))
        other = one.twin()
        second = info.optim_cls(other.params, **options)
        second.load_state_dict(saved)
        for problem, stepping in ((one, optimizer), (other, second)):
            problem.step(stepping)
        assert_same_params(other, one, desc)
        assert all(int(state.get("step", 2)) == 2 for state in second.state.values()), desc


def test_state_loads_on_another_device(info: OptimizerInfo, device: str) -> None:
    """State saved on the CPU comes to where the parameters are, and every tensor of it to one device."""
    for desc, options in inputs(info, device):
        one = Problem("cpu")
        optimizer = info.optim_cls(one.params, **options)
        one.step(optimizer)
        other = one.twin()
        for param in other.params:
            param.data = param.data.to(device)
        other.x = other.x.to(device)
        second = info.optim_cls(other.params, **options)
        second.load_state_dict(optimizer.state_dict())
        tensors = [value for state in second.state.values() for value in state.values() if isinstance(value, Tensor)]
        assert {value.device.type for value in tensors} == {device}, desc
        other.step(second)


# ---- Hooks ----------------------------------------------------------------------------------------------------------


def simple(info: OptimizerInfo, device: str) -> tuple[Problem, torch.optim.Optimizer]:
    problem = Problem(device)
    return problem, info.optim_cls(problem.params, lr=1e-3)


def test_step_hooks(info: OptimizerInfo, device: str) -> None:
    problem, optimizer = simple(info, device)
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: calls.append("global post")),
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre")),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post")),
    ]
    problem.loss().backward()
    try:
        optimizer.step()
        assert calls == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(calls) == 4


def test_step_pre_hook_may_change_arguments(info: OptimizerInfo, device: str) -> None:
    _, optimizer = simple(info, device)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": lambda: torch.tensor(5.0)}))
    assert optimizer.step().item() == 5.0


def test_state_dict_hooks(info: OptimizerInfo, device: str) -> None:
    problem, optimizer = simple(info, device)
    problem.step(optimizer)
    calls: list[str] = []

    def post(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**state_dict, "ran": True}

    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))
    optimizer.register_state_dict_post_hook(post)
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: calls.append("first post"), prepend=True)
    assert optimizer.state_dict()["ran"]
    assert calls == ["first", "pre", "first post", "post"]


def test_load_state_dict_hooks(info: OptimizerInfo, device: str) -> None:
    problem, optimizer = simple(info, device)
    problem.step(optimizer)
    saved = optimizer.state_dict()
    seen: list[Any] = []

    def change(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(("pre", sorted(state_dict["state"][0])))
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = 0.002
        return changed

    names = sorted(optimizer.state[problem.weight])
    twin = problem.twin()
    second = info.optim_cls(twin.params, lr=1e-3)
    second.register_load_state_dict_pre_hook(change)
    second.register_load_state_dict_pre_hook(lambda opt, sd: seen.append(("first", len(sd["state"]))), prepend=True)
    second.register_load_state_dict_post_hook(
        lambda opt: seen.append(("post", sorted(opt.state[twin.weight]), opt.param_groups[0]["lr"]))
    )
    second.register_load_state_dict_post_hook(
        lambda opt: seen.append(("first post", len(opt.state[twin.weight]))), prepend=True
    )
    second.load_state_dict(saved)
    assert seen == [("first", 2), ("pre", names), ("first post", len(names)), ("post", names, 0.002)]
    assert saved["param_groups"][0]["lr"] == 1e-3


# ---- The object -----------------------------------------------------------------------------------------------------


def public_attributes(value: Any) -> set[str]:
    return {name for name in vars(value) if not name.startswith("_")}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_preserve_all_public_attributes(info: OptimizerInfo, device: str, clone: Callable[[Any], Any]) -> None:
    for desc, options in inputs(info, device):
        problem = Problem(device)
        optimizer = info.optim_cls(problem.params, **options)
        problem.step(optimizer)
        twin, second = clone((problem, optimizer))
        assert public_attributes(second) == public_attributes(optimizer), desc
        assert repr(second) == repr(optimizer), desc
        problem.step(optimizer)
        twin.step(second)
        assert_same_params(twin, problem, desc)


def test_can_be_printed(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        text = repr(info.optim_cls(Problem(device).params, **options))
        assert text.startswith(f"{info.name} (\nParameter Group 0"), desc
        for name in options:
            assert f"    {name}: " in text, desc


def test_infos_leave_the_implementation_to_the_test(info: OptimizerInfo, device: str) -> None:
    for case in info.optim_inputs_func(device):
        assert not {"foreach", "fused", "differentiable"} & case.kwargs.keys(), case.desc


def test_options_are_in_defaults(info: OptimizerInfo, device: str) -> None:
    for desc, options in inputs(info, device):
        params = Problem(device).params
        optimizer = info.optim_cls(params, **options)
        assert options.items() <= optimizer.defaults.items(), desc
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert info.optim_cls(params, **optimizer.defaults).defaults == optimizer.defaults, desc
