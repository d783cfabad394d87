"""Statistics of the predictions of single test images: sampling error of the test set, agreement, McNemar's test.

``correct`` is a boolean array (num_seeds, num_images): whether the run of that seed is right on that test image.
Rows of two arrays that are compared are the same seeds, columns always the same images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as st

from abn_exp.report.stats import CONFIDENCE, NAN, Interval

Predictions = NDArray[np.integer]


@dataclass(frozen=True)
class CrossedMean:
    """A mean over seeds and test images, both taken as random, in percent or points."""

    mean: float
    interval: Interval  # covers new seeds and a new test set
    from_seeds: float  # standard error that is the seeds' alone
    from_images: float  # standard error that is the test set's alone


@dataclass(frozen=True)
class SpreadSplit:
    """The variance of accuracies between seeds, split; stds in points; an estimate below zero is 0."""

    std: float
    std_of_test_set: float  # of equally good networks on this many images
    std_of_networks: float  # on an infinitely large test set
    interval_of_networks: Interval


@dataclass(frozen=True)
class McNemar:
    """Test images that one of two runs of a seed classifies rightly and the other does not; exact two-sided p."""

    candidate_alone: int
    reference_alone: int
    p: float


def crossed_mean(values: ArrayLike) -> CrossedMean:
    """Return the mean of ``values`` (num_seeds, num_images), per image 0 or 1 or a difference of these, in percent.

    With x_si = mean + seed_s + image_i + rest_si, all random, n seeds and m images, Var(mean) = var(seed) / n +
    var(image) / m + var(rest) / (n m). The mean squares of the two-way table estimate it: (MS_seeds + MS_images -
    MS_rest) / (n m), where a negative part of the images counts as 0. Half the interval's width is the root of the
    sum of the squares of the two parts' own, Student's with n - 1 and with m - 1 degrees of freedom: with
    Satterthwaite's degrees of freedom for the sum it would cover too little below some ten seeds. NaN below two.
    """
    x = 100 * np.asarray(values, dtype=np.float64)
    n, m = x.shape
    mean = float(x.mean()) if n else NAN
    if n < 2 or m < 2:
        return CrossedMean(mean, (NAN, NAN), NAN, NAN)
    rows, columns = x.mean(axis=1), x.mean(axis=0)
    ms_seeds = m * rows.var(ddof=1)
    ms_images = n * columns.var(ddof=1)
    total = ((x - mean) ** 2).sum()
    ms_rest = max(0.0, total - (n - 1) * ms_seeds - (m - 1) * ms_images) / ((n - 1) * (m - 1))
    seeds, images = ms_seeds / (n * m), max(0.0, ms_images - ms_rest) / (n * m)
    if seeds + images == 0:
        return CrossedMean(mean, (NAN, NAN), 0.0, 0.0)
    by_seeds, by_images = st.t.ppf((1 + CONFIDENCE) / 2, [n - 1, m - 1]) * np.sqrt([seeds, images])
    half = math.hypot(by_seeds, by_images)
    return CrossedMean(mean, (mean - half, mean + half), math.sqrt(seeds), math.sqrt(images))


def split_spread(correct: ArrayLike) -> SpreadSplit:
    """Split the variance of accuracies between seeds into the test set's sampling and differences of networks.

    The covariance over seeds of the accuracies on two disjoint halves of the test set holds no sampling error of
    either half (Jordan 2023, arXiv 2304.01910). Averaged over all ways to halve it, it is the mean covariance of two
    different images, (m V - v) / (m - 1), with V the variance of the accuracies and v the mean variance over seeds of
    a single image, m images. The rest, V - that, is the test set's. The interval is the chi-square interval of V less
    the test set's part, which is known far better.
    """
    x = 100 * np.asarray(correct, dtype=np.float64)
    n, m = x.shape
    if n < 2 or m < 2:
        return SpreadSplit(NAN, NAN, NAN, (NAN, NAN))
    variance = float(x.mean(axis=1).var(ddof=1))
    networks = (m * variance - float(x.var(axis=0, ddof=1).mean())) / (m - 1)
    sampling = variance - networks
    tails = st.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], n - 1)
    low, high = ((n - 1) * variance / tails) - sampling
    return SpreadSplit(math.sqrt(variance), _root(sampling), _root(networks), (_root(low), _root(high)))


def _root(variance: float) -> float:
    return math.sqrt(max(0.0, variance))


def mcnemar(candidate: ArrayLike, reference: ArrayLike) -> list[McNemar]:
    """Return McNemar's exact test for each seed: of the images on which the two runs differ, is either right more
    often than in half of them? It is about these two networks, not about their norms."""
    a, b = np.asarray(candidate, dtype=bool), np.asarray(reference, dtype=bool)
    alone = [(int(only_a), int(only_b)) for only_a, only_b in zip((a & ~b).sum(1), (b & ~a).sum(1), strict=True)]
    return [McNemar(i, k, float(st.binomtest(i, i + k).pvalue) if i + k else 1.0) for i, k in alone]


def agreement(pairs: Iterable[tuple[Predictions, Predictions]]) -> float:
    """Return the share of test images on which both runs of a pair predict the same class, averaged over the pairs;
    NaN where there is none."""
    shares = [float(np.mean(a == b)) for a, b in pairs]
    return float(np.mean(shares)) if shares else NAN
