"""Means of scores over seeds, and the difference of two.

Pure functions on samples (num_seeds,); in a comparison entry i of both is the same seed. NaN marks a seed without a
score: it is left out, never filled in. What cannot be computed (too few seeds, no spread) is NaN. Where chance is
used, the generator is an argument.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy import stats as st

Array = NDArray[np.float64]
Interval = tuple[float, float]

NAN = float("nan")
CONFIDENCE = 0.95
ALPHA = 0.05
EXACT_SIGN_FLIPS = 20  # 2^20 sums are 8 MB; above this, flips are drawn at random
RESAMPLES = 9_999


@dataclass(frozen=True)
class Summary:
    """One cell over its seeds, in the unit of its scores; ``std`` has ddof = 1."""

    n: int
    mean: float
    std: float
    mean_interval: Interval
    std_interval: Interval
    minimum: float
    maximum: float


@dataclass(frozen=True)
class MeanComparison:
    """Candidate minus reference. ``effect`` is in standard deviations, named by ``effect_name``."""

    method: Literal["paired", "welch"]
    n: tuple[int, int]  # seeds used of the candidate, of the reference; equal where paired
    differences: tuple[float, ...]  # one a common seed; empty where not paired
    difference: float
    standard_error: float
    df: float  # degrees of freedom of the standard error
    interval: Interval
    p: float
    p_sign_flip: float
    effect: float
    effect_name: str


def present(sample: ArrayLike) -> Array:
    """Return the scores that are not NaN, as float64."""
    values = np.asarray(sample, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"A sample has one axis, the seeds; got an array of shape {values.shape}.")
    return values[~np.isnan(values)]


def has_spread(values: Array, scale: float | None = None) -> bool:
    """Tell whether a sample varies by more than the rounding of scores that were float32 once.

    ``scale`` is the size of the scores where the values are differences of them.
    """
    if len(values) < 2:
        return False
    return bool(np.ptp(values) > 1e-6 * (np.abs(values).max() if scale is None else scale))


def t_interval(sample: ArrayLike) -> Interval:
    """Return Student's 95 % interval of the mean, mean +- t(n - 1) std / sqrt(n)."""
    values = present(sample)
    if not has_spread(values):
        return NAN, NAN
    n = len(values)
    half = st.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def std_interval(sample: ArrayLike) -> Interval:
    """Return the 95 % interval of the std under normality, std sqrt((n - 1) / chi2(n - 1))."""
    values = present(sample)
    if not has_spread(values):
        return NAN, NAN
    tails = st.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], len(values) - 1)
    low, high = values.std(ddof=1) * np.sqrt((len(values) - 1) / tails)
    return float(low), float(high)


def summarize(sample: ArrayLike) -> Summary:
    values = present(sample)
    n = len(values)
    if n == 0:
        return Summary(0, NAN, NAN, (NAN, NAN), (NAN, NAN), NAN, NAN)
    std = float(values.std(ddof=1)) if n > 1 else NAN
    mean, low, high = float(values.mean()), float(values.min()), float(values.max())
    return Summary(n, mean, std, t_interval(values), std_interval(values), low, high)


def hedges_correction(degrees_of_freedom: float) -> float:
    """Return J = Gamma(m / 2) / (sqrt(m / 2) Gamma((m - 1) / 2)), which takes the bias out of a standardised
    effect (Hedges 1981, eq. 6e); it is 0 at m = 1, so the effect is NaN there."""
    m = degrees_of_freedom
    if m <= 1:
        return NAN
    return float(np.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2))


def sign_flip_p(differences: ArrayLike, rng: np.random.Generator) -> float:
    """Return the two-sided p of the mean difference under random signs of the pairs.

    Exact, over all 2^n signs, up to n = 20; from random signs above. The smallest value is 2 / 2^n.
    """
    values = present(differences)
    if len(values) == 0:
        return NAN
    observed = abs(values.sum())
    tolerance = 1e-12 * np.abs(values).sum()  # sums in another order round differently
    if len(values) <= EXACT_SIGN_FLIPS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= observed - tolerance))
    sums = rng.choice([-1.0, 1.0], size=(RESAMPLES, len(values))) @ values
    return float((1 + np.sum(np.abs(sums) >= observed - tolerance)) / (1 + RESAMPLES))


def compare_means(
    candidate: ArrayLike, reference: ArrayLike, rng: np.random.Generator, scale: float | None = None
) -> MeanComparison:
    """Compare two columns, row i being the same seed in both. ``scale`` is the size of the scores where the columns
    are differences of scores.

    Paired by seed (t test, sign flips, Cohen's dz with Hedges' correction) where at least two seeds, and half
    of the smaller sample, are common; else Welch's t test and Hedges' g with the mean of the two variances.
    """
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"Rows are seeds, the same in both columns; got shapes {a.shape} and {b.shape}.")
    common = ~np.isnan(a) & ~np.isnan(b)
    x, y = present(a), present(b)
    few_pairs = common.sum() < 2 or 2 * common.sum() < min(len(x), len(y))
    if few_pairs and min(len(x), len(y)) >= 2:
        return _welch(x, y)
    if scale is None:
        scale = float(np.abs(np.concatenate([x, y])).max(initial=0))
    return _paired(a[common], b[common], rng, scale)


def _paired(x: Array, y: Array, rng: np.random.Generator, scale: float) -> MeanComparison:
    differences = x - y
    n = len(differences)
    difference = float(differences.mean()) if n else NAN
    p = effect = error = df = NAN
    interval: Interval = (NAN, NAN)
    if has_spread(differences, scale):
        test: Any = st.ttest_rel(x, y)
        p, df, ci = float(test.pvalue), float(test.df), test.confidence_interval(CONFIDENCE)
        interval = float(ci.low), float(ci.high)
        std = float(differences.std(ddof=1))
        error, effect = std / math.sqrt(n), hedges_correction(n - 1) * difference / std
    flips = sign_flip_p(differences, rng)
    values = tuple(map(float, differences))
    return MeanComparison("paired", (n, n), values, difference, error, df, interval, p, flips, effect, "dz")


def _welch(x: Array, y: Array) -> MeanComparison:
    difference = float(x.mean() - y.mean())
    p = effect = error = df = NAN
    interval: Interval = (NAN, NAN)
    if has_spread(x) and has_spread(y):
        test: Any = st.ttest_ind(x, y, equal_var=False)
        p, df, ci = float(test.pvalue), float(test.df), test.confidence_interval(CONFIDENCE)
        interval = float(ci.low), float(ci.high)
        variances = x.var(ddof=1), y.var(ddof=1)
        error = math.sqrt(variances[0] / len(x) + variances[1] / len(y))
        of_their_mean = sum(variances) ** 2 / (variances[0] ** 2 / (len(x) - 1) + variances[1] ** 2 / (len(y) - 1))
        effect = hedges_correction(of_their_mean) * difference / math.sqrt(sum(variances) / 2)
    return MeanComparison("welch", (len(x), len(y)), (), difference, error, df, interval, p, NAN, effect, "g")


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values; NaN stays NaN and does not count (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    adjusted, largest = [NAN] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, float(p[i]) * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted
