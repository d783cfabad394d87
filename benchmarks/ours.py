"""This project's training loop, timed: its configuration, its loader, Lightning's trainer."""

import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch

from abn_exp.data.loader import BatchGroups
from abn_exp.training.parallel import StepLoop, synchronize
from abn_exp.training.setup import BATCHES_PER_GROUP, trainer_options


class _Clock(pl.Callback):
    """Notes when the groups after the first `warm` ones, or an evaluation, begin and end; data are included."""

    def __init__(self, device: torch.device, warm: int = 0, groups: int = 0) -> None:
        self.device, self.warm, self.last = device, warm, warm + groups
        self.done, self.start, self.seconds = 0, 0.0, 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.done += 1
        if self.done in (self.warm, self.last):
            synchronize(self.device)
            now = time.perf_counter()
            self.start, self.seconds = now, now - self.start

    def on_test_epoch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_test_epoch_end(self, *_: Any) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.start


class OurLoop(StepLoop):
    """A run's loop under Lightning's trainer; times are in seconds, the device's work included.

    A trainer leaves the network on the CPU, from where each of these takes it back.
    """

    def _trainer(self, **options: Any) -> pl.Trainer:
        common = trainer_options(self.config, self.device)
        return pl.Trainer(**common, enable_checkpointing=False, limit_val_batches=0, **options)

    def train(self, warm: int, steps: int) -> float:
        """Return the time of a step with its data, the mean of `steps` after `warm` others, or one group more."""
        group = min(BATCHES_PER_GROUP, steps)
        warm, timed = -(-warm // group), -(-steps // group)
        clock = _Clock(self.device, warm, timed)
        trainer = self._trainer(max_epochs=-1, max_steps=(warm + timed) * group, callbacks=[clock])
        with warnings.catch_warnings(action="ignore"):  # nothing is validated, and that is meant
            trainer.fit(self.classifier, BatchGroups(self.loaders["train"], group))
        self.network.to(self.device)
        return clock.seconds / (timed * group)

    def evaluate(self) -> float:
        """Return the time an image takes to evaluate."""
        clock = _Clock(self.device)
        self._trainer(callbacks=[clock]).test(self.classifier, self.loaders["test"], verbose=False)
        self.network.to(self.device)
        return clock.seconds / len(self.loaders["test"].labels)

    def epoch(self) -> float:
        """Return the time of a pass over all training images, the trainer's start included."""
        start = time.perf_counter()
        self._trainer(max_epochs=1).fit(self.classifier, BatchGroups(self.loaders["train"], BATCHES_PER_GROUP))
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.network.to(self.device)
        return seconds
