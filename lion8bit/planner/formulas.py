"""The memory of training, by optimizer.

Weights, gradients and state are the exact bytes of the tensors. Activations
of a transformer are what each layer saves for its backward pass, counted as
by Korthikanti et al. (arXiv 2205.05198) for attention that stores no scores,
without dropout. With t = batch * sequence tokens, width h, queries q, keys k,
inner width f, a heads, L layers, a vocabulary of v, e bytes per number:

  layer  = t * (norms + e*(h + 2q + 2k) + 4a + e*(h + s*f))
  norms  = n*e for each LayerNorm of width n, n*(e + 4) for an RMSNorm,
           8n for a norm that applies its weight in fp32 (Gemma, OLMo 2)
  s      = 4 with a gate, as in SwiGLU; without one 2 for GELU and SiLU
  inside = t * e*(h + 2f)      the gradients inside a layer
  logits = t * v * (e + 12)    with their softmax and its gradients in fp32

  activations = L*layer + max(inside, logits), and with checkpointing
                L*t*e*h + max(layer + inside, logits)

With a chunked loss, the output layer and the loss take c = min(256, t) tokens
at a time, and the backward pass computes the logits of a piece again. Then
the gradients of all hidden states and of the output layer grow while the
logits of one piece exist in fp32, with their softmax:

  logits = c * v * 8 + t*e*h

Where queries, keys and values are one product and rotated, q + k more numbers
are saved. The total is that of the worst moment: gradients grow while
activations shrink. Activations are known for decoders and encoders of Hugging
Face with one stack of equal layers. For other models (experts, several
towers) the total is a lower bound without them, and the verdict never "fits".

"release" is lion8bit.fuse_into_backward, "24-bit" compensated weights, "host"
momentum in the host's memory. "4 bits" is optim_bits=4, which keeps the bound
on the drift from fp32 Lion and gives up the bound on single signs (see
docs/numerics.md). "transient" is the largest gradient that lives for a
moment. Under FSDP2 (`fully_shard` on each block and on the whole) it includes
the gathered weights of the root and of two blocks, and the whole gradients of
the largest unit.

Not counted: buffers, workspaces of libraries, temporaries of a step, 16-bit
copies of fp32 weights under autocast.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lion8bit.layout import DEFAULT_BLOCK_SIZE, blocks_per_row, is_narrow, packed_shape, scales_shape
from lion8bit.paging import BUFFER_BYTES
from lion8bit.planner.models import load_model
from lion8bit.planner.shapes import Model, PlanError, Shape, Weight, Widths
from lion8bit.state import MIN_PAGED_SIZE

GIB = 2**30
LOSS_PIECE = 256  # tokens whose logits exist at a time with a chunked loss
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Piece(NamedTuple):
    """The part of a parameter that one process holds."""

    shape: Shape  # from the slowest dimension in memory to the fastest
    row_major: Shape  # the same in the parameter's order of dimensions
    whole: Shape  # of the whole parameter, in that order
    sharded: bool
    width: int  # bytes per element

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def piece_of(weight: Weight, gpus: int, width: int) -> Piece:
    """What rank 0 holds of a parameter under FSDP2: of ``rows`` along dimension 0 ``ceil(rows / gpus)``.

    The next ranks hold as many, then one holds the remainder, then the others nothing, so rank 0 has the most.
    """
    whole = weight.row_major
    if gpus == 1:
        return Piece(weight.shape, whole, whole, False, width)
    shape = (-(-whole[0] // gpus), *whole[1:]) if whole else whole
    return Piece(shape, shape, whole, True, width)  # DTensors and their state are row-major


def lion8bit_state(piece: Piece, bits: int, block_size: int, min_8bit_size: int) -> int:
    """Codes of ``bits`` and an fp32 scale per block, or fp32 momentum, by the rules of docs/design.md."""
    part_of_a_row = piece.sharded and (len(piece.whole) < 2 or is_narrow(piece.whole, block_size))
    if math.prod(piece.whole) < min_8bit_size or part_of_a_row:
        return 4 * piece.numel
    if bits == 4:
        packed, scales = (shape_of(piece.row_major, block_size) for shape_of in (packed_shape, scales_shape))
        return math.prod(packed) + 4 * math.prod(scales)
    return piece.numel + 4 * math.prod(scales_shape(piece.shape, block_size))


def adamw_state(piece: Piece) -> int:
    """torch's AdamW: two moments in the parameter's dtype, and an fp32 counter."""
    return 2 * piece.width * piece.numel + 4


def adamw8bit_state(piece: Piece) -> int:
    """bitsandbytes' AdamW8bit: two codes, two fp32 scales per 256 elements; fp32 below 4096 elements."""
    return 8 * piece.numel if piece.numel < 4096 else 2 * piece.numel + 8 * blocks_per_row(piece.numel, 256)


def lion_state(piece: Piece) -> int:
    """`lion8bit.Lion`: fp32 momentum."""
    return 4 * piece.numel


def flashlion_state(piece: Piece) -> int:
    """FlashLion on a GPU: a code, and an fp16 scale per 32 elements."""
    return piece.numel + 2 * blocks_per_row(piece.numel, 32)


class Method(NamedTuple):
    """A row of the plan: an optimizer and how it is used."""

    label: str
    state: Callable[[Piece], int]  # bytes for the part of a parameter
    dtypes: str = "bf16 fp16 fp32"  # of the trained weights for which the row differs from others
    shared: int = 0  # bytes of state that the parameters of 4096 elements and more share
    fp32: bool = False  # parameters and gradients are fp32 (and autocast computes in 16 bits)
    compensated: bool = False  # a byte of state completes each 16-bit weight to 24 bits
    release: bool = False  # each gradient is freed as soon as its parameter has been stepped
    host: bool = False  # the state is in the host's memory (`lion8bit.paging`), except that of small parameters


def methods(dtype: str, block_size: int | None = None, min_8bit_size: int = 4096) -> dict[str, Method]:
    """The rows for trained weights of a dtype, by key."""
    ours, ours4 = (
        partial(
            lion8bit_state, bits=bits, block_size=block_size or DEFAULT_BLOCK_SIZE[bits], min_8bit_size=min_8bit_size
        )
        for bits in (8, 4)
    )
    both = {"compensated": True, "release": True}
    rows = {
        "adamw-fp32": Method("AdamW, fp32 weights", adamw_state, "bf16 fp16", fp32=True),
        "adamw": Method("AdamW", adamw_state),
        "adamw8bit": Method("AdamW, 8 bits", adamw8bit_state, shared=2048),
        "lion": Method("Lion, fp32 momentum", lion_state),
        "flashlion": Method("FlashLion", flashlion_state),
        "flashlion-24": Method("FlashLion, 24-bit weights", flashlion_state, "bf16", compensated=True),
        "flashlion-release": Method("FlashLion, release", flashlion_state, release=True),
        "lion8bit": Method("Lion8bit", ours),
        "lion8bit-compensated": Method("Lion8bit, 24-bit weights", ours, "bf16", compensated=True),
        "lion8bit-release": Method("Lion8bit, release", ours, release=True),
        "lion8bit-release-compensated": Method("Lion8bit, release, 24-bit", ours, "bf16", **both),
        "lion8bit-release-host": Method("Lion8bit, release, host", ours, release=True, host=True),
        "lion8bit-4bit": Method("Lion8bit, 4 bits", ours4),
        "lion8bit-4bit-release": Method("Lion8bit, 4 bits, release", ours4, release=True),
    }
    return {key: row for key, row in rows.items() if dtype in row.dtypes.split()}


@dataclass(frozen=True)
class Row:
    """Bytes on one GPU with one optimizer."""

    label: str
    weights: int
    gradients: int  # 0 where each is freed at once
    state: int
    transient: int  # the largest gradient that lives for a moment, and what FSDP2 gathers
    activations: int | None  # at their largest; None where they are not known, and then no part of the total
    total: int  # at the worst moment; less than the sum, as gradients grow while activations shrink
    peak: str  # that moment: "loss" (the logits are largest), backward of "head", "first block", ... or "step"
    host: int  # bytes of state in the host's memory
    fits: bool | None  # total and reserve fit into the GPU; None without ``vram``, or if activations are not known


@dataclass(frozen=True)
class Plan:
    """The result of `estimate`; sizes are bytes, except ``vram`` and ``reserve``, which are GiB."""

    model: str
    note: str
    parameters: int
    trained: int
    dtype: str
    batch: int
    sequence: int
    checkpointing: bool
    chunked_loss: bool
    lora: int | None
    gpus: int
    vram: float | None
    reserve: float
    rows: dict[str, Row]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return asdict(self)


