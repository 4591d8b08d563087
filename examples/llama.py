"""Llama and Qwen3 in plain torch for the examples and benchmarks, with the parameter names of transformers' models.

    model = build(SHAPES["llama3-8b"], device, torch.bfloat16, seed=0)   # random weights, no fp32 copy
    model.checkpointing = False                                         # keep the activations (default: recompute)
    logits = model(tokens)                                              # [batch, length] -> [batch, length, vocabulary]
    hidden = model.hidden_states(tokens)                                # what the output layer gets, for a chunked loss

`Llama(config)` under `torch.device("meta")` has shapes only, for `lion8bit.estimate`. transformers loads what
`save_pretrained` writes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Llama or a Qwen3, by the names of Hugging Face's config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    model_type: str = "llama"  # or "qwen3", which has RMSNorms of each head's queries and keys
    head_dim: int | None = None  # width of a head; None for hidden_size // num_attention_heads

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def get_text_config(self) -> Config:
        """Itself: `lion8bit.estimate` calls this, because in transformers multimodal models contain a text model."""
        return self

    def record(self) -> dict[str, Any]:
        """The content of config.json."""
        architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.model_type]
        fixed = {"architectures": [architecture], "hidden_act": "silu", "torch_dtype": "bfloat16"}
        return {**dataclasses.asdict(self), "head_dim": self.head_width, **fixed}


# Llama 3 without the scaled rotary frequencies of 3.1 and 3.2, which are for contexts of more than 8192 tokens.
SHAPES = {
    "llama-7b": Config(4096, 11008, 32, 32, 32, 32000, 2048, 1e4, 1e-6),  # LLaMA 7B
    "llama3-8b": Config(4096, 14336, 32, 32, 8, 128256, 8192, 5e5),  # Llama-3-8B
    "llama-3b": Config(3072, 8192, 28, 24, 8, 128256, 8192, 5e5, tie_word_embeddings=True),  # Llama-3.2-3B
    "qwen3-4b": Config(2560, 9728, 36, 32, 8, 151936, 40960, 1e6, 1e-6, True, "qwen3", 128),
    "tinyllama-1.1b": Config(2048, 5632, 22, 32, 4, 32000, 2048, 1e4),
    "smollm-135m": Config(576, 1536, 30, 9, 3, 49152, 2048, 1e4, tie_word_embeddings=True),
    "tiny": Config(128, 352, 2, 4, 2, 256, 512, 1e4),  # for tests
}


class RMSNorm(nn.RMSNorm):
    """In fp32 by elementary operations, as in transformers, so that it keeps the same tensors for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = self.width = config.head_width
        heads, key_heads = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        normed = config.model_type == "qwen3"
        self.q_norm, self.k_norm = (RMSNorm(width, config.rms_norm_eps) if normed else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.width)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (each.transpose(1, 2) for each in (self.q_norm(q), self.k_norm(k), v))
        q, k = (each * cos + torch.cat([-each.chunk(2, -1)[1], each.chunk(2, -1)[0]], -1) * sin for each in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """Maps [batch, length] int64 tokens to [batch, length, vocab_size] logits; `build` sets random weights.

    A configuration of Qwen3 makes it one.

    While `checkpointing` is true, the backward pass computes each layer's activations again.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = True
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta" if tied else None)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer, for `lion8bit.estimate`."""
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.hidden_states(tokens))  # type: ignore[no-any-return]

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """[batch, length, hidden_size]: the input of the output layer."""
        x = self.model.embed_tokens(tokens)
        cos, sin = self._rotation(tokens.shape[1], x)
        for layer in self.model.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if self.checkpointing else layer(x, cos, sin)
        return self.model.norm(x)  # type: ignore[no-any-return]

    def _rotation(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        width = self.config.head_width
        rates = self.config.rope_theta ** (-torch.arange(0, width, 2, device=like.device).float() / width)
        angles = torch.outer(torch.arange(length, device=like.device).float(), rates).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def save_pretrained(self, folder: Path) -> None:
        """Writes config.json and pytorch_model.bin, which transformers loads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.record(), indent=1) + "\n")
        torch.save(self.state_dict(), folder / "pytorch_model.bin")


def build(config: Config, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Llama:
    """Makes a Llama with random weights directly on the device and in its dtype, without an fp32 copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Llama(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, INIT_STD, generator=generator) if param.dim() > 1 else param.fill_(1.0)
    return model
