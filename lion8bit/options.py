"""Parameter-group options: their checks, and the kernels' constants that are derived from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lion8bit.backends.native_library import in_default_environment
from lion8bit.backends.select import reads_device_memory
from lion8bit.device_scalars import DeviceRate
from lion8bit.layout import (
    CAUTIOUS,
    COUPLED_DECAY,
    DEFAULT_BLOCK_SIZE,
    MAXIMIZE,
    WEIGHT_ROUNDING,
    Hyper,
    check_block_size,
    is_integer,
)

MAX_FLOAT = float(np.finfo(np.float32).max)
# Rounding can end a schedule slightly below 0: by 1e-16 of the peak in double, by 1e-5 of it where fp32 rates are
# summed, which is 1e-9 at a peak of 1e-4. No schedule means such a rate, and it hardly moves a weight.
ROUNDED_RATE = 1e-9
NOT_CAPTURABLE = (
    "capturable must be True while a CUDA graph is captured, got False; "
    "each replay would repeat this step's learning rate and random numbers"
)

_FLAGS = (
    "momentum_first",
    "decoupled_weight_decay",
    "decouple_lr",
    "cautious",
    "maximize",
    "capturable",
    "fused",
    "is_paged",
)
_IN_HYPER = (
    "betas",
    "weight_decay",
    "block_size",
    "weight_rounding",
    "momentum_first",
    "decoupled_weight_decay",
    "cautious",
    "maximize",
)
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # a group's; torch's schedulers write the last four
_ONLY_ADAM = ("betas", "eps", "amsgrad", "foreach", "fused", "differentiable")

# ---- Checks --------------------------------------------------------------------------------------------------------


def as_number(name: str, value: Any) -> float:
    """The value as a float; ValueError if it is text, a truth value or not a number."""
    if type(value) is float:
        return value
    if isinstance(value, str):
        raise ValueError(f"{name} must be a number, got the text {value!r}; YAML reads 1e-4 as text: write 1.0e-4")
    real = not isinstance(value, (bool, np.bool_))
    if isinstance(value, Tensor):
        real = value.is_floating_point() and value.numel() == 1
    try:
        if real:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless the value is True or False; the text "False" would count as true."""
    if value not in (True, False):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_rates(options: Mapping[str, Any]) -> float:
    """Raises ValueError unless lr, betas and weight_decay are in their ranges.

    Returns:
        lr as a number; 0 if only rounding has made it negative.
    """
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    rate = as_number("lr", lr)
    if not -ROUNDED_RATE < rate <= MAX_FLOAT:
        raise ValueError(f"Invalid learning rate: {rate} (lr must be at least 0, and finite in float32)")
    is_pair = type(betas) is tuple or (isinstance(betas, (Sequence, np.ndarray)) and not isinstance(betas, str))
    if not is_pair or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0.0 <= as_number(name, beta) < 1.0:
            raise ValueError(f"Invalid {name}: {beta} (it must be in [0, 1))")
    weight_decay = as_number("weight_decay", options["weight_decay"])
    if not 0.0 <= weight_decay <= MAX_FLOAT:
        raise ValueError(f"Invalid weight_decay: {weight_decay} (it must be at least 0, and finite in float32)")
    return rate if rate > 0.0 else 0.0


def check_decay(decay: float, lr: float, weight_decay: float, peak_lr: float | None = None) -> None:
    """Raises ValueError unless the factor on the parameter is in [0, 1]; another one flips or inflates all weights."""
    if not 0.0 <= decay <= 1.0:
        formula, peak = ("lr", "") if peak_lr is None else ("lr/peak_lr", f", peak_lr {peak_lr}")
        raise ValueError(
            f"Invalid weight_decay: {weight_decay} ({formula}*weight_decay must be at most 1, got {1.0 - decay} with "
            f"lr {lr}{peak}; a step multiplies weights by 1 - {formula}*weight_decay)"
        )


def check_options(options: Mapping[str, Any]) -> float:
    """Raises ValueError unless every option has its kind and is in its range.

    Returns:
        lr as a number.
    """
    lr = check_rates(options)
    if options["decouple_lr"] and not 0.0 <= as_number("peak_lr", options.get("peak_lr", 0.0)) <= MAX_FLOAT:
        raise ValueError(f"peak_lr must be at least 0, and finite in float32, got {options['peak_lr']}")
    check_block_size(options["block_size"])
    size, bits = options["min_8bit_size"], options["optim_bits"]
    if not is_integer(size) or size < 0:
        raise ValueError(f"min_8bit_size must be an integer of at least 0, got {size!r}")
    if not is_integer(bits) or bits not in (4, 8, 32):
        raise ValueError(f"optim_bits must be 4, 8 or 32, got {bits!r}")
    seed = options["seed"]
    if seed is not None and (not is_integer(seed) or seed < 0):
        raise ValueError(f"seed must be an integer of at least 0 or None, got {seed!r}")
    for name in _FLAGS:
        check_flag(name, options[name])
    rounding = options["weight_rounding"]
    if rounding not in ("auto", *WEIGHT_ROUNDING):
        raise ValueError(f"weight_rounding must be 'auto' or one of {(*WEIGHT_ROUNDING,)}, got {rounding!r}")
    return lr