def estimate(
    model: int | str | os.PathLike[str] | nn.Module,
    *,
    dtype: str = "bf16",
    batch: int = 1,
    sequence: int | None = None,
    checkpointing: bool = True,
    chunked_loss: bool = False,
    lora: int | None = None,
    gpus: int = 1,
    vram: float | None = None,
    reserve: float = 1.0,
    block_size: int | None = None,
    min_8bit_size: int = 4096,
    trust_remote_code: bool = False,
) -> Plan:
    """Plans the memory of training, by optimizer.

    Bytes of tensors are exact. `lion8bit.planner.formulas` has the equations for the rest, and what is not counted.

    Args:
        model: the name of a public model, such as "llama-3-8b" (`lion8bit estimate --help` lists them); a count (an
            int, "7B", "124M"), which is taken as a Llama; a local Hugging Face folder or config.json;
            "package.module:factory", which is called on the meta device; or a module.
        dtype: "bf16", "fp16" or "fp32", of weights and gradients. LoRA's adapters are fp32, as peft makes them.
        batch: sequences per GPU and step.
        sequence: tokens per sequence; None for 2048, or less where that is the most that a model accepts, and for a
            vision transformer those of an image.
        checkpointing: each block's activations are computed again in the backward pass.
        chunked_loss: the logits exist for 256 tokens at a time, as in ``examples/full_finetune.py --chunked-loss``;
            Liger and unsloth have such losses too, with other sizes of the pieces.
        lora: rank of adapters at every linear layer except the output layer; everything else is frozen.
        gpus: processes of FSDP2.
        vram: memory of one GPU in GiB, for the verdicts.
        reserve: GiB of it that stay free for the CUDA context, workspaces and fragmentation.
        block_size, min_8bit_size: of Lion8bit; a ``block_size`` of None is 128, or 64 with 4 bits.
        trust_remote_code: execute Python code that the model's folder brings.

    Raises:
        PlanError: an argument out of its range, or a model that cannot be read; a ValueError.
    """
    given = {"batch": batch, "gpus": gpus, **({} if sequence is None else {"sequence": sequence})}
    _check(dtype=dtype, lora=lora, vram=vram, reserve=reserve, **given)
    found = load_model(model, lora, trust_remote_code)
    parameters = sum(math.prod(weight.shape) for weight in found.weights)
    trained = sum(math.prod(weight.shape) for weight in found.weights if weight.trained)
    sequence = found.sequence if sequence is None else sequence
    setting = (dtype, batch, sequence, checkpointing, chunked_loss, lora, gpus, vram, reserve)
    plan = Plan(found.name, found.note, parameters, trained, *setting, rows={})
    for key, method in methods("fp32" if lora else dtype, block_size, min_8bit_size).items():
        if gpus == 1 or not method.host:  # FSDP2 has its own offloading, which moves the weights too
            plan.rows[key] = _row(found, method, plan)
    return plan


def _check(*, dtype: str, lora: int | None, vram: float | None, reserve: float, **counts: int) -> None:
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    if lora is not None:
        counts["lora"] = lora
    for name, value in counts.items():
        if value < 1:
            raise PlanError(f"{name} must be at least 1, got {value}")
    if vram is not None and not 0 < vram < math.inf:
        raise PlanError(f"vram must be a positive number of GiB, got {vram}")
    if not 0 <= reserve < math.inf:
        raise PlanError(f"reserve must be at least 0 GiB, got {reserve}")


