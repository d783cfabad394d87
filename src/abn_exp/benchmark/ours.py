"""This project's own loop, as `train.py` runs it: its configuration, its loader, Lightning's trainer."""

import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from abn_exp.benchmark.measure import synchronize
from abn_exp.classifier import LitClassifier
from abn_exp.config import Config
from abn_exp.data.loader import Bundles
from abn_exp.data.prepare import ImageDataset
from abn_exp.parts import BUNDLE, loaders_of, network_of, trainer_options, waste_nothing


class _Clock(pl.Callback):
    """Notes when the bundles after the first `warm` ones, or an evaluation, begin and end; data are included."""

    def __init__(self, device: torch.device, warm: int = 0, bundles: int = 0) -> None:
        self.device, self.warm, self.last = device, warm, warm + bundles
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


class OurLoop:
    """A run's network, data and trainer; times are in seconds, the device's work included."""

    def __init__(self, config: Config, data: ImageDataset, device: torch.device, norm: str = "abn") -> None:
        self.config, self.device = config, device
        waste_nothing()
        classes = len(data.classes)
        self.network = network_of(config, norm, classes, device)
        if config.compile:
            self.network.compile()
        self.loaders = loaders_of(config, data, device)
        steps = len(self.loaders["train"])
        self.classifier = LitClassifier(self.network, config.recipe, config.seed, classes, steps)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3, fused=True)

    def _trainer(self, **options: Any) -> pl.Trainer:
        common = trainer_options(self.config, self.device)
        return pl.Trainer(**common, enable_checkpointing=False, limit_val_batches=0, **options)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.classifier._shared_step((images, labels), "train")

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """One step of training on one batch, without the trainer."""
        torch.use_deterministic_algorithms(self.config.deterministic)
        torch.backends.cudnn.benchmark = not self.config.deterministic
        self.loss(*batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, warm: int, steps: int) -> float:
        """Return the time of a step with its data, the mean of `steps` after `warm` others, or one bundle more."""
        bundle = min(BUNDLE, steps)
        warm, timed = -(-warm // bundle), -(-steps // bundle)
        clock = _Clock(self.device, warm, timed)
        trainer = self._trainer(max_epochs=-1, max_steps=(warm + timed) * bundle, callbacks=[clock])
        with warnings.catch_warnings(action="ignore"):  # nothing is validated, and that is meant
            trainer.fit(self.classifier, Bundles(self.loaders["train"], bundle))
        return clock.seconds / (timed * bundle)

    def evaluate(self) -> float:
        """Return the time an image takes to evaluate."""
        clock = _Clock(self.device)
        self._trainer(callbacks=[clock]).test(self.classifier, self.loaders["test"], verbose=False)
        return clock.seconds / len(self.loaders["test"].labels)

    def epoch(self) -> float:
        """Return the time of a pass over all training images, the trainer's start included."""
        start = time.perf_counter()
        self._trainer(max_epochs=1).fit(self.classifier, Bundles(self.loaders["train"], BUNDLE))
        synchronize(self.device)
        return time.perf_counter() - start
