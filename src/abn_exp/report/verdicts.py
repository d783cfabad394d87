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
from scipy import special
from scipy import stats as st
from scipy.optimize import brentq

from abn_exp.report.formatting import interval_text, number_text, p_equation, p_text, signed_text
from abn_exp.report.stats import ALPHA, NAN, Interval, MeanComparison, holm

Verdict = Literal["better", "worse", "equivalent", "not better by delta", "not worse by delta", "undecided"]
POWER = 0.8
MOST_SEEDS = 10_000  # no answer to "how many seeds" is searched beyond it
UNCORRECTED = "the interval leaves out zero, but is not corrected"
_GAUSS = np.polynomial.legendre.leggauss(100)


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
    """Count evidence for the side that failed more often only if it also holds with failures scored at chance.

    ``failed`` are the candidate's and the reference's runs that have no score because they failed or diverged.
    Better, equivalent and not worse by delta favour the candidate; worse, equivalent and not better by delta favour
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
    """Return the larger p; a q that could not be computed counts as 1, and a p that could not stays NaN."""
    return float(np.maximum(p, 1.0 if math.isnan(q) else q))


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


@dataclass(frozen=True)
class Tested:
    """A difference before its family is known: ``at_chance`` is the same with failures scored at chance, where one
    side has more of them."""

    mean: MeanComparison
    failed: tuple[int, int] = (0, 0)  # runs of the candidate and of the reference without a score
    at_chance: MeanComparison | None = None


@dataclass(frozen=True)
class Judgement:
    """A difference with the p values that decide on it, and the verdict."""

    mean: MeanComparison
    failed: tuple[int, int]
    delta: float
    uncorrected: PValues  # failures are counted in
    corrected: PValues
    family: int  # over how many differences the correction is
    without_failures: Verdict  # what the verdict would be if failures did not count
    level: float = ALPHA  # of the test of no difference; a look's where the seeds follow a plan
    level_delta: float = ALPHA  # of each of the two tests against delta

    @property
    def verdict(self) -> Verdict:
        return decide(self.corrected, self.level, self.level_delta)

    @property
    def interval(self) -> Interval:
        """The interval that belongs to the test of no difference, without correction for the family: 95 %, or that of
        a look, which covers at all looks together in 95 %."""
        return self._interval(self.level / 2)

    @property
    def interval_delta(self) -> Interval:
        """The interval that belongs to the two tests against delta: 90 %."""
        return self._interval(self.level_delta)

    def _interval(self, tail: float) -> Interval:
        half = float(st.t.isf(tail, self.mean.df)) * self.mean.standard_error
        return self.mean.difference - half, self.mean.difference + half

    @property
    def std(self) -> float:
        """Standard deviation of the differences between the scores of a seed; NaN where seeds are not paired."""
        return self.mean.standard_error * math.sqrt(self.mean.n[0]) if self.mean.method == "paired" else NAN

    @property
    def at_look(self) -> bool:
        """Whether this is one of several planned looks, each of which has a part of the error."""
        return self.level < ALPHA

    @property
    def detectable(self) -> float:
        """The difference that would be detected with 80 % power at this n and std, at the corrected level."""
        return detectable_difference(self.std, self.mean.n[0], self.level / self.family)

    @property
    def seeds_for_delta(self) -> int | None:
        """How many seeds detect a difference of delta with 80 % power; None where that is unknown."""
        return seeds_for_difference(self.delta, self.std, ALPHA / self.family) if self.std > 0 else None

    @property
    def seeds_for_equivalence(self) -> int | None:
        """How many seeds show equivalence with 80 % power where there is no difference."""
        return seeds_for_equivalence(self.delta, self.std, ALPHA / self.family) if self.std > 0 else None


def judge(
    family: Sequence[Tested], delta: float, level: float = ALPHA, level_delta: float = ALPHA
) -> list[Judgement]:
    """Judge the differences of one family; Holm's correction of each kind of test is over all of them."""
    plain = [_tests(tested.mean, delta) for tested in family]
    guarded = [
        p if tested.at_chance is None else guard_against_failures(p, _tests(tested.at_chance, delta), tested.failed)
        for p, tested in zip(plain, family, strict=True)
    ]
    size = max(1, sum(not math.isnan(p.difference) for p in plain))
    return [
        Judgement(t.mean, t.failed, delta, p, q, size, decide(r, level, level_delta), level, level_delta)
        for t, p, q, r in zip(family, guarded, correct(guarded), correct(plain), strict=True)
    ]


