"""Owns the callback that logs what `Lion8bit` knows about itself from transformers' Trainer and those built on it."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lion8bit.integrations import LastRates, check_every, report


class OptimizerReport(TrainerCallback):
    """Logs `lion8bit.integrations.report` to wherever the trainer logs.

    ``trainer.add_callback(OptimizerReport(trainer))``

    Args:
        trainer: logs.
        every: steps from one report to the next; the others do not wait for the GPU.

    Raises:
        TypeError: when training begins, the trainer's optimizer is not a Lion8bit.
    """

    def __init__(self, trainer: Trainer, every: int = 100) -> None:
        self._trainer, self._every = trainer, check_every(every)
        self._last: LastRates | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._last is not None:  # of a training that was interrupted
            self._last.remove()
        self._last = LastRates(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            should_log = control.should_log
            self._trainer.log(report(kwargs["optimizer"], self._last))
            control.should_log = should_log  # which log() clears, though the loss may still be due
