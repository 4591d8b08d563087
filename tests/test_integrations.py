"""Lion8bit in the trainers that people use, each by its real package: small random models, no network.

Tests named test_gpu_or_cpu take a GPU where there is one, and `make gpu` picks them by that name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same
from torch import nn

from lion8bit import Lion8bit

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_OFFLINE="1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products need it

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
LR = 2.0**-10  # powers of two: a step from zero is exact in bf16
OPTIONS: dict[str, Any] = {"lr": LR, "betas": [0.9, 0.99], "weight_decay": 0.1}
STEPS, SAVED = 6, 3


def need(name: str) -> Any:
    """The package, or a skip that names it; one that is installed but broken is an error."""
    return pytest.importorskip(name, reason=f"needs {name}", exc_type=ModuleNotFoundError)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def language_model() -> nn.Module:
    """A Llama of two layers in bf16, its matrices just large enough for 8-bit state; the same at every call."""
    transformers = need("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)


def lora_model() -> nn.Module:
    """The same with adapters, which PEFT keeps in fp32."""
    peft = need("peft")
    base = language_model()
    config = peft.LoraConfig(r=64, lora_alpha=64, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(base, config)


def texts(count: int = 12) -> list[dict[str, list[int]]]:
    tokens = torch.randint(64, (count, 16), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 16, "labels": row} for row in tokens]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def unwrapped(optimizer: Any) -> Lion8bit:
    """The optimizer inside of Accelerate's."""
    while not isinstance(optimizer, Lion8bit):
        optimizer = optimizer.optimizer
    return optimizer


def everything(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """What the model learned, and all state of its optimizer."""
    lion, found = unwrapped(optimizer), trained(model)
    for name, param in model.named_parameters():
        for key, value in lion.state.get(param, {}).items():
            found[f"{name} {key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_same(value, expected[name], name)


def assert_trained(model: nn.Module, before: dict[str, torch.Tensor], optimizer: Any) -> None:
    """Everything that can learn has moved, and some of its state has 8 bits."""
    after = trained(model)
    assert after.keys() == before.keys() and all(not torch.equal(after[name], before[name]) for name in after)
    states = unwrapped(optimizer).state
    assert len(states) == len(after) and any("codes" in state for state in states.values())


@torch.no_grad()
def forget(model: nn.Module) -> nn.Module:
    """The model with all that it could learn set to zero, so that only a checkpoint can bring it back."""
    for param in model.parameters():
        param.mul_(0 if param.requires_grad else 1)
    return model


# ---- transformers and PEFT ------------------------------------------------------------------------------------------


def trainer_arguments(folder: Path, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "warmup_steps": 1,
        "bf16": True,
        "use_cpu": not HAS_GPU,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 2,
    }
    return need("transformers").TrainingArguments(**{**settings, **changes})


def by_class(trainer_class: Any, model: nn.Module, **arguments: Any) -> Any:
    return trainer_class(model=model, optimizer_cls_and_kwargs=(Lion8bit, dict(OPTIONS)), **arguments)


def by_instance(trainer_class: Any, model: nn.Module, **arguments: Any) -> Any:
    params = [param for param in model.parameters() if param.requires_grad]
    return trainer_class(model=model, optimizers=(Lion8bit(params, **OPTIONS), None), **arguments)


def by_subclass(trainer_class: Any, model: nn.Module, **arguments: Any) -> Any:
    class LionTrainer(trainer_class):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = Lion8bit(self.model.parameters(), **OPTIONS)
            return self.optimizer

    return LionTrainer(model=model, **arguments)


@pytest.mark.parametrize("build", [by_class, by_instance, by_subclass])
@pytest.mark.parametrize("make_model", [language_model, lora_model])
def test_gpu_or_cpu_trainer_resumes_bit_for_bit(
    tmp_path: Path, make_model: Callable[[], nn.Module], build: Callable[..., Any]
) -> None:
    transformers, folder = need("transformers"), tmp_path / "run"
    arguments = {"args": trainer_arguments(folder), "train_dataset": texts()}
    model = make_model()
    before = trained(model)
    straight = build(transformers.Trainer, model, **arguments)
    straight.train()
    assert_trained(model, before, straight.optimizer)

    resumed = build(transformers.Trainer, forget(make_model()), **arguments)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
    assert_equal(everything(resumed.model, resumed.optimizer), everything(model, straight.optimizer))


def test_gpu_or_cpu_lora_plus_learns_b_faster(tmp_path: Path) -> None:
    transformers, peft_optimizers = need("transformers"), need("peft.optimizers")
    model = lora_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = peft_optimizers.create_loraplus_optimizer(model, Lion8bit, lr=LR, loraplus_lr_ratio=16)
    arguments = trainer_arguments(tmp_path, max_steps=1, warmup_steps=0, lr_scheduler_type="constant")
    transformers.Trainer(model=model, args=arguments, train_dataset=texts(), optimizers=(optimizer, None)).train()
    for name, param in model.named_parameters():
        if "lora_B" in name:  # zeros before, and a step is as long as the learning rate
            assert set(param.detach().abs().unique().tolist()) <= {0.0, 16 * LR} and param.any(), name
        elif "lora_A" not in name:
            assert_same(param.detach(), before[name], name)


# ---- Accelerate -----------------------------------------------------------------------------------------------------


def test_gpu_or_cpu_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    accelerate = need("accelerate")
    accelerator = accelerate.Accelerator(cpu=not HAS_GPU, mixed_precision="bf16", gradient_accumulation_steps=2)

    def prepare(model: nn.Module) -> tuple[Any, ...]:
        optimizer = Lion8bit(model.parameters(), **OPTIONS)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
        batches = [{name: torch.tensor([row[name]]) for name in row} for row in texts()]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        return accelerator.prepare(model, optimizer, loader, schedule)

    def train(model: Any, optimizer: Any, batches: Any, schedule: Any) -> None:
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    model, optimizer, loader, schedule = prepare(language_model())
    before = trained(model)
    batches = list(loader)
    train(model, optimizer, batches[: SAVED * 2], schedule)
    accelerator.save_state(tmp_path)
    train(model, optimizer, batches[SAVED * 2 :], schedule)
    expected = everything(model, optimizer)
    assert_trained(model, before, optimizer)

    accelerator.free_memory()
    model, optimizer, loader, schedule = prepare(forget(language_model()))
    accelerator.load_state(tmp_path)
    train(model, optimizer, batches[SAVED * 2 :], schedule)
    assert_equal(everything(model, optimizer), expected)
