"""LightningModule: loss, metrics, optimizer and learning-rate schedule. The network is passed in."""

import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from abn_exp.binarize import clip_latent_weights_
from abn_exp.config import RecipeConfig
from abn_exp.data.loader import BatchLoader
from abn_exp.errors import NotContinued
from abn_exp.norm import SynchronizedStatistics
from abn_exp.optimizer import build_optimizer
from abn_exp.provenance import device_kind
from abn_exp.seeding import derive_seed
from abn_exp.training.watch import Counter

Stage = Literal["train", "val", "test"]

log = logging.getLogger(__name__)


class LitClassifier(pl.LightningModule):
    """A network that learns to classify images (B, 3, S, S) into labels (B,) by cross-entropy.

    Each stage adds up loss, top-1 and top-5 on the device and gives means over images once an epoch
    (`epoch_metrics`), so that no step waits for the device. Training takes groups of batches (`BatchGroups`), so that
    Lightning's overhead is paid once a group, not once a step.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: RecipeConfig,
        seed: int,
        num_classes: int,
        steps_per_epoch: int,
        eval_stages: tuple[Stage, ...] = ("val",),
        sync_norm: bool = False,
    ) -> None:
        """`eval_stages` names the loaders that are evaluated after every epoch, in their order.

        `sync_norm`: whether batch norms take their statistics over the batches of all processes.
        """
        super().__init__()
        self.automatic_optimization = False
        self.steps = steps_per_epoch * recipe.epochs
        self.network = network
        self.num_classes = num_classes
        self.recipe = recipe
        self.seed = seed
        self.eval_stages = eval_stages
        self.sync_norm = sync_norm
        self.inputs: dict[str, Any] = {}  # of its images, as input.json has it
        self.made_with: list[dict[str, Any]] = []  # with what its parts are trained, the last of them here
        self.evaluated: dict[str, float] = {}  # what the last evaluation found
        self.predicted: Tensor  # classes of the test images in their order, (N,), as the last test found them
        self.begun: Counter = SimpleNamespace(value=0)  # batches, of every stage
        self._sums: dict[Stage, Tensor] = {}

    def _shared_step(self, batch: tuple[Tensor, Tensor], stage: Stage) -> tuple[Tensor, Tensor]:
        """Return the loss and the predicted classes (B,)."""
        self.begun.value += 1
        images, labels = batch
        # Where the network is compiled, it is for training; each other shape of a batch would be compiled again.
        logits = self.network(images) if stage == "train" else self.network.forward(images)
        smoothing = self.recipe.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        with torch.no_grad():
            likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            top5 = likeliest == labels[:, None]
            count = loss.new_full((), len(labels))  # new_tensor would wait for the device
            sums = torch.stack([loss * count, top5[:, 0].sum(), top5.sum(), count])
            self._sums[stage] = self._sums[stage] + sums if stage in self._sums else sums
        return loss, likeliest[:, 0]

    def epoch_metrics(self, stage: Stage) -> dict[str, float]:
        """Return the stage's means since the last call, over the images of all devices, and reset them."""
        sums = self.trainer.strategy.reduce(self._sums.pop(stage), reduce_op="sum")
        loss, top1, top5, count = (float(value) for value in sums)
        return {
            f"{stage}/loss": loss / count,
            f"{stage}/acc": top1 / count,
            f"{stage}/acc_top5": top5 / count,
        }

    def on_train_epoch_start(self) -> None:
        # Random numbers drawn in training are a function of (seed, epoch): a resumed run draws the same.
        torch.manual_seed(derive_seed(self.seed, "train", self.current_epoch))
        if self.recipe.optimizer.rebuild_each_epoch:
            fresh = build_optimizer(self.recipe.optimizer.model_dump(), self.parameters())
            self.optimizers(use_pl_optimizer=False).state = fresh.state  # type: ignore[union-attr]

    def training_step(self, batches: list[tuple[Tensor, Tensor]], batch_index: int) -> None:
        """Take a step of the optimizer on each batch of a group."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(scheduler, LambdaLR)
        start, end = self.recipe.clip_latent_range
        for batch in batches:
            if self.trainer.received_sigterm:  # else an epoch's last steps would be missing from it
                raise SIGTERMException
            with SynchronizedStatistics() if self.sync_norm and self.trainer.world_size > 1 else nullcontext():
                loss, _ = self._shared_step(batch, "train")
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.recipe.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.recipe.clip_grad_norm)
            optimizer.step()
            scheduler.step()
            if self.recipe.clip_latent_weights and start < scheduler.last_epoch / self.steps <= end:
                clip_latent_weights_(self.network)

    def on_validation_epoch_start(self) -> None:
        self._share_buffers()

    def on_test_epoch_start(self) -> None:
        self._share_buffers()
        self.predicted = torch.zeros_like(self._test_loader.labels)

    def _share_buffers(self) -> None:
        """Use the first process's running statistics in all processes: a checkpoint holds those."""
        if self.trainer.world_size > 1:
            for buffer in self.network.buffers():
                dist.broadcast(buffer, 0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int, dataloader_idx: int = 0) -> None:
        self._shared_step(batch, self.eval_stages[dataloader_idx])

    def on_validation_epoch_end(self) -> None:
        self.evaluated = {
            key: value for stage in self.eval_stages for key, value in self.epoch_metrics(stage).items()
        }
        if "val/acc" in self.evaluated:
            self.log("val/acc", self.evaluated["val/acc"])  # in float32, for the best checkpoint

    def on_test_epoch_end(self) -> None:
        self.evaluated = self.epoch_metrics("test")
        self.predicted = self.trainer.strategy.reduce(self.predicted, reduce_op="sum")  # each has filled in its share

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        _, predicted = self._shared_step(batch, "test")
        self.predicted[self._test_loader.share(batch_index)] = predicted

    @property
    def _test_loader(self) -> BatchLoader:
        loader = self.trainer.test_dataloaders
        assert isinstance(loader, BatchLoader)
        return loader

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["num_classes"] = self.num_classes  # so that the network can be built again from its run alone
        checkpoint["device"] = device_kind(next(self.parameters()).device)
        checkpoint["inputs"] = self.inputs
        checkpoint["made_with"] = self.made_with

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        begun, here = checkpoint.get("device"), device_kind(next(self.parameters()).device)
        if begun not in (None, here):  # its record would name one of the two
            raise NotContinued(
                f"This run was begun on {begun} and cannot go on on {here}; choose the device= that it was begun on, "
                "or force=true to begin it again."
            )
        now = [_what_counts(made) for made in self.made_with]
        earlier = [made for made in checkpoint.get("made_with", []) if _what_counts(made) not in now]
        if earlier:
            log.warning("its epochs so far are of other code, libraries or hardware; the record names both")
        self.made_with = [*earlier, *self.made_with]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.recipe.optimizer.model_dump(), self.parameters())
        warmup = self.recipe.schedule.warmup_epochs * self.steps // self.recipe.epochs
        scheduler = LambdaLR(optimizer, lambda step: rate(step, self.steps, warmup, self.recipe.schedule.name))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def _what_counts(made_with: dict[str, Any]) -> dict[str, Any]:
    """Return what may change a number: with a digest of the code, not the commit."""
    return {k: v for k, v in made_with.items() if k != "git_commit" or made_with["code"] is None}


def rate(step: int, steps: int, warmup: int, schedule: Literal["constant", "cosine", "linear"]) -> float:
    """Return the factor of the learning rate at `step` of `steps`: linear over `warmup`, then the schedule to zero.

    cosine: (1 + cos(pi t)) / 2, linear: 1 - t, with t in [0, 1) the share of the steps after the warm-up.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return {"constant": 1.0, "cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t}[schedule]
