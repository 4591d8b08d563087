"""Decoders by name and by count: the shapes of public models, and of the Llama that stands for a count."""

from __future__ import annotations

import re
from typing import NamedTuple

from lion8bit.planner.shapes import SAVED, Model, PlanError, Weight, Widths, adapters

SMALLEST_COUNT, LARGEST_COUNT = 10**6, 10**14  # outside of them the shape of a Llama would mean nothing


class Decoder(NamedTuple):
    """The sizes of a decoder with SwiGLU and RMSNorm, from its public configuration."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head: int  # width of one head
    inner: int  # inside the feed-forward network
    vocabulary: int
    tied: bool = False  # the embedding is the output layer too
    head_norms: bool = False  # RMSNorm of each head's queries and keys, as in Qwen3
    biases: bool = False  # of queries, keys and values, as in Qwen2.5


NAMED = {
    "llama-3-8b": Decoder(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.2-1b": Decoder(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "llama-3.2-3b": Decoder(28, 3072, 24, 8, 128, 8192, 128256, tied=True),
    "qwen3-0.6b": Decoder(28, 1024, 16, 8, 128, 3072, 151936, tied=True, head_norms=True),
    "qwen3-1.7b": Decoder(28, 2048, 16, 8, 128, 6144, 151936, tied=True, head_norms=True),
    "qwen3-4b": Decoder(36, 2560, 32, 8, 128, 9728, 151936, tied=True, head_norms=True),
    "qwen3-8b": Decoder(36, 4096, 32, 8, 128, 12288, 151936, head_norms=True),
    "qwen2.5-7b": Decoder(28, 3584, 28, 4, 128, 18944, 152064, biases=True),
    "mistral-7b-v0.3": Decoder(32, 4096, 32, 8, 128, 14336, 32768),
    "smollm2-1.7b": Decoder(24, 2048, 32, 32, 64, 8192, 49152, tied=True),
}
SAME_SHAPES = {"llama-3.1-8b": "llama-3-8b"}
NAMES = sorted([*NAMED, *SAME_SHAPES])


def named_model(text: str, lora: int | None = None) -> Model | None:
    """The model of a name in any case; None where it is not known."""
    name = text.strip().casefold()
    found = NAMED.get(SAME_SHAPES.get(name, name))
    if found is None:
        return None
    query, key = found.heads * found.head, found.key_heads * found.head
    norms = 2 * found.hidden + (query + key) * found.head_norms
    sizes = (found.layers, found.hidden, found.heads, query, key, found.inner)
    widths = Widths(*sizes, SAVED["silu"] + 2, 0, norms, 0, found.vocabulary)
    vectors = 2 * [found.head] * found.head_norms + [query, key, key] * found.biases
    return _decoder(name, widths, vectors, found.tied, lora)


def parse_count(text: str) -> int | None:
    """The number that "7B", "124M" or "6738415616" means; None where a text is no number."""
    match = re.fullmatch(r"\s*(-?\d[\d_,]*(?:\.\d+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    if match is None:
        return None
    digits, unit = match.groups()
    factor = 1000 ** " KMBT".index(unit.upper()) if unit else 1
    return round(float(digits.replace(",", "").replace("_", "")) * factor)


def typical_model(count: int, name: str = "", lora: int | None = None) -> Model:
    """The model that stands for a count: a Llama whose width is 128 times its layers, vocabulary 32000.

    Widths are multiples of 128, below 2048 of 8. There are at least 4 layers, and the vocabulary is at most a
    thousandth of the count, so that no part of a small model is out of proportion. The width is the one for which the
    feed-forward width is nearest to 8/3 of it. Then the feed-forward width is set so that the count is met to within
    one column per layer.

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
    widths = Widths(layers, hidden, layers, hidden, hidden, inner, SAVED["silu"] + 2, 0, 2 * hidden, 0, vocabulary)
    note = (
        f"a count is taken as a Llama of {layers} layers, width {hidden}, inner width {inner}, vocabulary {vocabulary}"
    )
    return _decoder(name, widths, [], False, lora, note)


def _decoder(name: str, widths: Widths, vectors: list[int], tied: bool, lora: int | None, note: str = "") -> Model:
    """A decoder of these widths; ``vectors`` has the lengths of a layer's vectors beside its two norms."""
    hidden, query, key, inner = widths.hidden, widths.query, widths.key, widths.inner
    matrices = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    matrices += [(inner, hidden), (inner, hidden), (hidden, inner)]
    trained = lora is None
    block = [Weight(shape, trained) for shape in (*matrices, (hidden,), (hidden,), *((size,) for size in vectors))]
    if lora is not None:
        block += [adapter for outputs, inputs in matrices for adapter in adapters(lora, inputs, outputs)]
    table = (widths.vocabulary, hidden)
    rest = tuple(Weight(shape, trained) for shape in (table, (hidden,), *([] if tied else [table])))
    return Model(name, (tuple(block),) * widths.layers, rest, tied, widths, note)
