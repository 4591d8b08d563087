"""Gradient release: each parameter is stepped inside the backward pass, as soon as its gradient is complete."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lion8bit.optimizer import Lion8bit

_handles: weakref.WeakSet[GradientRelease] = weakref.WeakSet()


class GradientRelease:
    """The hooks that `fuse_into_backward` has put on a model's parameters.

    The optimizer holds this handle, whose hooks hold neither of the two. They are removed when the optimizer is freed.
    """

    def __init__(self, model: nn.Module, optimizer: Lion8bit) -> None:
        if not isinstance(optimizer, Lion8bit):
            raise TypeError(f"optimizer must be a Lion8bit, got {type(optimizer).__name__}; pass the one that it wraps")
        _check_not_wrapped(model)
        owned = {param for group in optimizer.param_groups for param in group["params"]}
        self._names: dict[Tensor, str] = {
            param: name for name, param in model.named_parameters() if param.requires_grad and param in owned
        }
        if not self._names:
            raise ValueError("model must hold trainable parameters of the optimizer, got none of them; build it first")
        if _has_process_group() and _is_in_ddp(self._names):
            raise TypeError(_DDP)
        _check_not_fused(self._names)
        self._optimizer = weakref.ref(optimizer)
        self._stepped: set[Tensor] = set()  # in this iteration
        self._accumulating = False
        self._checked_for_ddp = False
        self._backward: Callable[[], _Backward | None] = lambda: None  # a weak reference
        self._completed = True  # the last backward pass
        self._lock = threading.Lock()  # autograd has a thread for each device
        hooks: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for param in self._names:
            hook = partial(_release, weakref.ref(self))
            hooks.append(param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        self._end = weakref.finalize(optimizer, _remove, weakref.ref(self), hooks)
        self._end.atexit = False
        optimizer._releases += 1
        _handles.add(self)

    def remove(self) -> None:
        """Goes back to ordinary steps."""
        optimizer = self._optimizer()
        if self._end.alive and optimizer is not None:
            optimizer._releases -= 1
        self._end()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add up in ``.grad``; the first one outside, or optimizer.step(), steps with the sum.

        Use it for all micro-batches except the last. The sums of all parameters are then in memory, as without
        gradient release. They cannot be added to the momentum one by one, because Lion's update is the sign of its
        blend with the whole gradient.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def _release(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        with self._lock:
            self._start_backward()
        if self._accumulating:
            return
        if param in self._stepped:
            raise RuntimeError(
                f"{self._names[param]} must get one gradient before optimizer.step() is called, got a second one; put "
                "all micro-batches except the last under accumulate(), call optimizer.step() in each iteration, and "
                "checkpoint modules that share parameters with use_reentrant=False"
            )
        optimizer.step_param(param, {})
        self._stepped.add(param)
        param.grad = None

    def _start_backward(self) -> None:
        """After a backward pass that failed before its end, the next one is another iteration."""
        if torch.compiler.is_compiling():  # compiled autograd takes no callbacks
            return
        if self._backward() is not None:  # this one, or the one that this one is nested in
            return
        if not self._checked_for_ddp and _has_process_group():
            if _is_in_ddp(self._names):
                raise RuntimeError(_DDP)
            self._checked_for_ddp = True
        if not self._completed:
            self._stepped.clear()
        backward = _Backward(self)
        torch.autograd.Variable._execution_engine.queue_callback(backward)
        self._backward, self._completed = weakref.ref(backward), False

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._end_iteration()
        if hasattr(optimizer, "grad_scale"):
            raise RuntimeError(
                "gradients must not be scaled where the backward pass steps, got a GradScaler; this iteration has used "
                "scaled gradients, so load a checkpoint and continue in bfloat16 without the scaler"
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._end_iteration()  # a closure's

    def _end_iteration(self) -> None:
        stepped, self._stepped = self._stepped, set()
        for param in stepped:
            if param.grad is not None:
                raise RuntimeError(
                    f"{self._names[param]} must have no gradient when step() is called after a backward pass has "
                    "stepped it, got one that came later; all gradients must be complete in the first backward pass "
                    "outside accumulate(), so average them with FSDP2's fully_shard and not after it"
                )


class _Backward:
    """Lives as long as a backward pass: autograd calls it at the end, and frees it uncalled where the pass fails."""

    def __init__(self, handle: GradientRelease) -> None:
        self._handle = handle

    def __call__(self) -> None:
        self._handle._completed = True


def _release(handle: weakref.ref[GradientRelease], param: Tensor) -> None:
    alive = handle()
    if alive is not None:
        alive._release(param)


def _remove(handle: weakref.ref[GradientRelease], hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    alive = handle()
    if alive is not None:
        _handles.discard(alive)
        alive._names, alive._stepped = {}, set()


def fuse_into_backward(model: nn.Module, optimizer: Lion8bit) -> GradientRelease:
    """Steps each parameter when ``backward()`` has accumulated its gradient, and frees the gradient at once.

    All gradients are then never in memory together. The bits are those of the ordinary step. The training loop stays
    as it is: ``optimizer.step()`` still ends each iteration, which schedulers need too, and steps only what still has a
    gradient, such as parameters outside ``model`` or unfrozen later.

    One backward pass is one step; all micro-batches except the last go under ``accumulate()`` of the handle. Activation
    checkpointing and FSDP2's ``fully_shard`` work. A graph that was made before the pass that steps cannot be used
    after it, because the weights have changed: autograd says "modified by an inplace operation".

    After a backward pass that failed half way, training goes on with the next batch. The parameters that the failed
    pass has reached have been stepped.

    Neither the model nor the optimizer is kept alive. An optimizer that nobody holds any more gives way to a new one.

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
        ValueError: the model holds no trainable parameter of the optimizer, or one that is fused already.
        RuntimeError: later, in ``backward()`` where DistributedDataParallel has wrapped the model meanwhile, or a
            parameter gets a second gradient before ``optimizer.step()``; and in ``optimizer.step()`` where a parameter
            has got a gradient after it was stepped, or a GradScaler has scaled the gradients.
    """
    return GradientRelease(model, optimizer)


_DDP = (
    "model must not be wrapped in DistributedDataParallel, which averages gradients after the hooks have run; "
    "use FSDP2's fully_shard"
)


def _check_not_wrapped(model: nn.Module) -> None:
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise TypeError(_DDP)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise TypeError(
                "model must not be wrapped in FullyShardedDataParallel, which holds many parameters in one; "
                "use FSDP2's fully_shard"
            )


def _has_process_group() -> bool:
    """Without one there is no DistributedDataParallel."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_in_ddp(params: Collection[Tensor]) -> bool:
    """Whether a DistributedDataParallel averages the gradients of one of these parameters.

    It leaves no trace on a module or parameter that Python can see, so all objects of the process are searched.
    """

    def found() -> bool:
        wrappers = [it for it in gc.get_objects() if issubclass(type(it), nn.parallel.DistributedDataParallel)]
        return any(
            param in params and name.removeprefix("module.") not in wrapper.parameters_to_ignore
            for wrapper in wrappers
            for name, param in wrapper.named_parameters()
        )

    if not found():
        return False
    gc.collect()  # it may be one that nobody holds any more
    return found()


def _check_not_fused(params: Collection[Tensor]) -> None:
    def names() -> list[str]:
        return [name for other in _handles for param, name in other._names.items() if param in params]

    if names():
        gc.collect()  # an optimizer that had a scheduler is in a reference cycle with it
    if names():
        raise ValueError(
            f"model must not hold parameters that backward() steps already, got {names()[0]}; first call remove() of "
            "the handle that fuse_into_backward returned, or drop the former optimizer and its schedulers"
        )
