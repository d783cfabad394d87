"""The conventional way to train a binary network: what the benchmark compares with.

The norm is a formula over tensors, whose running statistics keep their graph; binarising takes four passes; convs
have biases that the norm behind them cancels; images are transformed one by one with PIL in worker processes; each
step waits for the device three times, for its loss and its accuracies. What it computes is what `abn_exp.models` do.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from abn_exp.binarize import BinaryConv2d, BinaryLinear, conv2d
from abn_exp.data.prepare import ImageDataset, Split
from benchmarks.measure import synchronize


class Norm(nn.Module):
    r"""y = \sigma(xhat) xhat + beta, by its formula. With `detach` the running statistics are cut from the graph."""

    def __init__(self, num_features: int, detach: bool = False) -> None:
        super().__init__()
        shape = (1, num_features, 1, 1)
        self.bias = nn.Parameter(torch.zeros(shape))
        self.moving_mean, self.moving_var = torch.zeros(shape), torch.ones(shape)
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.moving_mean.to(x.device), self.moving_var.to(x.device)
        if self.training:
            old_mean, old_var = mean, var
            mean = x.mean((0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.moving_mean, self.moving_var = 0.1 * old_mean + 0.9 * mean, 0.1 * old_var + 0.9 * var
            if self.detach:
                self.moving_mean, self.moving_var = self.moving_mean.detach(), self.moving_var.detach()
        x = (x - mean) / torch.sqrt(var + 1e-5)
        return torch.sigmoid(x) * x + self.bias


class Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = 1.0
        return x.clone().div(scale).sign().mul(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        x, weight = Binarize.apply(input), Binarize.apply(self.weight)
        return conv2d(x, weight, self.bias, self.stride, self.padding)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(Binarize.apply(input), Binarize.apply(self.weight), self.bias)


def conventional(network: nn.Module) -> nn.Module:
    """Replace the layers of a network of `abn_exp.models`, made with `Norm`, by conventional ones; weights stay."""
    for name, layer in network.named_children():
        if isinstance(layer, nn.Conv2d):
            kind = _Conv2d if isinstance(layer, BinaryConv2d) else nn.Conv2d
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            other: nn.Conv2d | nn.Linear = kind(*shape)  # type: ignore[arg-type]
        elif isinstance(layer, BinaryLinear):
            other = _Linear(layer.in_features, layer.out_features)
        else:
            conventional(layer)
            continue
        other.weight = layer.weight
        assert other.bias is not None
        nn.init.zeros_(other.bias)
        setattr(network, name, other)
    return network


class PILImages(Dataset[tuple[Tensor, int]]):
    """Images that are transformed one by one, when they are asked for."""

    def __init__(self, split: Split, train: bool) -> None:
        self.images: NDArray[np.uint8] = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        size = self.images.shape[1]
        random = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()] if train else []
        normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.transform = transforms.Compose([*random, transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def _correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean()


class ConventionalLoop:
    """A network, its data and its optimizer; times are in seconds, the device's work included."""

    def __init__(
        self,
        network: nn.Module,
        data: ImageDataset,
        batch_size: int,
        device: torch.device,
        workers: int,
        bf16: bool = False,
    ) -> None:
        """`bf16`: autocast, and channels-last tensors."""
        self.network, self.device, self.bf16 = network.to(device), device, bf16
        if bf16:
            network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers}
        options["pin_memory"] = device.type == "cuda"
        self.train_loader = DataLoader(PILImages(data.train, True), shuffle=True, drop_last=True, **options)
        self.test_loader = DataLoader(PILImages(data.test, False), **options)
        self._batches: Iterator[Any] = iter(())

    def _to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        return images.to(memory_format=torch.channels_last) if self.bf16 else images, labels

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and its logits."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            # Compiled for training alone, as ours is.
            logits = self.network(images) if self.network.training else self.network.forward(images)
            return F.cross_entropy(logits, labels), logits

    def step(self, batch: Any) -> None:
        """One step of training on one batch."""
        # What the other loops may have set.
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        images, labels = self._to_device(batch)
        loss, logits = self.loss(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._wait(loss, logits, labels)

    @staticmethod
    def _wait(loss: Tensor, logits: Tensor, labels: Tensor) -> list[float]:
        return [loss.item(), _correct(logits, labels, 1).item(), _correct(logits, labels, 5).item()]

    def train(self, warm: int, steps: int) -> float:
        """Return the time of a step with its data, the mean of `steps` after `warm` others."""
        self.network.train()
        start = 0.0
        for i in range(warm + steps):
            if i == warm:
                synchronize(self.device)
                start = time.perf_counter()
            batch = next(self._batches, None)
            if batch is None:
                self._batches = iter(self.train_loader)
                batch = next(self._batches)
            self.step(batch)
        synchronize(self.device)
        return (time.perf_counter() - start) / steps

    def evaluate(self) -> float:
        """Return the time an image takes to evaluate, after a first batch that waits for the workers' start."""
        self.network.eval()
        images_seen = 0
        with torch.no_grad():
            for i, batch in enumerate(self.test_loader):
                if i == 1:
                    synchronize(self.device)
                    start = time.perf_counter()
                images, labels = self._to_device(batch)
                self._wait(*self.loss(images, labels), labels)
                images_seen += len(labels) if i else 0
        synchronize(self.device)
        self.network.train()
        return (time.perf_counter() - start) / images_seen

    def epoch(self) -> float:
        """Return the time of a pass over all training images, worker processes started and ended."""
        start = time.perf_counter()
        for batch in self.train_loader:
            self.step(batch)
        synchronize(self.device)
        return time.perf_counter() - start
