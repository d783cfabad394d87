"""Comparison of two standard deviations between seeds, from pairs of runs with the same seed.

Both samples are centred on their means; under equal spreads the two scores of a seed can then be swapped. The
statistic is |log(var x / var y)|, its distribution that over all swaps within seeds, or over random ones where there
are too many. Centring makes the test approximate: it is not used below ten pairs, and what level it keeps at n is
simulated, for normal scores and for t scores with 3 degrees of freedom, and stands beside each verdict. The interval
of the ratio holds all ratios that the same test at 5 % does not reject.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from abn_exp.report.formatting import interval_text, number_text, p_equation, p_text, percent_text
from abn_exp.report.stats import ALPHA, NAN, Array, Interval, has_spread, holm
from abn_exp.report.verdicts import Verdict, failures_text

MIN_PAIRS = 10
EXACT_SWAPS = 14  # 2^13 swaps that differ in the statistic; above this, swaps are drawn at random
RESAMPLES = 9_999
CORRELATION = 0.5  # between the two scores of a seed in simulations; 0.45 to 0.7 was found
MOST_PAIRS = 160  # ten doubled until nobody would train as many: no answer to "how many pairs" is searched beyond it


@dataclass(frozen=True)
class SpreadComparison:
    """Candidate's std over the reference's, over the seeds that both have."""

    n: int
    std: tuple[float, float]
    ratio: float
    ratio_interval: Interval  # from MIN_PAIRS on
    p: float  # from MIN_PAIRS on


@dataclass(frozen=True)
class SpreadTested:
    """A ratio of stds before its family is known: ``at_chance`` is the same with failures scored at chance, where one
    side has more of them."""

    found: SpreadComparison
    failed: tuple[int, int] = (0, 0)  # runs of the candidate and of the reference without a score
    at_chance: SpreadComparison | None = None

    @property
    def p(self) -> float:
        """The p value; where what it shows speaks for the side that failed more often, the larger of the two."""
        smaller = self.found.ratio < 1
        if self.at_chance is None or math.isnan(self.found.p) or smaller != (self.failed[0] > self.failed[1]):
            return self.found.p
        holds = (self.at_chance.ratio < 1) == smaller and not math.isnan(self.at_chance.p)
        return max(self.found.p, self.at_chance.p) if holds else 1.0


@dataclass(frozen=True)
class SpreadJudgement:
    """A ratio of stds between seeds, its p value after Holm's correction over the family, and the verdict."""

    found: SpreadComparison
    p_holm: float  # failures are counted in
    family: int
    failed: tuple[int, int]
    p_holm_without_failures: float  # what it would be if failures did not count

    @property
    def verdict(self) -> Verdict:
        """Better is the smaller spread."""
        return self._verdict(self.p_holm)

    @property
    def without_failures(self) -> Verdict:
        return self._verdict(self.p_holm_without_failures)

    def _verdict(self, p: float) -> Verdict:
        if p < ALPHA:
            return "better" if self.found.ratio < 1 else "worse"
        return "undecided"

    @property
    def power(self) -> float:
        """How often the test, at the level that Holm's correction begins with, notices a true ratio of 2."""
        return rejection_rate(self.found.n, 2.0, ALPHA / self.family)


def compare_spreads(candidate: ArrayLike, reference: ArrayLike, rng: np.random.Generator) -> SpreadComparison:
    """Compare the stds of two columns, row i being the same seed in both."""
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    common = ~np.isnan(a) & ~np.isnan(b)
    x, y = a[common], b[common]
    n = len(x)
    std = (float(x.std(ddof=1)), float(y.std(ddof=1))) if n > 1 else (NAN, NAN)
    if not (has_spread(x) and has_spread(y)):
        return SpreadComparison(n, std, NAN, (NAN, NAN), NAN)
    ratio = std[0] / std[1]
    if n < MIN_PAIRS:
        return SpreadComparison(n, std, ratio, (NAN, NAN), NAN)
    signs = swaps(n, rng)
    p = float(swap_p(x[None], y[None], signs)[0])
    return SpreadComparison(n, std, ratio, _ratio_interval(x, y, ratio, signs), p)


def swaps(n: int, rng: np.random.Generator) -> Array:
    """Return which seeds are swapped, as -1, (num_swaps, n): the identity first, then all others or random ones.

    Swapping all seeds changes nothing, so where all are returned the last seed never is.
    """
    if n <= EXACT_SWAPS:
        bits = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1
        return np.asarray(1.0 - 2.0 * bits)
    return random_swaps(n, rng, RESAMPLES)


def random_swaps(n: int, rng: np.random.Generator, count: int) -> Array:
    return np.asarray(np.concatenate([np.ones((1, n)), rng.choice([-1.0, 1.0], size=(count, n))]))


def swap_p(x: Array, y: Array, signs: Array) -> Array:
    """Return the p value of each row of ``x`` and ``y`` (num_samples, n): the share of swaps with at least the
    observed |log variance ratio|."""
    n = x.shape[1]
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    # A swapped pair is ((s + e d) / 2, (s - e d) / 2) with s = x + y, d = x - y, e = +-1, and s sums to zero: so both
    # samples' squares, and their means +-shift, follow from two products with the matrix of signs.
    s, d = x + y, x - y
    total = (s * s + d * d).sum(axis=1, keepdims=True) / 2
    difference, shift = (s * d) @ signs.T, d @ signs.T / (2 * n)
    first = np.maximum((total + difference) / 2 - n * shift**2, 0)
    second = np.maximum((total - difference) / 2 - n * shift**2, 0)
    large, small = np.maximum(first, second), np.minimum(first, second)
    # large / small >= observed ratio, without dividing by what may be zero
    return np.asarray((large * small[:, :1] >= (1 - 1e-9) * large[:, :1] * small).mean(axis=1))


