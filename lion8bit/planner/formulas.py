"""The memory of training in bytes, by optimizer, computed from the shapes of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lion8bit.layout import blocks_per_row, is_narrow, scales_shape
from lion8bit.paging import BUFFER_BYTES, LEAST
from lion8bit.planner.models import Model, PlanError, Shape, Weight, load_model

GIB = 2**30
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


# ---- State, by optimizer ---------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """The part of a parameter that one process holds."""

    shape: Shape
    whole: Shape
    sharded: bool
    width: int  # bytes per element

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def piece_of(weight: Weight, gpus: int, width: int) -> Piece:
    """What rank 0 holds of a parameter under FSDP2: of ``rows`` along dimension 0 ``ceil(rows / gpus)``.

    The next ranks hold as many, then one holds the remainder, then the others nothing, so rank 0 has the most.
    """
    shape = weight.shape
    if gpus > 1 and shape:
        shape = (-(-shape[0] // gpus), *shape[1:])
    return Piece(shape, weight.shape, gpus > 1, width)


def lion8bit_state(piece: Piece, compensated: bool = False, block_size: int = 128, min_8bit_size: int = 4096) -> int:
    """Bytes of Lion8bit's state, by the rules of docs/design.md."""
    residual = piece.numel if compensated and piece.width == 2 else 0
    part_of_a_row = piece.sharded and (len(piece.whole) < 2 or is_narrow(piece.whole, block_size))
    if math.prod(piece.whole) < min_8bit_size or part_of_a_row:
        return 4 * piece.numel + residual
    return piece.numel + 4 * math.prod(scales_shape(piece.shape, block_size)) + residual


def adamw_state(piece: Piece) -> int:
    """torch's AdamW: two moments in the parameter's dtype, and an fp32 counter."""
    return 2 * piece.width * piece.numel + 4


def adamw8bit_state(piece: Piece) -> int:
    """bitsandbytes' AdamW8bit: two codes, two fp32 scales per 256 elements; fp32 below 4096 elements."""
    return 8 * piece.numel if piece.numel < 4096 else 2 * piece.numel + 8 * blocks_per_row(piece.numel, 256)


def lion_state(piece: Piece) -> int:
    """`lion8bit.Lion`: fp32 momentum."""
    return 4 * piece.numel


def flashlion_state(piece: Piece, compensated: bool = False) -> int:
    """FlashLion on a GPU: a code, an fp16 scale per 32 elements, and a byte that completes 24-bit weights."""
    residual = piece.numel if compensated and piece.width == 2 else 0
    return piece.numel + 2 * blocks_per_row(piece.numel, 32) + residual


class Method(NamedTuple):
    """A row of the plan: an optimizer and how it is used."""

    label: str
    state: Callable[[Piece], int]  # bytes for the part of a parameter
    dtypes: str = "bf16 fp16 fp32"  # of the trained weights for which the row differs from others
    shared: int = 0  # bytes of state that the parameters of 4096 elements and more share
    fp32: bool = False  # parameters and gradients are fp32 (and autocast computes in 16 bits)
    release: bool = False  # each gradient is freed as soon as its parameter has been stepped
    host: bool = False  # the state is in the host's memory (`lion8bit.paging`), except that of small parameters


def methods(dtype: str, block_size: int = 128, min_8bit_size: int = 4096) -> dict[str, Method]:
    """The rows for trained weights of a dtype, by key."""
    ours = partial(lion8bit_state, block_size=block_size, min_8bit_size=min_8bit_size)
    flash, comp = partial(flashlion_state, compensated=True), partial(ours, compensated=True)
    rows = {
        "adamw-fp32": Method("AdamW, fp32 weights", adamw_state, "bf16 fp16", fp32=True),
        "adamw": Method("AdamW", adamw_state),
        "adamw8bit": Method("AdamW, 8 bits", adamw8bit_state, shared=2048),
        "lion": Method("Lion, fp32 momentum", lion_state),
        "flashlion": Method("FlashLion", flashlion_state),
        "flashlion-24": Method("FlashLion, 24-bit weights", flash, "bf16"),
        "flashlion-release": Method("FlashLion, release", flashlion_state, release=True),
        "lion8bit": Method("Lion8bit", ours),
        "lion8bit-compensated": Method("Lion8bit, 24-bit weights", comp, "bf16"),
        "lion8bit-release": Method("Lion8bit, release", ours, release=True),
        "lion8bit-release-compensated": Method("Lion8bit, release, 24-bit", comp, "bf16", release=True),
        "lion8bit-release-host": Method("Lion8bit, release, host", ours, release=True, host=True),
    }
    return {key: row for key, row in rows.items() if dtype in row.dtypes.split()}


# ---- The plan --------------------------------------------------------------------------------------------------------


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
    lora: int | None = None,
    gpus: int = 1,
    vram: float | None = None,
    reserve: float = 1.0,
    block_size: int = 128,
    min_8bit_size: int = 4096,
    trust_remote_code: bool = False,
) -> Plan:
    """Plans the memory of training, by optimizer.

    Weights, gradients and state are the exact bytes of the tensors.
    Activations of a transformer are what each layer saves for its backward
    pass, counted as by Korthikanti et al. (arXiv 2205.05198) for attention
    that stores no scores, without dropout. With t = batch * sequence tokens,
    width h, queries q, keys k, inner width f, a heads, L layers, a vocabulary
    of v, and e bytes per number:

        layer  = t * (norms + e*(h + 2q + 2k) + 4a + e*(h + s*f))
        norms  = n*e for each LayerNorm of width n, n*(e + 4) for an RMSNorm,
                 8n for a norm that applies its weight in fp32 (Gemma, OLMo 2)
        s      = 4 with a gate, as in SwiGLU; without: 2 for GELU and SiLU
        inside = t * e*(h + 2f)       gradients inside a layer
        logits = t * v * (e + 12)     with fp32 softmax and its gradients

        activations = L*layer + max(inside, logits), or with checkpointing
                      L*t*e*h + max(layer + inside, logits)

    Where queries, keys and values are one product and rotated, q + k more
    numbers are saved.

    The total is that of the worst moment: gradients grow while activations
    shrink. Activations are known for decoders and encoders of Hugging Face
    with one stack of equal layers. For other models (experts, several towers)
    totals are a lower bound without them, and the verdict is never "fits".

    Not counted: buffers, workspaces of libraries, temporaries of a step, and
    16-bit copies of fp32 weights under autocast.

    With ``gpus`` above 1 everything is per GPU under FSDP2, `fully_shard` on
    each block and on the whole. "transient" then includes the gathered weights
    of the root and of two blocks, and the whole gradients of the largest unit.

    Args:
        model: a count (an int, "7B", "124M"), which is taken as a Llama; a local Hugging Face folder or config.json;
            "package.module:factory", which is called on the meta device; or a module.
        dtype: "bf16", "fp16" or "fp32", of weights and gradients. LoRA's adapters are fp32, as peft makes them.
        batch: sequences per GPU and step.
        sequence: tokens per sequence; None for 2048, or less where that is the most that a model accepts, and for a
            vision transformer those of an image.
        checkpointing: each block's activations are computed again in the backward pass.
        lora: rank of adapters at every linear layer except the output layer; everything else is frozen.
        gpus: processes of FSDP2.
        vram: memory of one GPU in GiB, for the verdicts.
        reserve: GiB of it that stay free for the CUDA context, workspaces and fragmentation.
        block_size, min_8bit_size: of Lion8bit.
        trust_remote_code: execute Python code that the model's folder brings.

    Raises:
        PlanError: an argument out of its range, or a model that cannot be read; a ValueError.
    """
    given = {"batch": batch, "gpus": gpus, **({} if sequence is None else {"sequence": sequence})}
    _check(dtype=dtype, lora=lora, vram=vram, reserve=reserve, **given)
    found = load_model(model, lora, trust_remote_code)
    plan = Plan(
        model=found.name,
        note=found.note,
        parameters=sum(math.prod(weight.shape) for weight in found.weights),
        trained=sum(math.prod(weight.shape) for weight in found.weights if weight.trained),
        dtype=dtype,
        batch=batch,
        sequence=found.sequence if sequence is None else sequence,
        checkpointing=checkpointing,
        lora=lora,
        gpus=gpus,
        vram=vram,
        reserve=reserve,
        rows={},
    )
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


class _Gradients(NamedTuple):
    """Bytes of gradients on one GPU."""

    whole: int
    table: int  # the largest outside of the blocks: the output layer's and, unless tied, the embedding's
    largest: int  # inside of the blocks
    block: int  # of a whole block
    tied: bool  # the table waits for the embedding's part, and autograd adds the two into a third tensor

    @property
    def transient(self) -> int:
        """What lives for a moment if each gradient is freed as soon as it is complete."""
        return max((3 if self.tied else 1) * self.table, self.largest + self.tied * self.table)


def _row(model: Model, method: Method, plan: Plan) -> Row:
    width = DTYPE_BYTES[plan.dtype]

    def pieces(weights: Iterable[Weight], gpus: int = plan.gpus) -> list[Piece]:
        return [piece_of(w, gpus, 4 if w.adapter or (method.fp32 and w.trained) else width) for w in weights]

    def size(weights: Iterable[Weight], gpus: int = plan.gpus) -> int:
        return sum(piece.numel * piece.width for piece in pieces(weights, gpus))

    def gradients(weights: Iterable[Weight], gpus: int = plan.gpus) -> int:
        return size((weight for weight in weights if weight.trained), gpus)

    held = pieces(weight for weight in model.weights if weight.trained)
    state = sum(map(method.state, held)) + method.shared * any(piece.numel >= 4096 for piece in held)
    host = sum(method.state(piece) for piece in held if piece.numel >= LEAST) if method.host else 0
    on_gpu = state - host + BUFFER_BYTES * bool(host)
    grads = _Gradients(
        whole=gradients(model.weights),
        table=max((gradients([weight]) for weight in model.rest), default=0),
        largest=max((gradients([weight]) for unit in model.blocks for weight in unit), default=0),
        block=gradients(model.blocks[0]) if model.blocks else 0,
        tied=model.tied,
    )
    gathered = 0
    if plan.gpus > 1:
        # Whole weights are gathered in the dtype of the computation, whole gradients are reduced in their own.
        blocks, root = (
            [width * sum(math.prod(w.shape) for w in unit) for unit in units] for units in (model.blocks, [model.rest])
        )
        gathered = root[0] + sum(sorted(blocks)[-2:]) + max(gradients(unit, 1) for unit in (*model.blocks, model.rest))
    activations, moments = _backward(model, method.release, grads, plan)
    moments = {name: extra + gathered for name, extra in moments.items()}
    moments = {"step": 0 if method.release else grads.whole, **moments}
    peak = max(moments, key=lambda name: moments[name])
    weights = size(model.weights)
    total = weights + on_gpu + moments[peak]
    fits = None if plan.vram is None else total + plan.reserve * GIB <= plan.vram * GIB
    return Row(
        label=method.label,
        weights=weights,
        gradients=0 if method.release else grads.whole,
        state=on_gpu,
        transient=(grads.transient if method.release else 0) + gathered,
        activations=activations,
        total=total,
        peak=peak,
        host=host,
        fits=None if fits and activations is None else fits,  # activations that are not known may be too much
    )


def _backward(model: Model, release: bool, grads: _Gradients, plan: Plan) -> tuple[int | None, dict[str, int]]:
    """Bytes of all activations, and of gradients and activations at each moment that can be the worst."""
    if model.widths is None:
        return None, {"backward": grads.transient if release else grads.whole}
    tokens, width = plan.batch * plan.sequence, DTYPE_BYTES[plan.dtype]
    layer, inside = tokens * model.widths.layer_bytes(width), tokens * model.widths.inside_bytes(width)
    logits, kept = tokens * model.widths.logits_bytes(width), layer
    if plan.checkpointing:
        kept, inside = tokens * width * model.widths.hidden, inside + layer
    stack = model.widths.layers * kept
    head = grads.table if model.tied or not release else 0
    body = 0 if release else max(0, grads.whole - (1 if model.tied else 2) * grads.table)
    return stack + max(inside, logits), {
        "loss": stack + logits,
        "head": stack + 2 * tokens * width * model.widths.vocabulary + grads.table,
        "first block": stack + inside + head + grads.largest,
        "last block": kept + inside + head + (grads.largest if release else body - grads.block // 2),  # half is done
        "embedding": body + head + grads.table * (2 if model.tied else 1),
    }
