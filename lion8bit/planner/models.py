"""Reads a model for a plan: a module's shapes and widths, from whatever `estimate` accepts; nothing is allocated."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lion8bit.layout import memory_order
from lion8bit.planner.named import NAMES, named_model, parse_count, typical_model
from lion8bit.planner.shapes import SAVED, USUAL_SEQUENCE, Model, PlanError, Weight, Widths, adapters

# The field of `Widths` that norms of these classes count in; the first pattern that matches holds.
NORMS = {"(Gemma|Olmo).*RMSNorm": "fp32_norms", ".*RMSNorm": "rms_norms"}


def load_model(
    model: int | str | os.PathLike[str] | nn.Module, lora: int | None = None, trust_remote_code: bool = False
) -> Model:
    """The `Model` of anything that `estimate` accepts.

    Raises:
        PlanError: it is none of these.
    """
    if isinstance(model, nn.Module):
        return model_of(model, getattr(model, "config", None), lora)
    if isinstance(model, int):
        return typical_model(model, f"{model:,} parameters", lora)
    text = os.fspath(model)
    if Path(text).exists():
        return _from_hugging_face(Path(text), lora, trust_remote_code)
    if (named := named_model(text, lora)) is not None:
        return named
    if (count := parse_count(text)) is not None:
        return typical_model(count, text.strip(), lora)
    if re.fullmatch(r"[^\W\d]\w*(\.\w+)*[.:]\w+(\.\w+)*", text):
        return _from_factory(text, lora)
    raise PlanError(
        f"model must be a count such as 7B, a local folder or config.json of Hugging Face, package.module:factory, or "
        f"one of {', '.join(NAMES)}, got {text!r}; other models on the hub have to be downloaded first"
    )


def model_of(module: nn.Module, config: Any = None, lora: int | None = None) -> Model:
    """The shapes of a module, which may be on the meta device; shared parameters count once.

    Args:
        module: any; the elements of its outermost `nn.ModuleList`s are its blocks.
        config: its Hugging Face configuration, if it has one.
        lora: rank of adapters at every linear layer except the output layer, everything else frozen; None trains the
            parameters that require a gradient.
    """
    stacks: list[nn.ModuleList] = []
    block_of: dict[nn.Module, nn.Module] = {}
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part) > 1 and part not in block_of:
            stacks.append(part)
            for block in part:
                for inner in block.modules():
                    block_of.setdefault(inner, block)
    units: dict[nn.Module | None, list[Weight]] = {block: [] for stack in stacks for block in stack} | {None: []}
    output = _output(module)
    seen: set[torch.Tensor] = set()
    for part in module.modules():
        unit = units[block_of.get(part)]
        for param in part.parameters(recurse=False):
            if param not in seen:
                shape = tuple(param.shape[dim] for dim in memory_order(param) or range(param.dim()))
                unit.append(Weight(shape, lora is None and param.requires_grad, own_shape=tuple(param.shape)))
                seen.add(param)
        if lora is not None and part is not output and (features := _features(part)):
            unit += adapters(lora, *features)
    if lora is not None and not any(weight.adapter for unit in units.values() for weight in unit):
        raise PlanError(f"lora must meet a linear layer in the model, got {type(module).__name__} without any")
    model = Model(
        name=type(module).__name__,
        rest=tuple(units.pop(None)),
        blocks=tuple(tuple(unit) for unit in units.values() if unit),
        tied=len(seen) < len(list(module.named_parameters(remove_duplicate=False))),
    )
    if not hasattr(config, "get_text_config"):  # not one of Hugging Face's
        return replace(model, note="activations are known for models with a Hugging Face configuration only")
    model = replace(model, sequence=_sequence(config, module))
    try:
        return replace(model, widths=_widths(config.get_text_config(), module, stacks))
    except _NotKnownError as error:
        return replace(model, note=f"activations are not known for {config.model_type}: {error}")


def _features(part: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, also of GPT-2's transposed one; None for other modules."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    if type(part).__name__ == "Conv1D" and hasattr(part, "nf") and hasattr(part, "nx"):
        return part.nx, part.nf  # type: ignore[return-value]
    return None


def _output(module: nn.Module) -> nn.Module | None:
    """The output layer of a language model."""
    return getattr(module, "get_output_embeddings", lambda: None)()


def _sequence(config: Any, module: nn.Module) -> int:
    """Tokens of an image: its patches and the tokens that are added. Of a text 2048, or less if that is the most."""
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if getattr(module, "main_input_name", None) == "pixel_values" and image and patch:
        (height, width), (high, wide) = (
            size if isinstance(size, Sequence) else (size, size) for size in (image, patch)
        )
        tokens = ("cls_token", "class_embedding", "distillation_token", "register_tokens", "detection_tokens")
        added = [param for name, param in module.named_parameters() if name.rpartition(".")[2] in tokens]
        return int(height // high * (width // wide) + sum(param.numel() // param.shape[-1] for param in added))
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(USUAL_SEQUENCE, longest) if isinstance(longest, int) and longest > 0 else USUAL_SEQUENCE


class _NotKnownError(Exception):
    """Why the activations of a model are not known."""


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that a configuration has and that is not empty."""
    return next((value for name in names if (value := getattr(config, name, None))), default)


