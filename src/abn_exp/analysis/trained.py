"""Trained networks and the images they are tested on."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from abn_exp.config import parse
from abn_exp.data.prepare import ImageDataset, load
from abn_exp.results import Run, find_runs, load_network, read_config
from abn_exp.training.setup import make_loaders


def find_trained(folders: Iterable[str | Path]) -> list[Run]:
    """Return the finished runs in `folders`; each is a run's own folder (seed-0) or any folder above some.

    Raises ValueError where a folder has none, or where a finished run's weights are gone.
    """
    found: dict[Path, Run] = {}
    for folder in map(Path, folders):
        whole = folder.resolve()
        below = find_runs(whole.parent) if whole.name.startswith("seed-") else find_runs(whole)
        runs = [run for run in below if run.directory.is_relative_to(whole)]
        finished = [run for run in runs if run.status == "finished"]
        if not runs:
            raise ValueError(f"There are no runs in {folder}; give a run's folder (.../seed-0) or one above it.")
        if not finished:
            states = ", ".join(sorted({run.status for run in runs}))
            raise ValueError(f"No run in {folder} is finished ({states}); train to the end first.")
        found |= {run.directory: run for run in finished}
    for directory in found:
        if not (directory / "checkpoints" / "last.ckpt").is_file():
            raise ValueError(f"{directory} has no checkpoints/last.ckpt to analyse; train it again with force=true.")
    return sorted(found.values(), key=lambda run: (run.cell, run.seed))


def common_folder(folders: Sequence[str | Path]) -> Path:
    """Return the folder that all of these are in; of a single one, that one."""
    return Path(os.path.commonpath([Path(folder).resolve() for folder in folders]))


@dataclass(frozen=True)
class TestImages:
    """A test set, or a share of it: images as they are and as a network takes them, (N, 3, S, S)."""

    data: ImageDataset
    indices: Tensor  # (N,), of the whole test set
    normalized: Tensor
    labels: Tensor

    @property
    def boxes(self) -> Tensor | None:
        """(N, 4): x0, y0, x1, y1 in pixels, both corners inside; None where the set has none."""
        return None if self.data.test_boxes is None else self.data.test_boxes[self.indices]


class Opener:
    """Opens runs: the network with its last weights, and the images it is tested on, read once a data set."""

    def __init__(self, root: str | None, count: int | None, device: torch.device) -> None:
        """`root` replaces the runs' own data root; `count` is how many test images, None: all."""
        self.root, self.count, self.device = root, count, device
        self._key, self._images = "", None  # type: tuple[str, TestImages | None]

    def images(self, run: Run) -> TestImages:
        """Return the same images for every run on one data set: the first of each class, in equal shares."""
        config = parse(read_config(run.directory))
        changes = {"padding": 0, "flip": False} | ({} if self.root is None else {"root": self.root})
        config = config.model_copy(update={"dataset": config.dataset.model_copy(update=changes)})
        options = config.dataset
        if (key := f"{options!r}{config.recipe.normalization}") != self._key or self._images is None:
            source = {"path": options.path, "image_size": options.image_size, "download": options.download}
            data = load(options.name, options.root, **source)  # type: ignore[arg-type]
            chosen = first_of_each_class(data.test.labels, self.count)
            batches = list(make_loaders(config, data, torch.device("cpu"))["test"])
            normalized = torch.cat([images for images, _ in batches])[chosen]
            self._key = key
            self._images = TestImages(data, chosen, normalized.to(self.device), data.test.labels[chosen])
        return self._images

    def network(self, run: Run) -> nn.Module:
        return trained_network(run.directory, "last", self.device)


def trained_network(directory: Path, weights: Literal["last", "best"], device: torch.device) -> nn.Module:
    """Return a run's network, in evaluation mode, without gradients of its own.

    Raises ValueError where its running statistics were not saved, so that it is not the one that was trained.
    """
    network = load_network(directory, weights).requires_grad_(False)
    for name, module in network.named_modules():
        if module._non_persistent_buffers_set:
            raise ValueError(
                f"{directory}: {name} was saved without its running statistics; there is no trained network "
                "to analyse (persistent_stats=true saves them)."
            )
    return network.to(device).to(memory_format=torch.channels_last)


def first_of_each_class(labels: Tensor, count: int | None) -> Tensor:
    """Return the first `count` indices, taking the classes in turn; sorted int64. None, or too many: all."""
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    return turn.argsort(stable=True)[:count].sort().values
