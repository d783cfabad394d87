"""Lightning callbacks: a line of metrics an epoch, sign flips, divergence, the progress bar, signals under DDP."""

import errno
import json
import logging
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.errors import STOPPED, Diverged
from abn_exp.files import write_text_atomic
from abn_exp.report.progress import clock, speed_text
from abn_exp.results import count_from_one
from abn_exp.training.classifier import LitClassifier
from abn_exp.training.wandb_run import Tracker

log = logging.getLogger(__name__)


class EpochLogger(pl.Callback):
    """Writes a line an epoch to `metrics.jsonl`, the log and W&B: losses, accuracies, rate, flips, speed, ETA.

    lr: the rate of the next step, as the schedule has set it at the epoch's end. flip_ratio of a layer: the share of
    its binary weights whose sign at the epoch's end is not the one at its start. latent_beyond_one: the share of its
    latent weights with |w| > 1.
    The lines so far are also in every checkpoint, under its checksums. A resumed run rewrites the file from there, so
    that no damage to the file, and no epoch that is trained again, is left in it.

    Raises Diverged where a loss, a weight or a running statistic is not finite, OSError where the disk is full.
    """

    def __init__(self, directory: Path, tracker: Tracker, *, brief: bool = False) -> None:
        """`brief`: shorter lines, so that a run's label fits into 80 characters, too."""
        self.path = directory / "metrics.jsonl"
        self.tracker = tracker
        self.brief = brief
        self.lines: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines = count_from_one(state_dict["lines"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # not later: where all epochs are done, on_train_start is not called
            write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        for line in self.lines:
            self.tracker.log_epoch(line)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started, self.epochs_before = time.monotonic(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signs = {name: weight > 0 for name, weight in binary_weights(pl_module)}
        self.epoch_started = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.train_seconds = time.monotonic() - self.epoch_started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        epoch = trainer.current_epoch + 1  # Lightning counts from 0
        metrics: dict[str, Any] = {"epoch": epoch, **pl_module.epoch_metrics("train")}
        seconds = time.monotonic() - self.epoch_started
        training = self.train_seconds if pl_module.eval_stages else seconds
        if pl_module.eval_stages:
            metrics |= pl_module.evaluated
        metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics |= self._binary_metrics(pl_module)
        images = len(trainer.train_dataloader.loader.labels)  # type: ignore[union-attr]
        metrics |= {"seconds": seconds, "images_per_second": images / training}
        self.lines.append(metrics)
        if trainer.is_global_zero:
            append_line(self.path, json.dumps(metrics))
        self.tracker.log_epoch(metrics)
        self._log_epoch(metrics, trainer)
        bad = _not_finite(metrics, pl_module)
        if trainer.strategy.reduce_boolean_decision(bad is not None, all=False):  # of any device
            bad = bad if bad is not None else "a running statistic of another device"
            raise Diverged(f"diverged in epoch {epoch}: {bad} is not finite")

    def _binary_metrics(self, pl_module: pl.LightningModule) -> dict[str, float]:
        metrics = {}
        for name, weight in binary_weights(pl_module):
            metrics[f"bnn/flip_ratio/{name}"] = ((weight > 0) != self.signs[name]).float().mean()
            metrics[f"bnn/latent_beyond_one/{name}"] = (weight.abs() > 1).float().mean()
        values = torch.stack(list(metrics.values())).tolist() if metrics else []
        return dict(zip(metrics, values, strict=True))

    def _log_epoch(self, metrics: dict[str, Any], trainer: pl.Trainer) -> None:
        epoch, epochs = metrics["epoch"], trainer.max_epochs or 0
        eta = (time.monotonic() - self.started) / (epoch - self.epochs_before) * (epochs - epoch)
        parts = [f"epoch {epoch:>{len(str(epochs))}}/{epochs} loss {metrics['train/loss']:.3f}"]
        if not self.brief:
            parts.append(f"acc {metrics['train/acc']:.3f}")
        if "val/acc" in metrics:
            parts.append(f"val {metrics['val/acc']:.3f}")
            if not self.brief:
                parts.append(f"best {max(line['val/acc'] for line in self.lines):.3f}")
        if "test/acc" in metrics:
            parts.append(f"test {metrics['test/acc']:.3f}")
        log.info(" ".join([*parts, speed_text(metrics["images_per_second"]), f"ETA {clock(eta)}"]))


class StepProgressBar(pl.Callback):
    """One bar over all steps of a run, with the time left; what is logged meanwhile appears above it."""

    def __init__(self) -> None:
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        self.task = self.progress.add_task("", total=pl_module.steps, completed=trainer.global_step, epoch=1)
        self.progress.start()
        self._log_to_stdout()  # which the bar has replaced by a stream that prints above it

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.progress.update(self.task, completed=trainer.global_step, epoch=trainer.current_epoch + 1)

    def on_train_end(self, *_: Any) -> None:
        self.progress.stop()
        self._log_to_stdout()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    @staticmethod
    def _log_to_stdout() -> None:
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stdout)


def append_line(path: Path, line: str) -> None:
    """Append a line completely or not at all. Raises OSError that names the file, as a full disk's error does not."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        content = line.encode() + b"\n"
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _not_finite(metrics: dict[str, Any], module: torch.nn.Module) -> str | None:
    """Return the name of a loss, weight or running statistic that is not finite, or None.

    The loss alone does not show it: the sign of a NaN weight is finite."""
    for key, value in metrics.items():
        if key.endswith("/loss") and not math.isfinite(value):
            return key
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    finite = torch.stack([value.isfinite().all() for value in values.values()])
    if finite.all():  # the only wait for the device
        return None
    return list(values)[finite.tolist().index(False)].removeprefix("network.")


def binary_weights(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Return the latent weights of a network's binary layers with the layers' names."""
    return [
        (name.removeprefix("network."), layer.weight.detach())
        for name, layer in module.named_modules()
        if isinstance(layer, BinaryConv2d | BinaryLinear)
    ]


class KillAllRanks(pl.Callback):
    """Ends all processes of a run on SIGTERM or SIGINT, as SIGKILL would: what is on disk is complete.

    No handler runs while the main thread waits for another process in the middle of a step, so a thread ends them:
    the signal's number comes to it through a pipe. The handler keeps the main thread from taking the end of the
    others for an error. Lightning's, which is registered between the two hooks, would broadcast, and so wait, too.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            arrived, arrives = os.pipe()
            os.set_blocking(arrives, False)
            signal.set_wakeup_fd(arrives)
            Thread(target=_end, args=(arrived, trainer), name="signals", daemon=True).start()
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _wait_for_the_end if trainer.is_global_zero else signal.SIG_DFL)


class IgnoreSigterm(pl.Callback):
    """Ignores SIGTERM in a job that submitit has given to SLURM, as submitit does: the warning of which it knows is
    SIGUSR2. SLURM sends SIGTERM to a job that is preempted with a grace time, and requeues what it ends afterwards; a
    job that stops by itself is over. Lightning's own handler, which would stop it, is registered before training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait_for_the_end(*_: Any) -> None:
    while True:
        time.sleep(60)


def _end(arrived: int, trainer: pl.Trainer) -> None:
    """End all processes of a run when the number of a signal that ends it has arrived."""
    while (number := os.read(arrived, 1)[0]) not in (signal.SIGTERM, signal.SIGINT):
        pass
    with suppress(OSError, ValueError):  # a full disk, a closed stderr
        Path(trainer.default_root_dir, "RUNNING").unlink(missing_ok=True)
        print(STOPPED.format(signal.Signals(number).name), file=sys.stderr, flush=True)
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)
    os._exit(128 + number)
