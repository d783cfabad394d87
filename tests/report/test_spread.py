import math

import numpy as np
import pytest
from scipy import stats as st

from abn_exp.report import spread
from abn_exp.report.spread import compare_spreads, rejection_rate


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def log_ratio(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(np.log(x.var(axis=axis, ddof=1) / y.var(axis=axis, ddof=1)))


@pytest.mark.parametrize("n", [10, 18])  # all swaps, random ones
def test_swaps_within_seeds_agree_with_scipys_permutations(n: int, rng: np.random.Generator) -> None:
    x = rng.normal(0, 1, size=n)
    y = 0.5 * x + rng.normal(0, 1.4, size=n)
    found = compare_spreads(x, y, rng)
    assert found.n == n
    assert found.ratio == pytest.approx(x.std(ddof=1) / y.std(ddof=1))
    # scipy permutes pairs within an observation; the other half of its permutations swaps all, which changes nothing
    oracle = st.permutation_test(
        (x - x.mean(), y - y.mean()),
        log_ratio,
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=np.inf if n == 10 else 9_999,
        rng=3,
    )
    assert found.p == pytest.approx(oracle.pvalue, abs=1e-12 if n == 10 else 0.02)


def test_the_interval_holds_the_ratios_that_the_test_does_not_reject(rng: np.random.Generator) -> None:
    x, y = rng.normal(0, 1, size=12), rng.normal(0, 2, size=12)
    found = compare_spreads(x, y, rng)
    low, high = found.ratio_interval
    assert low < found.ratio < high
    assert (found.p < 0.05) == (not low < 1 < high)
    for ratio, rejected in ((low * 0.99, True), (low * 1.01, False), (high * 0.99, False), (high * 1.01, True)):
        assert (compare_spreads(x, y * ratio, rng).p < 0.05) == rejected


def test_there_is_no_test_below_ten_pairs_or_without_spread(rng: np.random.Generator) -> None:
    few = compare_spreads(rng.normal(size=9), rng.normal(size=9), rng)
    assert few.ratio > 0
    assert math.isnan(few.p)
    assert math.isnan(few.ratio_interval[0])
    assert math.isnan(rejection_rate(9, 2.0))
    constant = compare_spreads(np.full(12, 70.0), rng.normal(size=12), rng)
    assert math.isnan(constant.ratio)
    one = compare_spreads([1.0, math.nan], [2.0, 3.0], rng)
    assert (one.n, math.isnan(one.ratio)) == (1, True)


def test_level_and_power_are_the_simulated_ones(rng: np.random.Generator) -> None:
    """Against scipy's permutations on other draws."""
    n, draws = 10, 150

    def pairs(ratio: float) -> tuple[np.ndarray, np.ndarray]:
        shared = rng.normal(size=n)
        x, y = (math.sqrt(0.5) * (shared + rng.normal(size=n)) for _ in range(2))
        return x, ratio * y

    share = np.mean([compare_spreads(*pairs(2.5), rng).p < 0.05 for _ in range(draws)])
    assert rejection_rate(n, 2.5) == pytest.approx(share, abs=0.13)
    for shape in ("normal", "t3"):
        assert 0.04 < rejection_rate(n, 1.0, shape=shape) < 0.075
    assert rejection_rate(20, 2.0) == pytest.approx(0.85, abs=0.03)
    assert rejection_rate(20, 2.0, 0.05 / 4) < rejection_rate(20, 2.0)


def test_pairs_needed_reach_the_power(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = spread.pairs_needed()
    assert needed is not None
    assert 16 <= needed <= 21
    assert rejection_rate(needed, 2.0) >= 0.8
    monkeypatch.setattr(spread, "MOST_PAIRS", 12)
    assert spread.pairs_needed(ratio=1.9) is None
