"""Lion8bit in the trainers that people use, each by its real package: small random models, no network.

Tests named test_gpu_or_cpu take a GPU where there is one, and `make gpu` picks them by that name.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
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


def by_attribute(trainer_class: Any, model: nn.Module, **arguments: Any) -> Any:
    """As a plugin can that gets a trainer when it is complete."""
    trainer = trainer_class(model=model, **arguments)
    trainer.optimizer_cls_and_kwargs = (Lion8bit, dict(OPTIONS))
    return trainer


def by_instance(trainer_class: Any, model: nn.Module, **arguments: Any) -> Any:
    params = [param for param in model.parameters() if param.requires_grad]
    return trainer_class(model=model, optimizers=(Lion8bit(params, **OPTIONS), None), **arguments)


def by_subclass(trainer_class: Any, model: nn.Module, **arguments: Any) -> Any:
    class LionTrainer(trainer_class):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = Lion8bit(self.model.parameters(), **OPTIONS)
            return self.optimizer

    return LionTrainer(model=model, **arguments)


@pytest.mark.parametrize("build", [by_class, by_attribute, by_instance, by_subclass])
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


def test_trainer_takes_the_rate_from_the_pair_and_the_decay_from_its_arguments(tmp_path: Path) -> None:
    transformers = need("transformers")
    pair = (Lion8bit, {"lr": 3e-4, "weight_decay": 0.7})
    arguments = trainer_arguments(tmp_path, learning_rate=5e-5, weight_decay=0.2)
    trainer = transformers.Trainer(language_model(), arguments, optimizer_cls_and_kwargs=pair)
    groups = trainer.create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in groups] == [
        (3e-4, 0.2, (0.9, 0.99)),
        (3e-4, 0.0, (0.9, 0.99)),  # biases and norms
    ]


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


# ---- TRL ------------------------------------------------------------------------------------------------------------


def test_trl_supervised_fine_tuning_with_a_report(tmp_path: Path) -> None:
    trl, datasets, tokenizers = need("trl"), need("datasets"), need("tokenizers")
    from lion8bit.integrations.transformers import OptimizerReport

    words = {f"w{number}": number for number in range(62)} | {"<pad>": 62, "<eos>": 63}
    tokenizer = need("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    settings = {"output_dir": str(tmp_path), "max_steps": STEPS, "max_length": 32, "learning_rate": LR, "bf16": True}
    quiet = {"use_cpu": not HAS_GPU, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    model = language_model()
    before = trained(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings, **quiet, logging_steps=2),
        train_dataset=datasets.Dataset.from_list(texts(12)).remove_columns("labels"),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(Lion8bit, dict(OPTIONS)),
    )
    trainer.add_callback(OptimizerReport(trainer, every=4))
    trainer.train()
    assert_trained(model, before, trainer.optimizer)

    history = trainer.state.log_history
    (reported,) = [entry for entry in history if "lion8bit/frozen_fraction" in entry]
    lion = unwrapped(trainer.optimizer)
    assert reported["step"] == 4 and reported["lion8bit/nonfinite_count"] == 0
    assert reported["lion8bit/state_bytes"] == lion.memory_report()["state_bytes"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]


def test_trainer_reports_the_rate_of_the_step_and_not_of_the_next(tmp_path: Path) -> None:
    """A linear schedule is at 0 after its last step; none of the weights is frozen in any."""
    from lion8bit.integrations.transformers import OptimizerReport

    changes = {"learning_rate": LR, "lr_scheduler_type": "linear", "warmup_steps": 0, "save_strategy": "no"}
    arguments = trainer_arguments(tmp_path, max_steps=3, **changes)
    trainer = by_class(need("transformers").Trainer, language_model(), args=arguments, train_dataset=texts())
    trainer.add_callback(OptimizerReport(trainer, every=1))
    trainer.train()
    assert unwrapped(trainer.optimizer).param_groups[0]["lr"] == 0.0
    reported = [
        entry["lion8bit/frozen_fraction"] for entry in trainer.state.log_history if "lion8bit/parameters" in entry
    ]
    assert reported == [0.0, 0.0, 0.0]


def test_report_takes_the_present_rates_when_the_groups_are_others() -> None:
    from lion8bit.integrations import LastRates, report

    first, second = (nn.Parameter(torch.ones(8)) for _ in range(2))
    optimizer = Lion8bit([first], lr=1e-3)
    last = LastRates(optimizer)
    first.grad = torch.ones(8)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    assert report(optimizer)["lion8bit/frozen_fraction"] == 1.0
    assert report(optimizer, last)["lion8bit/frozen_fraction"] == 0.0
    optimizer.add_param_group({"params": [second], "lr": 1e-3})
    assert report(optimizer, last)["lion8bit/frozen_fraction"] == 0.5
    last.remove()
    optimizer.step()
    assert last.rates == [1e-3]


def test_report_says_at_once_that_the_optimizer_is_another(tmp_path: Path) -> None:
    transformers = need("transformers")
    from lion8bit.integrations.transformers import OptimizerReport

    trainer = transformers.Trainer(language_model(), trainer_arguments(tmp_path), train_dataset=texts())
    trainer.add_callback(OptimizerReport(trainer))
    with pytest.raises(TypeError, match="optimizer must be a Lion8bit, got AcceleratedOptimizer"):
        trainer.train()
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        OptimizerReport(trainer, every=0)


# ---- Lightning ------------------------------------------------------------------------------------------------------


def every_other_step(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def lightning_module(scheduler: Any = every_other_step) -> Any:
    lightning = need("lightning")

    class Regression(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.mse_loss(self.layers(batch[0]), batch[0].flip(1))

        def configure_optimizers(self) -> Any:
            optimizer = Lion8bit(self.parameters(), **OPTIONS)
            return [optimizer], [{"scheduler": scheduler(optimizer), "interval": "step"}]

    return Regression()


def lightning_trainer(folder: Path, **changes: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "precision": "bf16-mixed", "logger": False, **quiet, **changes}
    return need("lightning").Trainer(default_root_dir=folder, **settings)


def batches() -> Any:
    """Of one epoch; Lightning does not skip batches when it resumes in the middle of one."""
    data = torch.randn(SAVED * 4, 64, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    every_epoch = need("lightning.pytorch.callbacks").ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True
    )
    straight = lightning_trainer(tmp_path, max_epochs=2, callbacks=[every_epoch], enable_checkpointing=True)
    model = lightning_module()
    before = trained(model)
    straight.fit(model, batches())
    assert_trained(model, before, straight.optimizers[0])

    second, resumed = lightning_trainer(tmp_path, max_epochs=2), forget(lightning_module())
    second.fit(resumed, batches(), ckpt_path=tmp_path / f"step={SAVED}.ckpt")
    assert second.global_step == STEPS
    assert_equal(everything(resumed, second.optimizers[0]), everything(model, straight.optimizers[0]))


def test_lightning_hands_over_a_closure(tmp_path: Path) -> None:
    model, losses = lightning_module(), []
    model.automatic_optimization = False

    def training_step(batch: Any) -> None:
        optimizer = model.optimizers()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model.layers(batch[0]), batch[0].flip(1))
            model.manual_backward(loss)
            return loss

        losses.append(optimizer.step(closure))

    model.training_step = training_step
    before = trained(model)
    trainer = lightning_trainer(tmp_path, max_steps=2)
    trainer.fit(model, batches())
    assert_trained(model, before, trainer.optimizers[0])
    assert len(losses) == 2 and all(torch.is_tensor(loss) for loss in losses)


def test_lightning_reports_to_its_logger(tmp_path: Path) -> None:
    loggers = need("lightning.pytorch.loggers")
    from lion8bit.integrations.lightning import OptimizerReport

    class Kept(loggers.Logger):  # type: ignore[misc]
        name, version = "kept", 0

        def __init__(self) -> None:
            super().__init__()
            self.reports: dict[int, dict[str, float]] = {}

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "lion8bit/frozen_fraction" in metrics:
                assert step is not None and step not in self.reports
                self.reports[step] = metrics

    logger, report = Kept(), OptimizerReport(every=2)
    trainer = lightning_trainer(tmp_path, max_steps=5, logger=logger, callbacks=[report], accumulate_grad_batches=3)
    to_zero = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: float(step < 4))
    trainer.fit(lightning_module(to_zero), batches())
    assert sorted(logger.reports) == [2, 4]
    assert logger.reports[2]["lion8bit/parameters"] == 2 * (64 * 64 + 64)
    assert logger.reports[4]["lion8bit/frozen_fraction"] == 0, "at the rate of the step, though the next one's is 0"
    with pytest.raises(ValueError, match="trainer must have a logger"):
        lightning_trainer(tmp_path, max_steps=5, callbacks=[report]).fit(lightning_module(), batches())


# ---- By name --------------------------------------------------------------------------------------------------------

WITH_TIMM = """
import sys
from importlib.util import find_spec
from unittest.mock import MagicMock