def with_block_size(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the default ``block_size`` of their ``optim_bits`` in place of None."""
    size, bits = options["block_size"], options["optim_bits"]
    return {**options, "block_size": DEFAULT_BLOCK_SIZE[4 if bits == 4 else 8] if size is None else size}


def check_torch_options(foreach: bool | None, differentiable: bool) -> None:
    """Raises ValueError where an option of torch's optimizers asks for what this one does not have."""
    if foreach:
        raise ValueError(f"foreach must be None or False, got {foreach!r}; one kernel steps all parameters anyway")
    if differentiable:
        raise ValueError(f"differentiable must be False, got {differentiable!r}; the step is in place")


def plain(value: Any) -> Any:
    """An option in Python's own types: `torch.load` refuses numpy's numbers and the lists of configuration files."""
    if isinstance(value, np.generic):
        return value.item()
    is_pair = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
    return tuple(map(plain, value)) if is_pair else value


# ---- Constants of the kernels --------------------------------------------------------------------------------------


def make_hyper(
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    block_size: int = 128,
    weight_rounding: str = "nearest",
    momentum_first: bool = False,
    decoupled_weight_decay: bool = True,
    peak_lr: float | None = None,
    cautious: bool = False,
    maximize: bool = False,
) -> Hyper:
    """Derives the kernels' constants from a group's options, in double precision, each rounded to float32 once.

    With ``momentum_first`` the momentum is updated before the update is formed from it,
    ``m = beta1*m + (1-beta1)*g; c = beta2*m + (1-beta2)*g``, which is Lion with blend ``beta1*beta2`` and decay
    ``beta1``. With ``peak_lr`` the parameter is multiplied by ``1 - weight_decay*lr/peak_lr`` instead of
    ``1 - weight_decay*lr``.
    """
    weight_decay = float(weight_decay)
    beta1, beta2 = (float(beta) for beta in betas)
    blend, beta = (beta1 * beta2, beta1) if momentum_first else (beta1, beta2)
    divisor, decoupled = _decay_terms(weight_decay, decoupled_weight_decay, peak_lr)
    coupled = not decoupled_weight_decay and weight_decay != 0
    return Hyper(
        lr=lr,
        decay=1.0 - lr / divisor * decoupled,
        coupled_decay=weight_decay if coupled else 0.0,
        blend=blend,
        one_minus_blend=1.0 - blend,
        beta=beta,
        one_minus_beta=1.0 - beta,
        unscale=1.0,
        flags=MAXIMIZE * bool(maximize) | COUPLED_DECAY * coupled | CAUTIOUS * bool(cautious),
        block_size=int(block_size),
        weight_rounding=WEIGHT_ROUNDING["stochastic" if weight_rounding == "auto" else weight_rounding],
    )


def _decay_terms(
    weight_decay: float, decoupled_weight_decay: bool, peak_lr: float | None = None
) -> tuple[float, float]:
    """(divisor, weight decay) of the factor on the parameter, ``decay = 1 - lr / divisor * weight_decay``."""
    if not decoupled_weight_decay or peak_lr == 0:
        return 1.0, 0.0
    return (1.0 if peak_lr is None else peak_lr), weight_decay


@in_default_environment
def group_hyper(group: dict[str, Any], lr: float | None = None) -> Hyper:
    """The constants of a checked group; ``lr`` replaces the group's rate, which may be in device memory."""
    options = group
    if lr is not None or device_lr(group) is not None:
        options = {**group, "lr": 0.0 if lr is None else lr}
    else:
        _check_not_capturing(group["lr"])
    rate = check_options(options)  # anyone may write to a group, and the kernels do not check their constants
    peak = peak_lr(group)
    hyper = make_hyper(lr=rate, peak_lr=peak, **{name: group[name] for name in _IN_HYPER})
    check_decay(hyper.decay, rate, group["weight_decay"], peak)
    return hyper


@in_default_environment
def read_on_host(hypers: Sequence[Hyper], groups: Sequence[dict[str, Any]], grad_scale: Tensor | None) -> None:
    """Completes constants with rates and a gradient scale that are in device memory; waits for the device."""
    for hyper, group in zip(hypers, groups, strict=True):
        lr = device_lr(group)
        if lr is not None:
            read = group_hyper(group, float(lr))
            hyper.lr, hyper.decay = read.lr, read.decay
        if grad_scale is not None:
            hyper.unscale = float(grad_scale.double().reciprocal())  # as GradScaler; rounded to fp32 here


def peak_lr(group: dict[str, Any]) -> float | None:
    """The rate at which a step decays by the whole weight decay; None without ``decouple_lr``.

    A group without one gets its present lr. It is not ``initial_lr``, which torch's schedulers overwrite.
    """
    if not group["decouple_lr"]:
        return None
    if "peak_lr" not in group:
        group["peak_lr"] = max(0.0, as_number("lr", group["lr"]))
    return as_number("peak_lr", group["peak_lr"])


def device_lr(group: Mapping[str, Any]) -> Tensor | None:
    """A learning rate that the host need not read, because the kernel reads it."""
    lr = group["lr"]
    if not (group["capturable"] and isinstance(lr, Tensor) and lr.numel() == 1 and reads_device_memory(lr.device)):
        return None
    if lr.dtype != torch.float32:
        raise ValueError(f"lr must be a float32 tensor with capturable=True, got {lr.dtype}; pass lr.float()")
    return lr


def device_rate(group: dict[str, Any], device: torch.device) -> DeviceRate:
    """The group's rate as the kernel reads it from device memory."""
    divisor, weight_decay = _decay_terms(group["weight_decay"], group["decoupled_weight_decay"], peak_lr(group))
    return DeviceRate(to_scalar(device_lr(group), device), divisor, weight_decay)


def to_scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of one element in fp32 on a device, copied only if it is not there."""
    return None if value is None else value.detach().to(device, torch.float32, non_blocking=True)


def _check_not_capturing(lr: float | Tensor) -> None:
    """Reading a rate from device memory would end a capture with an error of CUDA's."""
    if isinstance(lr, Tensor) and lr.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(NOT_CAPTURABLE)


# ---- From AdamW ----------------------------------------------------------------------------------------------------


def from_adamw_options(settings: dict[str, Any], factor: float) -> dict[str, Any]:
    """Lion's options for an AdamW's: rates divided and the weight decay multiplied by the factor."""
    if settings.get("decouple_lr"):
        raise ValueError(
            "decouple_lr must be False in from_adamw, got True; call Lion8bit itself, and pass AdamW's "
            "lr * weight_decay as its weight_decay"
        )
    scales = {"weight_decay": factor, **dict.fromkeys(_RATES, 1 / factor)}
    for name in settings.keys() & scales.keys():
        as_number(name, settings[name])
    return {name: value * scales[name] if name in scales else value for name, value in settings.items()}


def without_adams(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group of an AdamW without the options that only Adam has."""
    return {name: value for name, value in group.items() if name not in _ONLY_ADAM}


def check_factor(factor: float) -> None:
    """Raises ValueError unless the factor between AdamW's and Lion's rates is positive and finite."""
    if not 0.0 < as_number("factor", factor) < math.inf:
        raise ValueError(f"factor must be positive, got {factor}")
