"""Fold what stands between the integer sums of a binary layer and the next sign into integer thresholds.

sign(f(y)) for a function f of one channel, such as a norm and its Hardtanh, is a step function of the integer y. Its
steps are found by evaluating f, in float32 and by torch itself, at every integer that the layer can give.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abn_exp.binarize import SignZero

MAX_THRESHOLDS = 32  # of a channel; a norm that changes its sign more often than this is no threshold function
CHUNK = 2**22  # values evaluated at once


class Unfoldable(ValueError):
    """A function whose sign is not a few integer thresholds a channel; its text says why."""


@dataclass(frozen=True)
class Fold:
    """The sign of each channel as a step function of the integer y.

    ``first`` (C,) is whether the sign is +1 below all thresholds; ``thresholds`` (C, T > 0) are the integers from
    which on the sign is the other one, ascending, and ``limit + 1``, which no sum reaches, where a channel has fewer.
    ``limit`` is the largest ``|y|``.
    """

    first: NDArray[np.bool_]
    thresholds: NDArray[np.int32]
    limit: int

    @property
    def counts(self) -> NDArray[np.int64]:
        """Return the number of thresholds of each channel (C,): 0 a constant, 1 a threshold, 2 an interval."""
        return (self.thresholds <= self.limit).sum(1)

    def single_thresholds(self) -> NDArray[np.int64]:
        """Return the threshold of each channel that has one, (C,); for a constant, what all sums reach, or none."""
        return np.where(self.counts == 1, self.thresholds[:, 0], np.where(self.first, -self.limit, self.limit + 1))

    def signs(self, y: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return whether each sign is +1, for integers y (B, C, ...)."""
        shape = (-1, *[1] * (y.ndim - 2))
        positive = np.broadcast_to(self.first.reshape(shape), y.shape).copy()
        for column in self.thresholds.T:
            positive ^= y >= column.reshape(shape)
        return positive

    def intervals(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Return (low, high, inverted): the sign is -1 where ``low <= y < high`` and +1 elsewhere, or inverted.

        A threshold is one end of an interval whose other end no sum reaches, and a constant all of it or nothing.
        Raises ValueError for a channel with more than two thresholds.
        """
        end, counts = self.limit + 1, self.counts
        if counts.max() > 2:
            raise ValueError("a channel with more than two thresholds has no interval")
        thresholds = np.pad(self.thresholds, ((0, 0), (0, 2)), constant_values=end)[:, :2].astype(np.int64)
        inverted = ~self.first & (counts == 2)
        # First -1, or +1 inside: from the lowest sum to the first threshold; else from the first to the second
        low = np.where(self.first | inverted, thresholds[:, 0], -end)
        high = np.where(self.first | inverted, thresholds[:, 1], thresholds[:, 0])
        return low, high, inverted

    def negated(self, channels: NDArray[np.bool_]) -> "Fold":
        """Return the fold of -y for the chosen channels: y >= t is -y < 1 - t."""
        counts = self.counts
        thresholds = self.thresholds.copy()
        for c in np.flatnonzero(channels):
            thresholds[c, : counts[c]] = 1 - thresholds[c, : counts[c]][::-1]
        return Fold(self.first ^ (channels & (counts % 2 == 1)), thresholds, self.limit)


@torch.no_grad()
def fold(
    function: Callable[[Tensor], Tensor], channels: int, limit: int, sign_zero: SignZero = "plus", dims: int = 4
) -> Fold:
    """Return the fold of sign(function(y)) for the integers y = -limit ... limit of each channel.

    Args:
        function: from float32 (B, C, H, W) to the same shape (with ``dims`` 2: from (B, C)), each value a function of
            its channel and of the value at the same place alone.
        limit: the most products in a sum, so that no ``|y|`` is larger.
        sign_zero: what sign(0) is. With ``zero``, a value of exactly 0 has no bit.

    Raises Unfoldable where a channel has more than MAX_THRESHOLDS steps, gives 0 with ``sign_zero="zero"``, or where
    torch decides an integer by where it stands in a map (the vectors of a kernel and the rest round differently).
    """
    step = max(1, CHUNK // channels)
    below = np.empty((channels, 2 * limit + 1), np.bool_)
    for start in range(-limit, limit + 1, step):
        y = torch.arange(start, min(start + step, limit + 1), dtype=torch.float32)
        rows = y[:, None].expand(-1, channels).contiguous()
        if dims == 2:
            value = function(rows)
            elsewhere = value[::7]
            again = function(rows[::7].contiguous())
        else:
            value = function(rows.T.contiguous()[None, :, None])[0, :, 0].T
            elsewhere = value
            again = function(rows[:, :, None, None])[:, :, 0, 0]  # each value alone in its map
        below[:, start + limit : start + limit + len(y)] = (value < 0).T.numpy()
        if not torch.equal(elsewhere < 0, again < 0):
            raise Unfoldable("torch rounds it in more than one way, and signs depend on which")
        if sign_zero == "zero" and (zeros := (value == 0).nonzero()).numel():
            at, of = zeros[0].tolist()
            raise Unfoldable(f"the sum {int(y[at])} of channel {of} gives exactly 0, which is no bit here")
    changes = below[:, 1:] != below[:, :-1]
    most = int(changes.sum(1).max(initial=1))
    if most > MAX_THRESHOLDS:
        raise Unfoldable(f"a channel changes its sign {most} times, more than {MAX_THRESHOLDS}")
    thresholds = np.full((channels, most), limit + 1, np.int32)
    channel, position = np.nonzero(changes)
    number = np.arange(len(channel)) - np.searchsorted(channel, channel)  # of a channel's steps: 0, 1, ...
    thresholds[channel, number] = position + 1 - limit
    return Fold(~below[:, 0], thresholds, limit)
