"""A byte-level transformer language model of a million parameters and its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHECKPOINT = Path(__file__).parent / "data" / "bytelm.pt"
ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class ByteLMConfig:
    """Sizes of a `ByteLM`. The defaults give 1,017,216 parameters; every matrix row is a multiple of 128 long."""

    width: int = 128  # of the residual stream, a multiple of 2 * heads because rotary channels come in pairs
    layers: int = 5
    heads: int = 4
    context: int = 256  # longest sequence, in bytes
    vocabulary: int = 256


def rotary_table(context: int, channels: int) -> Tensor:
    """Cosines and sines of `t * ROTARY_BASE ** (-2j / channels)` at position t, pair j: [2, context, channels / 2].

    Source: arXiv 2104.09864.
    """
    frequencies = ROTARY_BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates channel `j` of [batch, heads, length, channels] with channel `j + channels / 2` by the table's angles."""
    cos, sin = table[0], table[1]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then a GELU network four times as wide."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Maps a residual stream [batch, length, width] to the next; `table` is that of `rotary_table`."""
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query, table), rotate(key, table), value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        mlp: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mlp


class ByteLM(nn.Module):
    """A decoder-only byte transformer: pre-norm, rotary positions, no biases, head tied to the embedding."""

    rotary: Tensor

    def __init__(self, config: ByteLMConfig | None = None) -> None:
        super().__init__()
        self.config = config or ByteLMConfig()
        self.embedding = nn.Embedding(self.config.vocabulary, self.config.width)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(self.config.layers))
        self.norm = nn.LayerNorm(self.config.width, bias=False)
        table = rotary_table(self.config.context, self.config.width // self.config.heads)
        self.register_buffer("rotary", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws initial weights from torch's global generator.

        Matrices get a standard deviation of `1 / sqrt(inputs)`, those that write to the residual stream
        `1 / sqrt(2 * layers)` of that, so that the stream's variance does not grow with depth; the embedding,
        which is also the output head, 0.02, so that the first prediction is nearly uniform.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith("_out"):
                    std *= (2 * self.config.layers) ** -0.5
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [batch, length] int64 bytes to [batch, length, vocabulary] logits of the byte after each.

        Raises:
            ValueError: the sequence is longer than `config.context`.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens must be at most {self.config.context} long, got {length}")
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary[:, :length])
        return F.linear(self.norm(x), self.embedding.weight)


def tokenize(text: bytes) -> Tensor:
    """Converts text to tokens, [len(text)] uint8."""
    return torch.tensor([*text], dtype=torch.uint8)


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats, in fp32, of [batch, length, vocabulary] logits and [batch, length] integer targets."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().long(), reduction=reduction)


def load_pretrained(path: Path = CHECKPOINT) -> ByteLM:
    """Loads a checkpoint in fp32, on the CPU; the default is the one that `benchmarks/pretrain_bytelm.py` made."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = ByteLM(ByteLMConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["weights"])
    return model
