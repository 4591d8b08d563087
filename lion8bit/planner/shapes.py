"""The types that describe a model to the plan: shapes of its parameters, and widths for activations. Builds nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

USUAL_SEQUENCE = 2048  # tokens, where neither the user nor the model says otherwise

# Numbers per inner width that a feed-forward network without a gate saves for its backward pass: the activation's input
# and result; of ReLU the result only; of functions made of elementary operations also the intermediate results.
SAVED = {"relu": 1, "gelu": 2, "gelu_pytorch_tanh": 2, "silu": 2, "swish": 2, "quick_gelu": 3, "gelu_new": 5}

Shape = tuple[int, ...]


class PlanError(ValueError):
    """An argument from which no plan can be made; the message names it and the fix."""


class Weight(NamedTuple):
    """One parameter."""

    shape: Shape  # from the slowest dimension in memory to the fastest
    trained: bool = True
    adapter: bool = False  # of LoRA: fp32, whatever the others are, as peft makes them
    own_shape: Shape | None = None  # the parameter's, where its memory has another order: 4-bit codes follow it

    @property
    def row_major(self) -> Shape:
        """The parameter's shape."""
        return self.shape if self.own_shape is None else self.own_shape


@dataclass(frozen=True)
class Widths:
    """The widths that determine the activations of a transformer."""

    layers: int
    hidden: int  # of the residual stream
    heads: int  # attention heads
    query: int  # of all heads' queries
    key: int  # of their keys, and of their values
    inner: int  # inside the feed-forward network
    saved: int  # numbers per inner width that it saves: `SAVED`, and two more with a gate, as in SwiGLU
    layer_norms: int  # sum of the widths of a layer's LayerNorms
    rms_norms: int  # of norms computed in fp32 by torch's elementary operations, as the RMSNorm of transformers
    fp32_norms: int  # of those that apply their weight in fp32 too, as Gemma's
    vocabulary: int  # of the logits; 0 for a model without
    fused: bool = False  # queries, keys and values are one matrix product, and rotated: the values keep all of it


@dataclass(frozen=True)
class Model:
    """The properties of a model that a plan needs."""

    name: str  # a label for reports
    blocks: tuple[tuple[Weight, ...], ...]  # the parameters of each repeated block; each is one unit of FSDP2
    rest: tuple[Weight, ...]  # all others; they are the root unit
    tied: bool = False  # the largest parameter is both the embedding and the output layer
    widths: Widths | None = None  # of a transformer; None where the activations are not known
    note: str = ""  # why they are not, or what was assumed
    sequence: int = USUAL_SEQUENCE  # tokens of its usual input

    @property
    def weights(self) -> list[Weight]:
        """Every parameter."""
        return [*itertools.chain(*self.blocks), *self.rest]


def adapters(lora: int, inputs: int, outputs: int) -> tuple[Weight, Weight]:
    """LoRA's two matrices of a rank at a linear layer."""
    return Weight((lora, inputs), adapter=True), Weight((outputs, lora), adapter=True)
