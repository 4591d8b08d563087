"""`Lion`, the optimizer with fp32 momentum in plain torch that `Lion8bit` is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lion8bit.loading import check_structure, keeping_dtypes, naming, pair
from lion8bit.options import check_decay, check_flag, check_rates
from lion8bit.quantization import check_momentum
from lion8bit.sharding import local
from lion8bit.state import check_tensor


class Lion(torch.optim.Optimizer):
    r"""Lion with fp32 momentum in plain torch: what `Lion8bit` is measured against.

    .. math::
        c &= \beta_1 m + (1-\beta_1) g \\
        p &\leftarrow p\,(1 - \mathrm{lr}\,\lambda) - \mathrm{lr}\,\mathrm{sign}(c) \\
        m &\leftarrow \beta_2 m + (1-\beta_2) g

    Args:
        params: parameters, named parameters or groups of either. Every option below may be set per group.
        lr: step length, in units of the parameters; a float or a tensor of one element.
        betas: (beta1, beta2), each in [0, 1).
        weight_decay: the lambda above, at least 0.
        maximize: ascend.

    Raises:
        ValueError: an option out of its range.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, program 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        check_rates(defaults)
        check_flag("maximize", maximize)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with separate options; see `torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_rates(options)
            check_flag("maximize", options["maximize"])
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it to every optimizer's, whatever its arguments are
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; ``closure`` re-evaluates the model and returns the loss.

        Raises:
            ValueError: an option out of its range; no parameter has been changed.
            RuntimeError: a gradient is sparse or complex; the parameters before it have been stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = []
        for group in self.param_groups:
            lr = check_rates(group)
            check_flag("maximize", group["maximize"])
            decay = 1 - lr * float(group["weight_decay"])
            check_decay(decay, lr, group["weight_decay"])
            rates.append((lr, decay))
        for group, (lr, decay) in zip(self.param_groups, rates, strict=True):
            beta1, beta2 = map(float, group["betas"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    raise RuntimeError(f"Lion does not support sparse or complex gradients, got {p.grad.layout}")
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                g, m = p.grad.float() * (-1 if group["maximize"] else 1), state["momentum"]
                c = m * beta1 + g * (1 - beta1)
                p.copy_(p.float() * decay - lr * c.sign())
                m.copy_(m * beta2 + g * (1 - beta2))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; the momentum stays in fp32, whatever the parameter's dtype is.

        Raises:
            ValueError: the momentum does not fit its parameter or is not finite, or an option is out of its range;
                nothing has changed.
        """
        with keeping_dtypes(self, ("momentum",), self._loadable):
            super().load_state_dict(state_dict)

    def _loadable(self, incoming: dict[str, Any]) -> dict[str, Any]:
        check_structure(incoming)
        for saved in incoming["param_groups"]:
            check_rates({**self.defaults, **saved})
        for number, param, _saved in pair(self.param_groups, incoming["param_groups"]):
            state = incoming["state"].get(number)
            if state:
                with naming(number, param):
                    check_tensor("momentum", state.get("momentum"))
                    if state["momentum"].shape != param.shape:
                        raise ValueError(
                            f"momentum must have the parameter's shape, got {tuple(state['momentum'].shape)}"
                        )
                    check_momentum(local(state["momentum"]))
        return incoming
