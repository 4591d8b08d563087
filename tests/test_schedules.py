"""Learning rates of Lion8bit: schedules, decoupled decay, and settings taken from an AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    gradient_like,
    leaf,
)
from torch.optim import lr_scheduler

from lion8bit import Lion, Lion8bit


def test_tensor_lr_and_scheduler() -> None:
    param, other = leaf(torch.randn(5000)), leaf(torch.zeros(5000))
    other.data.copy_(param.data)
    # PyTorch 2.6's schedulers take no tensor that has a dimension.
    shape = [1] if hasattr(torch.optim.lr_scheduler, "_update_param_group_val") else []
    by_tensor, by_float = Lion8bit([param], lr=torch.full(shape, 1e-2)), Lion8bit([other], lr=1e-2)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.0 + 1e-9, 1.0, 4) for o in (by_tensor, by_float)]
    for _ in range(5):
        param.grad = gradient_like(param)
        other.grad = param.grad.clone()
        for optimizer, schedule in zip((by_tensor, by_float), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert torch.allclose(param, other, rtol=1e-6)
    with pytest.raises(ValueError, match="must be 1-element"):
        Lion8bit([param], lr=torch.tensor([1e-2, 1e-3]))


def test_decouple_lr() -> None:
    """At the initial lr the decay is weight_decay itself; a schedule that halves lr halves the decay."""
    param = leaf(torch.full((5000,), 2.0))
    optimizer = Lion8bit([param], lr=1e-3, weight_decay=0.1, decouple_lr=True)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.allclose(param, torch.full_like(param, 2.0 * 0.9))
    optimizer.param_groups[0]["lr"] = 5e-4
    optimizer.step()
    assert torch.allclose(param, torch.full_like(param, 2.0 * 0.9 * 0.95))


PEAK, STEPS, DECAY = 1e-3, 12, 0.25


def halves(step: int) -> float:
    return 0.5**step


# All of them stay at or below PEAK, the rate at construction.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, halves),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=STEPS - 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.7)], [5]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS - 2, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.7)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, PEAK / 10, PEAK, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, PEAK, total_steps=STEPS),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, PEAK / 2, 5),
}
BY_RATE = {"lr": PEAK, "weight_decay": DECAY / PEAK}
DECAYING: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "decouple_lr": lambda params: Lion8bit(params, lr=PEAK, weight_decay=DECAY, decouple_lr=True),
    "tensor lr": lambda params: Lion8bit(
        params, lr=torch.tensor(PEAK, dtype=torch.float64), weight_decay=DECAY, decouple_lr=True
    ),
    "Lion8bit": lambda params: Lion8bit(params, **BY_RATE),
    "Lion": lambda params: Lion(params, **BY_RATE),
}


def test_every_scheduler_of_torch_is_known() -> None:
    found = [c for c in vars(lr_scheduler).values() if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)]
    assert {c.__name__ for c in found} - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of schedulers that call each other's step
@pytest.mark.parametrize("optimizer_name", DECAYING)
@pytest.mark.parametrize("scheduler_name", SCHEDULERS)
def test_the_decay_follows_every_scheduler(scheduler_name: str, optimizer_name: str) -> None:
    """weight_decay*lr/peak at each step: none writes over the peak, and none makes the decay negative or larger."""
    param = leaf(torch.ones(8))
    optimizer = DECAYING[optimizer_name]([param])
    schedule = SCHEDULERS[scheduler_name](optimizer)
    (group,) = optimizer.param_groups
    rates = []
    for _ in range(STEPS):
        param.data.fill_(1.0)
        param.grad = torch.zeros_like(param)
        rates.append(max(0.0, float(group["lr"])))
        optimizer.step()
        expected = 1.0 - DECAY * rates[-1] / PEAK
        assert 1.0 - DECAY - 1e-7 <= expected <= 1.0
        torch.testing.assert_close(param.detach(), torch.full_like(param, expected), rtol=0.0, atol=1e-7)
        schedule.step(*[1.0] * (scheduler_name == "ReduceLROnPlateau"))
    assert len({*rates}) > 1


@pytest.mark.parametrize("optimizer_name", DECAYING)
def test_a_schedule_starts_from_the_rate_that_is_set(optimizer_name: str) -> None:
    optimizer = DECAYING[optimizer_name]([leaf(torch.ones(8))])
    (group,) = optimizer.param_groups
    assert "initial_lr" not in group
    group["lr"] = PEAK / 2
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert group["lr"] == group["initial_lr"] == PEAK / 2
    assert group.get("peak_lr", PEAK) == pytest.approx(PEAK)


def test_the_peak_is_the_groups_own_where_it_has_one() -> None:
    params = [leaf(torch.ones(8)) for _ in range(3)]
    groups = [{"params": params[:1], "peak_lr": 2e-3}, {"params": params[1:2], "lr": 0.0}, {"params": params[2:]}]
    optimizer = Lion8bit(groups, lr=1e-3, weight_decay=0.5, decouple_lr=True)
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.param_groups[2]["decouple_lr"] = False
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert [param[0].item() for param in params] == pytest.approx([0.75, 1.0, 1.0 - 5e-4])


def test_adamw_settings_keep_the_decay_of_a_step() -> None:
    own = {"params": [leaf(torch.ones(3))], "lr": 3e-3, "weight_decay": 0.0}
    groups = [{"params": [("weight", leaf(torch.ones(2, 2)))]}, {**own, "params": [("bias", *own["params"])]}]
    optimizer = Lion8bit.from_adamw(groups, lr=1e-3, weight_decay=0.01, factor=4, cautious=True)
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], first["betas"], first["cautious"]) == (2.5e-4, 0.04, (0.9, 0.99), True)
    assert (second["lr"], second["weight_decay"]) == (7.5e-4, 0.0)
    assert own["lr"] == 3e-3
    (group,) = Lion8bit.from_adamw(iter([leaf(torch.ones(3))]), lr=torch.tensor(0.5), weight_decay=0.0).param_groups
    assert float(group["lr"]) == pytest.approx(0.1)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"maximize": True, "amsgrad": True}])
def test_groups_of_the_adamw_that_is_replaced(scheduled: bool, flags: dict[str, bool]) -> None:
    params = [leaf(torch.ones(3)) for _ in range(2)]
    adamw = torch.optim.AdamW([{"params": params[:1], "name": "a"}, {"params": params[1:], "lr": 2e-3}], **flags)
    if scheduled:
        lr_scheduler.OneCycleLR(adamw, [1e-2, 2e-2], 10)
        lr_scheduler.SequentialLR(adamw, [lr_scheduler.ConstantLR(adamw), lr_scheduler.ConstantLR(adamw)], [5])
    before = [{**group} for group in adamw.param_groups]
    optimizer = Lion8bit.from_adamw(adamw.param_groups, lr=1e-3, weight_decay=0.01, betas=(0.95, 0.98))
    assert adamw.param_groups == before
    for group, theirs in zip(optimizer.param_groups, before, strict=True):
        assert group["betas"] == (0.95, 0.98)
        assert not group.keys() & {"eps", "amsgrad", "foreach", "differentiable"}
        assert group["fused"] is False and group["maximize"] is flags.get("maximize", False)
        assert group.get("name") == theirs.get("name") and group["params"] == theirs["params"]
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & theirs.keys():
            assert group[name] == pytest.approx(theirs[name] / 5)
        assert group["weight_decay"] == pytest.approx(theirs["weight_decay"] * 5)
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for group, theirs in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] == pytest.approx(theirs.get("initial_lr", theirs["lr"]) / 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"factor": 0}, "factor must be positive, got 0"),
        ({"factor": "5"}, "factor must be a number, got the text '5'"),
        ({"lr": "1e-3"}, "lr must be a number, got the text '1e-3'"),
        ({"weight_decay": None}, "weight_decay must be a number, got None"),
        ({"factor": float("inf")}, "factor must be positive, got inf"),
        ({"decouple_lr": True}, "decouple_lr must be False in from_adamw"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_adamw_settings_that_cannot_be_converted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lion8bit.from_adamw([leaf(torch.ones(3))], **{"lr": 1e-3, "weight_decay": 0.1, **changes})
