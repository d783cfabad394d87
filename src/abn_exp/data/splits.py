"""Random subsets and splits of a data set, the same share of each class in both parts."""

import itertools

import torch
from torch import Tensor

from abn_exp.seeding import generator


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split 0 ... N-1 at random into (train, val), the same fraction of each class in val.

    ``val`` has round(fraction * N) indices, a class's share rounded down or up (largest remainder). A pure
    function of its arguments. Both are sorted int64; fraction 0 gives an empty val.

    Raises:
        ValueError: fraction is not in [0, 1), or a class would have nothing in one of the two.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to hold out must be in [0, 1), not {fraction}")
    everything = torch.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    val = _draw(labels, round(fraction * len(labels)), seed, "split")
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    is_val[val] = True
    train = everything[~is_val]
    for indices, part in ((train, "training"), (val, "validation")):
        if len(labels[indices].unique()) < len(labels.unique()):
            raise ValueError(
                f"holding out {fraction} of {len(labels)} images leaves a class without {part} images: "
                "change the fraction"
            )
    return train, val


def stratified_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw ``count`` of the indices 0 ... N-1, the same share of each class; sorted int64 (count,).

    A pure function of its arguments. Of classes of equal size, a larger subset contains every smaller one.

    Raises:
        ValueError: count is not in [1, N], or a class would have no image.
    """
    num_classes = len(labels.unique())
    if not 1 <= count <= len(labels):
        raise ValueError(f"a subset can have 1 to {len(labels)} images, not {count}")
    subset = _draw(labels, count, seed, "subset")
    if len(labels[subset].unique()) < num_classes:
        raise ValueError(f"{count} images leave one of the {num_classes} classes empty: ask for more")
    return subset


def first_of_each_class(labels: Tensor, count: int | None) -> Tensor:
    """Return the first `count` indices, taking the classes in turn; sorted int64. None, or too many: all."""
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    return turn.argsort(stable=True)[:count].sort().values


def _draw(labels: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    random = generator(seed, purpose)
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    share = [count * len(member) / len(labels) for member in members]
    take = [int(s) for s in share]
    by_remainder = sorted(range(len(share)), key=lambda c: take[c] - share[c])  # stable: ties go to the first
    for c in itertools.islice(by_remainder, count - sum(take)):
        take[c] += 1
    drawn = [m[torch.randperm(len(m), generator=random)][:k] for m, k in zip(members, take, strict=True)]
    return torch.cat(drawn).sort().values
