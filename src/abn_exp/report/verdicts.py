"""The verdict on a difference of means: better, worse, equivalent, not better or not worse by delta, or undecided.

A difference d = candidate - reference, with its standard error s and the degrees of freedom of s, is put to three
tests:

    difference   H0: d = 0         t = d / s             two-sided, 5 %: better or worse
    not_better   H0: d >= delta    t = (d - delta) / s   one-sided, 5 %
    not_worse    H0: d <= -delta   t = (d + delta) / s   one-sided, 5 %

The last two together say equivalent (two one-sided tests, TOST): the 90 % interval lies inside +-delta, the smallest
difference of interest, in points. Where several hold, the verdict is the first of: equivalent; better or worse; not
better or not worse by delta.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import stats as st
from scipy.optimize import brentq

from abn_exp.report.stats import ALPHA, NAN, Interval, holm

Verdict = Literal["better", "worse", "equivalent", "not better by delta", "not worse by delta", "undecided"]
POWER = 0.8
MOST_SEEDS = 10_000  # no answer to "how many seeds" is searched beyond it


@dataclass(frozen=True)
class PValues:
    """p values of the three tests, and the sign of the difference; NaN where it has no standard error."""

    difference: float  # two-sided
    higher: bool  # is the candidate's mean the higher one
    not_better: float  # one-sided
    not_worse: float  # one-sided

    @property
    def equivalent(self) -> float:
        return float(np.maximum(self.not_better, self.not_worse))  # NaN stays NaN


def t_tests(difference: float, standard_error: float, df: float, delta: float) -> PValues:
    shifts = np.array([abs(difference), delta - difference, delta + difference])
    two_sided, not_better, not_worse = map(float, st.t.sf(shifts / standard_error, df))
    return PValues(2 * two_sided, difference > 0, not_better, not_worse)


def guard_against_failures(p: PValues, at_chance: PValues, failed: tuple[int, int]) -> PValues:
    """Let what speaks for the side that failed more often count only if it holds with failures scored at chance.

    ``failed`` are the candidate's and the reference's runs that have no score because they failed or diverged.
    Better, equivalent and not worse by delta speak for the candidate; worse, equivalent and not better by delta for
    the reference.
    """
    if failed[0] == failed[1]:
        return p
    for_candidate = failed[0] > failed[1]
    difference, not_better, not_worse = p.difference, p.not_better, p.not_worse
    if p.higher == for_candidate:
        difference = _larger(difference, at_chance.difference if at_chance.higher == for_candidate else 1.0)
    if for_candidate:
        not_worse = _larger(not_worse, at_chance.not_worse)
    else:
        not_better = _larger(not_better, at_chance.not_better)
    return PValues(difference, p.higher, not_better, not_worse)


def _larger(p: float, q: float) -> float:
    """Return the larger p; one that could not be computed counts as 1."""
    return float(np.nanmax([p, 1.0 if math.isnan(q) else q]))


def correct(family: Sequence[PValues]) -> list[PValues]:
    """Return Holm's correction of each of the three tests over a family."""
    columns = (holm([getattr(p, name) for p in family]) for name in ("difference", "not_better", "not_worse"))
    return [
        PValues(difference, p.higher, not_better, not_worse)
        for p, difference, not_better, not_worse in zip(family, *columns, strict=True)
    ]


def decide(p: PValues, level: float = ALPHA, level_delta: float = ALPHA) -> Verdict:
    """Return the verdict: ``level`` is that of the test of no difference, ``level_delta`` that of each of the two
    tests against delta."""
    if p.equivalent < level_delta:
        return "equivalent"
    if p.difference < level:
        return "better" if p.higher else "worse"
    if p.not_better < level_delta:
        return "not better by delta"
    if p.not_worse < level_delta:
        return "not worse by delta"
    return "undecided"


def interval(difference: float, standard_error: float, df: float, level: float = ALPHA) -> Interval:
    """Return the 1 - ``level`` interval of a difference."""
    half = st.t.isf(level / 2, df) * standard_error
    return float(difference - half), float(difference + half)


def power_of_difference(effect: float, n: int, level: float = ALPHA) -> float:
    """Return the power of the paired two-sided t test; ``effect`` is the difference in standard deviations."""
    bound = st.t.isf(level / 2, n - 1)
    shift = abs(effect) * math.sqrt(n)
    found = float(st.nct.sf(bound, n - 1, shift))  # the other tail adds at most level / 2, in the wrong direction
    return found if not math.isnan(found) else float(shift > bound)


def detectable_difference(std: float, n: int, level: float = ALPHA, power: float = POWER) -> float:
    """Return the smallest difference that the paired t test detects with ``power``, in the unit of ``std``."""
    if n < 2 or not std > 0:
        return NAN
    high = (st.t.isf(level / 2, n - 1) + st.t.isf(1 - power, n - 1)) / math.sqrt(n) + 1
    while power_of_difference(high, n, level) < power:
        high *= 2
    return std * float(brentq(lambda effect: power_of_difference(effect, n, level) - power, 0, high, xtol=1e-8))


@lru_cache(maxsize=4096)
def power_of_equivalence(margin: float, n: int, level: float = ALPHA) -> float:
    """Return the power of the two one-sided paired t tests where there is no difference; ``margin`` is delta in
    standard deviations.

    The share of |mean| < margin - t s / sqrt(n), integrated over the distribution of s.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    s = np.sqrt(st.chi2.ppf((nodes + 1) / 2, n - 1) / (n - 1))
    reach = np.maximum(0, margin * math.sqrt(n) - st.t.isf(level, n - 1) * s)
    return float((2 * st.norm.cdf(reach) - 1) @ weights / 2)


def seeds_for_difference(delta: float, std: float, level: float = ALPHA, power: float = POWER) -> int | None:
    """Return the smallest number of pairs that detects a difference of ``delta`` with ``power``; None beyond
    10,000."""
    return _smallest(lambda n: power_of_difference(delta / std, n, level) >= power)


def seeds_for_equivalence(delta: float, std: float, level: float = ALPHA, power: float = POWER) -> int | None:
    """Return the smallest number of pairs that shows equivalence within ``delta`` with ``power`` where there is no
    difference; None beyond 10,000."""
    return _smallest(lambda n: power_of_equivalence(delta / std, n, level) >= power)


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest n from 2 to 10,000 that is enough, by bisection: what is enough stays enough."""
    if not enough(MOST_SEEDS):
        return None
    return 2 + bisect.bisect_left(range(2, MOST_SEEDS + 1), True, key=enough)