def _tests(mean: MeanComparison, delta: float) -> PValues:
    return t_tests(mean.difference, mean.standard_error, mean.df, delta)


def sentence(j: Judgement, what: str, sides: tuple[str, str] | None = None) -> str:
    """Return the verdict on a difference in words that say what was tested; ``what`` is "On cifar10, abn - bn".

    ``sides`` are the names of what failed, where failures can count.
    """
    m, p, q = j.mean, j.uncorrected, j.corrected
    if math.isnan(m.difference):
        return f"{what} cannot be compared ({count_text(m)}): undecided."
    size = f"{what} is {signed_text(m.difference)} points"
    if math.isnan(m.standard_error):
        constant = "the differences do" if m.method == "paired" else "the scores of one side do"
        why = "one seed has no interval" if min(m.n) < 2 else f"{constant} not vary and give no interval"
        return f"{size} ({count_text(m)}): undecided, {why}."
    kind = "sequential " if j.at_look else "uncorrected " if j.family > 1 else ""
    text = f"{size} ({kind}95 % interval {interval_text(j.interval)}, {count_text(m)}): {j.verdict}, "
    delta = f"{j.delta:g} points"
    inside = f"{'sequential ' if j.at_look else ''}90 % interval {interval_text(j.interval_delta)}"

    def tested(name: str, level: float) -> str:
        if j.at_look:
            return f"p = {getattr(p, name):.3g}, level of this look {level:.3g}"
        holm = f", Holm {p_text(getattr(q, name))} over {j.family}" if j.family > 1 else ""
        return f"{p_equation(getattr(p, name))}{holm}"

    if j.verdict == "equivalent":
        text += f"by two one-sided tests inside ±{delta} ({inside}, {tested('equivalent', j.level_delta)})"
        if q.difference < j.level:
            text += f"; {'higher' if p.higher else 'lower'}, by less than {delta} ({tested('difference', j.level)})"
    elif j.verdict in ("better", "worse"):
        text += f"by the two-sided test of no difference ({tested('difference', j.level)})"
    elif j.verdict == "undecided":
        if j.at_look:
            text += f"no test passes the level of this look (no difference: p = {p.difference:.3g}, level "
            text += f"{j.level:.3g}; one-sided against +{delta} and -{delta}: p = {p.not_better:.3g} and "
            text += f"{p.not_worse:.3g}, level {j.level_delta:.3g})"
        else:
            text += f"no test rejects (no difference: {tested('difference', j.level)}; +{delta} or more: "
            text += f"{tested('not_better', j.level_delta)}; -{delta} or less: {tested('not_worse', j.level_delta)})"
        text += f"{', ' + UNCORRECTED if _contradicts(j) else ''}{_needed_sizes(j)}"
    else:
        name = "not_better" if j.verdict == "not better by delta" else "not_worse"
        side = "+" if name == "not_better" else "-"
        text += f"{delta}, by the one-sided test against {side}{j.delta:g} ({inside}, {tested(name, j.level_delta)})"
        text += "; whether there is a difference at all is undecided"
        if _contradicts(j):
            text += f", {UNCORRECTED} ({tested('difference', j.level)})"
    return f"{text}{failures_text(j.failed, j.verdict, j.without_failures, sides)}."


def _contradicts(j: Judgement) -> bool:
    """Tell whether the interval leaves out zero although the test of no difference, after correction, does not
    reject."""
    return j.uncorrected.difference < j.level <= j.corrected.difference


