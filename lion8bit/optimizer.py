"""Owns the optimizer: parameter groups, options, state and checkpoints. The arithmetic is in the backends."""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lion8bit.backends.cpu import in_default_environment
from lion8bit.backends.select import decides, forget_missing, update_
from lion8bit.describe import gradients_of
from lion8bit.device_scalars import DeviceRate, DeviceScalars, UpdateCounts
from lion8bit.layout import (
    DTYPES,
    FORMAT_VERSION,
    LOADED_VERSIONS,
    UNSCALE,
    WEIGHT_ROUNDING,
    Hyper,
    decay_terms,
    is_narrow,
    make_hyper,
    mark_order,
    memory_order,
    scales_shape,
    unmark_order,
)
from lion8bit.loading import (
    check_codes,
    check_momentum,
    check_numbers,
    check_scales,
    check_structure,
    check_tensor,
    keeping_dtypes,
    naming,
    pair,
    step_count,
)
from lion8bit.paging import Load, Pager, bring_home, home, lives_on_host
from lion8bit.reference import (
    MAX_FLOAT,
    as_number,
    check_block_size,
    check_decay,
    check_flag,
    check_rates,
    dequantize,
    from_compensated,
    is_integer,
    quantize,
    to_bfloat16,
    to_compensated,
    to_float16,
)
from lion8bit.sharding import (
    as_part_of,
    check_placement,
    gradients,
    is_dtensor,
    is_flattened,
    keeps_blocks_whole,
    local,
    resolved,
)
from lion8bit.table import STATE_TENSORS, DeviceTable, Entry, check_state, hyper_array, make_entry, turns


