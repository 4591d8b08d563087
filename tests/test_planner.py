"""Tests the memory plan: its bytes against those of real tensors, activations against autograd, verdicts."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lion8bit
from lion8bit import Lion, Lion8bit, Plan, estimate
from lion8bit.paging import BUFFER_BYTES
from lion8bit.planner import formulas, models, named, report, shapes
from lion8bit.tools.demo import state_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "vocab_size": 1000}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
GPT2: dict[str, Any] = {"n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 777}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
BERT: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"vocab_size": 500, "model_type": "bert", "architectures": ["BertModel"]}
TIED = {**LLAMA, "tie_word_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {"llama": LLAMA, "llama_tied": TIED, "gpt2": GPT2, "bert": BERT}


class Convolutions(nn.Module):
    """Filters in both memory orders, a transposed matrix, a long vector, a scalar and what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 40, 5)
        self.second = nn.Conv2d(40, 33, 3).to(memory_format=torch.channels_last)
        self.bank = nn.ModuleList(nn.Linear(150, 70) for _ in range(3))
        self.transposed = nn.Parameter(torch.empty(300, 41).T)
        self.vector = nn.Parameter(torch.empty(5000))
        self.scalar = nn.Parameter(torch.empty(()))
        self.frozen = nn.Linear(64, 80).requires_grad_(False)


class Narrow(nn.Module):
    """Rows of odd widths, and rows shorter than the blocks of 4 bits, of 8 bits or of neither."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 3, 63, 64, 65, 127, 128, 129)
        self.rows = nn.ParameterList(nn.Parameter(torch.empty(1021 if width > 3 else 5000, width)) for width in widths)
        self.filters = nn.Parameter(torch.empty(90, 7, 3, 3).to(memory_format=torch.channels_last))


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 130)
        self.head = nn.Linear(130, 200, bias=False)
        self.head.weight = self.embedding.weight


def hugging_face(name: str, folder: Path) -> Path:
    """A folder with nothing but the configuration."""
    pytest.importorskip("transformers", reason="needs transformers")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def build(folder: Path) -> nn.Module:
    """The model of a folder, on the CPU."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model: nn.Module = getattr(transformers, config.architectures[0])(config)
    return model


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [param for param in module.parameters() if param.requires_grad]


def bitsandbytes_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params)
    return optimizer


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": bitsandbytes_adamw,
    "lion": Lion,
    "lion8bit": lambda params: Lion8bit(params, weight_rounding="nearest"),
    "lion8bit-compensated": lambda params: Lion8bit(params, weight_rounding="compensated"),
    "lion8bit-release-host": Lion8bit,
    "lion8bit-4bit": lambda params: Lion8bit(params, optim_bits=4, weight_rounding="nearest"),
}


def assert_exact(plan: Plan, module: nn.Module, keys: dict[str, Make]) -> None:
    """Steps a module once with each optimizer; the plan's bytes must be those of the tensors."""
    for key, make in keys.items():
        copied = copy.deepcopy(module)  # bitsandbytes changes the memory order of parameters
        params = trained(copied)
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizer = make(params)
        optimizer.step()
        row = plan.rows[key]
        measured = sum(param.nbytes for param in copied.parameters())
        assert row.weights == measured, key
        shapes = sum(state["shape"].nbytes for state in optimizer.state.values() if "shape" in state)
        held = state_bytes(optimizer) - shapes  # a few bytes in host memory, which no report counts
        assert row.host + row.state - BUFFER_BYTES * bool(row.host) == held, key
        if "release" not in key:
            assert row.gradients == sum(param.grad.nbytes for param in params if param.grad is not None), key
        if isinstance(optimizer, Lion8bit):
            assert held == optimizer.memory_report()["state_bytes"]


# ---- Bytes of tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_models_exactly(name: str, dtype: str, tmp_path: Path) -> None:
    folder = hugging_face(name, tmp_path)
    module = build(folder).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    plan = estimate(folder, dtype=dtype)
    assert plan.parameters == plan.trained == sum(param.numel() for param in module.parameters())
    assert_exact(plan, module, {key: make for key, make in OPTIMIZERS.items() if key in plan.rows})
    assert ("lion8bit-compensated" in plan.rows) == (dtype == "bf16")


