"""Owns gradient release: each parameter is stepped inside the backward pass, as soon as its gradient is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lion8bit.optimizer import Lion8bit


class GradientRelease:
    """The hooks that `fuse_into_backward` has put on a model's parameters."""

    def __init__(self, model: nn.Module, optimizer: Lion8bit) -> None:
        if not isinstance(optimizer, Lion8bit):
            raise TypeError(f"optimizer must be a Lion8bit, got {type(optimizer).__name__}; pass the one that it wraps")
        _check_not_wrapped(model)
        owners: dict[Tensor, int] = {
            param: index for index, group in enumerate(optimizer.param_groups) for param in group["params"]
        }
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._owners = {param: owners[param] for param in self._names if param in owners}
        if not self._owners:
            raise ValueError("model must hold trainable parameters of the optimizer, got none of them; build it first")
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()  # since the last optimizer.step()
        self._accumulating = False
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for param in self._owners:
            self._hooks.append(param.register_post_accumulate_grad_hook(self._release))  # type: ignore[no-untyped-call]
        # GradScaler then hands its scale to the optimizer, which is how `_before_step` learns of it.
        vars(optimizer)["_step_supports_amp_scaling"] = True

    def remove(self) -> None:
        """Goes back to ordinary steps."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        vars(self._optimizer).pop("_step_supports_amp_scaling", None)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add up in ``.grad``; the first one outside, or optimizer.step(), steps with the sum.

        For all micro-batches but the last. The sums of all parameters are in memory meanwhile, as without gradient
        release. The momentum cannot take them in one by one: Lion's update is the sign of its blend with the whole
        gradient.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def _release(self, param: Tensor) -> None:
        if self._accumulating or param.grad is None:
            return
        if param in self._stepped:
            raise RuntimeError(
                f"{self._names[param]} must get one gradient before optimizer.step() is called, got a second one; put "
                "micro-batches but the last under accumulate(), call optimizer.step() in each iteration, and "
                "checkpoint modules that share parameters with use_reentrant=False"
            )
        self._optimizer.step_param(param, self._optimizer.param_groups[self._owners[param]])
        self._stepped.add(param)
        param.grad = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if hasattr(optimizer, "grad_scale"):
            raise RuntimeError(
                "gradients must not be scaled where the backward pass steps, got a GradScaler; this iteration has used "
                "scaled gradients, so load a checkpoint and go on in bfloat16 without the scaler"
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped.clear()


def fuse_into_backward(model: nn.Module, optimizer: Lion8bit) -> GradientRelease:
    """Steps each parameter when ``backward()`` has accumulated its gradient, and frees the gradient at once.

    All gradients are then never in memory together. The bits are those of the ordinary step. The training loop stays
    as it is: ``optimizer.step()`` still ends each iteration, for schedulers and to tell iterations apart, and steps
    only what still has a gradient, such as parameters outside ``model`` or unfrozen later.

    One backward pass is one step; micro-batches but the last go under ``accumulate()`` of the handle. Activation
    checkpointing and FSDP2's ``fully_shard`` work.

    Do not clip by the norm of all gradients: it is known only when most of them have been used and freed. This goes
    unnoticed, `clip_grad_norm_` just finds no gradients. (The size of Lion's update does not depend on a gradient's.)

    Args:
        model: holds the parameters; not wrapped.
        optimizer: steps them.

    Returns:
        A handle; ``handle.remove()`` goes back to ordinary steps.

    Raises:
        TypeError: the model is wrapped in DistributedDataParallel or FullyShardedDataParallel, or the optimizer in
            something.
        ValueError: the model holds no trainable parameter of the optimizer.
        RuntimeError: later, in ``backward()`` where a parameter gets a second gradient before ``optimizer.step()``, and
            in ``optimizer.step()`` where a GradScaler has scaled the gradients.
    """
    return GradientRelease(model, optimizer)


def _check_not_wrapped(model: nn.Module) -> None:
    wrappers: list[tuple[type, str]] = [
        (nn.parallel.DistributedDataParallel, "averages gradients after the hooks have run")
    ]
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrappers.append((FullyShardedDataParallel, "holds many parameters in one"))
    for module in model.modules():
        for wrapper, reason in wrappers:
            if isinstance(module, wrapper):
                name = wrapper.__name__
                raise TypeError(f"model must not be wrapped in {name}, which {reason}; use FSDP2's fully_shard")