if find_spec("torchvision") is None:  # timm's models want it, its optimizers do not
    for name in ("", ".ops", ".ops.misc", ".models", ".models.feature_extraction", ".datasets", ".transforms"):
        sys.modules["torchvision" + name] = MagicMock()
    sys.modules["torchvision.transforms.functional"] = MagicMock()

import lion8bit.integrations
assert "timm" not in sys.modules
import torch
from timm.optim import create_optimizer_v2, list_optimizers

lion8bit.integrations.register_timm()
assert {"lion4bit", "lion8bit"} <= {*list_optimizers("lion*")}
model = torch.nn.Linear(64, 64)
optimizer = create_optimizer_v2(model, opt="lion8bit", lr=1e-3, weight_decay=0.1, betas=[0.95, 0.98], eps=1e-8)
assert type(optimizer) is lion8bit.Lion8bit
decays = {tuple(param.shape): group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
assert decays == {(64, 64): 0.1, (64,): 0.0}, decays
assert all(group["betas"] == (0.95, 0.98) and group["lr"] == 1e-3 for group in optimizer.param_groups)
model(torch.ones(2, 64)).sum().backward()
optimizer.step()
assert "codes" in optimizer.state[model.weight]
smaller = create_optimizer_v2(model, opt="lion4bit", lr=1e-3)
assert type(smaller) is lion8bit.Lion4bit and all(group["optim_bits"] == 4 for group in smaller.param_groups)
"""


def test_timm_makes_it_by_name() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm")
    done = subprocess.run([sys.executable, "-c", WITH_TIMM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def component(config: Any, *args: Any) -> Any:
    """An object from a configuration as torchtune makes it: a dotted path, the other entries as they are."""
    module, _, name = config["_component_"].rpartition(".")
    arguments = {key: value for key, value in config.items() if key != "_component_"}
    return getattr(importlib.import_module(module), name)(*args, **arguments)


@pytest.mark.parametrize("path", ["lion8bit.Lion8bit", "lion8bit.Lion8", "lion8bit.Lion4bit"])
def test_torchtune_component(path: str, tmp_path: Path) -> None:
    configuration = need("omegaconf").OmegaConf.create(
        f"{{_component_: {path}, lr: 2e-5, betas: [0.9, 0.98], weight_decay: 0.1, weight_rounding: stochastic}}"
    )
    layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    optimizer = component(configuration, layer.parameters())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_rounding"]) == (2e-5, (0.9, 0.98), "stochastic")
    layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")  # the list's own class could not be loaded safely
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))


def kohya(optimizer_type: str, optimizer_args: list[str], params: Any, lr: float) -> Any:
    """An optimizer from sd-scripts' two options: text after the only "=" is a literal; what has a dot is a path."""
    options = {}
    for argument in optimizer_args:
        key, value = argument.split("=")
        options[key] = ast.literal_eval(value)
    assert not optimizer_type.lower().endswith("8bit"), "sd-scripts asks for bitsandbytes before it looks further"
    module, _, name = optimizer_type.rpartition(".")
    return getattr(importlib.import_module(module), name)(params, lr=lr, **options)


def test_kohya_options() -> None:
    params = [{"params": [nn.Parameter(torch.zeros(64, 64))], "lr": 5e-5}]  # as for the U-Net alone
    texts = ["betas=0.9,0.99", "weight_rounding='stochastic'", "weight_decay=0.1", "cautious=True", "block_size=64"]
    optimizer = kohya("lion8bit.Lion8", texts, params, lr=1e-4)
    (group,) = optimizer.param_groups
    wanted = {"betas": (0.9, 0.99), "weight_rounding": "stochastic", "weight_decay": 0.1, "cautious": True}
    assert group.items() >= {**wanted, "block_size": 64, "lr": 5e-5}.items()
