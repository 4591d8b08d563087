"""A byte-level transformer language model of a million parameters and its weights; not its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHECKPOINT = Path(__file__).parent / "data" / "bytelm.pt"
CHECKPOINT_FORMAT = 1
ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class ByteLMConfig:
    """Shape of a `ByteLM`.

    The defaults give 1,017,216 parameters, and every matrix row a length that is a multiple of 128.

    Args:
        width: channels of the residual stream, a multiple of `2 * heads`.
        layers: number of transformer blocks.
        heads: attention heads per block.
        context: longest sequence, in bytes.
        vocabulary: number of symbols; 256, one per byte value.

    Raises:
        ValueError: a size is not positive, or `width` is not a multiple of `2 * heads`.
    """

    width: int = 128
    layers: int = 5
    heads: int = 4
    context: int = 256
    vocabulary: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1:
                raise ValueError(f"{field.name} must be positive, got {size}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads = {2 * self.heads} (rotary channels come in pairs), "
                f"got {self.width}"
            )


def rotary_table(context: int, channels: int) -> Tensor:
    """Tabulates the rotary position angles' cosines and sines.

    Pair `j` of a head's channels turns by `t * ROTARY_BASE ** (-2j / channels)` radians at position `t`.

    Args:
        context: number of positions.
        channels: channels per head, even.

    Returns:
        [2, context, channels / 2] fp32: cosines, then sines.

    Source: arXiv 2104.09864.
    """
    frequencies = ROTARY_BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each channel pair of queries or keys by its position's angle.

    Args:
        x: [batch, heads, length, channels]; channel `j` is paired with `j + channels / 2`.
        table: [2, length, channels / 2], see `rotary_table`.

    Returns:
        A tensor of x's shape.
    """
    cos, sin = table[0], table[1]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then a GELU network four times as wide.

    Args:
        config: the model's shape.
    """

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
        """Applies the block.

        Args:
            x: [batch, length, width] residual stream.
            table: [2, length, width / heads / 2] rotary table.

        Returns:
            [batch, length, width] residual stream.
        """
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query, table), rotate(key, table), value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        mlp: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mlp


class ByteLM(nn.Module):
    """A decoder-only byte transformer: pre-norm, rotary positions, no biases, head tied to the embedding.

    Args:
        config: the model's shape.
    """

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
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predicts each next byte.

        Args:
            tokens: [batch, length] int64 byte values, length at most `config.context`.

        Returns:
            [batch, length, vocabulary] logits; position t predicts the byte at t + 1.

        Raises:
            ValueError: the sequence is longer than `config.context`.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens must be at most {self.config.context} long, got {length}")
        x = self.embedding(tokens)
        table = self.rotary[:, :length]
        for block in self.blocks:
            x = block(x, table)
        return F.linear(self.norm(x), self.embedding.weight)


def encode(text: bytes) -> Tensor:
    """Turns text into tokens.

    Args:
        text: any bytes.

    Returns:
        [len(text)] uint8.
    """
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Scores predictions.

    Args:
        logits: [batch, length, vocabulary], any float dtype; the arithmetic is fp32.
        targets: [batch, length] integer, the token that each position should have predicted.
        reduction: "mean" or "sum", over all positions.

    Returns:
        Scalar fp32: cross entropy, in nats per token.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().long(), reduction=reduction)


def save_pretrained(model: ByteLM, path: Path) -> None:
    """Writes a checkpoint: the configuration, and the weights in fp16 (two bytes per parameter).

    Args:
        model: the model to save; it is not changed.
        path: file to write.
    """
    weights = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in model.state_dict().items()}
    torch.save({"format": CHECKPOINT_FORMAT, "config": dataclasses.asdict(model.config), "weights": weights}, path)


def load_pretrained(path: Path = CHECKPOINT) -> ByteLM:
    """Reads a checkpoint written by `save_pretrained`.

    Args:
        path: file to read; by default the model that ships with the package, which
            `benchmarks/pretrain_bytelm.py` pretrained on the Python standard library's source.

    Returns:
        The model on the CPU, in fp32 and in training mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file's format is another one.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"checkpoint format must be {CHECKPOINT_FORMAT}, got {checkpoint['format']}")
    model = ByteLM(ByteLMConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["weights"])
    return model
