"""Owns the callback that logs what `Lion8bit` knows about itself from Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lion8bit.integrations import LastRates, check_every, report


class OptimizerReport(Callback):
    """Logs `lion8bit.integrations.report` of the first optimizer to the trainer's loggers.

    ``Trainer(callbacks=[OptimizerReport()])``

    Args:
        every: steps from one report to the next; the others do not wait for the GPU.

    Raises:
        TypeError: when training begins, the first optimizer is not a Lion8bit.
        ValueError: when training begins, the trainer has no logger.
    """

    def __init__(self, every: int = 100) -> None:
        self._every, self._reported = check_every(every), 0
        self._last: LastRates | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None:  # of an earlier training
            self._last.remove()
        self._last = LastRates(trainer.optimizers[0])
        if not trainer.loggers:
            raise ValueError("trainer must have a logger to report to, got none; leave logger at its default")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self._every == 0 and step != self._reported:  # several batches may make one step
            self._reported = step
            numbers = report(trainer.optimizers[0], self._last)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)
