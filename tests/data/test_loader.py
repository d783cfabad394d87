from typing import Any

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from abn_exp.data.loader import BatchGroups, BatchLoader
from abn_exp.data.prepare import Split
from abn_exp.seeding import generator
from abn_exp.trained_network import InputFormat

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SIZE = 8


def split_of(count: int) -> Split:
    """Random images; an image's label is its index."""
    images = torch.randint(256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    return Split(images.to(torch.uint8), torch.arange(count))


def loader_of(count: int, batch_size: int, **options: Any) -> BatchLoader:
    return BatchLoader(
        split_of(count),
        torch.arange(count),
        batch_size,
        mean=MEAN,
        std=STD,
        device="cpu",
        **options,
    )


def training_loader(count: int = 50, batch_size: int = 12, seed: int = 5, **options: Any) -> BatchLoader:
    return loader_of(count, batch_size, seed=seed, padding=2, flip=True, shuffle=True, **options)


def epoch_of(loader: BatchLoader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of one epoch."""
    loader.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def normalized(image: torch.Tensor) -> torch.Tensor:
    return TF.normalize(TF.to_dtype(image, torch.float64, scale=True), list(MEAN), list(STD)).float()


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True), (0, False)])
def test_against_torchvision_an_image_at_a_time(epoch: int, padding: int, flip: bool) -> None:
    count, seed = 40, 5
    split = split_of(count)
    loader = loader_of(count, 7, seed=seed, padding=padding, flip=flip, shuffle=True)
    images, labels = epoch_of(loader, epoch)
    order = torch.randperm(count, generator=generator(seed, "order", epoch))
    corners = torch.randint(2 * padding + 1, (count, 2), generator=generator(seed, "crop", epoch))
    mirror = torch.randint(2, (count,), generator=generator(seed, "flip", epoch))
    assert 0 < mirror.sum() < count
    assert torch.equal(labels, order)
    for i in range(count):
        image = split.images[order[i]]
        if padding > 0:
            top, left = corners[i].tolist()
            image = TF.crop(TF.pad(image, [padding], fill=0), top, left, SIZE, SIZE)
        if flip and mirror[i]:
            image = TF.horizontal_flip(image)
        torch.testing.assert_close(images[i], normalized(image), rtol=1e-5, atol=1e-6)


def test_evaluation_is_plain_and_in_order() -> None:
    split = split_of(20)
    indices = torch.tensor([7, 3, 19, 0, 4])
    loader = BatchLoader(split, indices, 3, mean=MEAN, std=STD, device="cpu")
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [3, 2]
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, normalized(split.images[indices]), rtol=1e-5, atol=1e-6)
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert torch.equal(labels, indices)


def test_it_normalises_as_a_run_s_input_format_does_to_the_last_bit() -> None:
    split = split_of(20)
    ((images, _),) = BatchLoader(split, torch.arange(20), 20, mean=MEAN, std=STD, device="cpu")
    inputs = InputFormat(split.images.shape[-1], MEAN, STD, None)
    assert torch.equal(inputs.normalize(split.images), images)


def test_only_the_indices_are_used() -> None:
    indices = torch.arange(0, 20, 3)
    loader = BatchLoader(split_of(20), indices, 4, mean=MEAN, std=STD, device="cpu", seed=0, shuffle=True, flip=True)
    assert torch.equal(epoch_of(loader)[1].sort().values, indices)


def test_every_image_once_an_epoch_in_another_order() -> None:
    loader = training_loader()
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    for _, labels in (first, second):
        assert torch.equal(labels.sort().values, torch.arange(50))
    assert not torch.equal(first[1], second[1])


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    loader = training_loader()
    images, labels = epoch_of(loader, 2)
    epoch_of(loader, 0)
    torch.manual_seed(99)
    again = epoch_of(loader, 2)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    other = epoch_of(training_loader(seed=6), 2)
    assert not torch.equal(labels, other[1])
    # crops and flips change with the epoch too, not only the order
    crops = loader_of(50, 50, seed=5, padding=2)
    flips = loader_of(50, 50, seed=5, flip=True)
    assert not torch.equal(epoch_of(crops, 0)[0], epoch_of(crops, 1)[0])
    assert not torch.equal(epoch_of(flips, 0)[0], epoch_of(flips, 1)[0])


def test_crops_and_flips_do_not_shift_the_order() -> None:
    plain = loader_of(50, 12, seed=5, shuffle=True)
    assert torch.equal(epoch_of(plain, 1)[1], epoch_of(training_loader(), 1)[1])


def test_an_image_is_augmented_the_same_way_whatever_the_batch_size() -> None:
    images, labels = epoch_of(training_loader(batch_size=12), 1)
    others, other_labels = epoch_of(training_loader(batch_size=25), 1)
    assert torch.equal(images, others)
    assert torch.equal(labels, other_labels)


def test_the_epoch_is_read_at_the_first_batch() -> None:
    loader = training_loader()
    batches = iter(loader)
    loader.sampler.set_epoch(4)  # as Lightning does when it resumes: after iter()
    _, labels = next(batches)
    assert torch.equal(labels, epoch_of(loader, 4)[1][:12])
    assert not torch.equal(labels, epoch_of(loader, 0)[1][:12])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [4, 12, 13, 23, 24, 25, 27, 30, 50])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_an_epoch(count: int, world_size: int, shuffle: bool) -> None:
    whole = training_loader(count) if shuffle else loader_of(count, 12)
    whole.set_epoch(1)
    ranks = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size}
        loader = training_loader(count, **options) if shuffle else loader_of(count, 12, **options)
        loader.set_epoch(1)
        ranks.append(list(loader))
        assert len(ranks[-1]) == len(loader)
    assert len({len(batches) for batches in ranks}) == 1  # or a rank would wait for ever
    together_images, together_labels = [], []
    for shares in zip(*ranks, strict=True):
        sizes = [len(labels) for _, labels in shares]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        images, labels = (torch.empty(sum(sizes), *part.shape[1:], dtype=part.dtype) for part in shares[0])
        for rank, share in enumerate(shares):
            images[rank::world_size], labels[rank::world_size] = share
        together_images.append(images)
        together_labels.append(labels)
    for (images, labels), ours, our_labels in zip(whole, together_images[:-1], together_labels[:-1], strict=False):
        assert torch.equal(images, ours)
        assert torch.equal(labels, our_labels)
    images, labels = epoch_of(whole, 1)
    assert torch.equal(torch.cat(together_images), images)
    assert torch.equal(torch.cat(together_labels), labels)


@pytest.mark.parametrize(
    ("count", "world_size", "sizes"),
    [
        (24, 1, [12, 12]),
        (25, 1, [12, 13]),  # no batch of one image
        (26, 1, [12, 12, 2]),
        (1, 1, [1]),
        (27, 2, [6, 8]),  # rank 0 of 12 and 15
        (28, 2, [6, 6, 2]),
    ],
)
def test_sizes_of_batches(count: int, world_size: int, sizes: list[int]) -> None:
    loader = loader_of(count, 12, world_size=world_size)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (20, [5])])
def test_bundles_hold_every_batch_in_order(size: int, lengths: list[int]) -> None:
    loader = training_loader(count=50, batch_size=12)
    groups = BatchGroups(loader, size)
    for epoch in (0, 3):
        expected = epoch_of(loader, epoch)
        loader.set_epoch(99)
        unread = iter(groups)
        groups.sampler.set_epoch(epoch)  # Lightning, resuming, sets the epoch of an iterator that it has
        found = list(unread)
        assert [len(group) for group in found] == lengths
        assert len(groups) == len(lengths)
        images, labels = zip(*(batch for group in found for batch in group), strict=True)
        assert torch.equal(torch.cat(images), expected[0])
        assert torch.equal(torch.cat(labels), expected[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1"),
        ({"world_size": 5, "shuffle": True, "seed": 0}, "positive multiple of 5"),
        ({"world_size": 13}, "positive multiple of 13"),
        ({"batch_size": 0}, "batch_size"),
        ({"count": 1, "world_size": 2}, "1 images cannot be shared by 2"),
        ({"count": 0}, "0 images cannot be shared"),
        ({"padding": -1, "seed": 0}, "padding"),
        ({"shuffle": True}, "need a seed"),
        ({"flip": True}, "need a seed"),
        ({"padding": 1}, "need a seed"),
    ],
)
def test_argument_mistakes(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(**{"count": 20, "batch_size": 12} | options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_batches_on_a_gpu() -> None:
    here = training_loader()
    there = BatchLoader(
        split_of(50),
        torch.arange(50),
        12,
        mean=MEAN,
        std=STD,
        device="cuda",
        seed=5,
        padding=2,
        flip=True,
        shuffle=True,
    )
    for (images, labels), (gpu_images, gpu_labels) in zip(here, there, strict=True):
        assert gpu_images.is_cuda
        torch.testing.assert_close(gpu_images.cpu(), images)
        assert torch.equal(gpu_labels.cpu(), labels)


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(50, 12, 1), (50, 12, 2), (49, 12, 2), (25, 12, 2)])
def test_shares_say_where_a_batch_is_in_the_epoch_s_order(count: int, batch_size: int, world_size: int) -> None:
    found = torch.full((count,), -1)
    for rank in range(world_size):
        loader = loader_of(count, batch_size, rank=rank, world_size=world_size)
        for step, (_, labels) in enumerate(loader):
            found[loader.share(step)] = labels
    assert torch.equal(found, torch.arange(count))
