"""The listing that the project began from: its update rule is Lion8bit's `momentum_first`; its prose is not Lion."""

from __future__ import annotations

import math

import pytest
import torch

from lion8bit import Lion8bit
from lion8bit.options import make_hyper

LR, BETA1, BETA2, WEIGHT_DECAY = 1e-3, 0.9, 0.97, 0.05


def listing_code_step(
    param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The listing's code: coupled decay, momentum first. Returns parameter, momentum and what the sign is of."""
    grad = grad + WEIGHT_DECAY * param
    momentum = BETA1 * momentum + (1 - BETA1) * grad
    blended = BETA2 * momentum + (1 - BETA2) * grad
    return param - LR * blended.sign(), momentum, blended


@pytest.mark.parametrize("optim_bits", [32, 8, 4])
def test_momentum_first_is_the_listing(optim_bits: int) -> None:
    """From equal parameters and momentum, each step has the listing's signs wherever rounding cannot decide them."""
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(64, 128, generator=generator).requires_grad_()
    optimizer = Lion8bit([param], LR, (BETA1, BETA2), WEIGHT_DECAY, momentum_first=True,
                         decoupled_weight_decay=False, optim_bits=optim_bits)  # fmt: skip
    for _ in range(50):
        param.grad = torch.randn(64, 128, generator=generator)
        expected, momentum, blended = listing_code_step(
            param.detach().double(), param.grad.double(), optimizer.momentum(param).double()
        )
        optimizer.step()
        decided = blended.abs() > 1e-6  # fp32 evaluates values of order 1 to about 1e-7
        assert float(decided.double().mean()) > 0.999
        assert float((param.detach().double() - expected).abs()[decided].max()) < 1e-6
        if optim_bits == 32:
            assert torch.allclose(optimizer.momentum(param).double(), momentum, atol=1e-6)


def test_momentum_first_is_lion_with_other_constants() -> None:
    """beta2*(beta1*m + (1-beta1)*g) + (1-beta2)*g = blend*m + (1-blend)*g with blend = beta1*beta2, decay beta1."""
    hyper = make_hyper(lr=1.0, betas=(BETA1, BETA2), momentum_first=True)
    assert hyper.blend == pytest.approx(BETA1 * BETA2, rel=2**-23) and hyper.beta == pytest.approx(BETA1, rel=2**-23)
    assert hyper.one_minus_blend == pytest.approx(BETA2 * (1 - BETA1) + 1 - BETA2, rel=2**-23)
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(5000, generator=generator)
    one, other = param.clone().requires_grad_(), param.clone().requires_grad_()
    listing = Lion8bit([one], LR, (BETA1, BETA2), momentum_first=True)
    lion = Lion8bit([other], LR, (BETA1 * BETA2, BETA1))
    for _ in range(20):
        one.grad = torch.randn(5000, generator=generator)
        other.grad = one.grad.clone()
        listing.step()
        lion.step()
    assert torch.equal(one, other)


def test_zero_lr_is_allowed_where_the_listing_refuses_it() -> None:
    param = torch.randn(5000, requires_grad=True)
    before = param.detach().clone()
    optimizer = Lion8bit([param], lr=0.0, weight_decay=0.1)
    param.grad = torch.randn(5000)
    optimizer.step()
    assert torch.equal(param.detach(), before) and bool(optimizer.momentum(param).any())


def listing_definition(
    grads: list[float], *, beta1: float, beta2: float, gamma: float, lr: float, eps: float
) -> list[dict[str, float]]:
    """The rule of the listing's prose; one record for each step. A negative n has no root: NaN."""
    theta, m, records = 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        sign = (g > 0) - (g < 0)
        m = beta1 * m + (1 - beta1) * g
        n = gamma * sign * abs(g) + (1 - beta2) * sign
        m_hat, n_hat = m / (1 - beta1**t), n / (1 - beta2**t)
        root = math.sqrt(n_hat) if n_hat >= 0 else math.nan
        theta -= lr * m_hat / (root + eps)
        records.append({"m": m, "n": n, "m_hat": m_hat, "n_hat": n_hat, "theta": theta})
    return records


CONSTANTS = {"beta1": 0.9, "beta2": 0.997, "gamma": 0.1, "lr": 0.001, "eps": 1e-8}


def test_worked_example_up_to_its_last_line() -> None:
    """With the listing's own gradient of 50 its intermediate values come out; its last line forgets the root."""
    record = listing_definition([50.0], **CONSTANTS)[0]
    assert record["m"] == pytest.approx(5.0) and record["m_hat"] == pytest.approx(50.0)
    assert record["n"] == pytest.approx(5.003) and record["n_hat"] == pytest.approx(1667.67, rel=1e-5)
    printed = -0.00003
    without_root = -0.001 * record["m_hat"] / record["n_hat"]
    assert without_root == pytest.approx(printed, rel=1e-3)
    assert record["theta"] == pytest.approx(-0.001 * 50 / math.sqrt(1667.67), rel=1e-5)
    assert record["theta"] / printed > 40


def test_worked_example_has_the_wrong_gradient() -> None:
    """f(theta) = (theta - 5)^2 at 0 has gradient -10, not 50; and with a negative gradient the rule yields NaN."""
    theta = torch.zeros((), requires_grad=True)
    (theta - 5).square().backward()
    assert theta.grad is not None and theta.grad.item() == -10.0
    record = listing_definition([-10.0], **CONSTANTS)[0]
    assert record["n_hat"] < 0 and math.isnan(record["theta"])


def test_definition_has_no_second_momentum() -> None:
    """n depends on the present gradient alone: two histories with the same last gradient end with the same n."""
    one, other = listing_definition([1.0, 3.0], **CONSTANTS), listing_definition([200.0, 3.0], **CONSTANTS)
    assert one[-1]["n"] == other[-1]["n"] and one[-1]["m"] != other[-1]["m"]