class Lion8bit(torch.optim.Optimizer):
    r"""Lion with its momentum in 8 bits: one byte of state per parameter, plus one fp32 scale per block.

    For a gradient g, momentum m and decay :math:`\lambda`:

    .. math::
        c &= \beta_1 m + (1-\beta_1) g \\
        p &\leftarrow p\,(1 - \mathrm{lr}\,\lambda) - \mathrm{lr}\,\mathrm{sign}(c) \\
        m &\leftarrow \beta_2 m + (1-\beta_2) g

    m is stored as int8 codes of its square root with a scale per block, see `lion8bit.quantize`. An element whose
    gradient is NaN, infinite or at least 2^120 is skipped and counted; the rest of its block proceeds.

    Args:
        params: parameters, named parameters or groups of either; fp32, bf16 or fp16. Every option below may be set
            per group.
        lr: step length in units of the parameters, a float or a tensor of one element; at least 0. Zero is allowed,
            because warm-up starts there and checkpoint tools step with it.
        betas: (beta1, beta2), each in [0, 1).
        weight_decay: the lambda above, at least 0.
        block_size: elements per scale: 64, 128 or 256.
        min_8bit_size: parameters with fewer elements keep fp32 momentum.
        optim_bits: 8, or 32 for fp32 momentum.
        weight_rounding: how the new value of a 16-bit parameter is rounded: "stochastic" (unbiased, reproducible),
            "nearest", or "auto", which is stochastic. "compensated" keeps the next 8 bits of a bf16 parameter in an
            int8 state tensor, ``residual``, and so trains 24-bit weights. fp32 parameters are not rounded.
        momentum_first: take the gradient into the momentum before the update is formed from it,
            ``m = beta1*m + (1-beta1)*g; update = sign(beta2*m + (1-beta2)*g)``.
        decoupled_weight_decay: False adds ``weight_decay*p`` to the gradient instead of shrinking p.
        decouple_lr: decay by ``1 - weight_decay*lr/peak_lr``, so that a schedule scales both alike but the peak
            learning rate does not enter. ``peak_lr`` is the group's own key: lr at construction, unless the group
            brings another or it is set later.
        cautious: skip an update whose sign is not the gradient's (Liang et al., arXiv 2411.16085, without the
            rescaling by the share of kept updates, which would need a pass over the whole tensor).
        maximize: ascend.
        capturable: CUDA graphs may capture `step`: a tensor lr (fp32, on the GPU) is read, and updates are counted, by
            each replay. The first step must come before the capture.
        fused: `torch.amp.GradScaler` leaves unscaling, and skipping after an overflow, to the kernel: no pass over the
            gradients to unscale them, and no waiting for the GPU.
        seed: of stochastic rounding, from 0 on; parameter i of a group takes ``seed + i``, so groups of n parameters
            must be n apart. None numbers all parameters of all optimizers in this process in the order in which they
            are given: a script that is run again has the same random bits, and no two parameters have equal ones. It
            is kept in checkpoints. Ranks that train replicas must make their optimizers in the same order, or pass it.
        is_paged: keep the state of parameters on a GPU in pinned host memory. A step streams it through a buffer of
            48 MiB and has the same bits. Parameters of fewer than 65,536 elements keep theirs on the GPU. Where
            parameters are on the CPU, nothing changes. Not for DTensors on a GPU, in CUDA graphs or under
            torch.compile.

    Raises:
        ValueError: an option out of its range.
        TypeError: a parameter of another dtype.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = 128,
        min_8bit_size: int = 4096,
        optim_bits: int = 8,
        weight_rounding: str = "auto",
        momentum_first: bool = False,
        decoupled_weight_decay: bool = True,
        decouple_lr: bool = False,
        cautious: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool = False,
        is_paged: bool = False,
        seed: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "min_8bit_size": min_8bit_size,
            "optim_bits": optim_bits,
            "weight_rounding": weight_rounding,
            "momentum_first": momentum_first,
            "decoupled_weight_decay": decoupled_weight_decay,
            "decouple_lr": decouple_lr,
            "cautious": cautious,
            "maximize": maximize,
            "capturable": capturable,
            "fused": fused,
            "is_paged": is_paged,
            "seed": seed,
        }
        _check_options(defaults)
        defaults = {name: _plain(value) for name, value in defaults.items()}
        forget_missing()
        self._plan: _Plan | None = None
        self._plans: dict[Tensor, _Plan] = {}  # of the parameters that are stepped alone
        self._index = _Index([])
        self._lock = threading.RLock()  # autograd has a thread for each device, and each may call `step_param`
        self._counters: dict[torch.device, Tensor] = {}
        self._update_counts: dict[torch.device, UpdateCounts] = {}
        self._pagers: dict[torch.device, Pager] = {}
        super().__init__(params, defaults)

    @classmethod
    def from_adamw(
        cls, params: Iterable[Any], *, lr: float | Tensor, weight_decay: float, factor: float = 5.0, **options: Any
    ) -> Lion8bit:
        """A Lion8bit with the settings of an AdamW: ``lr / factor`` and ``weight_decay * factor``.

        Lion's updates are ±1 where AdamW's are mostly smaller, hence the shorter step; the product, which is the decay
        of a step, stays. Betas are Lion's own unless they are among ``options``; Adam's do not carry over.

        Args:
            params: as above, or the ``param_groups`` of the AdamW. What a group has of its own is taken for AdamW's
                as well: rates (``lr``, and those that schedulers keep) and ``weight_decay`` are converted, and what
                only Adam means is left out, such as ``betas``, ``eps`` and ``fused``.
            lr: AdamW's.
            weight_decay: AdamW's.
            factor: 3 to 10 is what the paper found; 5 is at most a factor of two away from both.
            options: as above.

        Raises:
            ValueError: ``factor`` is not positive, or an option is out of its range; with ``decouple_lr`` a step decays
                by the weight decay alone, so that there is no product to keep.

        Source: Chen et al., arXiv 2302.06675, section 5.
        """
        if not 0.0 < as_number("factor", factor) < math.inf:
            raise ValueError(f"factor must be positive, got {factor}")

        def for_lion(settings: dict[str, Any]) -> dict[str, Any]:
            if settings.get("decouple_lr"):
                raise ValueError(
                    "decouple_lr must be False in from_adamw, got True; call Lion8bit itself, and pass AdamW's "
                    "lr * weight_decay as its weight_decay"
                )
            scales = {"weight_decay": factor, **dict.fromkeys(_RATES, 1 / factor)}
            scaled = {name: scales[name] for name in settings if name in scales}
            for name in scaled:
                as_number(name, settings[name])
            return {**settings, **{name: settings[name] * scale for name, scale in scaled.items()}}

        def without_adams(group: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in group.items() if name not in _ADAMS_OWN}

        groups = [for_lion(without_adams(entry)) if isinstance(entry, dict) else entry for entry in params]
        return cls(groups, **for_lion({"lr": lr, "weight_decay": weight_decay, **options}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with options of its own; see `torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            _check_options(options)
            _device_lr(options)
        given = {*param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group |= {name: _plain(group[name]) for name in self.defaults}
        group.setdefault("format_version", FORMAT_VERSION)
        if group["seed"] is None:
            group["seed"] = _first_number(len(group["params"]))
        elif "seed" not in given:
            group["seed"] += sum(len(other["params"]) for other in self.param_groups[:-1])
        _peak_lr(group)  # before a warm-up changes lr
        for i, param in enumerate(group["params"]):
            try:
                if is_flattened(param) and group["optim_bits"] == 8:
                    raise TypeError(
                        "parameters must not be flattened to have 8-bit state, got those of FullyShardedDataParallel "
                        "(FSDP1), which cannot save it; use FSDP2's fully_shard, or optim_bits=32"
                    )
                if not param.requires_grad:  # of any dtype, as in QLoRA; `step` checks what has a gradient
                    continue
                if param.dtype not in DTYPES:
                    raise TypeError(f"parameters must be float32, bfloat16 or float16, got {param.dtype}")
                _is_compensated(param, group)
                lives_on_host(param, group)
            except (TypeError, ValueError) as error:
                self.param_groups.pop()
                where = f"(parameter {i} of group {len(self.param_groups)}, shape {tuple(param.shape)})"
                raise type(error)(f"{error} {where}") from None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it to every optimizer's, whatever its arguments are
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            _check_version(group.setdefault("format_version", FORMAT_VERSION))
            if group["format_version"] != FORMAT_VERSION:
                for param in filter(self.state.get, group["params"]):
                    self.state[param] = checked_state(self.state[param], param, group)
                group["format_version"] = FORMAT_VERSION
            if group["decouple_lr"] and "initial_lr" in group:  # which was the key, and schedulers write to it
                group.setdefault("peak_lr", float(group["initial_lr"]))
        number = 0
        for group in self.param_groups:
            if group["seed"] is None:  # of state from before there were seeds
                group["seed"] = number
            number += len(group["params"])
        self._plan = None
        self._plans = {}
        self._index = _Index([])
        self.__dict__.setdefault("_lock", threading.RLock())
        self.__dict__.setdefault("_counters", {})
        self.__dict__.setdefault("_update_counts", {})
        for counts in self._update_counts.values():
            counts.forget(self.state.values())
        self.__dict__.setdefault("_pagers", {})

    # ---- Stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step on every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            TypeError, ValueError, RuntimeError: an option, gradient or state that cannot be stepped with; the message
                names the parameter, and no parameter has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            from lion8bit import compiled

            compiled.trace_step(self)
        else:
            params, grads, counts = _ready(self.param_groups)
            self._step(self.param_groups, params, grads, counts)
        return loss

    def _step(
        self, groups: Sequence[dict[str, Any]], params: list[Tensor], grads: list[Tensor], counts: list[int]
    ) -> None:
        """Steps ``counts`` parameters of each group, all that have gradients."""
        hypers = [_hyper(group) for group in groups]
        layouts = [(hyper.block_size, hyper.weight_rounding) for hyper in hypers]
        key = (counts, layouts, [(_PLACING(group), len(group["params"])) for group in groups])
        plan = self._plan
        # Without DTensors `refresh` finds that each parameter is still its own local tensor.
        grads = gradients(params, grads) if plan is None or plan.sharded else resolved(grads)
        if plan is None or not plan.refresh(key, self.state.values(), params, grads):
            self._plan = None
            batches = self._build(groups, params, gradients(params, grads), counts, hypers)
            self._plan = plan = _Plan(key, self.state.values(), batches)
        self._run(plan.batches, groups, hypers)
        for pager in self._pagers.values():
            pager.turn()

    def _before_tracing(self) -> int:
        """Makes the state that is missing, which graphs take as an input; the key of `compiled.enroll`."""
        from lion8bit import compiled

        params, grads, counts = _ready(self.param_groups)
        if any(lives_on_host(param, group) for group in self.param_groups for param in group["params"]):
            raise RuntimeError("is_paged must be False where torch.compile traces the step, got True")
        with torch.no_grad():
            self._build(self.param_groups, params, gradients(params, grads), counts, [*map(_hyper, self.param_groups)])
        return compiled.enroll(self)

    # As `torch.compiler.assume_constant_result` does, which would have `import lion8bit` load the compiler.
    _before_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def step_param(self, param: Tensor, group: dict[str, Any]) -> None:
        """Steps one parameter alone, for trainers that step while gradients arrive.

        Several threads may step different parameters at the same time.

        Args:
            param: with its gradient; without one nothing happens.
            group: not used, because trainers may pass one from before `load_state_dict`, which makes new groups: the
                options are those of the group that holds ``param``.

        Raises:
            ValueError: ``param`` is in no group; and what `step` raises.
        """
        if param.grad is None:
            return
        group = self._group_of(param)
        grads = gradients([param], [param.grad])  # may communicate, so it must not make other threads wait
        with self._lock:
            hypers = [_hyper(group)]
            layout = hypers[0].block_size, hypers[0].weight_rounding
            key = (id(group), self._seed(param), layout, _PLACING(group))
            states = [self.state[param]] if param in self.state else []
            plan = self._plans.get(param)
            if plan is None or not plan.refresh(key, states, [param], grads):
                self._plans.pop(param, None)
                batches = self._build([group], [param], grads, [1], hypers)
                plan = _Plan(key, [self.state[param]], batches)
                if batches[0].in_place:
                    self._plans[param] = plan
            self._run(plan.batches, [group], hypers)

    def step_parameter(self, param: Tensor, group: dict[str, Any], index: int) -> None:
        """`step_param` with the parameter's index in its group, as some trainers call it."""
        self.step_param(param, group)

    def _run(self, batches: Sequence[DeviceTable], groups: Sequence[dict[str, Any]], hypers: Sequence[Hyper]) -> None:
        """Applies a step whole or not at all, also where Ctrl-C comes in between."""
        try:
            updates = self._updates(batches, groups, hypers)
            try:
                _apply(updates)
            except BaseException:
                while any(batch.done for batch, _ in updates):
                    try:
                        _apply(updates)  # what is missing
                        break
                    except KeyboardInterrupt:  # one is enough
                        continue
                raise
        finally:
            for batch in batches:
                batch.grads = []

    def _updates(
        self, batches: Sequence[DeviceTable], groups: Sequence[dict[str, Any]], hypers: Sequence[Hyper]
    ) -> list[tuple[DeviceTable, Callable[[], None]]]:
        """What is to be done with each batch of a step; nothing is changed yet. A call goes on where it was left."""
        grad_scale, found_inf = self._from_scaler()
        if grad_scale is not None:
            for hyper in hypers:
                hyper.flags |= UNSCALE
        updates = []
        for batch in batches:
            counts = self._counts_on(batch.device, grad_scale is not None or found_inf is not None)
            control: tuple[DeviceScalars, ...] = ()
            if counts is None:
                if found_inf is not None and found_inf.item():
                    continue
                _complete(hypers, groups, grad_scale)
                batch.begin()
            else:
                batch.begin_on(counts, self.state.values())
                rates = [_rate(group, batch.device) for group in groups]
                control = (DeviceScalars(rates, _on(batch.device, grad_scale), _on(batch.device, found_inf), counts),)
            updates.append((batch, self._update_of(batch, hyper_array(hypers), *control)))
        return updates

    def _update_of(
        self, batch: DeviceTable, hypers: ctypes.Array[Hyper], *control: DeviceScalars
    ) -> Callable[[], None]:
        device, counter = batch.device, self._counter(batch.device)
        if not batch.paged:
            return partial(update_, batch, hypers, counter, *control)
        if device not in self._pagers:
            self._pagers[device] = Pager(device)

        def update(load: Load) -> None:
            update_(load, hypers, counter, *control)

        return partial(self._pagers[device].run, batch, hypers, update, on_device=bool(control))

    def _from_scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """The scale and the verdict of GradScaler, which sets both where this optimizer supports it."""
        if not self._step_supports_amp_scaling:
            return None, None
        found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        grad_scale, found_inf = (None if value is None else torch.as_tensor(value) for value in found)
        return grad_scale, found_inf

    def _counts_on(self, device: torch.device, scaled: bool) -> UpdateCounts | None:
        """Where the device counts this step's updates; None where the host does and knows all that a step needs."""
        capturable = [group["capturable"] for group in self.param_groups]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not all(capturable):
                raise RuntimeError(_NOT_CAPTURABLE)
            if any(group["is_paged"] for group in self.param_groups):
                raise RuntimeError("is_paged must be False while a CUDA graph is captured, got True")
            if any(isinstance(group["lr"], Tensor) and group["lr"].device.type == "cpu" for group in self.param_groups):
                raise RuntimeError(
                    f"lr must be a number or a tensor on {device} while a CUDA graph is captured, got a CPU tensor; "
                    "each replay would take its present value"
                )
        fused = [group["fused"] for group in self.param_groups]
        if (scaled or any(capturable) or any(fused)) and decides(device.type):
            if device not in self._update_counts:
                self._update_counts[device] = UpdateCounts(device)
            return self._update_counts[device]
        if device in self._update_counts:
            self._update_counts[device].settle()
        return None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands over its scale and its verdict as ``grad_scale`` and ``found_inf``."""
        return vars(self).get("_step_supports_amp_scaling", False) or any(group["fused"] for group in self.param_groups)

    def _build(
        self,
        groups: Sequence[dict[str, Any]],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        counts: Sequence[int],
        hypers: Sequence[Hyper],
    ) -> list[DeviceTable]:
        """Checks parameters, gradients and state, makes the state that is missing; a batch for each device."""
        self._take_index(params)
        owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
        self._settle_pages()
        entries: list[Entry] = []
        ordered: list[Tensor] = []
        for param, grad, owner in zip(params, grads, owners, strict=True):
            state = self.state.get(param, {})
            state = state if type(state) is dict else dict(state)  # the kept plan reads dicts
            try:
                group = groups[owner]
                with torch.inference_mode(False), torch.no_grad():  # or only inference mode could write to it
                    state = _with_residual(state, param, group) if state else _new_state(param, group)
                    state = _at_home(_in_bits(state, param, group), param, group)
                entry, ordered_grad = make_entry(
                    param,
                    grad,
                    state,
                    block_size=hypers[owner].block_size,
                    seed=self._seed(param),
                    hyper=owner,
                    paged=lives_on_host(param, group),
                )
                entries.append(entry)
                ordered.append(ordered_grad)
            except (TypeError, ValueError, RuntimeError) as error:
                index = next((i for i, other in enumerate(groups[owner]["params"]) if other is param), None)
                number = next(
                    i for i, group in enumerate(self.param_groups) if group["params"] is groups[owner]["params"]
                )
                where = f"(parameter {index} of group {number}, shape {tuple(param.shape)})"
                raise type(error)(f"{error} {where}") from error
        places: dict[tuple[int, torch.device, bool, bool], list[int]] = {}
        for place, (turn, entry) in enumerate(zip(turns(entries), entries, strict=True)):
            places.setdefault((turn, entry.param.device, entry.paged, entry.in_place), []).append(place)
        for entry in entries:
            self.state[entry.source] = entry.state
        if len(places) == 1:
            return [DeviceTable(device, entries, ordered) for _, device, *_ in places]
        return [
            DeviceTable(device, [entries[i] for i in at], [ordered[i] for i in at], at)
            for (_, device, *_), at in sorted(places.items(), key=lambda item: item[0][0])
        ]

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        self._take_index([param])
        if id(param) not in self._index.numbers:
            raise ValueError(
                f"param must be one of this optimizer's parameters, got shape {tuple(param.shape)}; "
                "call add_param_group first, or remove() of a gradient release that still steps it"
            )
        return self.param_groups[self._index.place(param)[0]]

    def _seed(self, param: Tensor) -> int:
        """Of a parameter in the index."""
        owner, number = self._index.place(param)
        seed: int = self.param_groups[owner]["seed"]
        return seed + number & 0xFFFFFFFF

    def _take_index(self, params: Sequence[Tensor]) -> None:
        """Makes the index of the groups anew, unless it knows where these parameters are."""
        with self._lock:
            if not self._index.holds(self.param_groups, params):
                self._index = _Index(self.param_groups)
                present = {*chain.from_iterable(self._index.lists)}
                self._plans = {param: plan for param, plan in self._plans.items() if param in present}

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._counters:
            with torch.inference_mode(False):  # or later steps outside of inference mode could not add to it
                self._counters[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._counters[device]

    # ---- Looking inside ----------------------------------------------------------------------------------------------

    def momentum(self, param: Tensor) -> Tensor:
        """The momentum of a parameter in fp32 on its device, whatever its storage; zeros before its first step.

        Returns:
            fp32, the shape of ``param`` and, if that is a DTensor, placed as it is; a copy.

        Raises:
            ValueError: ``param`` is not one of this optimizer's.
        """
        group = self._group_of(param)
        self._settle_pages()
        state = self.state.get(param)
        if not state:
            return torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        if "codes" in state:
            codes, scales = (local(state[name]).to(local(param).device) for name in ("codes", "scales"))
            return as_part_of(param, dequantize(codes, unmark_order(scales), group["block_size"]), param.shape)
        momentum: Tensor = state["momentum"]
        return momentum.to(param.device, copy=True)

    def nonfinite_count(self) -> int:
        """How many elements this process has skipped for a bad gradient since construction; waits for the devices."""
        return sum(int(counter.item()) for counter in self._counters.values())

    @torch.no_grad()
    def frozen_fraction(self, lr: Sequence[float | Tensor] | None = None) -> float:
        """Share of this process's trained weights that an update of ±lr cannot move, because rounding brings them back.

        Weights rounded stochastically move in expectation, and count as frozen only where fp32 itself cannot move them;
        compensated weights, only where 24 bits cannot. Weights that require no gradient or hold no data (as on "meta")
        do not count.

        Args:
            lr: a learning rate for each group; None for those of the groups, which after ``scheduler.step()`` are those
                of the next step.

        Returns:
            Between 0 and 1; 0 where no weight counts.

        Raises:
            ValueError: ``lr`` has not one rate for each group.
        """
        rates = [group["lr"] for group in self.param_groups] if lr is None else lr
        if len(rates) != len(self.param_groups):
            raise ValueError(f"lr must have {len(self.param_groups)} rates, one for each group, got {len(rates)}")
        self._settle_pages()
        frozen, total = 0, 0
        for group, lr_of_group in zip(self.param_groups, rates):
            rate = float(lr_of_group)
            for param in filter(_holds_trained_data, group["params"]):
                flat, residual = local(param).detach().reshape(-1), self.state.get(param, {}).get("residual")
                below = None if residual is None else local(residual).reshape(-1)
                for start in range(0, flat.numel(), _PIECE):
                    piece = slice(start, start + _PIECE)
                    value = _fp32(flat[piece], None if below is None else below[piece].to(flat.device))
                    moved = [_rounded(value + step, param.dtype, group["weight_rounding"]) for step in (rate, -rate)]
                    frozen += int(((moved[0] == value) & (moved[1] == value)).sum())
                total += flat.numel()
        return frozen / total if total else 0.0

    @torch.no_grad()
    def fp32_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with its 16-bit parameters in fp32, the residual taken in where there is one.

        An fp32 copy of the model loads it; `load_fp32_weights` takes it back.

        Args:
            model: the module that this optimizer's parameters belong to.

        Returns:
            The names of ``model.state_dict()``; its values, but fp32 copies for 16-bit parameters.
        """
        self._settle_pages()
        weights = model.state_dict()
        for name, param in model.named_parameters(remove_duplicate=False):
            if param.dtype in DTYPES and param.dtype != torch.float32:
                piece, residual = local(param).detach(), local(self.state.get(param, {}).get("residual"))
                value = _fp32(piece, None if residual is None else residual.to(piece.device))
                weights[name] = as_part_of(param, value, param.shape)
        return weights

    @torch.no_grad()
    def load_fp32_weights(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Loads what `fp32_weights` returned, or the ``state_dict()`` of an fp32 model, in place.

        A compensated parameter takes 24 bits of its weights, another one what its dtype holds, to nearest.

        Args:
            model: the module that this optimizer's parameters belong to.
            weights: a value for each name of ``model.state_dict()``.

        Raises:
            ValueError: names or shapes differ from the model's; nothing has changed.
        """
        present = model.state_dict()
        if present.keys() != weights.keys():
            missing, unknown = sorted(present.keys() - weights.keys()), sorted(weights.keys() - present.keys())
            raise ValueError(f"weights must have the names of model.state_dict(), got {unknown} and lack {missing}")
        for name, value in present.items():
            if isinstance(value, Tensor) and getattr(weights[name], "shape", None) != value.shape:
                got = getattr(weights[name], "shape", type(weights[name]).__name__)
                raise ValueError(f"weights[{name!r}] must have the shape {tuple(value.shape)}, got {got}")
        groups = {param: group for group in self.param_groups for param in group["params"]}
        rounded = dict(weights)
        residuals: dict[Tensor, Tensor] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            if param.requires_grad and param in groups and _is_compensated(param, groups[param]):
                check_placement(f"weights[{name!r}]", weights[name], param)
                high, residuals[param] = to_compensated(local(weights[name]).to(param.device, torch.float32))
                rounded[name] = as_part_of(param, high, param.shape)
        self._settle_pages()
        model.load_state_dict(rounded)
        for owner, residual in residuals.items():
            state, group = self.state.get(owner), groups[owner]
            self.state[owner] = state = _with_residual(state, owner, group) if state else _new_state(owner, group)
            local(state["residual"]).copy_(residual)

    def memory_report(self) -> dict[str, float]:
        """Bytes held in this process for the parameters that this optimizer trains, of DTensors the local parts.

        Parameters that require no gradient count only in ``state_bytes``, with state from before they were frozen.

        Returns:
            ``parameters`` (elements), ``parameter_bytes``, ``gradient_bytes``, ``state_bytes`` (all state tensors),
            ``state_bytes_per_parameter`` (over the parameters that have state; 0 before the first step),
            ``paged_bytes`` (of the state, what ``is_paged`` keeps in host memory) and ``buffer_bytes`` (for that, on
            the devices).
        """
        params = [param for group in self.param_groups for param in group["params"]]
        trained = [param for param in params if param.requires_grad]
        stepped = [param for param in params if self.state.get(param)]
        held = {param: sum(_nbytes(self.state[param].get(name)) for name in STATE_TENSORS) for param in stepped}
        groups = {param: group for group in self.param_groups for param in group["params"]}
        state_bytes = sum(held.values())
        count = sum(local(param).numel() for param in stepped)
        return {
            "parameters": sum(local(param).numel() for param in trained),
            "parameter_bytes": sum(_nbytes(param) for param in trained),
            "gradient_bytes": sum(_nbytes(param.grad) for param in trained),
            "state_bytes": state_bytes,
            "state_bytes_per_parameter": state_bytes / count if count else 0.0,
            "paged_bytes": sum(held[param] for param in stepped if lives_on_host(param, groups[param])),
            "buffer_bytes": sum(pager.buffer_bytes for pager in self._pagers.values()),
        }

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; waits for devices (``fused``, ``capturable``, ``is_paged``)."""
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def _settle(self) -> None:
        for counts in self._update_counts.values():
            counts.settle()
        self._settle_pages()

    def _settle_pages(self) -> None:
        for pager in self._pagers.values():
            pager.settle()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; codes, scales and momentum keep their dtypes, whatever the parameter's is.

        The options of the saved groups replace the present ones, as in every torch optimizer, but for ``is_paged``,
        which is about this machine's memory. Tensors are copied. State of another library's Lion is converted by
        `lion8bit.convert_state_dict`, under the present options. State of format versions 2 and 3 is brought into the
        present one: momentum of version 2 is quantized again where a parameter's rows are shorter than a block.

        Raises:
            ValueError: the state is not a Lion's, has another format version, is damaged, or does not fit the
                parameters; nothing has changed.

        Warns:
            UserWarning: the state has another order in memory than the parameters, see `lion8bit.convert_state_dict`.
        """
        self._settle_pages()
        groups = {param: group for group in self.param_groups for param in group["params"]}

        def place(value: Tensor, param: Tensor) -> Tensor:
            return bring_home(value, param, groups[param], copy=True)

        with keeping_dtypes(self, STATE_TENSORS, self._loadable, place):
            super().load_state_dict(state_dict)
        self._warn_of_copies()

    def _loadable(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """The state dict in the present format, checked so that all of it can be loaded and stepped with."""
        check_structure(incoming)
        if any("format_version" not in group for group in incoming["param_groups"]):
            from lion8bit.checkpoints import convert_state_dict

            incoming = convert_state_dict(incoming, self)
        for place, saved in enumerate(incoming["param_groups"]):
            check_saved_group({**self.defaults, "block_size": None, **saved}, place)
        check_numbers(self.param_groups, incoming["param_groups"])
        states = dict(incoming["state"])
        for number, param, saved in pair(self.param_groups, incoming["param_groups"]):
            with naming(number, param):
                _is_compensated(param, {**self.defaults, **saved})
                if states.get(number):
                    states[number] = checked_state(states[number], param, saved)
        own, saved_groups = self.param_groups, incoming["param_groups"]
        if len(own) == len(saved_groups):  # torch refuses others
            saved_groups = [
                {**saved, "is_paged": group["is_paged"], "format_version": FORMAT_VERSION}
                for saved, group in zip(saved_groups, own)
            ]
        return {**incoming, "state": states, "param_groups": saved_groups}

    def _warn_of_copies(self) -> None:
        """Says once of all parameters whose state keeps another order in memory that each step copies them."""
        copied = []
        for number, param in enumerate(param for group in self.param_groups for param in group["params"]):
            state = self.state.get(param)
            if state and not is_dtensor(param):
                order, kept = memory_order(param), state["codes" if "codes" in state else "momentum"]
                if order is not None and order != memory_order(kept):
                    copied.append(f"{number}, shape {tuple(param.shape)}")
        if copied:
            warnings.warn(
                f"the loaded state of {len(copied)} parameters has another order in memory than they have, so every "
                "step copies them; load lion8bit.convert_state_dict(state_dict, optimizer) to have it quantized again "
                f"in their order (the first is parameter {copied[0]})",
                stacklevel=3,
            )


def _check_version(version: Any) -> None:
    if version not in LOADED_VERSIONS:
        raise ValueError(f"state must have format_version {FORMAT_VERSION}, got {version}")


def check_saved_group(saved: dict[str, Any], place: int) -> None:
    """Raises ValueError unless the options of a saved group are such as `Lion8bit` takes, in the present format."""
    try:
        _check_version(saved.get("format_version"))
        _hyper(dict(saved))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # of values that are no numbers, or on "meta"
        raise ValueError(f"{error} (group {place} of the saved state)") from error


def checked_state(state: Mapping[str, Any], param: Tensor, saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's saved state in the present format.

    Raises:
        ValueError: a part of it is missing or not of the format, see `lion8bit.loading`; or it does not fit ``param``.
    """
    for name in STATE_TENSORS:
        if name in state:
            check_tensor(name, state[name])
    checked = {**state, "step": step_count(state["step"])} if "step" in state else dict(state)
    if saved_group["format_version"] != FORMAT_VERSION:
        checked = _in_present_format(checked, saved_group["block_size"])
    order, _ = check_state(checked, param, saved_group["block_size"])
    if "momentum" in checked:
        check_momentum(local(checked["momentum"]))
    else:
        check_codes(local(checked["codes"]))
        check_scales(local(checked["scales"]))
        checked["scales"] = mark_order(checked["scales"].contiguous(), order)
    return checked


_NOT_CAPTURABLE = (
    "capturable must be True while a CUDA graph is captured, got False; "
    "each replay would repeat this step's learning rate and random numbers"
)
_numbers = itertools.count()  # of the parameters in this process
_PIECE = 1 << 22  # elements at a time where a parameter is looked at in fp32
_PLACING = itemgetter("is_paged", "optim_bits", "min_8bit_size", "seed")  # what a plan is made with
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
_flags = itemgetter(*_FLAGS)
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # a group's, the last four written by torch's schedulers
_ADAMS_OWN = ("betas", "eps", "amsgrad", "foreach", "fused", "differentiable")


def _apply(updates: Iterable[tuple[DeviceTable, Callable[[], None]]]) -> None:
    for batch, update in updates:
        if not batch.finished:
            update()
            batch.finish()


class _Plan:
    """The batches of a step, and what must be the same for another step to take them again."""

    def __init__(self, key: Any, states: Iterable[dict[str, Any]], batches: Sequence[DeviceTable]) -> None:
        self.key = key  # parameters and storage of each group
        self.states = list(states)
        self.batches = batches
        self.sharded = any(batch.sharded for batch in batches)

    def refresh(self, key: Any, states: Collection[dict[str, Any]], params: list[Tensor], grads: list[Tensor]) -> bool:
        """Takes in another step's parameters and gradients; False where a new plan is needed."""
        if key != self.key or len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return False
        return all(batch.refresh(params, grads) for batch in self.batches)


class _Index:
    """Where parameters are in an optimizer's groups, so that stepping one takes no pass over all of them."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.lists = [group["params"] for group in groups]
        self._sizes = [*map(len, self.lists)]
        self._ends = [*accumulate(self._sizes)]
        self.numbers = {id(param): number for number, param in enumerate(chain.from_iterable(self.lists))}

    def place(self, param: Tensor) -> tuple[int, int]:
        """The parameter's group, and its number there.

        Raises:
            KeyError: it is in none.
        """
        number = self.numbers[id(param)]
        owner = bisect_right(self._ends, number)
        return owner, number - self._ends[owner] + self._sizes[owner]

    def holds(self, groups: Sequence[dict[str, Any]], params: Sequence[Tensor]) -> bool:
        """Whether these parameters are still where they were; False too where it does not know one."""
        lists = [group["params"] for group in groups]
        if len(lists) != len(self.lists) or not all(map(is_, lists, self.lists)) or [*map(len, lists)] != self._sizes:
            return False
        for param in params:
            if id(param) not in self.numbers:
                return False
            owner, number = self.place(param)
            if lists[owner][number] is not param:
                return False
        return True


def _ready(groups: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The parameters that have gradients, these gradients, and how many each group has."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    counts: list[int] = []
    for group in groups:
        here = group["params"]
        found = gradients_of(here)
        params += here if len(found) == len(here) else [param for param in here if param.grad is not None]
        grads += found
        counts.append(len(found))
    return params, grads, counts


def _first_number(count: int) -> int:
    """The first of so many numbers that no other parameters have."""
    first, *_ = itertools.islice(_numbers, max(1, count))
    return first


@in_default_environment
def _hyper(group: dict[str, Any], lr: float | None = None) -> Hyper:
    """The kernels' constants of a group; ``lr`` in place of its own, which may be in device memory."""
    options = group
    if lr is not None or _device_lr(group) is not None:
        options = {**group, "lr": 0.0 if lr is None else lr}
    else:
        _refuse_capture(group["lr"])
    rate = _check_options(options)  # anyone may write to a group, and the kernels trust what they are given
    peak_lr = _peak_lr(group)
    hyper = make_hyper(
        lr=rate,
        betas=group["betas"],
        weight_decay=group["weight_decay"],
        block_size=group["block_size"],
        weight_rounding="stochastic" if group["weight_rounding"] == "auto" else group["weight_rounding"],
        momentum_first=group["momentum_first"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        peak_lr=peak_lr,
        cautious=group["cautious"],
        maximize=group["maximize"],
    )
    check_decay(hyper.decay, rate, group["weight_decay"], peak_lr)
    return hyper


def _refuse_capture(lr: float | Tensor) -> None:
    """Before a rate in device memory is read, which would end the capture with an error of CUDA's."""
    if isinstance(lr, Tensor) and lr.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(_NOT_CAPTURABLE)


def _peak_lr(group: dict[str, Any]) -> float | None:
    """The rate at which a step decays by the whole weight decay; not ``initial_lr``, which schedulers write to."""
    if not group["decouple_lr"]:
        return None
    if "peak_lr" not in group:
        group["peak_lr"] = max(0.0, as_number("lr", group["lr"]))
    return as_number("peak_lr", group["peak_lr"])


def _device_lr(group: dict[str, Any]) -> Tensor | None:
    """A learning rate that the host need not read, because the kernel will."""
    lr = group["lr"]
    if not (group["capturable"] and isinstance(lr, Tensor) and lr.numel() == 1 and decides(lr.device.type)):
        return None
    if lr.dtype != torch.float32:
        raise ValueError(f"lr must be a float32 tensor with capturable=True, got {lr.dtype}; pass lr.float()")
    return lr


def _rate(group: dict[str, Any], device: torch.device) -> DeviceRate:
    divisor, weight_decay = decay_terms(group["weight_decay"], group["decoupled_weight_decay"], _peak_lr(group))
    return DeviceRate(_on(device, _device_lr(group)), divisor, weight_decay)


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.detach().to(device, torch.float32, non_blocking=True)


@in_default_environment
def _complete(hypers: Sequence[Hyper], groups: Sequence[dict[str, Any]], grad_scale: Tensor | None) -> None:
    """Reads on the host what a `DeviceScalars` would leave to the device."""
    for hyper, group in zip(hypers, groups, strict=True):
        lr = _device_lr(group)
        if lr is not None:
            read = _hyper(group, float(lr))
            hyper.lr, hyper.decay = read.lr, read.decay
        if grad_scale is not None:
            hyper.unscale = float(grad_scale.double().reciprocal())  # as GradScaler; rounded to fp32 here


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    # All ranks must choose alike, so the choice depends on the whole parameter. Rows of a DTensor run along shape[0].
    piece, block_size, place = local(param), group["block_size"], home(param, group)
    like = {"memory_format": torch.contiguous_format, **place} if is_dtensor(param) else place
    if _keeps_fp32(param, group):
        momentum = torch.zeros_like(piece, dtype=torch.float32, requires_grad=False, **like)
        return _with_residual({"step": 0, "momentum": as_part_of(param, momentum, param.shape)}, param, group)
    codes = torch.zeros_like(piece, dtype=torch.int8, requires_grad=False, **like)
    order = memory_order(codes)
    assert order is not None  # zeros_like makes dense tensors
    shape = scales_shape([piece.shape[dim] for dim in order], block_size)
    scales = mark_order(torch.zeros(shape, dtype=torch.float32, **place), order)
    state = {
        "step": 0,
        "codes": as_part_of(param, codes, param.shape),
        "scales": as_part_of(param, scales, scales_shape(param.shape, block_size)),
    }
    return _with_residual(state, param, group)


def momentum_of(state: Mapping[str, Any], block_size: int) -> Tensor:
    """The fp32 momentum that codes and scales stand for, placed as the codes."""
    codes = state["codes"]
    decoded = dequantize(local(codes), unmark_order(local(state["scales"])), block_size)
    return as_part_of(codes, decoded, codes.shape)


def quantized(momentum: Tensor, block_size: int) -> dict[str, Tensor]:
    """The codes and scales of an fp32 momentum, in its memory order and placed as it is."""
    codes, scales = quantize(local(momentum), block_size)
    order = memory_order(codes)
    assert order is not None  # `quantize` takes no others
    return {
        "codes": as_part_of(momentum, codes, momentum.shape),
        "scales": as_part_of(momentum, mark_order(scales, order), scales_shape(momentum.shape, block_size)),
    }


def _in_present_format(state: dict[str, Any], block_size: int) -> dict[str, Any]:
    """State of format version 2 or 3 in the present format.

    In both, the code of an exact zero was -128. In version 2, rows that are shorter than a block had a scale each.
    """
    codes, scales = (local(state.get(name)) for name in ("codes", "scales"))
    if getattr(codes, "dtype", None) != torch.int8 or getattr(scales, "dtype", None) != torch.float32:
        return state  # fp32 momentum, or `check_state` will report what is wrong
    codes = codes.masked_fill(codes == -128, 0)
    state = {**state, "codes": as_part_of(state["codes"], codes, state["codes"].shape)}
    order = memory_order(codes)
    narrow = order is not None and is_narrow([codes.shape[dim] for dim in order], block_size)
    if not narrow or unmark_order(scales).dim() != 2:
        return state
    check_scales(scales)
    momentum = momentum_of(state, block_size)
    kept = {name: value for name, value in state.items() if name not in ("codes", "scales")}
    if keeps_blocks_whole(momentum, block_size):
        return {**kept, **quantized(momentum, block_size)}
    return {**kept, "momentum": momentum}


def _asks_fp32(param: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["optim_bits"] == 32 or param.numel() < group["min_8bit_size"])


def _keeps_fp32(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether new state of the parameter has its momentum in fp32."""
    return _asks_fp32(param, group) or not keeps_blocks_whole(param, group["block_size"])


def _in_bits(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The state decoded, or encoded, where the group's ``optim_bits`` or ``min_8bit_size`` has changed."""
    block_size = group["block_size"]
    if "codes" in state and _asks_fp32(param, group):
        new = {"momentum": momentum_of(state, block_size)}
    elif "momentum" in state and not _keeps_fp32(param, group):
        new = quantized(state["momentum"], block_size)
    else:
        return state
    return {**new, **{name: value for name, value in state.items() if name not in ("codes", "scales", "momentum")}}


def _is_compensated(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether the parameter has a residual in this group: a bf16 one does, an fp32 one needs none."""
    compensated: bool = group["weight_rounding"] == "compensated"
    if compensated and param.dtype == torch.float16:
        raise ValueError(
            "weight_rounding must be 'auto', 'stochastic' or 'nearest' for float16 parameters, got 'compensated'; "
            "use bfloat16 parameters, or a group of their own"
        )
    return compensated and param.dtype == torch.bfloat16


def _with_residual(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The state with a residual where the group's option asks for one, at first 0, and without one elsewhere."""
    compensated = _is_compensated(param, group)
    if compensated == ("residual" in state):
        return state
    if compensated:
        like = state["codes"] if "codes" in state else state["momentum"]  # and the momentum's order in memory
        return {**state, "residual": torch.zeros_like(like, dtype=torch.int8)}
    return {name: value for name, value in state.items() if name != "residual"}


def _at_home(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The state with its tensors moved from or to host memory, where the group's ``is_paged`` has changed."""
    paged = lives_on_host(param, group)
    tensors = {name: state[name] for name in STATE_TENSORS if isinstance(state.get(name), Tensor)}
    tensors = {name: tensor for name, tensor in tensors.items() if paged or tensor.device.type == "cpu"}
    moved = {name: bring_home(tensor, param, group) for name, tensor in tensors.items()}
    return state if all(map(is_, moved.values(), tensors.values())) else {**state, **moved}


def _fp32(param: Tensor, residual: Tensor | None) -> Tensor:
    return param.float() if residual is None else from_compensated(param, residual)


def _rounded(x: Tensor, dtype: torch.dtype, weight_rounding: str) -> Tensor:
    """What a parameter of this dtype keeps of its fp32 value; all of it in expectation where rounding is stochastic."""
    if dtype == torch.float32 or weight_rounding in ("auto", "stochastic"):
        return x
    if weight_rounding == "compensated":
        return from_compensated(*to_compensated(x))
    return (to_bfloat16 if dtype == torch.bfloat16 else to_float16)(x, None).float()


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_meta else local(tensor).numel() * tensor.element_size()


def _holds_trained_data(param: Tensor) -> bool:
    """Whether a parameter is trained and its weights can be read in this process."""
    if not param.requires_grad or param.dtype not in DTYPES or param.is_meta:
        return False
    piece = local(param)
    plain = type(piece).__torch_dispatch__ is Tensor.__torch_dispatch__  # a wrapper's storage is empty, or of others
    return plain and (not piece.numel() or piece.untyped_storage().nbytes() > 0)


def _plain(value: Any) -> Any:
    """An option in Python's own types: `torch.load` refuses numpy's numbers and the lists of configuration files."""
    if isinstance(value, np.generic):
        return value.item()
    is_pair = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
    return tuple(map(_plain, value)) if is_pair else value


def _check_options(options: dict[str, Any]) -> float:
    """Raises ValueError unless every option is of its kind and in its range; lr as a number."""
    lr = check_rates(options)
    if options["decouple_lr"] and not 0.0 <= as_number("peak_lr", options.get("peak_lr", 0.0)) <= MAX_FLOAT:
        raise ValueError(f"peak_lr must be at least 0, and finite in float32, got {options['peak_lr']}")
    check_block_size(options["block_size"])
    size, bits = options["min_8bit_size"], options["optim_bits"]
    if not is_integer(size) or size < 0:
        raise ValueError(f"min_8bit_size must be an integer of at least 0, got {size!r}")
    if not is_integer(bits) or bits not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, got {bits!r}")
    seed = options["seed"]
    if seed is not None and (not is_integer(seed) or seed < 0):
        raise ValueError(f"seed must be an integer of at least 0 or None, got {seed!r}")
    flags = _flags(options)
    if flags.count(True) + flags.count(False) != len(flags):
        for name in _FLAGS:
            check_flag(name, options[name])
    rounding = options["weight_rounding"]
    if rounding not in ("auto", *WEIGHT_ROUNDING):
        raise ValueError(f"weight_rounding must be 'auto' or one of {(*WEIGHT_ROUNDING,)}, got {rounding!r}")
    return lr
