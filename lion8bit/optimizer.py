"""Owns the optimizer: parameter groups, options, state and checkpoints. The arithmetic is in the backends."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lion8bit.backend import decides, update_
from lion8bit.batch import STATE_TENSORS, Batch, Entry, check_state, hyper_array, make_entry
from lion8bit.control import Control, Rate, UpdateCounts
from lion8bit.cpu import in_default_environment
from lion8bit.describe import gradients_of
from lion8bit.layout import (
    DTYPES,
    FORMAT_VERSION,
    UNSCALE,
    WEIGHT_ROUNDING,
    ZERO_CODE,
    Hyper,
    blocks_per_row,
    decay_terms,
    make_hyper,
    memory_order,
    rows_and_cols,
)
from lion8bit.loading import keeping_dtypes, pair
from lion8bit.paging import Pager, bring_home, home, lives_on_host
from lion8bit.reference import (
    check_block_size,
    check_rates,
    dequantize,
    from_compensated,
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
)


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
        decouple_lr: decay by ``1 - weight_decay*lr/initial_lr``, so that a schedule scales both alike but the peak
            learning rate does not enter.
        cautious: skip an update whose sign is not the gradient's (Liang et al., arXiv 2411.16085, without the
            rescaling by the share of kept updates, which would need a pass over the whole tensor).
        maximize: ascend.
        capturable: CUDA graphs may capture `step`: a tensor lr (fp32, on the GPU) is read, and updates are counted, by
            each replay. The first step must come before the capture.
        fused: `torch.amp.GradScaler` leaves unscaling, and skipping after an overflow, to the kernel: no pass over the
            gradients to unscale them, and no waiting for the GPU.
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
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
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
        }
        _check_options(defaults)
        self._plan: _Plan | None = None
        self._plans: dict[Tensor, _Plan] = {}  # of the parameters that are stepped alone
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
            params: as above. A ``lr`` or ``weight_decay`` that a group has of its own is taken for AdamW's as well.
            lr: AdamW's.
            weight_decay: AdamW's.
            factor: 3 to 10 is what the paper found; 5 is at most a factor of two away from both.
            options: as above.

        Raises:
            ValueError: ``factor`` is not positive, or an option is out of its range; with ``decouple_lr`` a step decays
                by the weight decay alone, so that there is no product to keep.

        Source: Chen et al., arXiv 2302.06675, section 5.
        """
        if not 0.0 < factor < math.inf:
            raise ValueError(f"factor must be positive, got {factor}")

        def for_lion(settings: dict[str, Any]) -> dict[str, Any]:
            if settings.get("decouple_lr"):
                raise ValueError(
                    "decouple_lr must be False in from_adamw, got True; call Lion8bit itself, and pass AdamW's "
                    "lr * weight_decay as its weight_decay"
                )
            scales = {"lr": 1 / factor, "weight_decay": factor}
            return {name: value * scales[name] if name in scales else value for name, value in settings.items()}

        groups = [for_lion(entry) if isinstance(entry, dict) else entry for entry in params]
        return cls(groups, **for_lion({"lr": lr, "weight_decay": weight_decay, **options}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with options of its own; see `torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["betas"] = tuple(group["betas"])  # a configuration file's list may be of a class that cannot be saved
        group.setdefault("format_version", FORMAT_VERSION)
        if group["decouple_lr"]:
            group.setdefault("initial_lr", float(group["lr"]))  # before a warm-up changes it
        for i, param in enumerate(group["params"]):
            try:
                if param.dtype not in DTYPES:
                    raise TypeError(f"parameters must be float32, bfloat16 or float16, got {param.dtype}")
                if is_flattened(param) and group["optim_bits"] == 8:
                    raise TypeError(
                        "parameters must not be flattened to have 8-bit state, got those of FullyShardedDataParallel "
                        "(FSDP1), which cannot save it; use FSDP2's fully_shard, or optim_bits=32"
                    )
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
            group.setdefault("format_version", FORMAT_VERSION)
        self._plan = None
        self._plans = {}
        self.__dict__.setdefault("_counters", {})
        self.__dict__.setdefault("_update_counts", {})
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
        key = (counts, layouts, [group["is_paged"] for group in groups])
        plan = self._plan
        if plan is None or plan.sharded:  # elsewhere `refresh` finds that each parameter is still its own local tensor
            grads = gradients(params, grads)
        if plan is None or not plan.refresh(key, self.state.values(), params, grads):
            self._plan = None
            batches = self._build(groups, params, gradients(params, grads), counts, hypers)
            plan = _Plan(key, self.state.values(), batches)
            if all(batch.reusable for batch in plan.batches):
                self._plan = plan
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

        Args:
            param: with its gradient; without one nothing happens.
            group: the one that holds it. A group from before `load_state_dict`, which makes new ones, will do.

        Raises:
            ValueError: ``param`` is in no group; and what `step` raises.
        """
        if param.grad is None:
            return
        if not any(group is present for present in self.param_groups):
            group = self._group_of(param)
        hypers = [_hyper(group)]
        key = (id(group), hypers[0].block_size, hypers[0].weight_rounding, group["is_paged"])
        states = [self.state[param]] if param in self.state else []
        plan, grads = self._plans.get(param), gradients([param], [param.grad])
        if plan is None or not plan.refresh(key, states, [param], grads):
            present = {param for group in self.param_groups for param in group["params"]}
            self._plans = {other: plan for other, plan in self._plans.items() if other in present - {param}}
            batches = self._build([group], [param], grads, [1], hypers)
            plan = _Plan(key, [self.state[param]], batches)
            if batches[0].reusable:
                self._plans[param] = plan
        self._run(plan.batches, [group], hypers)

    def step_parameter(self, param: Tensor, group: dict[str, Any], index: int) -> None:
        """`step_param` with the parameter's index in its group, as some trainers call it."""
        self.step_param(param, group)

    def _run(self, batches: Sequence[Batch], groups: Sequence[dict[str, Any]], hypers: Sequence[Hyper]) -> None:
        grad_scale, found_inf = self._from_scaler()
        if grad_scale is not None:
            for hyper in hypers:
                hyper.flags |= UNSCALE
        for batch in batches:
            counts = self._counts_on(batch.device, grad_scale is not None or found_inf is not None)
            if counts is None:
                if found_inf is not None and found_inf.item():
                    batch.grads = []
                    continue
                _complete(hypers, groups, grad_scale)
                batch.advance()
                self._update(batch, hyper_array(hypers))
            else:
                batch.advance_on(counts, self.state.values())
                rates = [_rate(group, batch.device) for group in groups]
                control = Control(rates, _on(batch.device, grad_scale), _on(batch.device, found_inf), counts)
                self._update(batch, hyper_array(hypers), control)
            batch.finish()

    def _update(self, batch: Batch, hypers: ctypes.Array[Hyper], *control: Control) -> None:
        device, counter = batch.device, self._counter(batch.device)
        if not batch.paged:
            update_(batch, hypers, counter, *control)
            return
        if device not in self._pagers:
            self._pagers[device] = Pager(device)
        self._pagers[device].run(
            batch, hypers, lambda load: update_(load, hypers, counter, *control), on_device=bool(control)
        )

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
    ) -> list[Batch]:
        """Checks parameters, gradients and state, makes the state that is missing; a batch for each device."""
        numbers = {id(param): n for n, param in enumerate(p for group in self.param_groups for p in group["params"])}
        owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
        self._settle_pages()
        entries: list[Entry] = []
        ordered: list[Tensor] = []
        for param, grad, owner in zip(params, grads, owners, strict=True):
            state = self.state.get(param, {})
            try:
                group = groups[owner]
                state = _with_residual(state, param, group) if state else _new_state(param, group)
                state = _at_home(state, param, group)
                entry, ordered_grad = make_entry(
                    param,
                    grad,
                    state,
                    block_size=hypers[owner].block_size,
                    seed=numbers.get(id(param), 0),
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
        for entry in entries:
            self.state[entry.source] = entry.state
        places: dict[tuple[torch.device, bool], list[int]] = {}
        for place, entry in enumerate(entries):
            places.setdefault((entry.param.device, entry.paged), []).append(place)
        if len(places) == 1:
            return [Batch(device, entries, ordered) for device, _ in places]
        return [
            Batch(device, [entries[i] for i in at], [ordered[i] for i in at], at) for (device, _), at in places.items()
        ]

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(other is param for other in group["params"]):
                return group
        raise ValueError(f"param must be one of this optimizer's parameters, got shape {tuple(param.shape)}")

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._counters:
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
            return as_part_of(param, dequantize(codes, scales, group["block_size"]), param.shape)
        momentum: Tensor = state["momentum"]
        return momentum.to(param.device, copy=True)

    def nonfinite_count(self) -> int:
        """How many elements this process has skipped for a bad gradient since construction; waits for the devices."""
        return sum(int(counter.item()) for counter in self._counters.values())

    @torch.no_grad()
    def frozen_fraction(self) -> float:
        """Share of this process's weights that an update of ±lr cannot move, because rounding brings them back.

        Weights rounded stochastically move in expectation, and count as frozen only where fp32 itself cannot move them;
        compensated weights, only where 24 bits cannot.
        """
        self._settle_pages()
        frozen, total = 0, 0
        for group in self.param_groups:
            lr = float(group["lr"])
            for param in group["params"]:
                flat, residual = local(param).detach().reshape(-1), self.state.get(param, {}).get("residual")
                below = None if residual is None else local(residual).reshape(-1)
                for start in range(0, flat.numel(), _PIECE):
                    piece = slice(start, start + _PIECE)
                    value = _fp32(flat[piece], None if below is None else below[piece].to(flat.device))
                    moved = [_rounded(value + step, param.dtype, group["weight_rounding"]) for step in (lr, -lr)]
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
        """Bytes held in this process for the parameters that this optimizer steps, of DTensors the local parts.

        Returns:
            ``parameters`` (elements), ``parameter_bytes``, ``gradient_bytes``, ``state_bytes`` (all state tensors),
            ``state_bytes_per_parameter`` (over the parameters that have state; 0 before the first step),
            ``paged_bytes`` (of the state, what ``is_paged`` keeps in host memory) and ``buffer_bytes`` (for that, on
            the devices).
        """
        params = [param for group in self.param_groups for param in group["params"]]
        stepped = [param for param in params if self.state.get(param)]
        held = {param: sum(_nbytes(self.state[param].get(name)) for name in STATE_TENSORS) for param in stepped}
        groups = {param: group for group in self.param_groups for param in group["params"]}
        state_bytes = sum(held.values())
        count = sum(local(param).numel() for param in stepped)
        return {
            "parameters": sum(local(param).numel() for param in params),
            "parameter_bytes": sum(_nbytes(param) for param in params),
            "gradient_bytes": sum(_nbytes(param.grad) for param in params),
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
        `lion8bit.convert_state_dict`, under the present options.

        Raises:
            ValueError: the state is not a Lion's, has another format version, or does not fit the parameters; nothing
                has changed.
        """
        self._settle_pages()
        groups = {param: group for group in self.param_groups for param in group["params"]}

        def place(value: Tensor, param: Tensor) -> Tensor:
            return bring_home(value, param, groups[param], copy=True)

        with keeping_dtypes(self, STATE_TENSORS, self._loadable, place):
            super().load_state_dict(state_dict)
        for state in self.state.values():
            if "scales" in state:
                state["scales"] = state["scales"].contiguous()
            if isinstance(state.get("step"), Tensor):  # as torch's own optimizers count
                state["step"] = int(state["step"])

    def _loadable(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """The state dict in the present format, checked against the parameters."""
        if any("format_version" not in group for group in incoming["param_groups"]):
            from lion8bit.checkpoints import convert_state_dict

            incoming = convert_state_dict(incoming, self)
        for number, param, group in pair(self.param_groups, incoming["param_groups"]):
            state = incoming["state"].get(number)
            if not state:
                continue
            version = group.get("format_version")
            try:
                if version != FORMAT_VERSION:
                    raise ValueError(f"state must have format_version {FORMAT_VERSION}, got {version}")
                check_state(state, param, group["block_size"])
            except ValueError as error:
                raise ValueError(f"{error} (parameter {number}, shape {tuple(param.shape)})") from error
        own, saved_groups = self.param_groups, incoming["param_groups"]
        if len(own) == len(saved_groups):  # torch refuses others
            saved_groups = [{**saved, "is_paged": group["is_paged"]} for saved, group in zip(saved_groups, own)]
        return {**incoming, "param_groups": saved_groups}


_NOT_CAPTURABLE = (
    "capturable must be True while a CUDA graph is captured, got False; "
    "each replay would repeat this step's learning rate and random numbers"
)
_PIECE = 1 << 22  # elements at a time where a parameter is looked at in fp32


class _Plan:
    """The batches of a step, and what must be the same for another step to take them again."""

    def __init__(self, key: Any, states: Iterable[dict[str, Any]], batches: Sequence[Batch]) -> None:
        self.key = key  # parameters and storage of each group
        self.states = list(states)
        self.batches = batches
        self.sharded = any(batch.sharded for batch in batches)

    def refresh(self, key: Any, states: Collection[dict[str, Any]], params: list[Tensor], grads: list[Tensor]) -> bool:
        """Takes in another step's parameters and gradients; False where a new plan is needed."""
        if key != self.key or len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return False
        return all(batch.refresh(params, grads) for batch in self.batches)


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


@in_default_environment
def _hyper(group: dict[str, Any], lr: float | None = None) -> Hyper:
    """The kernels' constants of a group; ``lr`` in place of its own, which may be in device memory."""
    if lr is None and _device_lr(group) is None:
        _refuse_capture(group["lr"])
    _check_options(group)  # anyone may write to a group, and the kernels trust what they are given
    if lr is None:
        lr = float(group["lr"]) if _device_lr(group) is None else 0.0
    return make_hyper(
        lr=lr,
        betas=group["betas"],
        weight_decay=group["weight_decay"],
        block_size=group["block_size"],
        weight_rounding="stochastic" if group["weight_rounding"] == "auto" else group["weight_rounding"],
        momentum_first=group["momentum_first"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        initial_lr=_initial_lr(group),
        cautious=group["cautious"],
        maximize=group["maximize"],
    )


def _refuse_capture(lr: float | Tensor) -> None:
    """Before a rate in device memory is read, which would end the capture with an error of CUDA's."""
    if isinstance(lr, Tensor) and lr.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(_NOT_CAPTURABLE)


def _initial_lr(group: dict[str, Any]) -> float | None:
    if not group["decouple_lr"]:
        return None
    initial_lr = group.setdefault("initial_lr", group["lr"])
    if isinstance(initial_lr, Tensor):  # a scheduler's: read once
        group["initial_lr"] = initial_lr = float(initial_lr)
    return float(initial_lr)


def _device_lr(group: dict[str, Any]) -> Tensor | None:
    """A learning rate that the host need not read, because the kernel will."""
    lr = group["lr"]
    if not (group["capturable"] and isinstance(lr, Tensor) and lr.numel() == 1 and decides(lr.device.type)):
        return None
    if lr.dtype != torch.float32:
        raise ValueError(f"lr must be a float32 tensor with capturable=True, got {lr.dtype}; pass lr.float()")
    return lr


def _rate(group: dict[str, Any], device: torch.device) -> Rate:
    divisor, weight_decay = decay_terms(group["weight_decay"], group["decoupled_weight_decay"], _initial_lr(group))
    return Rate(_on(device, _device_lr(group)), divisor, weight_decay)


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.detach().to(device, torch.float32, non_blocking=True)


@in_default_environment
def _complete(hypers: Sequence[Hyper], groups: Sequence[dict[str, Any]], grad_scale: Tensor | None) -> None:
    """Reads on the host what a `Control` would leave to the device."""
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
    wide = group["optim_bits"] == 32 or param.numel() < group["min_8bit_size"]
    if wide or not keeps_blocks_whole(param, block_size):
        momentum = torch.zeros_like(piece, dtype=torch.float32, requires_grad=False, **like)
        return _with_residual({"step": 0, "momentum": as_part_of(param, momentum, param.shape)}, param, group)
    codes = torch.full_like(piece, ZERO_CODE, dtype=torch.int8, requires_grad=False, **like)
    order = memory_order(codes)
    assert order is not None  # full_like makes dense tensors
    rows, cols = rows_and_cols([piece.shape[dim] for dim in order])
    scales = torch.zeros(rows, blocks_per_row(cols, block_size), dtype=torch.float32, **place)
    all_rows, all_cols = rows_and_cols(param.shape)
    state = {
        "step": 0,
        "codes": as_part_of(param, codes, param.shape),
        "scales": as_part_of(param, scales, (all_rows, blocks_per_row(all_cols, block_size))),
    }
    return _with_residual(state, param, group)


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
    return 0 if tensor is None else local(tensor).numel() * tensor.element_size()


def _check_options(options: dict[str, Any]) -> None:
    check_rates(options if _device_lr(options) is None else {**options, "lr": 0.0})
    check_block_size(options["block_size"])
    if options["min_8bit_size"] < 0:
        raise ValueError(f"min_8bit_size must be at least 0, got {options['min_8bit_size']}")
    if options["optim_bits"] not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, got {options['optim_bits']!r}")
    rounding = options["weight_rounding"]
    if rounding not in ("auto", *WEIGHT_ROUNDING):
        raise ValueError(f"weight_rounding must be 'auto' or one of {(*WEIGHT_ROUNDING,)}, got {rounding!r}")
