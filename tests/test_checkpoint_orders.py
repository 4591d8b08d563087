"""Checkpoints of parameters in another order in memory, channels_last beside contiguous."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import pytest
import torch
from cases import assert_same_tree
from torch import nn

from lion8bit import Lion8bit, convert_state_dict, dequantize, quantize
from lion8bit.layout import memory_order


def images(
    memory_format: torch.memory_format, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Lion8bit]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 3, 3)).to(dtype).to(memory_format=memory_format)
    return net, Lion8bit(net.parameters(), lr=1e-3, **options)


def train_images(net: nn.Module, optimizer: Lion8bit, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in net.parameters():
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = torch.empty_like(param).copy_(gradient)
    optimizer.step()


ORDERS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("options", [{}, {"optim_bits": 32}, {"weight_rounding": "compensated"}], ids=str)
@pytest.mark.parametrize("saved_format", ORDERS)
def test_a_checkpoint_of_another_memory_format(saved_format: torch.memory_format, options: dict[str, Any]) -> None:
    """Loaded as it is it keeps its bits and its order, at the price of copies, and says so; converted it needs none."""
    other_format = next(order for order in ORDERS if order is not saved_format)
    dtype = torch.bfloat16 if "weight_rounding" in options else torch.float32
    net, optimizer = images(saved_format, dtype, **options)
    train_images(net, optimizer, 1)
    saved = optimizer.state_dict()
    wanted = [optimizer.momentum(param) for param in net.parameters()]

    _, kept = images(other_format, dtype, **options)
    with pytest.warns(
        UserWarning, match=r"of 2 parameters has another order .*convert_state_dict.*parameter 0"
    ) as seen:
        kept.load_state_dict(saved)
    assert len(seen) == 1 and seen[0].filename == __file__
    converted_net, converted = images(other_format, dtype, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.load_state_dict(convert_state_dict(saved, kept))
        converted.load_state_dict(convert_state_dict(saved, converted))
        images(saved_format, dtype, **options)[1].load_state_dict(saved)
    for param, momentum in zip(converted_net.parameters(), wanted, strict=True):
        state = converted.state[param]
        if "codes" in state:
            in_order = torch.empty_like(param, dtype=torch.float32).copy_(momentum)
            assert torch.equal(converted.momentum(param), dequantize(*quantize(in_order)))
        else:
            assert torch.equal(converted.momentum(param), momentum)
    for number, param in enumerate(converted_net.parameters()):
        if "residual" in saved["state"][number]:
            assert torch.equal(converted.state[param]["residual"], saved["state"][number]["residual"])
    train_images(converted_net, converted, 2)
    assert converted._stepper.plan is not None  # nothing is copied, so the plan is kept
    for param in converted_net.parameters():
        assert {memory_order(t) for t in converted.state[param].values() if getattr(t, "shape", 0) == param.shape} == {
            memory_order(param)
        }


def test_loaded_as_it_is_another_memory_format_keeps_its_bits() -> None:
    net, optimizer = images(torch.contiguous_format, torch.bfloat16)
    train_images(net, optimizer, 1)
    other_net, other = images(torch.channels_last, torch.bfloat16)
    other_net.load_state_dict(net.state_dict())
    with pytest.warns(UserWarning, match="another order"):
        other.load_state_dict(optimizer.state_dict())
    train_images(net, optimizer, 2)
    train_images(other_net, other, 2)
    for one, two in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(one, two) and torch.equal(optimizer.momentum(one), other.momentum(two))


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_4_bits_have_the_same_bits_in_every_order(rounding: str) -> None:
    """Their blocks follow the row-major order of the indices, so state moves between orders, and nothing warns."""
    options: dict[str, Any] = {"optim_bits": 4, "weight_rounding": rounding, "min_8bit_size": 0}
    twins = [images(order, torch.bfloat16, **options) for order in ORDERS]
    for seed in range(2):
        for net, optimizer in twins:
            train_images(net, optimizer, seed)
    for (_, one), (_, other) in (twins, twins[::-1]):
        assert_same_tree(one.state_dict(), other.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(one.state_dict())
            assert_same_tree(convert_state_dict(one.state_dict(), other)["state"], one.state_dict()["state"])
    for net, optimizer in twins:
        train_images(net, optimizer, 2)
    for param, other in zip(twins[0][0].parameters(), twins[1][0].parameters(), strict=True):
        assert torch.equal(param, other)
    assert_same_tree(twins[0][1].state_dict(), twins[1][1].state_dict())


def test_scales_of_another_order_are_marked() -> None:
    """State of before the mark loads, by the strides of its codes."""
    net, optimizer = images(torch.channels_last)
    train_images(net, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["scales"].shape == (1, 1, 32, 3)
    saved["state"][0]["scales"] = saved["state"][0]["scales"].view(32, 3)
    twin_net, twin = images(torch.channels_last)
    twin.load_state_dict(saved)
    assert_same_tree(twin.state_dict(), optimizer.state_dict())
    saved["state"][0]["codes"] = saved["state"][0]["codes"].contiguous()
    saved["state"][0]["scales"] = saved["state"][0]["scales"][None, None]
    with pytest.raises(ValueError, match=r"order in memory that their scales were made for.*\(parameter 0, shape"):
        twin.load_state_dict(saved)
    train_images(twin_net, twin, 2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("loaded_format", ORDERS)
@pytest.mark.parametrize("saved_format", ORDERS)
def test_distributed_checkpoints_and_memory_formats(
    saved_format: torch.memory_format, loaded_format: torch.memory_format, flat: bool, bits: int
) -> None:
    """They copy codes element by element, also between orders, which scales of 8 bits do not survive."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, optimizer = images(saved_format, optim_bits=bits)
    train_images(net, optimizer, 1)
    resumed_net, resumed = images(loaded_format, optim_bits=bits)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.save({"o": get_optimizer_state_dict(net, optimizer, options=options)}, checkpoint_id=folder)
        state = {"o": get_optimizer_state_dict(resumed_net, resumed, options=options)}
        if saved_format is not loaded_format and bits == 8:
            with pytest.raises(checkpoint.api.CheckpointException, match=r"Size mismatch.*\.scales"):
                checkpoint.load(state, checkpoint_id=folder)
            return
        checkpoint.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(resumed_net, resumed, state["o"], options=options)
    for one, two in zip(net.parameters(), resumed_net.parameters(), strict=True):
        assert torch.equal(optimizer.momentum(one), resumed.momentum(two))
