"""The optimizers that the benchmarks compare, and how each is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from lion8bit import Lion8bit, stepper
from lion8bit.backends import portable

LR = 1e-6  # small enough that hundreds of steps leave the weights as they are
OURS = "lion8bit"
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {  # of parameters and gradients
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32/bf16": (torch.float32, torch.bfloat16),
}

Params = list[torch.nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """One optimizer: its name in tables, how it is made, the package it needs, and the dtypes it is measured with."""

    label: str
    make: Make
    package: str = "torch"
    dtypes: tuple[str, ...] = tuple(DTYPES)


def optimizer(module: str, name: str, **options: Any) -> Make:
    """A function that makes the optimizer ``module.name`` with these options, at `LR` where they have no ``lr``."""

    def make(params: Params) -> torch.optim.Optimizer:
        cls = getattr(importlib.import_module(module), name)
        made: torch.optim.Optimizer = cls(params, **{"lr": LR, **options})
        return made

    return make


def fresh_compiler() -> None:
    """Empties torch.compile's cache, which holds 8 versions: it compiles again for each dtype and thread count."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it silently goes on without compiling


class CompiledLion(torch.optim.Optimizer):
    """Lion with fp32 momentum, one torch.compile'd kernel per parameter."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {})
        fresh_compiler()
        self.update = torch.compile(_lion, dynamic=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param, dtype=torch.float32)
                self.update(param.detach().view(-1), param.grad.view(-1), state["momentum"].view(-1))


def _lion(param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor) -> None:
    g = grad.float()
    sign = torch.sign(momentum * 0.9 + g * (1 - 0.9))
    param.copy_(param.float() - LR * sign)
    momentum.copy_(momentum * 0.99 + g * (1 - 0.99))


def make_torchao(params: Params) -> torch.optim.Optimizer:
    """torchao's 8-bit AdamW, which compiles itself."""
    fresh_compiler()
    return optimizer("torchao.optim", "AdamW8bit")(params)


class PortableLion8bit(Lion8bit):
    """Lion8bit as it steps where it has no kernel, in plain torch."""

    def step(self, closure: None = None) -> None:
        with mock.patch.object(stepper, "update_", portable.update_):
            super().step()


def ours(**options: Any) -> Make:
    """Lion8bit with options."""
    return optimizer("lion8bit", "Lion8bit", **options)


CONTENDERS: dict[str, Contender] = {
    OURS: Contender("lion8bit", ours(weight_rounding="nearest")),
    "lion8bit-stochastic": Contender("lion8bit, stochastic rounding", ours(), dtypes=("bf16",)),
    "lion8bit-4bit": Contender("lion8bit, 4 bits", ours(weight_rounding="nearest", optim_bits=4)),
    "portable": Contender(
        "lion8bit, portable backend", lambda params: PortableLion8bit(params, lr=LR, weight_rounding="nearest")
    ),
    "bitsandbytes": Contender(
        "bitsandbytes Lion8bit", optimizer("bitsandbytes.optim", "Lion8bit"), package="bitsandbytes"
    ),
    "lion-pytorch": Contender("lion-pytorch Lion", optimizer("lion_pytorch", "Lion"), package="lion_pytorch"),
    # With 16-bit parameters it has its Kahan summation by default, which is one more tensor of state.
    "optimi": Contender("torch-optimi Lion", optimizer("optimi", "Lion"), package="optimi"),
    "adamw": Contender("torch AdamW(fused=True)", optimizer("torch.optim", "AdamW", fused=True)),
    "compiled-lion": Contender("torch.compile'd fp32 Lion", CompiledLion),
    "torchao": Contender("torchao AdamW8bit", make_torchao, package="torchao"),
}
