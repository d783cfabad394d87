"""Batches of a data set that is kept on the device, cropped and flipped there batch by batch."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from abn_exp.data.prepare import Split
from abn_exp.seeding import generator


class BatchLoader:
    r"""Iterate over (images, labels): float32 (B, 3, S, S), normalised, and int64 (B,), both on ``device``.

    .. math:: x = (u / 255 - \text{mean}) / \text{std}

    where u is the uint8 image after its random crop (of the image with ``padding`` black pixels on each side)
    and, with probability 1/2, its mirroring: torchvision's ``RandomCrop(S, padding)`` and
    ``RandomHorizontalFlip()``.

    Order, crops and flips of an epoch are pure functions of (seed, epoch), drawn on the CPU for the whole
    epoch: the image at position i of the epoch's order is cropped and flipped the same way whatever the
    device, the batch size or the number of ranks. The epoch is read when the first batch is asked for, not
    when ``iter`` is called: Lightning, resuming a run, calls ``iter`` first and ``set_epoch`` after it.

    ``batch_size`` is the global one. Of batch k, rank r takes images r, r + world_size, ..., so that the
    ranks' batches together are the batch of a single process. The last batch is what is left over, so the
    ranks' shares of it may differ by one image; if it is less than two images a rank, it is added to the
    batch before it (no batch norm can train on one image). So every image is seen once an epoch, none is
    repeated, no share is empty, and all ranks take the same number of steps.

    Memory on the device: four bytes for each pixel of the padded images, twice with ``flip``.

    Args:
        split: the images and labels.
        indices: int64 (n,), those to use, in the order of an unshuffled epoch.
        batch_size: images in a step, over all ranks; where they are shuffled (training) a multiple of world_size,
            so that gradients of equal shares are averaged.
        mean, std: of each channel, for pixels in [0, 1].
        device: where the set is kept and batches are made.
        seed: of order, crops and flips; may be None where there is nothing random.
        padding: black pixels added to each side before the crop; 0: no crop.
        flip: whether to mirror half of the images.
        shuffle: whether to draw a new order each epoch.
        rank, world_size: this process among those that share the work.

    Raises:
        ValueError: an argument is out of its range.
    """

    batch_sampler = None  # Lightning looks for one beside `sampler`

    def __init__(
        self,
        split: Split,
        indices: Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        seed: int | None = None,
        padding: int = 0,
        flip: bool = False,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1} (world_size - 1), not {rank}")
        if batch_size < world_size or (shuffle and batch_size % world_size != 0):
            raise ValueError(f"batch_size must be a positive multiple of {world_size} processes, not {batch_size}")
        if len(indices) < world_size:
            raise ValueError(f"{len(indices)} images cannot be shared by {world_size} processes: use more images")
        if padding < 0:
            raise ValueError(f"padding must be 0 or more pixels, not {padding}")
        if seed is None and (shuffle or flip or padding > 0):
            raise ValueError("shuffle, flip and padding need a seed")
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.seed = seed
        self.padding = padding
        self.flip = flip
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        indices = indices.to(split.images.device)
        self.labels = split.labels[indices].to(self.device)
        # A pixel is one 32-bit number, red + 256 green + 256^2 blue: a crop moves a third of the values that way, and
        # floats hold each colour with its factor, a power of two that the scale takes back, exactly.
        red, green, blue = split.images[indices].unbind(1)
        pixels = blue.int().mul_(256).add_(green).mul_(256).add_(red)
        n, size, _ = pixels.shape
        middle = slice(padding, padding + size)
        padded = pixels.new_zeros(n, 2 if flip else 1, size + 2 * padding, size + 2 * padding)
        padded[:, 0, middle, middle] = pixels
        if flip:
            padded[:, 1, middle, middle] = pixels.flip(2)
        padded = padded.to(self.device)  # only now, so that nothing else takes its memory
        # Every crop of every image, (n, 1 or 2, 2 padding + 1, 2 padding + 1, S, S), as a view: a batch is one
        # indexing operation.
        self._crops = padded.unfold(2, size, 1).unfold(3, size, 1)
        colour = torch.tensor([1, 256, 256**2], dtype=torch.int32, device=self.device).view(3, 1, 1)
        std_ = torch.tensor(std, device=self.device).view(3, 1, 1)
        self._mask = 255 * colour
        self._scale = 1 / (255 * std_) / colour
        self._shift = -torch.tensor(mean, device=self.device).view(3, 1, 1) / std_

    @property
    def sampler(self) -> "BatchLoader":
        """The object whose ``set_epoch`` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, left = divmod(len(self.labels), self.batch_size)
        return max(1, full + (left >= 2 * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, top, left, mirror = self._draw(self.epoch)
        for step in range(len(self)):
            mine = self.share(step)
            pixels = self._crops[order[mine], mirror[mine], top[mine], left[mine]]
            images = (pixels[:, None] & self._mask).float()
            yield images.mul_(self._scale).add_(self._shift), self.labels[order[mine]]

    def share(self, step: int) -> slice:
        """Return where in the epoch's order the images of this rank's part of a batch are."""
        start = step * self.batch_size
        stop = len(self.labels) if step == len(self) - 1 else start + self.batch_size
        return slice(start + self.rank, stop, self.world_size)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw an epoch's order, upper edges and left edges of the crops, and mirrorings (0, 1), each (n,).

        The left edge is that in the mirrored image, where the crop of the image is to be mirrored.
        """
        n = len(self.labels)
        order = torch.arange(n)
        corners = torch.zeros(n, 2, dtype=torch.int64)
        mirror = torch.zeros(n, dtype=torch.int64)
        if self.seed is not None:
            if self.shuffle:
                order = torch.randperm(n, generator=generator(self.seed, "order", epoch))
            if self.padding > 0:
                random = generator(self.seed, "crop", epoch)
                corners = torch.randint(2 * self.padding + 1, (n, 2), generator=random)
            if self.flip:
                mirror = torch.randint(2, (n,), generator=generator(self.seed, "flip", epoch))
        top, left = corners.unbind(1)
        left = torch.where(mirror == 1, 2 * self.padding - left, left)
        return order.to(self.device), top.to(self.device), left.to(self.device), mirror.to(self.device)


class BatchGroups:
    """A training loader's batches in lists of `size`, the last one shorter."""

    batch_sampler = None

    def __init__(self, loader: BatchLoader, size: int) -> None:
        self.loader = loader
        self.size = size

    @property
    def sampler(self) -> BatchLoader:
        """The object whose ``set_epoch`` Lightning calls."""
        return self.loader

    def __len__(self) -> int:
        return -(-len(self.loader) // self.size)

    def __iter__(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        batches = iter(self.loader)
        while group := list(islice(batches, self.size)):
            yield group