def _needed_sizes(j: Judgement) -> str:
    if not j.std > 0:
        return ""
    counts = (j.seeds_for_delta, j.seeds_for_equivalence)
    delta, equivalence = (f"more than {MOST_SEEDS:,}" if n is None else n for n in counts)
    this, without = ("look", "and without looks ") if j.at_look else ("n", "")
    return (
        f"; with 80 % power {number_text(j.detectable)} points would be detected at this {this}, {without}"
        f"{j.delta:g} points take {delta} seeds, and equivalence, where there is no difference, {equivalence}"
    )


def failures_text(
    failed: tuple[int, int], verdict: Verdict, without_failures: Verdict, sides: tuple[str, str] | None
) -> str:
    """Return how often each side failed, and what that took back, to be added to a sentence."""
    if sides is None or failed == (0, 0):
        return ""
    text = f"; {sides[0]} failed in {failed[0]} runs, {sides[1]} in {failed[1]}"
    if verdict != without_failures:
        text += f": without them the verdict would be {without_failures}, which does not hold when they count"
    return text


def count_text(mean: MeanComparison) -> str:
    """Return how many seeds a comparison of means has."""
    n = mean.n
    return f"n = {n[0]} paired seeds" if mean.method == "paired" else f"n = {n[0]} and {n[1]} unpaired seeds"


def power_of_difference(effect: float, n: int, level: float = ALPHA) -> float:
    """Return the power of the paired two-sided t test; ``effect`` is the difference in standard deviations."""
    bound = st.t.isf(level / 2, n - 1)
    shift = abs(effect) * math.sqrt(n)
    found = float(st.nct.sf(bound, n - 1, shift))  # the other tail adds at most level / 2, in the wrong direction
    return found if not math.isnan(found) else float(shift > bound)


def detectable_difference(std: float, n: int, level: float = ALPHA) -> float:
    """Return the smallest difference that the paired t test detects with 80 % power, in the unit of ``std``."""
    if n < 2 or not std > 0:
        return NAN
    high = (st.t.isf(level / 2, n - 1) + st.t.isf(1 - POWER, n - 1)) / math.sqrt(n) + 1
    while power_of_difference(high, n, level) < POWER:
        high *= 2
    return std * float(brentq(lambda effect: power_of_difference(effect, n, level) - POWER, 0, high, xtol=1e-8))


@lru_cache(maxsize=4096)
def power_of_equivalence(margin: float, n: int, level: float = ALPHA) -> float:
    """Return the power of the two one-sided paired t tests where there is no difference; ``margin`` is delta in
    standard deviations.

    The share of |mean| < margin - t s / sqrt(n), integrated over the distribution of s.
    """
    nodes, weights = _GAUSS
    s = np.sqrt(2 * special.gammaincinv((n - 1) / 2, (nodes + 1) / 2) / (n - 1))
    reach = np.maximum(0, margin * math.sqrt(n) - special.stdtrit(n - 1, 1 - level) * s)
    return float((2 * special.ndtr(reach) - 1) @ weights / 2)


def seeds_for_difference(delta: float, std: float, level: float = ALPHA) -> int | None:
    """Return the smallest number of pairs that detects ``delta`` with 80 % power; None above 10,000."""
    return _smallest(lambda n: power_of_difference(delta / std, n, level) >= POWER)


def seeds_for_equivalence(delta: float, std: float, level: float = ALPHA) -> int | None:
    """Return the smallest number of pairs that shows equivalence within ``delta`` with 80 % power, where there is no
    difference; None above 10,000."""
    return _smallest(lambda n: power_of_equivalence(delta / std, n, level) >= POWER)


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest n from 2 to 10,000 that is enough, by bisection: what is enough stays enough."""
    if not enough(MOST_SEEDS):
        return None
    return 2 + bisect.bisect_left(range(2, MOST_SEEDS + 1), True, key=enough)