def _ratio_interval(x: Array, y: Array, ratio: float, signs: Array) -> Interval:
    """Return the ratios of true stds that the test does not reject, searched by bisection of their logarithm."""

    def end(direction: int) -> float:
        def rejected(distance: float) -> bool:
            scaled = y * ratio * math.exp(direction * distance)
            return bool(swap_p(x[None], scaled[None], signs)[0] < ALPHA)

        high = 0.1
        while not rejected(high):
            high *= 2
            if high > 10:
                return 0.0 if direction < 0 else math.inf
        low = high / 2 if high > 0.1 else 0.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (low, middle) if rejected(middle) else (middle, high)
        return ratio * math.exp(direction * low)

    return end(-1), end(1)


Shape = Literal["normal", "t3"]
SHAPES: tuple[Shape, ...] = ("normal", "t3")


@lru_cache
def rejection_rate(n: int, ratio: float, level: float = ALPHA, shape: Shape = "normal", draws: int = 2_000) -> float:
    """Return how often the test at ``level`` rejects in simulated pairs with a true ratio of stds, always the same
    number: its power, or at a ratio of 1 the level that it keeps. NaN below MIN_PAIRS."""
    if n < MIN_PAIRS:
        return NAN
    rng = np.random.default_rng([n, draws])
    draw: Callable[[tuple[int, int]], Array] = (
        rng.standard_normal if shape == "normal" else lambda size: rng.standard_t(3, size)
    )
    signs = random_swaps(n, rng, max(399, math.ceil(20 / level) - 1))  # at least 20 of them below the level
    hits = 0.0
    for _ in range(8):  # in parts, for memory
        size = (draws // 8, n)
        shared = math.sqrt(CORRELATION) * draw(size)
        own = [shared + math.sqrt(1 - CORRELATION) * draw(size) for _ in range(2)]
        hits += float((swap_p(own[0], ratio * own[1], signs) <= level).mean()) / 8
    return hits


@lru_cache
def pairs_needed(level: float = ALPHA, ratio: float = 2.0) -> int | None:
    """Return the smallest number of pairs at which the test at ``level`` notices ``ratio`` with 80 % power."""
    low, high = MIN_PAIRS - 1, MIN_PAIRS
    while rejection_rate(high, ratio, level) < 0.8:
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rejection_rate(middle, ratio, level) >= 0.8 else (middle, high)
    return high


def judge_spreads(family: Sequence[SpreadTested]) -> list[SpreadJudgement]:
    """Return the judgements of a family of ratios, in its order."""
    adjusted, plain = holm([t.p for t in family]), holm([t.found.p for t in family])
    tested = sum(not math.isnan(p) for p in adjusted)
    size = tested or max(1, sum(not math.isnan(t.found.ratio) for t in family))  # of those that more seeds would test
    return [SpreadJudgement(t.found, p, size, t.failed, q) for t, p, q in zip(family, adjusted, plain, strict=True)]


def spread_sentence(j: SpreadJudgement, what: str, norm: str, reference: str) -> str:
    """Return the verdict on a ratio of stds; ``what`` is where, in words."""
    s, n = j.found, f"n = {j.found.n} paired seeds"
    if math.isnan(s.ratio):
        why = "that takes two seeds of each, with different scores"
        return f"{what}, {norm}'s spread cannot be compared with {reference}'s ({n}): undecided, {why}."
    text = (
        f"{what}, {norm} has {s.ratio:.2f} times the std of {reference} between seeds ({s.std[0]:.2f} against "
        f"{s.std[1]:.2f} points"
    )
    needed = pairs_needed(ALPHA / j.family)
    takes = f"80 % takes {needed} pairs" if needed is not None else f"80 % takes more than {MOST_PAIRS} pairs"
    if s.n < MIN_PAIRS:
        return f"{text}, {n}): undecided, the test needs {MIN_PAIRS} pairs; to notice a ratio of 2 in {takes}."
    after = f", Holm {p_text(j.p_holm)} over {j.family}" if j.family > 1 else ""
    text += f", 95 % interval of the ratio {interval_text(s.ratio_interval)}, {n}, swaps within seeds "
    normal, t3 = spread_level(s.n)
    text += (
        f"{p_equation(s.p)}{after}; at 5 % this test errs in {normal} % of cases with normal scores, in {t3} % with "
    )
    text += f"t (3 df)): {j.verdict}"
    failures = failures_text(j.failed, j.verdict, j.without_failures, (norm, reference))
    if j.verdict != "undecided":
        return f"{text}, {'less' if s.ratio < 1 else 'more'} spread{failures}."
    if j.without_failures != "undecided":
        return f"{text}{failures}."
    if s.p < ALPHA:
        text += ", the interval leaves out 1, but is not corrected"
    only = "only " if j.power < 0.8 else ""
    return f"{text}, the test would notice a ratio of 2 in {only}{percent_text(j.power)} of cases ({takes})."


def spread_level(n: int) -> tuple[str, str]:
    """Return in percent how often the spread test at 5 % errs, with normal scores and with t scores (3 df)."""
    normal, t3 = (100 * rejection_rate(n, 1.0, shape=shape, draws=20_000) for shape in SHAPES)
    return number_text(normal, 1), number_text(t3, 1)
