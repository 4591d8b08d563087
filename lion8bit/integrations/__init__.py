"""Owns what trainers need beside a torch optimizer. Nothing imports a trainer's library before it is asked for.

`lion8bit.integrations.transformers` and `lion8bit.integrations.lightning` have an `OptimizerReport` each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lion8bit.optimizer import Lion4bit, Lion8bit


def register_timm() -> None:
    """Makes "lion8bit" a name that timm knows: ``create_optimizer_v2(model, opt="lion8bit")`` and ``--opt lion8bit``.

    "lion4bit" is another one, for `Lion4bit`. Needs timm 1.0.12 or newer.
    """
    from timm.optim._optim_factory import OptimInfo, default_registry

    for bits, opt_class in ((8, Lion8bit), (4, Lion4bit)):
        default_registry.register(
            OptimInfo(
                name=f"lion{bits}bit",
                opt_class=opt_class,
                description=f"Lion with {bits}-bit momentum",
                has_eps=False,
                has_betas=True,
            )
        )


def find(optimizer: Any) -> Lion8bit:
    """The Lion8bit in what a trainer has wrapped around one.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, Lion8bit):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(f"optimizer must be a Lion8bit, got {type(optimizer).__name__}")
    return inner


class LastRates:
    """The learning rates of the latest step; the trainer's scheduler has replaced those of the groups by then.

    Args:
        optimizer: a Lion8bit, or what a trainer has wrapped around one.

    Raises:
        TypeError: it is none.
    """

    def __init__(self, optimizer: Any) -> None:
        self.rates: list[float | Tensor] | None = None
        self._handle = find(optimizer).register_step_post_hook(self._keep)

    def _keep(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        self.rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def remove(self) -> None:
        """Lets go of the optimizer."""
        self._handle.remove()


def report(optimizer: Any, last: LastRates | None = None) -> dict[str, float]:
    """What a trainer logs: `frozen_fraction`, `nonfinite_count` and `memory_report`, each name after "lion8bit/".

    It reads all trained parameters and waits for their devices.

    Args:
        optimizer: a Lion8bit, or what a trainer has wrapped around one.
        last: holds the learning rates of the step that the report is about; None for the present ones.
    """
    lion = find(optimizer)
    rates = None if last is None else last.rates
    if rates is not None and len(rates) != len(lion.param_groups):  # a group has been added since
        rates = None
    numbers = {"frozen_fraction": lion.frozen_fraction(rates), "nonfinite_count": lion.nonfinite_count()}
    return {f"lion8bit/{name}": float(value) for name, value in {**numbers, **lion.memory_report()}.items()}


def check_every(every: int) -> int:
    """The number of steps from one report to the next; a ValueError unless it is at least 1."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return every
