"""The loss of a language model without its whole logits: they exist for a piece of the tokens at a time.

    loss = chunked_loss(model, tokens, targets)   # as cross_entropy(model(tokens)), with the same gradients

The forward pass keeps no logits. The backward pass computes those of a piece again, in fp32 with their softmax, and
adds its part to the gradient of the output layer in place. With v logits per token and pieces of c tokens, 8*c*v
bytes are needed beside the gradients; `lion8bit.estimate(..., chunked_loss=True)` plans this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lion8bit.planner.formulas import LOSS_PIECE

CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # options of Hugging Face's models


class _CrossEntropy(torch.autograd.Function):
    """Mean cross entropy of [tokens, width] hidden states under a [vocabulary, width] output layer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        total = hidden.new_zeros((), dtype=torch.float32)
        for x, y in zip(hidden.split(LOSS_PIECE), targets.split(LOSS_PIECE), strict=True):
            total += F.cross_entropy((x @ weight.T).float(), y, reduction="sum")
        return total / len(targets)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        parts = (each.split(LOSS_PIECE) for each in (hidden, targets, grad_hidden))
        for x, y, grad_x in zip(*parts, strict=True):
            # d loss / d logits = (softmax - one at the target) / tokens
            slope = (x @ weight.T).float().softmax(-1)
            slope[torch.arange(len(y), device=y.device), y] -= 1
            slope = slope.mul_(grad / len(targets)).to(x.dtype)
            torch.mm(slope, weight, out=grad_x)
            grad_weight.addmm_(slope.T, x)
            del slope  # before the logits of the next piece
        return grad_hidden, grad_weight, None


def chunked_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy of a model's next tokens, in fp32.

    Args:
        model: of `llama.py`, or a causal model of Hugging Face, whose output layer is one matrix.
        tokens, targets: [batch, length] int64.

    Raises:
        TypeError: the model changes its logits after the output layer, or its output layer has a bias.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    changed = [name for name in CHANGES_LOGITS if getattr(getattr(model, "config", None), name, None)]
    if changed or head.bias is not None:
        raise TypeError(f"model must have plain logits for a chunked loss, got {', '.join(changed) or 'a bias'}")
    if hasattr(model, "hidden_states"):
        hidden = model.hidden_states(tokens)  # type: ignore[operator]
    else:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[operator]
    return _CrossEntropy.apply(hidden.flatten(0, 1), head.weight, targets.flatten())  # type: ignore[no-any-return]