@pytest.mark.parametrize("make", [Convolutions, Narrow, Tied])
def test_other_modules_exactly(make: type[nn.Module]) -> None:
    module = make().bfloat16()
    plan = estimate(f"{__name__}:{make.__name__}")
    assert plan.trained == sum(param.numel() for param in trained(module))
    assert_exact(plan, module, OPTIMIZERS)
    assert plan.rows["lion8bit"].activations is None and "activations" in plan.note
    assert estimate(module).rows == plan.rows, "a module itself"


def test_options_of_the_format() -> None:
    module = Convolutions().bfloat16()
    for block_size in (64, 256):
        options: dict[str, Any] = {"block_size": block_size, "min_8bit_size": 100}
        plan = estimate(module, **options)
        makes: dict[str, Make] = {"lion8bit": partial(Lion8bit, **options)}
        makes["lion8bit-4bit"] = partial(Lion8bit, optim_bits=4, **options)
        assert_exact(plan, module, makes)


def test_fp32_weights_of_adamw() -> None:
    plan = estimate(Convolutions())
    whole = estimate(Convolutions(), dtype="fp32").rows["adamw"]
    row = plan.rows["adamw-fp32"]
    assert (row.gradients, row.state) == (whole.gradients, whole.state)
    assert row.weights == whole.weights - 2 * 80 * 65, "what is frozen has 16 bits"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_as_peft_counts_it(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    folder = hugging_face(name, tmp_path)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    module = peft.get_peft_model(build(folder).bfloat16(), config)
    plan = estimate(folder, lora=4)
    assert plan.trained == sum(param.numel() for param in trained(module))
    assert {param.dtype for param in trained(module)} == {torch.float32}
    assert_exact(plan, module, {key: make for key, make in OPTIMIZERS.items() if key in plan.rows})
    assert "lion8bit-compensated" not in plan.rows, "fp32 adapters are not compensated"


def test_lora_counts_linear_layers_but_the_output(tmp_path: Path) -> None:
    plan = estimate(hugging_face("llama", tmp_path), lora=8)
    block = 2 * (256 + 256) + 2 * (256 + 128) + 2 * (256 + 688) + (688 + 256)
    assert plan.trained == 3 * 8 * block
    assert estimate("7B", lora=16).trained == 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11673))


def test_4_bits_take_a_byte_for_two_parameters() -> None:
    rows = estimate("llama-3-8b").rows
    eight, four = rows["lion8bit"], rows["lion8bit-4bit"]
    assert four.state / 8_030_261_248 == pytest.approx(0.5 + 4 / 64, rel=1e-4)
    assert four.total - four.state == eight.total - eight.state
    assert (rows["lion8bit-4bit-release"].state, rows["lion8bit-4bit-release"].gradients) == (four.state, 0)


def test_flashlion_by_its_formula() -> None:
    module = nn.Linear(100, 77)  # its codes and scales exist on a GPU only
    plan = estimate(module)
    assert plan.rows["flashlion"].state == 7777 + 2 * (math.ceil(7700 / 32) + math.ceil(77 / 32))
    assert plan.rows["flashlion-24"].state == plan.rows["flashlion"].state + 7777


# ---- Counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, count, note",
    [
        ("7B", 7 * 10**9, "Llama"),
        ("124M", 124_000_000, "Llama"),
        ("1.5b", 1_500_000_000, "Llama"),
        ("70_000_000", 70_000_000, "Llama"),
        ("6738415616", 6738415616, "32 layers, width 4096"),
        ("13015864320", 13015864320, "40 layers, width 5120"),
    ],
)
def test_counts(text: str, count: int, note: str) -> None:
    plan = estimate(text)
    assert named.parse_count(text) == count
    assert abs(plan.parameters - count) < 1e-4 * count
    assert estimate(count).rows == plan.rows
    assert note in plan.note


PUBLISHED = {
    "llama-3-8b": 8_030_261_248, "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen2.5-7b": 7_615_616_512, "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-1.7b": 1_711_376_384,
}  # fmt: skip


@pytest.mark.parametrize("name", named.NAMES)
def test_named_models_have_the_published_sizes(name: str) -> None:
    plan = estimate(name)
    assert (plan.model, plan.parameters, plan.note) == (name, PUBLISHED[name], "")
    assert estimate(f" {name.upper()} ").rows == plan.rows


