"""What a run watches while it trains: the record of each epoch, sign flips, divergence, progress, checkpoints."""

import io
import json
import logging
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.classifier import LitClassifier
from abn_exp.results import read_metrics, write_text_atomic
from abn_exp.tracking import Tracker

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss or a weight is no longer a finite number."""


class EpochRecord(pl.Callback):
    """Writes a line an epoch to `metrics.jsonl`, the log and W&B: losses, accuracies, rate, flips, speed, ETA.

    flip_ratio of a layer: the share of its binary weights whose sign at the epoch's end is not the one at its
    start. latent_beyond_one: the share of its latent weights with |w| > 1.
    Raises Diverged where the training loss or a weight is not finite.
    """

    def __init__(self, directory: Path, tracker: Tracker) -> None:
        self.path = directory / "metrics.jsonl"
        self.tracker = tracker

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that goes on repeats the epochs after its last checkpoint; their old lines must not stay.
        kept = [line for line in read_metrics(self.path.parent) if line["epoch"] < trainer.current_epoch]
        if trainer.is_global_zero:
            write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.best = max((line["val/acc"], -line["epoch"]) for line in kept) if kept and "val/acc" in kept[0] else None
        self.started, self.first_epoch = time.monotonic(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signs = {name: weight > 0 for name, weight in binary_weights(pl_module)}
        self.epoch_started = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.train_seconds = time.monotonic() - self.epoch_started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        epoch = trainer.current_epoch
        metrics: dict[str, Any] = {"epoch": epoch, **pl_module.epoch_metrics("train")}
        seconds = time.monotonic() - self.epoch_started
        training = self.train_seconds if pl_module.eval_stages else seconds
        for stage in pl_module.eval_stages:
            for key in (f"{stage}/loss", f"{stage}/acc", f"{stage}/acc_top5"):
                metrics[key] = float(trainer.callback_metrics[key])
        metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics |= self._binary_metrics(pl_module)
        images = len(trainer.train_dataloader.labels)  # type: ignore[union-attr]
        metrics |= {"seconds": seconds, "images_per_second": images / training}
        if trainer.is_global_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        self.tracker.log(metrics)
        self._say(metrics, trainer)
        finite = torch.stack([parameter.isfinite().all() for parameter in pl_module.parameters()]).all()
        if not (metrics["train/loss"] < float("inf") and bool(finite)):
            raise Diverged(f"diverged in epoch {epoch + 1}: loss {metrics['train/loss']}, weights not finite")

    def _binary_metrics(self, pl_module: pl.LightningModule) -> dict[str, float]:
        metrics = {}
        for name, weight in binary_weights(pl_module):
            metrics[f"bnn/flip_ratio/{name}"] = ((weight > 0) != self.signs[name]).float().mean()
            metrics[f"bnn/latent_beyond_one/{name}"] = (weight.abs() > 1).float().mean()
        values = torch.stack(list(metrics.values())).tolist() if metrics else []
        return dict(zip(metrics, values, strict=True))

    def _say(self, metrics: dict[str, Any], trainer: pl.Trainer) -> None:
        epoch, epochs = metrics["epoch"], trainer.max_epochs or 0
        done = epoch + 1 - self.first_epoch
        eta = (time.monotonic() - self.started) / done * (epochs - epoch - 1)
        parts = [f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}"]
        parts.append(f"train loss {metrics['train/loss']:.3f} acc {metrics['train/acc']:.3f}")
        if "val/acc" in metrics:
            self.best = max(filter(None, [self.best, (metrics["val/acc"], -epoch)]))
            parts.append(f"val acc {metrics['val/acc']:.3f} (best {self.best[0]:.3f} in {1 - self.best[1]})")
        if "test/acc" in metrics:
            parts.append(f"test acc {metrics['test/acc']:.3f}")
        parts.append(f"lr {metrics['lr']:.1e}  {metrics['images_per_second']:.0f} img/s")
        parts.append("ETA " + time.strftime("%H:%M:%S", time.gmtime(eta)))
        log.info("  ".join(parts))


class Bar(pl.Callback):
    """One bar over all steps of a run, with the time left; what is logged meanwhile appears above it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True)
        total = int(trainer.estimated_stepping_batches)
        self.task = self.progress.add_task("", total=total, completed=trainer.global_step, epoch=1)
        self.progress.start()
        self._send_logs_to(sys.stdout)  # which the bar has replaced by a stream that prints above it

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.progress.update(self.task, completed=trainer.global_step, epoch=trainer.current_epoch + 1)

    def on_train_end(self, *_: Any) -> None:
        self.progress.stop()
        self._send_logs_to(sys.stdout)

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    @staticmethod
    def _send_logs_to(stream: TextIO) -> None:
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(stream)


def binary_weights(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Return the latent weights of a network's binary layers with the layers' names."""
    return [
        (name.removeprefix("network."), layer.weight.detach())
        for name, layer in module.named_modules()
        if isinstance(layer, BinaryConv2d | BinaryLinear)
    ]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, and keeps the one before `last.ckpt`.

    Lightning writes to the system's temporary folder; where that is another file system, its "rename" is a copy,
    and a full disk or a kill leaves half a file under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        part = path.with_name(f".{path.name}.part")
        try:
            with open(part, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if path.name == "last.ckpt" and path.exists():
                os.replace(path, previous(path))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Return where the checkpoint before `path` is kept."""
    return path.with_name(f"previous-{path.name}")


def checkpoints(directory: Path, *, keep_best: bool) -> list[pl.Callback]:
    """Return the callbacks that save `last.ckpt` after every epoch and, if asked, `best.ckpt` by `val/acc`.

    Only ends of epochs are saved: what Lightning saves inside an epoch resumes on other batches.
    """
    best_weights = {"filename": "best", "monitor": "val/acc", "mode": "max", "save_weights_only": True}
    kinds: list[dict[str, Any]] = [best_weights, {"filename": "last"}] if keep_best else [{"filename": "last"}]
    return [  # the best first, so that last.ckpt knows what best.ckpt holds
        ModelCheckpoint(
            directory / "checkpoints",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            **kind,
        )
        for kind in kinds
    ]


def usable_checkpoint(path: Path) -> Path | None:
    """Return `path` where it is whole, else the checkpoint before it with a warning, else None.

    A checkpoint is a zip archive; its checksums find what loading does not notice, down to a single bit.
    """
    for candidate in (path, previous(path)):
        if not candidate.is_file():
            continue
        try:
            with zipfile.ZipFile(candidate) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            broken = str(error)
        if broken is None:
            return candidate
        log.warning("%s is damaged (%s); going on from the checkpoint before it, if there is one", candidate, broken)
    return None
