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


def vit_shapes(
    layers: int = 12, width: int = 768, patch: int = 16, tokens: int = 197, classes: int = 1000
) -> list[Shape]:
    """Parameters of a vision transformer that classifies; the default is ViT-B/16 at 224 pixels."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    embedding: list[Shape] = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    block = [*norm, *attention, *norm, *feed_forward]
    return [*embedding, *(block * layers), *norm, (classes, width), (classes,)]


def sdxl_unet_shapes(widths: tuple[int, int, int] = (320, 640, 1280), depths: tuple[int, int] = (2, 10)) -> list[Shape]:
    """Parameters of Stable Diffusion XL's UNet.

    Args:
        widths: channels of the three resolutions; the first has no attention.
        depths: transformer blocks in each attention of the other two.
    """
    text, time, resnets = 2048, 4 * widths[0], 2

    def linear(out: int, in_: int) -> list[Shape]:
        return [(out, in_), (out,)]

    def conv(out: int, in_: int, size: int = 3) -> list[Shape]:
        return [(out, in_, size, size), (out,)]

    def resnet(out: int, in_: int) -> list[Shape]:
        shortcut = conv(out, in_, 1) if out != in_ else []
        return [(in_,), (in_,), *conv(out, in_), *linear(out, time), (out,), (out,), *conv(out, out), *shortcut]

    def attention(width: int, context: int) -> list[Shape]:
        return [(width, width), (width, context), (width, context), *linear(width, width)]

    def transformer(width: int, depth: int) -> list[Shape]:
        norm: list[Shape] = [(width,), (width,)]
        feed_forward = [*linear(8 * width, width), *linear(width, 4 * width)]
        block = [*norm, *attention(width, width), *norm, *attention(width, text), *norm, *feed_forward]
        return [*norm, *linear(width, width), *(block * depth), *linear(width, width)]

    shapes = conv(widths[0], 4) + linear(time, widths[0]) + linear(time, time)
    shapes += linear(time, 2816) + linear(time, time)
    levels = list(zip(widths, (0, *depths)))
    skips, width = [widths[0]], widths[0]
    for out, depth in levels:
        for _ in range(resnets):
            shapes += resnet(out, width) + (transformer(out, depth) if depth else [])
            width = out
            skips.append(width)
        if out != widths[-1]:
            shapes += conv(out, out)
            skips.append(out)
    shapes += resnet(width, width) + transformer(width, depths[-1]) + resnet(width, width)
    for out, depth in reversed(levels):
        for _ in range(resnets + 1):
            shapes += resnet(out, width + skips.pop()) + (transformer(out, depth) if depth else [])
            width = out
        if out != widths[0]:
            shapes += conv(out, out)
    return [*shapes, (width,), (width,), *conv(4, width)]


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
    "vit": ("ViT-B/16", vit_shapes()),
    "sdxl": ("SDXL UNet", sdxl_unet_shapes()),
}
QUICK_GPU_MODELS: dict[str, tuple[str, list[Shape]]] = {
    "gpt2": ("GPT-2, 1 layer, small", gpt2_shapes(layers=1, width=128, vocabulary=512, context=64)),
    "1B": ("one tensor of 1M", [(1024, 1024)]),
    "llama": ("Llama, 1 layer, small", llama_shapes(1, 128, 64, 256, 512)),
    "lora": ("LoRA r=16, 1 layer", lora_shapes(layers=1)),
    "vit": ("ViT, 1 layer, small", vit_shapes(layers=1, width=128)),
    "sdxl": ("SDXL UNet, narrow", sdxl_unet_shapes((32, 64, 128), (1, 1))),
}
