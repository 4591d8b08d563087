"""Tests the chunked loss of the examples: its loss and gradients, the models that it refuses, and its memory."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lion8bit import Lion8bit, estimate, fuse_into_backward

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples and benchmarks can be imported."""
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def make(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with random weights."""
    llama = importlib.import_module("llama")
    return llama.build(llama.dataclasses.replace(llama.SHAPES["tiny"], **changes), CPU, dtype)


def loss_of(model: Any, batch: torch.Tensor, chunked: bool) -> torch.Tensor:
    """The loss as the example computes it."""
    return importlib.import_module("full_finetune").loss_of(model, batch, chunked)  # type: ignore[no-any-return]


def tokens(rows: int, length: int) -> torch.Tensor:
    """Random tokens, one more than the length in each row."""
    return torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("shape", [(1, 1), (1, 255), (2, 128), (1, 257), (3, 300)])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(shape: tuple[int, int], tied: bool) -> None:
    models, losses = [make(tie_word_embeddings=tied) for _ in range(2)], []
    for model, chunked in zip(models, (False, True), strict=True):
        losses.append(loss_of(model, tokens(*shape), chunked))
        (3 * losses[-1]).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_bf16_gradients_are_near_those_of_whole_logits() -> None:
    """The gradient of the output layer is rounded to bf16 once for each of the five pieces."""
    models = [make(torch.bfloat16) for _ in range(2)]
    for model, chunked in zip(models, (False, True), strict=True):
        loss_of(model, tokens(4, 320), chunked).backward()  # type: ignore[no-untyped-call]
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        assert (ours.grad - theirs.grad).float().norm() < 0.02 * theirs.grad.float().norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_release_steps_each_parameter_with_its_whole_gradient(bits: int) -> None:
    """As an ordinary step after the same backward pass, also for the output layer, whose gradient has pieces."""
    models = [make(torch.bfloat16) for _ in range(2)]
    optimizers = [Lion8bit(model.parameters(), lr=1e-3, optim_bits=bits) for model in models]
    fuse_into_backward(models[1], optimizers[1])
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, tokens(2, 300 + step), True).backward()  # type: ignore[no-untyped-call]
            assert (model.lm_head.weight.grad is None) == (model is models[1])
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimizers[0].momentum(one), optimizers[1].momentum(other))


def test_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 256}
    config = transformers.AutoConfig.for_model("llama", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    whole, chunked = (loss_of(model, tokens(2, 300), choice) for choice in (False, True))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    config.logit_scale = 0.5
    with pytest.raises(TypeError, match="plain logits for a chunked loss, got logit_scale"):
        loss_of(model, tokens(1, 5), True)
    del config.logit_scale
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(256))
    with pytest.raises(TypeError, match="plain logits for a chunked loss, got a bias"):
        loss_of(model, tokens(1, 5), True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_peak_is_that_of_the_plan(tied: bool, release: bool) -> None:
    tensors_of = importlib.import_module("memory").tensors_of
    model = make(torch.bfloat16, vocab_size=20_000, tie_word_embeddings=tied, model_type="qwen3", head_dim=64)
    optimizer = Lion8bit(model.parameters(), optim_bits=4)
    if release:
        fuse_into_backward(model, optimizer)
    batch, losses = tokens(2, 256), []
    for _ in range(2):
        losses.clear()
        highest, kept = tensors_of(lambda: losses.append(loss_of(model, batch, True)))
        highest = max(highest, kept + tensors_of(lambda: losses[0].backward())[0])  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.memory_report()
    plan = estimate(model, batch=2, sequence=256, chunked_loss=True)
    row = plan.rows["lion8bit-4bit" + "-release" * release]
    measured = report["parameter_bytes"] + report["state_bytes"] + highest
    assert row.peak == "head" and measured == pytest.approx(row.total, rel=0.03)
    assert estimate(model, batch=2, sequence=256).rows["lion8bit-4bit-release"].total > 2 * row.total
