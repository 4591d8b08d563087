"""Groups by name, and what trainers do to an optimizer's groups, parameters and state behind its back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import assert_same
from torch import nn

from lion8bit import Lion8bit, keep_32bit


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    block = nn.ModuleDict({"norm": nn.LayerNorm(80), "proj": nn.Linear(80, 80)})
    tied = nn.ModuleDict({"embed_tokens": nn.Embedding(60, 80), "layers": nn.ModuleList([block])})
    tied["head"] = nn.Linear(80, 60, bias=False)
    tied["head"].weight = tied["embed_tokens"].weight
    return tied


def step(params: Any, optimizer: Lion8bit, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


# ---- keep_32bit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embed*"], {"embed_tokens.weight"}),
        ("head", {"embed_tokens.weight"}),
        (["head.weight", "*.norm"], {"embed_tokens.weight", "layers.0.norm.weight", "layers.0.norm.bias"}),
        (["*.bias"], {"layers.0.norm.bias", "layers.0.proj.bias"}),
        ("layers.?.proj", {"layers.0.proj.weight", "layers.0.proj.bias"}),
        ([], set()),
    ],
)
def test_names_choose_parameters(patterns: str | list[str], expected: set[str]) -> None:
    module = model()
    names = {param: name for name, param in module.named_parameters()}
    groups = keep_32bit(module, patterns)
    wide = [param for group in groups if group.get("optim_bits") == 32 for param in group["params"]]
    assert {names[param] for param in wide} == expected and len(wide) == len(expected)
    assert sum(len(group["params"]) for group in groups) == len(names)
    optimizer = Lion8bit(groups, min_8bit_size=0)
    step(module.parameters(), optimizer, 1)
    assert {names[param] for param, state in optimizer.state.items() if "momentum" in state} == expected


def test_every_parameter_may_be_kept() -> None:
    module = model()
    assert keep_32bit(module, "*") == [{"params": list(module.parameters()), "optim_bits": 32}]


@pytest.mark.parametrize("pattern", ["norm", "Embed*", "embed_tokens.weight.*", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"patterns must .*\['" + pattern.replace("*", r"\*")):
        keep_32bit(model(), ["head", pattern])


# ---- What trainers do -----------------------------------------------------------------------------------------------


def test_state_goes_through_load_before_the_first_step() -> None:
    """As Accelerate does to place state; and again after a step, with all tensors moved and copied."""
    module, twin = model(), model()
    optimizer, plain = (
        Lion8bit(keep_32bit(net, "*.proj"), lr=1e-3, optim_bits=4, min_8bit_size=0) for net in (module, twin)
    )
    for seed in range(3):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(module.parameters(), optimizer, seed)
        step(twin.parameters(), plain, seed)
    for param, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert_same(param.detach(), other.detach(), "parameter")
        assert_same(optimizer.momentum(param), plain.momentum(other), "momentum")


def test_parameters_put_in_place_of_others() -> None:
    """As wrappers do between construction and the first step; what is in the group is stepped, nothing else."""
    module = model()
    optimizer = Lion8bit(module.parameters(), lr=1e-3)
    step(module.parameters(), optimizer, 1)
    others = [nn.Parameter(param.detach().clone()) for param in module.parameters()]
    optimizer.param_groups[0]["params"][:] = others
    before = copy.deepcopy(module.state_dict())
    fresh = model()
    fresh.load_state_dict(before)
    expected = Lion8bit(fresh.parameters(), lr=1e-3)
    for seed in (2, 3):
        step(others, optimizer, seed)
        step(fresh.parameters(), expected, seed)
    for param, other in zip(fresh.parameters(), others, strict=True):
        assert_same(other.detach(), param.detach(), "new parameter")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_data_put_under_a_parameter() -> None:
    """As ``model.to`` does: another memory or dtype, the same momentum."""
    param = nn.Parameter(torch.randn(70, 90))
    twin = nn.Parameter(param.detach().clone())
    optimizer, plain = Lion8bit([param], lr=1e-3), Lion8bit([twin], lr=1e-3)
    step([param], optimizer, 1)
    step([twin], plain, 1)
    param.data = param.data.clone()
    step([param], optimizer, 2)
    step([twin], plain, 2)
    assert_same(param.detach(), twin.detach(), "parameter")
    momentum = optimizer.momentum(param)
    param.grad = None  # torch wants gradients of the parameter's dtype
    param.data = param.data.bfloat16()
    assert_same(optimizer.momentum(param), momentum, "momentum")
    step([param], optimizer, 3)
    assert param.dtype == torch.bfloat16 and optimizer.state[param]["codes"].dtype == torch.int8


@pytest.mark.parametrize(
    ("name", "bits"), [("codes", 8), ("scales", 8), ("codes", 4), ("scales", 4), ("shape", 4), ("momentum", 32)]
)
@pytest.mark.parametrize("warm", [False, True])
def test_state_cast_in_place_is_refused(name: str, bits: int, warm: bool) -> None:
    param = nn.Parameter(torch.randn(70, 90))
    optimizer = Lion8bit([param], optim_bits=bits)
    for seed in range(1 + warm):
        step([param], optimizer, seed)
    optimizer.state[param] = {**optimizer.state[param], name: optimizer.state[param][name].half()}
    before = param.detach().clone()
    with pytest.raises(ValueError, match=rf"{name} must be .*float16.* \(parameter 0 of group 0, shape \(70, 90\)\)"):
        step([param], optimizer, 9)
    assert_same(param.detach(), before, "parameter")


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("step_alone", [False, True])
def test_state_moved_elsewhere_is_refused(step_alone: bool, bits: int) -> None:
    param = nn.Parameter(torch.randn(70, 90))
    optimizer = Lion8bit([param], optim_bits=bits)
    step([param], optimizer, 1)
    optimizer.state[param] = {
        name: value.to("meta") if isinstance(value, torch.Tensor) and name != "shape" else value
        for name, value in optimizer.state[param].items()
    }
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="state must be on the parameter's device cpu, got meta"):
        optimizer.step_param(param, optimizer.param_groups[0]) if step_alone else optimizer.step()
    assert_same(param.detach(), before, "parameter")


def test_state_moved_and_back_goes_on() -> None:
    """As Lightning does when it offloads: each state a new dict of new tensors."""
    module, twin = model(), model()
    optimizer, plain = (
        Lion8bit(keep_32bit(net, "*.proj"), lr=1e-3, optim_bits=4, min_8bit_size=0) for net in (module, twin)
    )
    for seed in range(3):
        for param, state in optimizer.state.items():
            optimizer.state[param] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        step(module.parameters(), optimizer, seed)
        step(twin.parameters(), plain, seed)
    for param, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert_same(param.detach(), other.detach(), "parameter")


def test_closure_by_position_and_betas_as_a_list() -> None:
    module, twin = model(), model()
    optimizer = Lion8bit(module.parameters(), 1e-3, [0.8, 0.9])
    plain = Lion8bit(twin.parameters(), lr=1e-3, betas=(0.8, 0.9))
    generator = torch.Generator().manual_seed(1)
    for param, other in zip(module.parameters(), twin.parameters(), strict=True):
        other.grad = torch.randn(param.shape, generator=generator)

    def closure() -> float:
        for param, other in zip(module.parameters(), twin.parameters(), strict=True):
            param.grad = other.grad.clone()
        return 1.5

    assert optimizer.step(closure) == 1.5
    plain.step()
    for param, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert_same(param.detach(), other.detach(), "parameter")


@pytest.mark.parametrize("bits", [4, 8])
def test_partitions_of_a_flat_buffer_step_as_vectors(bits: int) -> None:
    """As DeepSpeed's ZeRO does: slices of one buffer take the place of parameters before the first step."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3 * 5001, generator=generator)
    whole = torch.nn.Parameter(flat.clone())
    slices = [torch.nn.Parameter(flat.narrow(0, start, 5001)) for start in range(0, len(flat), 5001)]
    options = {"weight_decay": 0.1, "optim_bits": bits}
    optimizers = [Lion8bit([torch.nn.Parameter(torch.zeros(70, 90))], **options) for _ in slices]
    for optimizer, part in zip(optimizers, slices, strict=True):
        optimizer.param_groups[0]["params"] = [part]
    reference = [Lion8bit([part.detach().clone().requires_grad_()], **options) for part in slices]
    for _ in range(3):
        grads = torch.randn(len(flat), generator=generator).split(5001)
        for optimizer, alone, grad in zip(optimizers, reference, grads, strict=True):
            for stepped in (optimizer, alone):
                stepped.param_groups[0]["params"][0].grad = grad.clone()
                stepped.step()
    for optimizer, alone, part in zip(optimizers, reference, slices, strict=True):
        copy = alone.param_groups[0]["params"][0]
        assert optimizer.state[part]["codes"].shape == ((1, 2501) if bits == 4 else (5001,))
        assert_same(part.detach(), copy.detach(), "slice")
        assert_same(optimizer.momentum(part), alone.momentum(copy), "momentum")
    assert_same(flat, torch.cat([part.detach() for part in slices]), "buffer")
    assert not torch.equal(flat, whole)
