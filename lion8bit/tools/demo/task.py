"""What the demo trains: a pretrained language model and a text, on a device."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lion8bit.tools.demo.bytelm import load_pretrained, next_token_loss, tokenize

HELD_OUT_SHARE = 0.1
HF_CONTEXT = 256  # tokens per window for Hugging Face models


class DemoInputError(ValueError):
    """An argument that the demo cannot satisfy; the message is for the user."""


@dataclasses.dataclass
class Task:
    """A pretrained model and a text to fine-tune it on."""

    model: nn.Module  # on the device that it trains on
    model_name: str
    text_name: str
    train: Tensor  # [n] integer tokens, on the CPU
    held_out: Tensor  # [windows, context + 1] int64 tokens that are not in `train`, on the model's device
    token: str  # "byte" or "token"

    def __post_init__(self) -> None:
        self.unit, self.unit_per_nat = ("bits/byte", 1 / math.log(2)) if self.token == "byte" else ("nats/token", 1.0)
        self.initial = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in self.trained)
        self.device = self.held_out.device
        self.window = self.held_out.shape[1]

    def reset(self) -> None:
        """Loads the pretrained weights again and drops the gradients."""
        self.model.load_state_dict(self.initial)
        self.model.zero_grad()

    def loss(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats of all tokens of [batch, context + 1] int64 windows, except the first of each."""
        output = self.model(windows[:, :-1])
        return next_token_loss(getattr(output, "logits", output), windows[:, 1:], reduction)

    @torch.no_grad()
    def held_out_loss(self, batch_size: int) -> float:
        """Mean loss over the held-out windows, in `unit`, `batch_size` windows at a time."""
        self.model.eval()
        total = sum(self.loss(windows, "sum").item() for windows in torch.split(self.held_out, batch_size))
        self.model.train()
        return total / self.held_out[:, 1:].numel() * self.unit_per_nat


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def resolve_device(name: str | None) -> torch.device:
    """Chooses the device and allocates a tensor on it; None means a GPU if there is one, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
        raise DemoInputError(f"device must be one that this machine has, got {name!r} ({reason})") from error
    return device


def read_text(path: Path | None) -> tuple[str, bytes]:
    """Reads the name and the content of a text; None means the source of Python's help topics."""
    name = "pydoc_data/topics.py" if path is None else path.name
    if path is None:
        path = Path(str(importlib.import_module("pydoc_data.topics").__file__))
    try:
        return name, path.read_bytes()
    except OSError as error:
        raise DemoInputError(f"text must be a readable file, got {path} ({error.strerror})") from error


def split(tokens: Tensor, window: int, count: int) -> tuple[Tensor, Tensor]:
    """Splits tokens into a part to train on and `count` held-out windows, evenly spaced over the last tenth.

    There are fewer windows where `count` of them would overlap.
    """
    cut = len(tokens) - int(len(tokens) * HELD_OUT_SHARE)
    train, held_out = tokens[:cut], tokens[cut:]
    if len(held_out) < window:
        raise DemoInputError(
            f"text must be at least {math.ceil(window / HELD_OUT_SHARE)} tokens long, so that its held-out "
            f"last {HELD_OUT_SHARE:.0%} fills a window of {window}, got {len(tokens)}; pass a longer file"
        )
    starts = torch.linspace(0, len(held_out) - window, min(count, len(held_out) // window)).long()
    return train, held_out[starts[:, None] + torch.arange(window)].long()


def load_hugging_face(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Loads the causal language model and the tokenizer that `save_pretrained` wrote into a folder."""
    requirement = f"model must be a folder that holds a Hugging Face causal language model, got {folder}"
    if not folder.is_dir():
        raise DemoInputError(requirement)
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise DemoInputError("model needs the transformers package; run: pip install transformers") from error
    auto, local = transformers.AutoModelForCausalLM, {"local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **local)
        return auto.from_pretrained(folder, trust_remote_code=trust_remote_code, **local), tokenizer
    except (OSError, ValueError, KeyError) as error:
        reason = f"({first_line(error)})"
        if not trust_remote_code and "trust_remote_code" in str(error):
            reason = "with Python code; if you trust that code, pass --trust-remote-code"
        raise DemoInputError(f"{requirement} {reason}") from error


def load_task(
    folder: Path | None, text: Path | None, device: torch.device, eval_windows: int, trust_remote_code: bool = False
) -> Task:
    """Loads the model of a Hugging Face folder, or this package's own, and a text; see `run_demo`.

    Weights are fp32, except those of Hugging Face models on CUDA devices, which are bf16.
    """
    text_name, content = read_text(text)
    if folder is None:
        model: Any = load_pretrained()
        name, digits, dtype = "byte-level transformer", ".2f", torch.float32
        tokens, context = tokenize(content), model.config.context
    else:
        model, tokenizer = load_hugging_face(folder, trust_remote_code)
        model.config.use_cache = False
        name, digits = folder.resolve().name, ".4g"
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tokens = torch.tensor(
            tokenizer(content.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        )
        context = min(HF_CONTEXT, getattr(model.config, "max_position_embeddings", None) or HF_CONTEXT)
    train, held_out = split(tokens, context + 1, eval_windows)
    name += f", {sum(p.numel() for p in model.parameters()) / 1e6:{digits}} M parameters"
    name += f" in {str(dtype).removeprefix('torch.')}" if folder else ""
    model = model.to(device=device, dtype=dtype).train()
    return Task(model, name, text_name, train, held_out.to(device), "token" if folder else "byte")
