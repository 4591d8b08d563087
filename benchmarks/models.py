"""The parameter lists of public models that the benchmarks step: shapes by their configurations."""

from __future__ import annotations

from common import Shape


def gpt2_shapes(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """Parameters of GPT-2, in the orientation of its published checkpoint; the default is the 124M model."""
    block: list[Shape] = [
        (width,),
        (width,),
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


def minilm_shapes(layers: int = 6, width: int = 384, vocabulary: int = 30522, context: int = 512) -> list[Shape]:
    """Parameters of a BERT encoder with a pooler; the default is all-MiniLM-L6, 22.7M."""
    linear: list[Shape] = [(width, width), (width,)]
    norm: list[Shape] = [(width,), (width,)]
    feed_forward: list[Shape] = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block = linear * 4 + norm + feed_forward + norm
    return [(vocabulary, width), (context, width), (2, width), *norm, *(block * layers), *linear]


def llama_shapes(
    layers: int = 32, width: int = 4096, key_width: int = 1024, hidden: int = 14336, vocabulary: int = 128256
) -> list[Shape]:
    """Parameters of a Llama with its own output layer; the default is Llama-3.1-8B."""
    attention: list[Shape] = [(width, width), (key_width, width), (key_width, width), (width, width)]
    feed_forward: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    block = [*attention, *feed_forward, (width,), (width,)]
    return [(vocabulary, width), *(block * layers), (width,), (vocabulary, width)]


def lora_shapes(rank: int = 16, layers: int = 32) -> list[Shape]:
    """Low-rank adapters of all linear layers of Llama-3.1-8B."""
    targets = [shape for shape in llama_shapes(layers=1)[1:] if len(shape) == 2][:-1]
    return [shape for out, in_ in targets for shape in ((rank, in_), (out, rank))] * layers


MODELS: dict[str, tuple[str, list[Shape]]] = {
    "64M": ("one tensor of 64M", [(8192, 8192)]),
    "gpt2": ("GPT-2 124M", gpt2_shapes()),
    "minilm": ("all-MiniLM-L6", minilm_shapes()),
}
QUICK_MODELS: dict[str, tuple[str, list[Shape]]] = {
    "64M": ("one tensor of 1M", [(1024, 1024)]),
    "gpt2": ("GPT-2, 1 layer, small vocabulary", gpt2_shapes(layers=1, width=256, vocabulary=512, context=64)),
    "minilm": ("MiniLM, 1 layer, small vocabulary", minilm_shapes(layers=1, width=128, vocabulary=512, context=64)),
}
GPU_MODELS: dict[str, tuple[str, list[Shape]]] = {
    "gpt2": ("GPT-2 124M", gpt2_shapes()),
    "1B": ("one tensor of 1B", [(32768, 32768)]),
    "llama": ("Llama-3.1-8B", llama_shapes()),
    "lora": ("LoRA r=16 of Llama-3.1-8B", lora_shapes()),
}
QUICK_GPU_MODELS: dict[str, tuple[str, list[Shape]]] = {
    "gpt2": ("GPT-2, 1 layer, small", gpt2_shapes(layers=1, width=128, vocabulary=512, context=64)),
    "1B": ("one tensor of 1M", [(1024, 1024)]),
    "llama": ("Llama, 1 layer, small", llama_shapes(1, 128, 64, 256, 512)),
    "lora": ("LoRA r=16, 1 layer", lora_shapes(layers=1)),
}
