"""Evaluate a run's saved weights on any set of the same image size and number of classes; write its predictions."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from abn_exp.analysis.trained import network_on
from abn_exp.config import DatasetConfig, parse
from abn_exp.data.loader import BatchLoader
from abn_exp.data.prepare import load
from abn_exp.errors import ConfigError
from abn_exp.files import write_text_atomic
from abn_exp.trained_network import load_input_format, read_config
from abn_exp.training.setup import load_data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A network's outputs on a set of images: int64 (N,) labels, float32 (N, classes) logits, in the set's order."""

    labels: Tensor
    logits: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images whose label has the greatest logit, in [0, 1]."""
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits.double(), self.labels).item()

    def write(self, path: Path) -> None:
        """Write a CSV file with a line an image: label, prediction and the prediction's probability."""
        probability, prediction = self.logits.softmax(1).max(1)
        columns = zip(self.labels.tolist(), prediction.tolist(), probability.tolist(), strict=True)
        lines = [f"{i},{label},{guess},{p:.6f}\n" for i, (label, guess, p) in enumerate(columns)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, "".join(["image,label,prediction,probability\n", *lines]))


@torch.no_grad()
def evaluate(
    directory: Path,
    dataset: DatasetConfig | None = None,
    weights: Literal["last", "best"] = "last",
    part: Literal["train", "test"] = "test",
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Return the outputs of a run's network on a data set, by default on its own test images; in float32.

    Images are normalised as those that it was trained on, and classes of the same names are the same classes, in
    whatever order. Raises ConfigError where the images have another size or another number of classes, ValueError or
    OSError where the run's weights cannot be read.
    """
    network = network_on(directory, weights, torch.device(device))
    config, inputs = parse(read_config(directory)), load_input_format(directory)
    options = config.dataset if dataset is None else dataset
    size = inputs.image_size
    if options.image_size != size:
        raise ConfigError(
            f"{options.name} has images of {options.image_size} pixels a side, but this network takes {size}; only "
            "those of dataset=folder are scaled (dataset.image_size)."
        )
    classes = network(torch.zeros(1, 3, size, size, device=device)).shape[1]
    data = load_data(config) if dataset is None else load(**options.source)
    if len(data.classes) != classes:
        raise ConfigError(f"{options.name} has {len(data.classes)} classes, but this network tells {classes} apart.")
    names = data.classes if inputs.classes is None else inputs.classes
    if set(names) != set(data.classes):
        log.warning("%s names its classes otherwise than the run does; they are taken in their order", options.name)
        names = data.classes
    places = torch.tensor([names.index(name) for name in data.classes])  # of the set's classes among the run's
    split = data.train if part == "train" else data.test
    batches = BatchLoader(
        split, torch.arange(len(split.labels)), 500, mean=inputs.mean, std=inputs.std, device=device
    )
    found = [(places[labels.cpu()], network(images).cpu()) for images, labels in batches]
    return Evaluation(torch.cat([labels for labels, _ in found]), torch.cat([logits for _, logits in found]))