@pytest.mark.parametrize("lora", [None, 8])
@pytest.mark.parametrize("name", named.NAMED)
def test_named_models_are_those_of_transformers(name: str, lora: int | None) -> None:
    """Two layers are built from the public configuration; the others have the same shapes."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    found = named.NAMED[name]
    model_type = next(kind for start, kind in MODEL_TYPES.items() if name.startswith(start))
    config = transformers.AutoConfig.for_model(
        model_type,
        num_hidden_layers=2,
        hidden_size=found.hidden,
        intermediate_size=found.inner,
        num_attention_heads=found.heads,
        num_key_value_heads=found.key_heads,
        vocab_size=found.vocabulary,
        tie_word_embeddings=found.tied,
        **({"head_dim": found.head} if model_type != "qwen2" else {}),
    )
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    theirs, ours = models.model_of(module, config, lora), named.named_model(name, lora)
    assert ours is not None and theirs.widths is not None
    assert ours.widths == replace(theirs.widths, layers=found.layers)
    assert ours.tied == theirs.tied and ours.sequence == theirs.sequence
    assert len(ours.blocks) == found.layers and set(map(by_shape, ours.blocks)) == set(map(by_shape, theirs.blocks))
    assert by_shape(ours.rest) == by_shape(theirs.rest)


MODEL_TYPES = {"llama": "llama", "qwen3": "qwen3", "qwen2": "qwen2", "mistral": "mistral", "smollm2": "llama"}


def by_shape(weights: tuple[shapes.Weight, ...]) -> tuple[shapes.Weight, ...]:
    """Weights in an order of their own, without the shapes of another order in memory."""
    return tuple(sorted(weight._replace(own_shape=None) for weight in weights))


COUNTS = [round(10 ** (6 + 6 * i / 120)) for i in range(121)]  # 1M to 1T, each 12 % more than the one before


@pytest.mark.parametrize("checkpointing", [True, False])
def test_any_count_is_a_plausible_model_that_grows_with_it(checkpointing: bool) -> None:
    before: dict[tuple[str, str], int] = {}
    for count in COUNTS:
        typical = named.typical_model(count)
        widths = typical.widths
        assert widths is not None and widths.layers >= 4 and widths.vocabulary >= 1000
        assert min(min(weight.shape) for weight in typical.weights) > 0, count
        assert abs(sum(math.prod(weight.shape) for weight in typical.weights) - count) < 1e-3 * count
        assert 2 < widths.inner / widths.hidden < 3.2 and 16 <= widths.hidden / widths.layers <= 512, count
        for key, row in estimate(count, checkpointing=checkpointing).rows.items():
            sizes = {name: getattr(row, name) for name in ("weights", "gradients", "transient", "activations", "total")}
            sizes["state"] = row.state + row.host  # of small parameters it is not in the host's memory
            for name, size in sizes.items():
                assert size >= max(0, before.get((key, name), 0)), (count, key, name)
                before[key, name] = size


# ---- Sharding --------------------------------------------------------------------------------------------------------


def test_rank_0_holds_what_chunk_gives_it() -> None:
    """FSDP2 shards by `torch.chunk`; tests/test_distributed.py compares whole plans with real shards."""
    for rows in (1, 3, 7, 8, 100, 32000, 50257):
        for gpus in (1, 2, 3, 8, 64, 1000, 4096):
            largest = max(len(part) for part in torch.empty(rows).chunk(gpus))
            assert formulas.piece_of(shapes.Weight((rows, 5)), gpus, 2).shape == (largest, 5)


def test_more_gpus_hold_less() -> None:
    totals = [estimate("7B", gpus=gpus).rows["lion8bit"].total for gpus in (2, 3, 4, 8, 64, 1024, 4096)]
    assert totals == sorted(totals, reverse=True)
    row = estimate("7B", gpus=4).rows["lion8bit"]
    block = 2 * (4 * 4096**2 + 3 * 4096 * 11673 + 2 * 4096)
    root = 2 * (2 * 32000 * 4096 + 4096)
    assert row.transient == root + 2 * block + max(root, block)


# ---- Activations and the peak ----------------------------------------------------------------------------------------


@pytest.fixture
def tensors_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[int, int]]:
    """How `benchmarks/memory.py` measures the tensors of a call: most and last."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("memory").tensors_of  # type: ignore[no-any-return]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    "name, tokens, release",
    [("llama", 96, True), ("llama", 8, True), ("llama", 96, False), ("llama_tied", 8, True), ("llama_tied", 8, False)],
)
def test_peak_is_what_an_iteration_allocates(
    name: str,
    tokens: int,
    release: bool,
    checkpointing: bool,
    tmp_path: Path,
    tensors_of: Callable[[Callable[[], Any]], tuple[int, int]],
) -> None:
    folder = hugging_face(name, tmp_path)
    model = build(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    optimizer = Lion8bit(model.parameters())
    if release:
        lion8bit.fuse_into_backward(model, optimizer)
    tokens_ = torch.arange(2 * tokens).reshape(2, tokens)
    outputs: list[Any] = []

    def forward() -> None:
        outputs.append(model(input_ids=tokens_, labels=tokens_, use_cache=False))

    def backward() -> None:
        outputs[0].loss.backward()

    for _ in range(2):
        outputs.clear()
        highest, kept = tensors_of(forward)
        highest = max(highest, kept + tensors_of(backward)[0])
        optimizer.step()
        optimizer.zero_grad()
    plan = estimate(folder, dtype="fp32", batch=2, sequence=tokens, checkpointing=checkpointing)
    row = plan.rows["lion8bit-release" if release else "lion8bit"]
    measured = optimizer.memory_report()["parameter_bytes"] + optimizer.memory_report()["state_bytes"] + highest
    assert measured == pytest.approx(row.total, rel=0.03), row


def test_activations_follow_the_published_count() -> None:
    """Korthikanti et al. have 34sbh + 5as²b for GPT; without dropout's masks (2sbh) and the scores, 32sbh."""
    widths = shapes.Widths(12, 768, 0, 768, 768, 3072, shapes.SAVED["gelu"], 2 * 768, 0, 0, 0)
    assert formulas.layer_bytes(widths, 2) == 32 * 768
    short, long = (estimate("7B", sequence=s, checkpointing=False).rows["lion8bit"].activations for s in (512, 2048))
    assert short is not None and long == 4 * short
    assert (estimate("7B", batch=4, sequence=512).rows["lion"].activations) == estimate("7B").rows["lion"].activations


def test_checkpointing_saves_memory() -> None:
    with_, without = (estimate("7B", checkpointing=choice).rows["lion8bit-release"] for choice in (True, False))
    assert with_.total < without.total and without.activations is not None and with_.activations is not None
    assert without.activations > 5 * with_.activations


DECODER = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 8, "num_attention_heads": 4}
DECODER |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "pad_token_id": 0}
ENCODER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
ENCODER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGES = {"image_size": [64, 48], "patch_size": 8}
OLDER = {"n_embd": 128, "n_layer": 8, "n_head": 4, "vocab_size": 300, "n_positions": 64}
OLDER |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
RELU = {"hidden_size": 128, "ffn_dim": 344, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 300}
RELU |= {"word_embed_proj_dim": 128, "dropout": 0.0, "pad_token_id": 0}
PARTS = {"dim": 128, "hidden_dim": 512, "n_layers": 8, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
SHORT = {**DECODER, "max_position_embeddings": 96}
KNOWN: dict[str, tuple[str, str, dict[str, Any], int]] = {  # class, model_type, configuration, usual tokens
    "Llama": ("LlamaForCausalLM", "llama", DECODER, 2048),
    "norms of queries and keys": ("Qwen3ForCausalLM", "qwen3", SHORT, 96),
    "norms in fp32": ("Gemma3ForCausalLM", "gemma3_text", SHORT, 96),
    "norms after layers": ("Olmo2ForCausalLM", "olmo2", SHORT, 96),
    "fused matrices": ("Phi3ForCausalLM", "phi3", SHORT, 96),
    "GELU in parts": ("GPT2LMHeadModel", "gpt2", OLDER, 64),
    "ReLU": ("OPTForCausalLM", "opt", RELU, 2048),
    "BERT": ("BertModel", "bert", {**ENCODER, "vocab_size": 300}, 512),
    "DistilBERT": ("DistilBertModel", "distilbert", PARTS, 512),
    "ViT": ("ViTModel", "vit", {**ENCODER, **IMAGES}, 49),
    "DeiT": ("DeiTModel", "deit", {**ENCODER, **IMAGES}, 50),
    "CLIP's images": ("CLIPVisionModel", "clip_vision_model", {**ENCODER, "image_size": 64, "patch_size": 8}, 65),
}


@pytest.mark.parametrize("name", KNOWN)
def test_activations_are_what_autograd_saves(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    cls, model_type, options, usual = KNOWN[name]
    config = transformers.AutoConfig.for_model(model_type, **options)
    model = getattr(transformers, cls)(config).train().bfloat16()
    plan = estimate(model, batch=2, checkpointing=False)
    assert (plan.sequence, plan.note) == (usual, "")
    length = min(plan.sequence, 64)
    if model.main_input_name == "pixel_values":
        size = [options["image_size"]] * 2 if isinstance(options["image_size"], int) else options["image_size"]
        inputs = {"pixel_values": torch.rand(2, 3, *size).bfloat16()}
    else:
        inputs = {"input_ids": torch.arange(2 * length).reshape(2, length) % 200 + 1, "use_cache": False}
        inputs |= {"labels": inputs["input_ids"]} if "LM" in cls else {}
        inputs = {key: value for key, value in inputs.items() if key != "use_cache" or "LM" in cls}
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs)
    if model.main_input_name == "pixel_values":
        assert output.last_hidden_state.shape[1] == usual
        length = usual
    widths = models.model_of(model, config).widths
    assert widths is not None
    expected = (
        2 * length * (widths.layers * formulas.layer_bytes(widths, 2) + 6 * widths.vocabulary)
    )  # logits and their softmax
    assert sum(storage.nbytes() for storage in saved.values()) == pytest.approx(expected, rel=0.06)


EXPERTS = {**DECODER, "num_hidden_layers": 2, "moe_intermediate_size": 64}
SPEECH = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
SPEECH |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
LOCAL = {"hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
IMAGE_TOWER = {"depth": 3, "embed_dim": 64, "hidden_size": 128, "num_heads": 4}
TOWERS = {"text_config": EXPERTS, "vision_config": IMAGE_TOWER}
UNKNOWN: dict[str, tuple[str, str, dict[str, Any], str]] = {  # class, model_type, configuration, what the note says
    "mixtral": ("MixtralForCausalLM", "mixtral", {**EXPERTS, "num_local_experts": 4}, "dense"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {**EXPERTS, "num_experts": 4}, "dense"),
    "t5": ("T5ForConditionalGeneration", "t5", {"d_model": 64, "d_ff": 128, "num_layers": 2}, "dense"),
    "t5 encoder": ("T5EncoderModel", "t5", {"d_model": 64, "d_ff": 128, "num_layers": 2}, "equal layers|dense"),
    "whisper": ("WhisperForConditionalGeneration", "whisper", SPEECH, "dense"),
    "mamba": ("MambaForCausalLM", "mamba", {"hidden_size": 64, "num_hidden_layers": 2}, "num_attention_heads"),
    "albert": ("AlbertModel", "albert", {**ENCODER, "embedding_size": 32}, "one stack"),
    "deberta": ("DebertaV2Model", "deberta-v2", ENCODER, "stores its scores"),
    "eager": ("LlamaForCausalLM", "llama", {**EXPERTS, "attn_implementation": "eager"}, "stores its scores"),
    "gpt_neo": ("GPTNeoForCausalLM", "gpt_neo", LOCAL, "stores its scores"),
    "dinov2": ("Dinov2Model", "dinov2", {**ENCODER, **IMAGES}, "LayerScale"),
    "clip": ("CLIPModel", "clip", {}, "stacks of 12 and 12"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "qwen2_vl", TOWERS, "stacks of [23] and [23]"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_models_of_unknown_activations_never_fit(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    cls, model_type, options, note = UNKNOWN[name]
    config = transformers.AutoConfig.for_model(model_type, **options)
    with torch.device("meta"):
        model = getattr(transformers, cls)(config)
    plan = estimate(model, vram=1e5)
    assert {row.activations for row in plan.rows.values()} == {row.fits for row in plan.rows.values()} == {None}
    assert re.search(f"not known for .*{note}", plan.note)
    assert plan.to_dict()["rows"]["lion8bit"]["fits"] is None
    assert estimate(model, vram=1e-3).rows["lion8bit"].fits is False, "but that is certain"


def test_a_plan_of_unknown_activations_says_at_least() -> None:
    pytest.importorskip("rich", reason="needs the extra named demo")
    from rich.console import Console

    console = Console(width=80, record=True)
    console.print(report.plan_table(estimate(nn.Linear(50_000, 70_000, device="meta"), vram=40)))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    rows = {name: next(line for line in lines if line.startswith(f" {name} ")) for name in ("AdamW", "Lion8bit")}
    assert rows["AdamW"].endswith("at least 26 GiB") and rows["Lion8bit"].endswith("at least 16 GiB")
    assert "no" in next(line for line in lines if "AdamW, fp32" in line).split() and "total, at least" in " ".join(
        lines
    )


@pytest.mark.parametrize("name, note", [("moe", "dense"), ("no_layers", "num_hidden_layers")])
def test_unknown_activations_are_left_out_and_said(name: str, note: str) -> None:
    class Config:
        model_type = name
        hidden_size = 8
        num_attention_heads = 2
        num_experts = 4 if name == "moe" else None

        def get_text_config(self) -> Any:
            return self

    module = nn.Linear(8, 8)
    module.config = Config()  # type: ignore[assignment]
    plan = estimate(module)
    assert plan.rows["lion8bit"].activations is None and note in plan.note and name in plan.note


# ---- Verdicts --------------------------------------------------------------------------------------------------------


def test_7b_fits_24_gib_with_gradient_release_only() -> None:
    rows = estimate("6738415616", vram=24).rows
    fitting = {key for key, row in rows.items() if row.fits}
    eight = {"lion8bit-release", "lion8bit-release-host", "flashlion-release"}
    assert fitting == {*eight, "lion8bit-4bit-release"}


GOALS = [  # model, tokens, chunked loss, GiB with 8 and with 4 bits
    ("llama-3-8b", 512, False, 24.0, 20.5),
    ("llama-3-8b", 2048, False, 26.6, 23.1),
    ("llama-3-8b", 2048, True, 24.4, 20.9),
    ("qwen3-8b", 512, False, 24.7, 21.1),
    ("qwen3-4b", 2048, False, 15.8, 14.0),
    ("llama-3.2-3b", 512, False, 11.3, 9.9),
]


@pytest.mark.parametrize(("name", "tokens", "chunked", "eight", "four"), GOALS)
def test_4_bits_with_gradient_release(name: str, tokens: int, chunked: bool, eight: float, four: float) -> None:
    rows = estimate(name, sequence=tokens, chunked_loss=chunked).rows
    totals = [rows[f"lion8bit{bits}-release"].total / formulas.GIB for bits in ("", "-4bit")]
    assert [round(total, 1) for total in totals] == [eight, four]


def test_a_chunked_loss_needs_the_logits_of_a_piece_only() -> None:
    """It saves nothing with few tokens, and from one piece on its logits do not grow."""
    whole, pieces = (estimate("llama-3-8b", chunked_loss=chunked).rows["lion8bit-release"] for chunked in (False, True))
    assert (whole.peak, pieces.peak) == ("loss", "head") and whole.total - pieces.total > 2 * formulas.GIB
    hidden = 2048 * 4096 * 2
    table, stack = 2 * 128256 * 4096, 32 * hidden
    assert pieces.total == pieces.weights + pieces.state + stack + table + hidden + 8 * 256 * 128256
    assert (
        estimate("7B", chunked_loss=True, sequence=64).rows["lion"].total
        <= estimate("7B", sequence=64).rows["lion"].total * 1.001
    )


def test_verdict_is_total_and_reserve() -> None:
    total = estimate("7B").rows["lion8bit"].total / formulas.GIB
    for reserve in (0.0, 2.5):
        for room, fits in ((0.001, True), (-0.001, False)):
            assert estimate("7B", vram=total + reserve + room, reserve=reserve).rows["lion8bit"].fits is fits
    assert estimate("7B").rows["lion8bit"].fits is None
