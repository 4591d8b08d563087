"""`Lion8bit`: parameter groups, state and hooks of the optimizer; the arithmetic is in the backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lion8bit import compiled, inspection
from lion8bit.backends.select import forget_missing
from lion8bit.checkpoints import check_saved_group, convert_state_dict
from lion8bit.device_scalars import is_device_count
from lion8bit.layout import FORMAT_VERSION
from lion8bit.loading import check_numbers, check_structure, keeping_dtypes, naming, pair, warn_of_copies
from lion8bit.options import (
    check_factor,
    check_options,
    check_torch_options,
    device_lr,
    from_adamw_options,
    group_hyper,
    peak_lr,
    plain,
    with_block_size,
    without_adams,
)
from lion8bit.sharding import gradients
from lion8bit.state import (
    STATE_TENSORS,
    check_param,
    check_version,
    checked_state,
    fp32_momentum,
    is_compensated,
    is_paged,
    to_place,
)
from lion8bit.stepper import Ready, Stepper, ready

_numbers = itertools.count()  # of the parameters in this process


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
        block_size: elements per scale: 64, 128 or 256; None for 128, or 64 with 4 bits.
        min_8bit_size: parameters with fewer elements keep fp32 momentum.
        optim_bits: 8; or 4 for half of the state, 0.56 bytes per parameter: single signs then differ often from fp32
            Lion's, but the momentum has no bias and the drift a bound, see docs/numerics.md; or 32 for fp32 momentum.
        weight_rounding: how the new value of a 16-bit parameter is rounded: "stochastic" (unbiased, reproducible;
            "auto" means the same) or "nearest". "compensated" keeps the next 8 bits of a bf16 parameter in an int8
            state tensor, ``residual``, and so trains 24-bit weights. fp32 parameters are not rounded.
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
        foreach, differentiable: accepted for code that sets torch's defaults, None and False; nothing else is.

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
        block_size: int | None = None,
        min_8bit_size: int = 4096,
        optim_bits: int = 8,
        weight_rounding: str = "stochastic",
        momentum_first: bool = False,
        decoupled_weight_decay: bool = True,
        decouple_lr: bool = False,
        cautious: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool = False,
        is_paged: bool = False,
        seed: int | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
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
        check_options(with_block_size(defaults))
        check_torch_options(foreach, differentiable)
        forget_missing()
        self._stepper = Stepper()
        self._releases = 0  # handles of `fuse_into_backward` that step its parameters
        super().__init__(params, {name: plain(value) for name, value in defaults.items()})

    @classmethod
    def from_adamw(
        cls, params: Iterable[Any], *, lr: float | Tensor, weight_decay: float, factor: float = 5.0, **options: Any
    ) -> Lion8bit:
        """A Lion8bit with the settings of an AdamW: ``lr / factor`` and ``weight_decay * factor``.

        Lion's updates are ±1 where AdamW's are mostly smaller, hence the shorter step; the product, which is the decay
        of a step, stays. Betas are Lion's own unless they are among ``options``; Adam's do not carry over.

        Args:
            params: as above, or the ``param_groups`` of the AdamW. Options of a group count as AdamW's too: rates
                (``lr``, and those that schedulers keep) and ``weight_decay`` are converted, and options that have
                another meaning for Adam are left out, such as ``betas``, ``eps`` and ``fused``.
            lr: AdamW's.
            weight_decay: AdamW's.
            factor: 3 to 10 is what the paper found; 5 is at most a factor of two away from both.
            options: as above.

        Raises:
            ValueError: ``factor`` is not positive, or an option is out of its range; with ``decouple_lr`` a step decays
                by the weight decay alone, so that there is no product to keep.

        Source: Chen et al., arXiv 2302.06675, section 5.
        """
        check_factor(factor)
        groups = [
            from_adamw_options(without_adams(entry), factor) if isinstance(entry, dict) else entry for entry in params
        ]
        return cls(groups, **from_adamw_options({"lr": lr, "weight_decay": weight_decay, **options}, factor))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with separate options; see `torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            options = with_block_size({**self.defaults, **param_group})
            check_options(options)
            device_lr(options)
        given = {*param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group |= {name: plain(value) for name, value in with_block_size(group).items() if name in self.defaults}
        group.setdefault("format_version", FORMAT_VERSION)
        if group["seed"] is None:
            group["seed"] = _first_number(len(group["params"]))
        elif "seed" not in given:
            group["seed"] += sum(len(other["params"]) for other in self.param_groups[:-1])
        peak_lr(group)  # before a warm-up changes lr
        for number, param in enumerate(group["params"]):
            try:
                check_param(param, group)
            except (TypeError, ValueError) as error:
                self.param_groups.pop()
                where = f"(parameter {number} of group {len(self.param_groups)}, shape {tuple(param.shape)})"
                raise type(error)(f"{error} {where}") from None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it to every optimizer's, whatever its arguments are
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            check_version(group.setdefault("format_version", FORMAT_VERSION))
            if group["format_version"] != FORMAT_VERSION:
                for param in filter(self.state.get, group["params"]):
                    self.state[param] = checked_state(self.state[param], param, group)
                group["format_version"] = FORMAT_VERSION
            if group["decouple_lr"] and "initial_lr" in group:  # a former key, which schedulers overwrite
                group.setdefault("peak_lr", float(group["initial_lr"]))
        number = 0
        for group in self.param_groups:
            if group["seed"] is None:  # of state from before there were seeds
                group["seed"] = number
            number += len(group["params"])
        stepper = self.__dict__.setdefault("_stepper", Stepper())
        stepper.plan, stepper.plans = None, {}
        self.__dict__.setdefault("_releases", 0)

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
            compiled.trace_step(self)
        else:
            step = ready(self.param_groups)
            step.grad_scale, step.found_inf = self._scaler()
            self._stepper.step(self, step)
        return loss

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
        if param.grad is not None:
            self._stepper.step_param(self, param, self._scaler())

    def step_parameter(self, param: Tensor, group: dict[str, Any], index: int) -> None:
        """`step_param` with the parameter's index in its group, as some trainers call it."""
        self.step_param(param, group)

    def _scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """GradScaler's scale and its found_inf, which it sets if this optimizer supports it."""
        if not self._step_supports_amp_scaling:
            return None, None
        found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        grad_scale, found_inf = (None if value is None else torch.as_tensor(value) for value in found)
        return grad_scale, found_inf

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler sets ``grad_scale`` and ``found_inf``, by which gradient release detects it."""
        return self._releases > 0 or any(group["fused"] for group in self.param_groups)

    def _before_tracing(self) -> int:
        """Makes the state that is missing, which graphs take as an input; the key of `compiled.enroll`."""
        if any(is_paged(param, group) for group in self.param_groups for param in group["params"]):
            raise RuntimeError("is_paged must be False where torch.compile traces the step, got True")
        step = ready(self.param_groups)
        hypers = [*map(group_hyper, self.param_groups)]
        with torch.no_grad():
            self._stepper.build(self, step, gradients(step.params, step.grads), hypers)
        return compiled.enroll(self)

    # As `torch.compiler.assume_constant_result` does, which would have `import lion8bit` load the compiler.
    _before_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _step_graph(
        self,
        groups: list[dict[str, Any]],
        owners: list[Tensor],
        params: list[Tensor],
        grads: list[Tensor],
        counts: list[int],
        copies: list[dict[str, Any]] | None,
    ) -> None:
        """Steps the tensors of a compiled graph; ``copies``: the states of ``params`` where these are copies."""
        step = Ready(groups, params, grads, counts, *self._scaler(), owners=owners)
        if copies is None:
            self._stepper.step(self, step)
        else:
            self._stepper.step_copies(self, step, copies)

    # ---- Reports ----------------------------------------------------------------------------------------------

    def momentum(self, param: Tensor) -> Tensor:
        """The momentum of a parameter in fp32 on its device, whatever its storage; zeros before its first step.

        Returns:
            fp32, the shape of ``param`` and, if that is a DTensor, placed as it is; a copy.

        Raises:
            ValueError: ``param`` is not one of this optimizer's.
        """
        group = self._stepper.group_of(self, param)
        self._stepper.finish_paging()
        state = self.state.get(param)
        if not state:
            return torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        return fp32_momentum(state, param, group["block_size"])

    def nonfinite_count(self) -> int:
        """How many elements this process has skipped for a bad gradient since construction; waits for the devices."""
        return sum(int(counter.item()) for counter in self._stepper.counters.values())

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
        self._stepper.finish_paging()
        return inspection.frozen_fraction(self.param_groups, self.state, rates)

    @torch.no_grad()
    def fp32_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with its 16-bit parameters in fp32, the residual taken in where there is one.

        An fp32 copy of the model loads it; `load_fp32_weights` takes it back.

        Args:
            model: the module that this optimizer's parameters belong to.

        Returns:
            The names of ``model.state_dict()``; its values, but fp32 copies for 16-bit parameters.
        """
        self._stepper.finish_paging()
        return inspection.fp32_weights(model, self.state)

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
        self._stepper.finish_paging()
        inspection.load_fp32_weights(model, weights, self.param_groups, self.state)

    def memory_report(self) -> dict[str, float]:
        """Bytes held in this process for the parameters that this optimizer trains, of DTensors the local parts.

        Parameters that require no gradient count only in ``state_bytes``, with state from before they were frozen.

        Returns:
            ``parameters`` (elements), ``parameter_bytes``, ``gradient_bytes``, ``state_bytes`` (all state tensors),
            ``state_bytes_per_parameter`` (over the parameters that have state; 0 before the first step),
            ``paged_bytes`` (of the state, what ``is_paged`` keeps in host memory) and ``buffer_bytes`` (for that, on
            the devices).
        """
        buffer_bytes = sum(pager.buffer_bytes for pager in self._stepper.pagers.values())
        return inspection.memory_report(self.param_groups, self.state, buffer_bytes)

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; waits for devices (``fused``, ``capturable``, ``is_paged``)."""
        self._stepper.finish_paging()
        saved = super().state_dict()
        for number, state in saved["state"].items():
            if isinstance(state, dict) and is_device_count(state.get("step")):
                saved["state"][number] = {**state, "step": int(state["step"])}
        return saved

    def __getstate__(self) -> dict[str, Any]:
        self._stepper.finish_paging()
        return super().__getstate__()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; codes, scales and momentum keep their dtypes, whatever the parameter's is.

        The options of the saved groups replace the present ones, as in every torch optimizer, except ``is_paged``,
        which depends on this machine's memory. Tensors are copied. State of another library's Lion is converted by
        `lion8bit.convert_state_dict`, under the present options. State of format versions 2 and 3 is brought into the
        present one: momentum of version 2 is quantized again where a parameter's rows are shorter than a block.

        Raises:
            ValueError: the state is not a Lion's, has another format version, is damaged, or does not fit the
                parameters; nothing has changed.

        Warns:
            UserWarning: the state has another order in memory than the parameters, see `lion8bit.convert_state_dict`.
        """
        self._stepper.finish_paging()
        groups = {param: group for group in self.param_groups for param in group["params"]}

        def place(value: Tensor, param: Tensor) -> Tensor:
            if value.dtype == torch.int64:  # "shape", which only the host reads
                return value.to("cpu", copy=True)
            return to_place(value, param, groups[param], copy=True)

        with keeping_dtypes(self, ("shape", *STATE_TENSORS), self._loadable, place):
            super().load_state_dict(state_dict)
        warn_of_copies(self)

    def _loadable(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """The state dict in the present format, checked so that all of it can be loaded and stepped with."""
        check_structure(incoming)
        if any("format_version" not in group for group in incoming["param_groups"]):
            incoming = convert_state_dict(incoming, self)
        for place, saved in enumerate(incoming["param_groups"]):
            check_saved_group({**self.defaults, "block_size": None, **saved}, place)
        check_numbers(self.param_groups, incoming["param_groups"])
        states = dict(incoming["state"])
        for number, param, saved in pair(self.param_groups, incoming["param_groups"]):
            with naming(number, param):
                is_compensated(param, {**self.defaults, **saved})
                if states.get(number):
                    states[number] = checked_state(states[number], param, saved)
        own, saved_groups = self.param_groups, incoming["param_groups"]
        if len(own) == len(saved_groups):  # torch refuses others
            saved_groups = [
                {**saved, "is_paged": group["is_paged"], "format_version": FORMAT_VERSION}
                for saved, group in zip(saved_groups, own)
            ]
        return {**incoming, "state": states, "param_groups": saved_groups}


class Lion4bit(Lion8bit):
    """`Lion8bit` with ``optim_bits=4`` as its default: 0.56 bytes of state per parameter.

    8 bits remain the recommended default. Four bits give up the bound on single signs, which then differ often from
    those of fp32 Lion. They keep the bound on the drift of the momentum. See docs/numerics.md.

    Args:
        params, lr, betas, weight_decay, optim_bits, options: as of `Lion8bit`; every option may be set per group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        optim_bits: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, optim_bits=optim_bits, **options)


def _first_number(count: int) -> int:
    """The first of so many numbers that no other parameters have."""
    first, *_ = itertools.islice(_numbers, max(1, count))
    return first