def _row(model: Model, method: Method, plan: Plan) -> Row:
    width = DTYPE_BYTES[plan.dtype]

    def pieces(weights: Iterable[Weight], gpus: int = plan.gpus) -> list[Piece]:
        return [piece_of(w, gpus, 4 if w.adapter or (method.fp32 and w.trained) else width) for w in weights]

    def size(weights: Iterable[Weight], gpus: int = plan.gpus) -> int:
        return sum(piece.numel * piece.width for piece in pieces(weights, gpus))

    def gradients(weights: Iterable[Weight], gpus: int = plan.gpus) -> int:
        return size((weight for weight in weights if weight.trained), gpus)

    def state(piece: Piece) -> int:
        return method.state(piece) + piece.numel * (method.compensated and piece.width == 2)

    held = pieces(weight for weight in model.weights if weight.trained)
    shared = method.shared * any(piece.numel >= 4096 for piece in held)
    host = sum(state(piece) for piece in held if piece.numel >= MIN_PAGED_SIZE) if method.host else 0
    on_gpu = sum(map(state, held)) + shared - host + BUFFER_BYTES * bool(host)
    gathered = 0
    if plan.gpus > 1:
        # Whole weights are gathered in the dtype of the computation, whole gradients are reduced in their own.
        units = [*model.blocks, model.rest]
        *blocks, root = (width * sum(math.prod(weight.shape) for weight in unit) for unit in units)
        gathered = root + sum(sorted(blocks)[-2:]) + max(gradients(unit, 1) for unit in units)
    activations, transient, moments = _backward(model, method.release, gradients, plan)
    whole = 0 if method.release else gradients(model.weights)
    moments = {"step": whole, **{name: extra + gathered for name, extra in moments.items()}}
    peak = max(moments, key=lambda name: moments[name])
    weights = size(model.weights)
    total = weights + on_gpu + moments[peak]
    fits = None if plan.vram is None else total + plan.reserve * GIB <= plan.vram * GIB
    if fits and activations is None:  # which may be too much
        fits = None
    transient += gathered
    return Row(method.label, weights, whole, on_gpu, transient, activations, total, peak, host, fits)


def _backward(
    model: Model, release: bool, gradients: Callable[[Iterable[Weight]], int], plan: Plan
) -> tuple[int | None, int, dict[str, int]]:
    """Bytes of activations, of the largest gradient that lives for a moment, and of both at the moments of the peak.

    ``gradients`` returns the bytes of the gradients of weights; with ``release`` each is freed when it is complete.
    """
    # The largest gradient outside of the blocks is the output layer's and, unless they are tied, the embedding's.
    table = max((gradients([weight]) for weight in model.rest), default=0)
    largest = max((gradients([weight]) for unit in model.blocks for weight in unit), default=0)
    whole, tied = gradients(model.weights), model.tied
    # A tied gradient waits for the embedding's part, and autograd adds the two into a third tensor.
    transient = max((3 if tied else 1) * table, largest + tied * table) if release else 0
    if model.widths is None:
        return None, transient, {"backward": transient if release else whole}
    widths, tokens, width = model.widths, plan.batch * plan.sequence, DTYPE_BYTES[plan.dtype]
    layer = tokens * layer_bytes(widths, width)
    inside = tokens * width * (widths.hidden + 2 * widths.inner)
    loss, head_loss = _loss_bytes(widths, tokens, width, plan.chunked_loss)
    kept = layer
    if plan.checkpointing:
        kept, inside = tokens * width * widths.hidden, layer + inside
    stack = widths.layers * kept
    head = table if tied or not release else 0
    body = 0 if release else max(0, whole - (1 if tied else 2) * table)
    first_block = gradients(model.blocks[0]) if model.blocks else 0
    return (
        stack + max(inside, loss, head_loss if plan.chunked_loss else 0),
        transient,
        {
            "loss": stack + loss,
            "head": stack + head_loss + table,
            "first block": stack + inside + head + largest,
            "last block": kept
            + inside
            + head
            + (largest if release else body - first_block // 2),  # half of it is done
            "embedding": body + head + table * (2 if tied else 1),
        },
    )


def _loss_bytes(widths: Widths, tokens: int, width: int, chunked: bool) -> tuple[int, int]:
    """Bytes beside the layers' at the loss, and in the backward pass of the output layer without its own gradient."""
    if not chunked:
        return tokens * widths.vocabulary * (width + 12), 2 * tokens * width * widths.vocabulary
    piece = min(tokens, LOSS_PIECE) * widths.vocabulary * 8  # logits and their softmax in fp32
    return piece, (piece + tokens * width * widths.hidden) * (widths.vocabulary > 0)


def layer_bytes(widths: Widths, width: int) -> int:
    """Bytes per token that a layer saves for its backward pass, computing in ``width`` bytes per number."""
    norms = widths.layer_norms * width + widths.rms_norms * (width + 4) + widths.fp32_norms * (4 + 4)
    attention = width * (widths.hidden + (2 + widths.fused) * (widths.query + widths.key)) + 4 * widths.heads
    return norms + attention + width * (widths.hidden + widths.saved * widths.inner)
