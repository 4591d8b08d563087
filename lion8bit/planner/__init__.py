"""Owns the memory plan: bytes that training will take, by optimizer, computed from shapes; nothing is measured here.

It imports torch and the standard library; transformers, rich and matplotlib only where they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lion8bit.layout import blocks_per_row, is_narrow, memory_order, scales_shape
from lion8bit.paging import BUFFER_BYTES, LEAST

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SMALLEST_COUNT, LARGEST_COUNT = 10**6, 10**14  # a shape that is assumed for others would mean nothing
USUAL_SEQUENCE = 2048  # tokens, where nobody and nothing says otherwise

# Numbers per inner width that a feed-forward network without a gate saves for its backward pass: the activation's input
# and its result, which the second matrix needs; of ReLU only the result; of those that are written out in elementary
# operations also their intermediate results.
SAVED = {"relu": 1, "gelu": 2, "gelu_pytorch_tanh": 2, "silu": 2, "swish": 2, "quick_gelu": 3, "gelu_new": 5}

Shape = tuple[int, ...]


class PlanError(ValueError):
    """An argument from which no plan can be made; the message names it and the remedy."""


# ---- Models, as shapes -----------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """One parameter."""

    shape: Shape  # from the slowest dimension in memory to the fastest
    trained: bool = True
    adapter: bool = False  # of LoRA: fp32, whatever the others are, as peft makes them


@dataclass(frozen=True)
class Widths:
    """What the activations of a transformer follow from.

    Args:
        layers: number of blocks.
        hidden: width of the residual stream.
        heads: attention heads.
        query, key: widths of all heads' queries, and of their keys (and values).
        inner: width inside the feed-forward network.
        saved: numbers per inner width that it saves; `SAVED`, and two more with a gate, as SwiGLU.
        layer_norms: widths of a layer's LayerNorms together.
        rms_norms: of norms computed in fp32 by torch's elementary operations, as the RMSNorm of transformers.
        fp32_norms: of those whose weight is applied in fp32 too, as Gemma's.
        vocabulary: width of the logits; 0 for a model without.
        fused: queries, keys and values are one matrix product, and rotated: the values keep the whole product.
    """

    layers: int
    hidden: int
    heads: int
    query: int
    key: int
    inner: int
    saved: int
    layer_norms: int
    rms_norms: int
    fp32_norms: int
    vocabulary: int
    fused: bool = False

    def layer_bytes(self, width: int) -> int:
        """Bytes per token that a layer saves for its backward pass, computing in ``width`` bytes per number."""
        norms = self.layer_norms * width + self.rms_norms * (width + 4) + self.fp32_norms * (4 + 4)
        attention = width * (self.hidden + (2 + self.fused) * (self.query + self.key)) + 4 * self.heads
        feed_forward = width * (self.hidden + self.saved * self.inner)
        return norms + attention + feed_forward

    def inside_bytes(self, width: int) -> int:
        """Bytes per token of the gradients inside a layer during its backward pass."""
        return width * (self.hidden + 2 * self.inner)

    def logits_bytes(self, width: int) -> int:
        """Bytes per token of the logits, and of their softmax and its gradients in fp32."""
        return self.vocabulary * (width + 12)


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model.

    Args:
        name: for people.
        blocks: the parameters of each repeated block; each is one unit of FSDP2.
        rest: all others; they are the root unit.
        tied: the largest parameter is the embedding and the output layer in one.
        widths: of a transformer; None where the activations are not known.
        note: why they are not, or what was assumed.
        sequence: tokens of its usual input.
    """

    name: str
    blocks: tuple[tuple[Weight, ...], ...]
    rest: tuple[Weight, ...]
    tied: bool = False
    widths: Widths | None = None
    note: str = ""
    sequence: int = USUAL_SEQUENCE

    @property
    def weights(self) -> list[Weight]:
        """Every parameter."""
        return [*itertools.chain(*self.blocks), *self.rest]


