"""Tests against delta, their precedence and their power, against statsmodels and simulation."""

import math

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from abn_exp.report import verdicts
from abn_exp.report.stats import compare_means
from abn_exp.report.verdicts import PValues, decide, guard_against_failures

NAN = math.nan


def p_values_of(d: np.ndarray) -> PValues:
    return verdicts.t_tests(d.mean(), d.std(ddof=1) / np.sqrt(len(d)), len(d) - 1, delta=0.5)


def test_p_values_are_those_of_statsmodels() -> None:
    d = np.random.default_rng(1).normal(0.2, 0.6, size=8)
    found, oracle = p_values_of(d), DescrStatsW(d)
    p, (_, p_low, _), (_, p_high, _) = oracle.ttost_mean(-0.5, 0.5)
    assert found.difference == pytest.approx(oracle.ttest_mean(0)[1])
    assert found.equivalent == pytest.approx(p)
    assert (found.not_worse, found.not_better) == pytest.approx((p_low, p_high))
    assert found.higher == (d.mean() > 0)
    (judged,) = verdicts.judge([verdicts.Tested(compare_means(d, np.zeros(8), np.random.default_rng(0)))], 0.5)
    assert judged.interval_delta == pytest.approx(oracle.tconfint_mean(0.1))
    assert judged.interval == pytest.approx(oracle.tconfint_mean(0.05))
    assert judged.uncorrected == judged.corrected == found


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),  # half: of the 90 % interval
    [
        (0.1, 0.3, "equivalent"),
        (0.3, 0.15, "equivalent"),  # and higher
        (0.6, 0.3, "better"),
        (-0.6, 0.3, "worse"),  # and not better by delta
        (-0.2, 0.6, "not better by delta"),
        (0.2, 0.6, "not worse by delta"),
        (0.0, 2.0, "undecided"),
    ],
)
def test_the_first_verdict_that_holds_is_given(mean: float, half: float, verdict: str) -> None:
    assert decide(verdicts.t_tests(mean, half / 2.131847, 4, 0.5)) == verdict  # t(0.95, 4 df) = 2.131847


def test_nothing_is_decided_without_a_standard_error() -> None:
    assert decide(verdicts.t_tests(0.3, NAN, NAN, 0.5)) == "undecided"
    assert math.isnan(verdicts.t_tests(0.3, NAN, NAN, 0.5).equivalent)


def test_failures_of_the_candidate_take_back_what_speaks_for_it_alone() -> None:
    better, unclear = PValues(0.001, True, 0.9, 0.001), PValues(0.4, False, 0.02, 0.7)
    assert decide(guard_against_failures(better, unclear, (2, 0))) == "undecided"
    assert decide(guard_against_failures(better, unclear, (2, 2))) == "better"
    assert decide(guard_against_failures(better, unclear, (0, 2))) == "better"
    assert decide(guard_against_failures(better, PValues(0.01, True, 0.9, 0.01), (2, 0))) == "better"
    assert decide(guard_against_failures(better, PValues(0.01, False, 0.01, 0.9), (2, 0))) == "undecided"
    worse = PValues(0.001, False, 0.001, 0.9)
    assert decide(guard_against_failures(worse, unclear, (2, 0))) == "worse"
    assert decide(guard_against_failures(worse, PValues(0.4, True, 0.7, 0.02), (0, 2))) == "undecided"
    same = PValues(0.6, True, 0.01, 0.01)
    assert decide(guard_against_failures(same, unclear, (1, 0))) == "not better by delta"
    assert decide(guard_against_failures(same, PValues(NAN, False, NAN, NAN), (0, 1))) == "not worse by delta"
    # No test, whatever failed: it is no part of the family, and chance alone gives no verdict.
    nothing = PValues(NAN, True, NAN, NAN)
    assert math.isnan(guard_against_failures(nothing, PValues(0.01, True, 0.9, 0.01), (1, 0)).not_worse)
    assert decide(guard_against_failures(nothing, PValues(0.01, True, 0.9, 0.01), (1, 0))) == "undecided"


def test_a_norm_that_only_failed_leaves_the_others_verdicts() -> None:
    rng = np.random.default_rng(0)
    chance = compare_means(np.full(5, 10.0), rng.normal(70, 1, 5), rng)
    some = verdicts.Tested(compare_means(rng.normal(70, 1, 5), rng.normal(70, 1, 5), rng))
    none = verdicts.Tested(compare_means(np.full(5, NAN), np.arange(5.0), rng), (5, 0), chance)
    assert verdicts.judge([some, none], 0.5)[0] == verdicts.judge([some], 0.5)[0]


def test_each_test_is_corrected_over_the_family_by_holm() -> None:
    rng = np.random.default_rng(2)
    family = [p_values_of(rng.normal(0.3, 0.5, size=6)) for _ in range(4)]
    found = verdicts.correct(family)
    for name in ("difference", "not_better", "not_worse"):
        oracle = multipletests([getattr(p, name) for p in family], method="holm")[1]
        assert [getattr(p, name) for p in found] == pytest.approx(oracle)
    assert [p.higher for p in found] == [p.higher for p in family]


@pytest.mark.parametrize(("n", "level"), [(5, 0.05), (5, 0.05 / 6), (20, 0.05)])
def test_detectable_difference_has_its_power_by_statsmodels(n: int, level: float) -> None:
    d = verdicts.detectable_difference(0.7, n, level)
    assert TTestPower().power(d / 0.7, n, level, alternative="two-sided") == pytest.approx(0.8, abs=1e-4)


def test_seeds_that_would_decide() -> None:
    assert verdicts.seeds_for_difference(0.5, 0.65) == math.ceil(
        TTestPower().solve_power(0.5 / 0.65, power=0.8, alpha=0.05)
    )
    # two one-sided tests within half a point, 80 % power: a table for stds of differences of .35, .65 and .8
    assert [verdicts.seeds_for_equivalence(0.5, std) for std in (0.35, 0.65, 0.8)] == [6, 16, 24]
    assert verdicts.seeds_for_difference(1e-4, 10) is None


def test_power_of_equivalence_is_the_share_of_simulated_samples() -> None:
    x = np.random.default_rng(4).normal(0, 0.65, size=(20_000, 12))
    half = 1.795885 * x.std(axis=1, ddof=1) / np.sqrt(12)  # t(0.95, 11 df)
    share = np.mean(np.abs(x.mean(axis=1)) + half < 0.5)
    assert verdicts.power_of_equivalence(0.5 / 0.65, 12) == pytest.approx(share, abs=0.012)


def test_an_interval_that_contradicts_the_corrected_verdict_says_why() -> None:
    """p = 0.03 alone; over six comparisons there is no verdict on the difference."""
    d = np.array([-0.1, -0.3, -0.4, -0.5, -0.7])
    found = verdicts.Tested(compare_means(d, np.zeros(5), np.random.default_rng(0)))
    why = "the interval leaves out zero, but is not corrected"
    for delta, verdict in ((0.5, "not better by delta"), (0.05, "undecided")):
        alone, *_ = verdicts.judge([found], delta)
        assert 0.005 < alone.uncorrected.difference < 0.05
        assert why not in verdicts.sentence(alone, "x")
        in_a_family, *_ = verdicts.judge([found] * 12, delta)
        assert in_a_family.verdict == verdict
        assert why in verdicts.sentence(in_a_family, "x")
        assert in_a_family.interval[1] < 0