def _check_dense(config: Any, module: nn.Module, stacks: Sequence[nn.ModuleList]) -> None:
    """Raises `_NotKnownError` unless a model is one stack of equal layers whose attention stores no scores."""
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if getattr(config, "is_encoder_decoder", False) or _first(config, *experts):
        raise _NotKnownError("the formula is for dense decoders and encoders")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if not isinstance(getattr(config, name, None), int):
            raise _NotKnownError(f"its configuration has no {name}")
    if len(stacks) != 1:
        numbers = " and ".join(str(len(stack)) for stack in stacks) or "none"
        raise _NotKnownError(f"the formula is for one stack of layers, this has stacks of {numbers}")
    layers = config.num_hidden_layers
    shapes = {tuple(param.shape for param in layer.parameters()) for layer in stacks[0]}
    if len(shapes) > 1 or len(stacks[0]) != layers:
        raise _NotKnownError(f"the formula is for {layers} equal layers, each with separate weights")
    if not getattr(module, "_supports_sdpa", True) or getattr(config, "_attn_implementation", None) == "eager":
        raise _NotKnownError("its attention stores its scores")
    if getattr(config, "attn_logit_softcapping", None):
        raise _NotKnownError("its attention caps its scores")


def _widths(config: Any, module: nn.Module, stacks: Sequence[nn.ModuleList]) -> Widths:
    """The `Widths` of a dense model; `_NotKnownError` unless all weights of a layer have a place in the formula."""
    _check_dense(config, module, stacks)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = _first(config, "head_dim", default=hidden // heads)
    query, key = heads * head, _first(config, "num_key_value_heads", default=heads) * head
    inner = _first(config, "intermediate_size", "n_inner", "ffn_dim", "hidden_dim", default=4 * hidden)
    functions = ("hidden_act", "activation_function", "hidden_activation", "activation")
    function = _first(config, *functions, default="silu")
    if function not in SAVED:
        raise _NotKnownError(f"the formula is for activation functions {', '.join(SAVED)}, not {function}")
    linear: list[tuple[int, int]] = []
    norms = {"layer_norms": 0, "rms_norms": 0, "fp32_norms": 0}
    for name, part in stacks[0][0].named_modules():
        own = [*part.parameters(recurse=False)]
        if features := _features(part):
            linear.append(features)
        elif "Norm" in type(part).__name__ and all(param.dim() == 1 for param in own):
            last = name.rpartition(".")[2]
            found = (field for pattern, field in NORMS.items() if re.fullmatch(pattern, type(part).__name__))
            kind = "layer_norms" if isinstance(part, nn.LayerNorm) else next(found, "")
            if not kind:
                raise _NotKnownError(f"its layers have a {type(part).__name__}")
            norms[kind] += query if last.startswith("q") else key if last.startswith("k") else hidden
        elif own:
            raise _NotKnownError(f"its layers have weights beside matrices and norms ({type(part).__name__})")
    output = (query, hidden)
    attentions = {True: [(hidden, query + 2 * key), output], False: [(hidden, query), *2 * [(hidden, key)], output]}
    inputs = {0: [(hidden, inner)], 1: 2 * [(hidden, inner)], 2: [(hidden, 2 * inner)]}  # no gate, a gate, both in one
    for one, gate in itertools.product(attentions, inputs):
        if sorted(linear) == sorted([*attentions[one], *inputs[gate], (inner, hidden)]):
            break
    else:
        raise _NotKnownError("its layers are not one attention and one feed-forward network")
    return Widths(
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        query=query,
        key=key,
        inner=inner,
        saved=SAVED[function] + 2 * (gate > 0),
        **norms,
        vocabulary=config.vocab_size if _output(module) is not None else 0,
        fused=one and bool(_first(config, "rope_parameters", "rope_theta", "rotary_dim")),
    )


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
            path, local_files_only=True, trust_remote_code=trust_remote_code
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
        config._attn_implementation = "sdpa"  # training uses it where the model supports it
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise PlanError(
                f"model must be of a type that transformers has itself, got {path}, which contains its own code; "
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
    """Lets modules of the working directory be imported, but none that would replace one found elsewhere."""
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