def parse_count(text: str) -> int | None:
    """The number that "7B", "124M" or "6738415616" means; None where a text is no number."""
    match = re.fullmatch(r"\s*(-?\d[\d_,]*(?:\.\d+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    if match is None:
        return None
    digits, unit = match.groups()
    factor = 1000 ** " KMBT".index(unit.upper()) if unit else 1
    return round(float(digits.replace(",", "").replace("_", "")) * factor)


def typical_model(count: int) -> Model:
    """The model that a mere count is taken for: a Llama whose width is 128 times its layers, vocabulary 32000.

    Widths are multiples of 128, below 2048 of 8. There are at least 4 layers, and the vocabulary is at most a
    thousandth of the count, so that no part of a small model is out of proportion. The width is that for which the
    feed-forward width comes nearest to 8/3 of it; then the latter takes the value that meets the count, to within one
    column per layer.

    Raises:
        PlanError: the count is below 1M, or above 100T.
    """
    if not SMALLEST_COUNT <= count <= LARGEST_COUNT:
        raise PlanError(
            f"model must be a count of {SMALLEST_COUNT:,} to {LARGEST_COUNT:,} parameters, got {count:,}; for another "
            "model give its folder or a factory"
        )
    vocabulary = min(32000, count // 1000)

    def inner_width(width: int) -> float:
        layers = max(4, width // 128)
        fixed = 2 * vocabulary * width + layers * (4 * width**2 + 2 * width) + width
        return (count - fixed) / (3 * layers * width)

    hidden = min((*range(32, 2048, 8), *range(2048, 128_000, 128)), key=lambda w: abs(inner_width(w) / w - 8 / 3))
    layers, inner = max(4, hidden // 128), round(inner_width(hidden))
    block = [Weight(shape) for shape in 4 * [(hidden, hidden)] + 2 * [(inner, hidden)]]
    block += [Weight((hidden, inner)), Weight((hidden,)), Weight((hidden,))]
    rest = (Weight((vocabulary, hidden)), Weight((hidden,)), Weight((vocabulary, hidden)))
    widths = Widths(layers, hidden, layers, hidden, hidden, inner, SAVED["silu"] + 2, 0, 2 * hidden, 0, vocabulary)
    note = (
        f"a count is taken as a Llama of {layers} layers, width {hidden}, inner width {inner}, vocabulary {vocabulary}"
    )
    return Model("", (tuple(block),) * layers, rest, widths=widths, note=note)


def model_of(module: nn.Module, config: Any = None, lora: int | None = None) -> Model:
    """The shapes of a module, which may be on the meta device; shared parameters count once.

    Args:
        module: whatever it holds; the elements of its outermost `nn.ModuleList`s are its blocks.
        config: its Hugging Face configuration, if it has one.
        lora: rank of adapters at every linear layer but the output's, all else frozen; None trains what requires a
            gradient.
    """
    names: list[str] = []  # of the blocks
    stacks: list[nn.ModuleList] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) > 1 and not _owner(name, names):
            names += [f"{name}.{index}" for index in range(len(part))]
            stacks.append(part)
    units: dict[str, list[Weight]] = {name: [] for name in [*names, ""]}
    output = _output(module)
    seen: set[torch.Tensor] = set()
    for name, part in module.named_modules():
        unit = units[_owner(name, names)]
        own = [param for param in part.parameters(recurse=False) if param not in seen]
        seen.update(own)
        unit += [Weight(_memory_shape(param), lora is None and param.requires_grad) for param in own]
        if lora is not None and part is not output and (features := _features(part)):
            inputs, outputs = features
            unit += [Weight((lora, inputs), adapter=True), Weight((outputs, lora), adapter=True)]
    if lora is not None and not any(weight.adapter for unit in units.values() for weight in unit):
        raise PlanError(f"lora must meet a linear layer in the model, got {type(module).__name__} without any")
    rest = tuple(units.pop(""))
    tied = len(seen) < len(list(module.named_parameters(remove_duplicate=False)))
    blocks = tuple(tuple(unit) for unit in units.values() if unit)
    if not hasattr(config, "get_text_config"):  # not one of Hugging Face's
        return Model(type(module).__name__, blocks, rest, tied, None, f"activations are known for {_HUGGING_FACE} only")
    widths, note = None, ""
    try:
        widths = _widths(config.get_text_config(), module, stacks)
    except _NotKnownError as error:
        note = f"activations are not known for {config.model_type}: {error}"
    return Model(type(module).__name__, blocks, rest, tied, widths, note, _sequence(config, module))


def _owner(name: str, blocks: Sequence[str]) -> str:
    """The block that a module is part of; empty for none."""
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), "")


def _memory_shape(param: torch.Tensor) -> Shape:
    return tuple(param.shape[dim] for dim in memory_order(param) or range(param.dim()))


def _features(part: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, of GPT-2's transposed one too; None for other modules."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    if type(part).__name__ == "Conv1D" and hasattr(part, "nf") and hasattr(part, "nx"):
        return part.nx, part.nf  # type: ignore[return-value]
    return None


_HUGGING_FACE = "models with a Hugging Face configuration"
_TOKENS = (
    "cls_token",
    "class_embedding",
    "distillation_token",
    "register_tokens",
    "detection_tokens",
)  # not of patches


class _NotKnownError(Exception):
    """Why the activations of a model are not known."""


def _widths(config: Any, module: nn.Module, stacks: Sequence[nn.ModuleList]) -> Widths:
    """The `Widths` of a model that is one stack of equal transformer layers, all of whose weights are accounted for.

    Raises:
        _NotKnownError: it is another one.
    """
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if getattr(config, "is_encoder_decoder", False) or any(getattr(config, name, None) for name in experts):
        raise _NotKnownError("the formula is for dense decoders and encoders")
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    for name in needed:
        if not isinstance(getattr(config, name, None), int):
            raise _NotKnownError(f"its configuration has no {name}")
    layers, hidden, heads = (getattr(config, name) for name in needed)
    if len(stacks) != 1:
        numbers = " and ".join(str(len(stack)) for stack in stacks) or "none"
        raise _NotKnownError(f"the formula is for one stack of layers, this has stacks of {numbers}")
    shapes = {tuple(param.shape for param in layer.parameters()) for layer in stacks[0]}
    if len(shapes) > 1 or len(stacks[0]) != layers:
        raise _NotKnownError(f"the formula is for {layers} equal layers, each with weights of its own")
    if not getattr(module, "_supports_sdpa", True) or getattr(config, "_attn_implementation", None) == "eager":
        raise _NotKnownError("its attention stores its scores")
    if getattr(config, "attn_logit_softcapping", None):
        raise _NotKnownError("its attention caps its scores")
    head = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    inner = inner or getattr(config, "ffn_dim", None) or getattr(config, "hidden_dim", None) or 4 * hidden
    names = ("hidden_act", "activation_function", "hidden_activation", "activation")
    function = next((found for name in names if (found := getattr(config, name, None))), "silu")
    if function not in SAVED:
        raise _NotKnownError(f"the formula is for activation functions {', '.join(SAVED)}, not {function}")

    linear: list[tuple[int, int]] = []
    layer_norms = rms_norms = fp32_norms = 0
    for name, part in stacks[0][0].named_modules():
        own = [*part.parameters(recurse=False)]
        if features := _features(part):
            linear.append(features)
        elif "Norm" in type(part).__name__ and all(param.dim() == 1 for param in own):
            last = name.rpartition(".")[2]
            width = query if last.startswith("q") else key if last.startswith("k") else hidden
            if isinstance(part, nn.LayerNorm):
                layer_norms += width
            elif re.fullmatch("(Gemma|Olmo).*RMSNorm", type(part).__name__):
                fp32_norms += width
            elif type(part).__name__.endswith("RMSNorm"):
                rms_norms += width
            else:
                raise _NotKnownError(f"its layers have a {type(part).__name__}")
        elif own:
            raise _NotKnownError(f"its layers have weights beside matrices and norms ({type(part).__name__})")
    output = (query, hidden)
    attentions = {True: [(hidden, query + 2 * key), output], False: [(hidden, query), *2 * [(hidden, key)], output]}
    inputs = {0: [(hidden, inner)], 1: 2 * [(hidden, inner)], 2: [(hidden, 2 * inner)]}  # no gate, a gate, both in one
    variants = itertools.product(attentions, inputs)
    found = [
        (one, gate)
        for one, gate in variants
        if sorted(linear) == sorted([*attentions[one], *inputs[gate], (inner, hidden)])
    ]
    if not found:
        raise _NotKnownError("its layers are not one attention and one feed-forward network")
    one, gate = found[0]
    rotated = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rotary_dim"))
    return Widths(
        layers=layers,
        hidden=hidden,
        heads=heads,
        query=query,
        key=key,
        inner=inner,
        saved=SAVED[function] + 2 * (gate > 0),
        layer_norms=layer_norms,
        rms_norms=rms_norms,
        fp32_norms=fp32_norms,
        vocabulary=config.vocab_size if _output(module) is not None else 0,
        fused=one and rotated,
    )


def _output(module: nn.Module) -> nn.Module | None:
    """The output layer of a language model."""
    return getattr(module, "get_output_embeddings", lambda: None)()


def _sequence(config: Any, module: nn.Module) -> int:
    """Tokens of an image, by its size, that of patches and the tokens that are added; of a text 2048, or the most."""
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if getattr(module, "main_input_name", None) == "pixel_values" and image and patch:
        (height, width), (high, wide) = (
            size if isinstance(size, Sequence) else (size, size) for size in (image, patch)
        )
        added = [param for name, param in module.named_parameters() if name.rpartition(".")[2] in _TOKENS]
        return int(height // high * (width // wide) + sum(param.numel() // param.shape[-1] for param in added))
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(USUAL_SEQUENCE, longest) if isinstance(longest, int) and longest > 0 else USUAL_SEQUENCE


def load_model(
    model: int | str | os.PathLike[str] | nn.Module, lora: int | None = None, trust_remote_code: bool = False
) -> Model:
    """The `Model` of anything that `estimate` takes.

    Raises:
        PlanError: it is none of these.
    """
    if isinstance(model, nn.Module):
        return model_of(model, getattr(model, "config", None), lora)
    if isinstance(model, int):
        return _with_lora(replace(typical_model(model), name=f"{model:,} parameters"), lora)
    text = os.fspath(model)
    if Path(text).exists():
        return _from_hugging_face(Path(text), lora, trust_remote_code)
    count = parse_count(text)
    if count is not None:
        return _with_lora(replace(typical_model(count), name=text.strip()), lora)
    if re.fullmatch(r"[^\W\d]\w*(\.\w+)*[.:]\w+(\.\w+)*", text):
        return _from_factory(text, lora)
    raise PlanError(
        f"model must be a count such as 7B, a local folder or config.json of Hugging Face, or package.module:factory, "
        f"got {text!r}; models on the hub have to be downloaded first"
    )


def _with_lora(model: Model, lora: int | None) -> Model:
    """Freezes a typical model, and adds adapters to the linear layers of its blocks."""
    if lora is None:
        return model

    def adapted(unit: Iterable[Weight]) -> tuple[Weight, ...]:
        frozen = [weight._replace(trained=False) for weight in unit]
        pairs = [((lora, w.shape[1]), (w.shape[0], lora)) for w in frozen if len(w.shape) == 2]
        return (*frozen, *(Weight(shape, adapter=True) for pair in pairs for shape in pair))

    rest = tuple(weight._replace(trained=False) for weight in model.rest)
    return replace(model, blocks=(adapted(model.blocks[0]),) * len(model.blocks), rest=rest)


def _from_hugging_face(path: Path, lora: int | None, trust_remote_code: bool) -> Model:
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise PlanError(f"model must be a folder with a config.json, got {path}; give the folder of a saved model")
    try:
        import transformers
    except ImportError:
        raise PlanError(f"model {path} needs transformers; run: pip install transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(
            file if path.is_file() else path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        architectures = [getattr(transformers, name, None) for name in config.architectures or ()]
        cls = next((found for found in architectures if hasattr(found, "_from_config")), None)
        config._attn_implementation = "eager"  # another may be a kernel to download; shapes do not depend on it
        with torch.device("meta"):
            if cls is not None:
                module = cls._from_config(config)
            else:
                own = getattr(config, "auto_map", {})
                name = next((name for name in own if name.startswith("AutoModel")), "AutoModelForCausalLM")
                module = getattr(transformers, name).from_config(config, trust_remote_code=trust_remote_code)
        config._attn_implementation = "sdpa"  # what training takes where the model supports it
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise PlanError(
                f"model must be of a type that transformers has itself, got {path}, which brings code of its own; "
                "if you trust that code, pass --trust-remote-code (trust_remote_code=True)"
            ) from error
        reason = str(error).strip().splitlines() or [""]
        raise PlanError(
            f"model must be of a type that transformers {transformers.__version__} builds, got {file}: {reason[0]}; "
            "check model_type in that file, or give package.module:factory"
        ) from error
    return replace(model_of(module, config, lora), name=str(path))


@contextlib.contextmanager
def _working_directory_last() -> Iterator[None]:
    """Modules of the working directory can be imported, but none that is found elsewhere is replaced by one of them."""
    added = [os.getcwd()]
    sys.path += added
    try:
        yield
    finally:
        sys.path[:] = [path for path in sys.path if path is not added[0]]


def _from_factory(text: str, lora: int | None) -> Model:
    name, attribute = text.split(":") if ":" in text else text.rsplit(".", 1)
    try:
        with _working_directory_last():
            factory: Any = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except Exception as error:  # the module may do anything
        raise PlanError(
            f"model must be importable as package.module:factory, got {text}: {type(error).__name__}: {error}"
        ) from error
    try:
        with torch.device("meta"):
            module = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:  # the factory may do anything
        raise PlanError(
            f"model must be a factory that takes no arguments and builds on the meta device, got {text}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise PlanError(f"model must be a factory of an nn.Module, got {type(module).__name__} from {text}")
    return replace(model_of(module, getattr(module, "config", None), lora), name=text)


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

    The ranks that follow hold as many, then one what is left over, then nothing, so rank 0 has the most.
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


@dataclass(frozen=True)
class Method:
    """A row of the plan: an optimizer and how it is used.

    Args:
        label: for people.
        state: bytes for the part of a parameter.
        shared: bytes of state that the parameters of 4096 elements and more share.
        fp32: parameters and gradients are fp32 (and autocast computes in 16 bits).
        release: each gradient is freed as soon as its parameter has been stepped.
        host: the state is in the host's memory (`lion8bit.paging`), but for small parameters.
        for_16_bits: it makes a difference where the trained weights are 16-bit ones only.
        for_bf16: and among these bf16 only.
    """

    label: str
    state: Callable[[Piece], int]
    shared: int = 0
    fp32: bool = False
    release: bool = False
    host: bool = False
    for_16_bits: bool = False
    for_bf16: bool = False


def methods(dtype: str, block_size: int = 128, min_8bit_size: int = 4096) -> dict[str, Method]:
    """The rows for trained weights of a dtype, by key."""
    ours = partial(lion8bit_state, block_size=block_size, min_8bit_size=min_8bit_size)
    flash, comp = partial(flashlion_state, compensated=True), partial(ours, compensated=True)
    rows = {
        "adamw-fp32": Method("AdamW, fp32 weights", adamw_state, fp32=True, for_16_bits=True),
        "adamw": Method("AdamW", adamw_state),
        "adamw8bit": Method("AdamW, 8 bits", adamw8bit_state, shared=2048),
        "lion": Method("Lion, fp32 momentum", lion_state),
        "flashlion": Method("FlashLion", flashlion_state),
        "flashlion-24": Method("FlashLion, 24-bit weights", flash, for_bf16=True),
        "flashlion-release": Method("FlashLion, release", flashlion_state, release=True),
        "lion8bit": Method("Lion8bit", ours),
        "lion8bit-compensated": Method("Lion8bit, 24-bit weights", comp, for_bf16=True),
        "lion8bit-release": Method("Lion8bit, release", ours, release=True),
        "lion8bit-release-compensated": Method("Lion8bit, release, 24-bit", comp, release=True, for_bf16=True),
        "lion8bit-release-host": Method("Lion8bit, release, host", ours, release=True, host=True),
    }
    unneeded = [key for key, row in rows.items() if dtype != "bf16" and row.for_bf16]
    unneeded += [key for key, row in rows.items() if dtype == "fp32" and row.for_16_bits]
    return {key: row for key, row in rows.items() if key not in unneeded}


# ---- The plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Bytes on one GPU with one optimizer.

    Args:
        label: the optimizer.
        weights, gradients, state: what lives from step to step; gradients are 0 where each is freed at once.
        transient: the largest gradient that lives for a moment, or what FSDP2 gathers.
        activations: at their largest; None where they are not known, and then in no total.
        total: at the worst moment. Gradients grow while activations shrink, so it is less than the sum.
        peak: that moment: "loss" (the forward pass ends, and with it the logits are largest), the backward pass of the
            "head", "first block", "last block" or "embedding", or "step".
        host: bytes of state in the host's memory.
        fits: whether total and reserve fit into the GPU's memory; None where none was named, and where what is known
            fits but the activations are not known.
    """

    label: str
    weights: int
    gradients: int
    state: int
    transient: int
    activations: int | None
    total: int
    peak: str
    host: int
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """What `estimate` returns; sizes are bytes, but ``vram`` and ``reserve`` are GiB."""

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
        """All of it as JSON takes it."""
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

    Weights, gradients and state are exact: the bytes of the tensors. Activations of transformers follow Korthikanti et
    al. (arXiv 2205.05198): what each operation of a layer saves for its backward pass, here for attention that does not
    store its scores (FlashAttention) and without dropout. With t = batch * sequence tokens, width h, attention widths q
    and k, inner width f, a heads, L layers, a vocabulary of v, and e bytes per number,

        layer = t * (norms + e*(h + 2q + 2k) + 4a + e*(h + s*f))     s = 4 with a gate, as SwiGLU
        norms = n*e for a LayerNorm of width n, n*(e + 4) for an RMSNorm, which transformers computes in fp32
        inside = t * e*(h + 2f)                                      gradients inside of a layer
        logits = t * v * (e + 12)                                    themselves, fp32 softmax and its gradients

    and activations are L*layer + max(inside, logits), or L*t*e*h + max(layer + inside, logits) with checkpointing.
    Without a gate, s is what the activation function saves: 2 for GELU and SiLU, `SAVED` has others. Where queries,
    keys and values are one product and rotated, q + k more numbers are kept. A norm that applies its weight in fp32
    (Gemma, OLMo 2) saves 8n.

    Activations are known for decoders and encoders of Hugging Face with one stack of equal layers, where each weight of
    a layer has its place in this formula. For other models (mixtures of experts, encoder-decoders, several towers) the
    totals are without them, a least value, and ``fits`` is False or None.

    Not counted: buffers, the workspaces of libraries, temporaries of an optimizer's step (fused AdamW, bitsandbytes,
    FlashLion and Lion8bit make none), and the 16-bit copies of fp32 weights under autocast.

    With ``gpus`` above 1 everything is per GPU under FSDP2, `fully_shard` on each block and on the whole: rank 0 holds
    ``ceil(shape[0] / gpus)`` rows of each parameter, the most of any. Passing through are the gathered weights of the
    root and of two blocks, and the whole gradients of the largest unit.

    Args:
        model: a count (an int, "7B", "124M"), which is taken as a Llama; a local Hugging Face folder or config.json;
            "package.module:factory", which is called on the meta device; or a module.
        dtype: "bf16", "fp16" or "fp32", of weights and gradients. LoRA's adapters are fp32, as peft makes them.
        batch: sequences per GPU and step.
        sequence: tokens per sequence; None for 2048, or less where that is the most that a model takes, and for a
            vision transformer those of an image.
        checkpointing: each block's activations are computed anew in the backward pass.
        lora: rank of adapters at every linear layer but the output's; all else is frozen.
        gpus: processes of FSDP2.
        vram: memory of one GPU in GiB, for the verdicts.
        reserve: GiB of it that stay free for the CUDA context, workspaces and fragmentation.
        block_size, min_8bit_size: of Lion8bit.
        trust_remote_code: a folder may bring Python code of its own, which is then executed.

    Raises:
        PlanError: an argument out of its range, or a model that cannot be read; a ValueError.
    """
    given = {"batch": batch, "gpus": gpus, **({} if sequence is None else {"sequence": sequence})}
    _check(dtype=dtype, lora=lora, vram=vram, reserve=reserve, **given)
    found = load_model(model, lora, trust_remote_code)
    sequence = found.sequence if sequence is None else sequence
    width = DTYPE_BYTES[dtype]
    rows = {}
    for key, method in methods("fp32" if lora else dtype, block_size, min_8bit_size).items():
        if method.host and gpus > 1:  # FSDP2 has an offloading of its own, which takes the weights too
            continue
        rows[key] = _row(found, method, width, batch * sequence, checkpointing, gpus, vram, reserve)
    return Plan(
        model=found.name,
        note=found.note,
        parameters=sum(math.prod(weight.shape) for weight in found.weights),
        trained=sum(math.prod(weight.shape) for weight in found.weights if weight.trained),
        dtype=dtype,
        batch=batch,
        sequence=sequence,
        checkpointing=checkpointing,
        lora=lora,
        gpus=gpus,
        vram=vram,
        reserve=reserve,
        rows=rows,
    )


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


def _row(
    model: Model,
    method: Method,
    width: int,
    tokens: int,
    checkpointing: bool,
    gpus: int,
    vram: float | None,
    reserve: float,
) -> Row:
    def bytes_each(weight: Weight) -> int:
        return 4 if weight.adapter or (method.fp32 and weight.trained) else width

    def pieces(weights: Iterable[Weight], ranks: int) -> Iterator[Piece]:
        return (piece_of(weight, ranks, bytes_each(weight)) for weight in weights)

    def size(weights: Iterable[Weight], ranks: int = gpus) -> int:
        return sum(piece.numel * piece.width for piece in pieces(weights, ranks))

    trained = [weight for weight in model.weights if weight.trained]
    weights, whole = size(model.weights), size(trained)
    held = list(pieces(trained, gpus))
    state = sum(map(method.state, held)) + method.shared * any(piece.numel >= 4096 for piece in held)

    table = max((size([weight]) for weight in model.rest if weight.trained), default=0)
    block = max((size([weight]) for unit in model.blocks for weight in unit if weight.trained), default=0)
    transient = max((3 if model.tied else 1) * table, block + model.tied * table) if method.release else 0
    passing = 0
    if gpus > 1:
        # Whole weights are gathered in the dtype that is computed in, whole gradients are reduced in their own.
        units = [sum(math.prod(weight.shape) * width for weight in unit) for unit in (*model.blocks, model.rest)]
        gradients = [size((weight for weight in unit if weight.trained), 1) for unit in (*model.blocks, model.rest)]
        passing = units[-1] + sum(sorted(units[:-1])[-2:]) + max(gradients)

    last = size(weight for weight in (model.blocks or ((),))[0] if weight.trained)
    moments = _moments(model, method.release, whole, table, block, last, width, tokens, checkpointing)
    peak, extra = max(moments.items(), key=lambda item: item[1] + (0 if item[0] == "step" else passing))
    activations = None if model.widths is None else _activations(model.widths, width, tokens, checkpointing)
    host = sum(method.state(piece) for piece in held if piece.numel >= LEAST) if method.host else 0
    on_gpu = state - host + BUFFER_BYTES * bool(host)
    total = weights + on_gpu + extra + (0 if peak == "step" else passing)
    fits = None if vram is None else total + reserve * GIB <= vram * GIB
    if fits and activations is None:  # which may be too much
        fits = None
    return Row(
        label=method.label,
        weights=weights,
        gradients=0 if method.release else whole,
        state=on_gpu,
        transient=transient + passing,
        activations=activations,
        total=total,
        peak=peak,
        host=host,
        fits=fits,
    )


def _activations(widths: Widths, width: int, tokens: int, checkpointing: bool) -> int:
    layer, logits = tokens * widths.layer_bytes(width), tokens * widths.logits_bytes(width)
    inside = tokens * widths.inside_bytes(width)
    if not checkpointing:
        return widths.layers * layer + max(inside, logits)
    return widths.layers * tokens * width * widths.hidden + max(layer + inside, logits)


def _moments(
    model: Model,
    release: bool,
    whole: int,
    table: int,
    block: int,
    last: int,
    width: int,
    tokens: int,
    checkpointing: bool,
) -> dict[str, int]:
    """Bytes of gradients and activations at the moments of an iteration that can be its worst.

    Args:
        model: what is trained.
        release: gradients are freed as soon as they are complete.
        whole, table, block, last: bytes of all gradients, of the largest outside of the blocks (the output layer's and,
            once more, the embedding's, unless they are tied), of the largest inside, and of a whole block.
        width, tokens, checkpointing: as in `estimate`.
    """
    moments = {"step": 0 if release else whole}
    # A tied gradient waits for the embedding's part, and autograd adds the two into a third tensor.
    head = table if model.tied or not release else 0
    if model.widths is None:
        return {**moments, "backward": max((3 if model.tied else 1) * table, block + head) if release else whole}
    layer, logits = tokens * model.widths.layer_bytes(width), tokens * model.widths.logits_bytes(width)
    kept = tokens * width * model.widths.hidden if checkpointing else layer
    inside = tokens * model.widths.inside_bytes(width) + (layer if checkpointing else 0)
    stack = model.widths.layers * kept
    body = 0 if release else max(0, whole - (1 if model.tied else 2) * table)
    return {
        **moments,
        "loss": stack + logits,
        "head": stack + 2 * tokens * width * model.widths.vocabulary + table,
        "first block": stack + inside + head + block,
        "last block": kept + inside + head + (block if release else body - last // 2),  # half of it is done
        "embedding": body + head + table * (2 if model.tied else 1),
    }


# ---- The report ------------------------------------------------------------------------------------------------------


# Okabe and Ito's palette, told apart with any common colour blindness: https://jfly.uni-koeln.de/color/
PARTS = {"weights": "#0072B2", "optimizer state": "#009E73", "gradients and activations at the peak": "#E69F00"}


def parts(row: Row) -> list[int]:
    """What a row's total consists of: weights, state, and what else there is at the worst moment."""
    return [row.weights, row.state, row.total - row.weights - row.state]


def describe(plan: Plan) -> str:
    """The setting in a line."""
    words = [f"{plan.parameters:,} parameters", plan.dtype, f"{plan.batch} x {plan.sequence} tokens"]
    if plan.lora:
        words.append(f"LoRA of rank {plan.lora}, {plan.trained:,} trained")
    words.append("checkpointing" if plan.checkpointing else "no checkpointing")
    return ", ".join([*words, *([f"each of {plan.gpus} GPUs (FSDP2)"] if plan.gpus > 1 else [])])


def plan_table(plan: Plan) -> Table:
    """Lays a plan out for a terminal, in GiB."""
    from rich import box
    from rich.table import Table

    title = f"{plan.model}: {describe(plan)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("GiB", no_wrap=True)
    known = all(row.activations is not None for row in plan.rows.values())
    for heading in ("weights", "grads", "state", "transient", *(["acts"] if known else []), "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    if plan.vram is not None:
        table.add_column(f"in {plan.vram:g}", no_wrap=True)
    for row in plan.rows.values():
        cells = (row.weights, row.gradients, row.state, row.transient, row.activations, row.total)
        texts = [f"{size / GIB:.1f}" for size in cells if size is not None]
        least = f"at least {texts[-1] if len(texts[-1]) < 4 else row.total // GIB} GiB"
        verdict = {True: "[green]fits[/]", False: "[red]no[/]", None: least}[row.fits]
        table.add_row(
            row.label,
            *texts,
            *([] if plan.vram is None else [verdict]),
            style="bold" if row.label.startswith("Lion8bit") else None,
        )
    notes = [plan.note] if plan.note else []
    notes.append(f"total{'' if known else ', at least'}: at the worst moment, which is named beside its bar")
    if plan.vram is not None:
        notes.append(f"{plan.reserve:g} GiB stay free for the CUDA context, workspaces and fragmentation")
    table.caption = "; ".join(notes)
    table.caption_justify = "left"
    return table


def plan_bars(plan: Plan, columns: int) -> Any:
    """The totals as bars of text, as long as the memory of the GPU, if one was named, or the largest total."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    longest = max(row.total for row in plan.rows.values())
    scale = max(longest, (plan.vram or 0) * GIB) / max(10, columns - 46)
    grid = Table.grid(padding=(0, 1, 0, 0))
    for row in plan.rows.values():
        bar, done = Text(no_wrap=True, overflow="crop"), 0
        ends = itertools.accumulate(parts(row))
        for end, colour in zip(ends, PARTS.values(), strict=True):
            length = round(end / scale) - done
            bar.append("█" * length, colour)
            done += length
        if plan.vram is not None:
            mark = round(plan.vram * GIB / scale)
            bar = bar + " " * (mark - done) + "|" if done < mark else bar[:mark] + "|" + bar[mark + 1 :]
        grid.add_row(row.label, bar, f"{row.total / GIB:.1f} {row.peak}")
    legend = Text()
    for name, colour in PARTS.items():
        legend.append("█ ", colour).append(f"{name}  ")
    return Group(grid, legend)


PICTURES = (".png", ".svg", ".pdf")


def check_suffix(path: Path) -> None:
    """A ValueError unless `plot_plan` can write a file of this name."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"path must end in one of {', '.join(PICTURES)}, got {path.name!r}")


def plot_plan(plan: Plan, path: Path) -> None:
    """Draws the totals as horizontal bars, with a line where the memory of the GPU ends.

    Args:
        plan: what `estimate` returned.
        path: .png, .svg or .pdf file to write.

    Raises:
        ValueError: it ends in something else.
    """
    check_suffix(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(plan.rows.values())
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for index, (name, colour) in enumerate(PARTS.items()):
        sizes = [parts(row)[index] / GIB for row in rows]
        axes.barh(range(len(rows)), sizes, left=left, color=colour, height=0.7, label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, end in enumerate(left):
        axes.text(end, place, f" {end:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.08)
    if plan.vram is not None:
        axes.axvline(plan.vram, color="#D55E00", linestyle="--", label=f"{plan.vram:g} GiB")
    axes.set_xlabel("GiB at the worst moment")
    axes.set_title(f"{plan.model}: {describe(plan)}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
