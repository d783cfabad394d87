import math

import numpy as np
import pytest
from scipy import stats as st

from abn_exp.report import stats

NAN = float("nan")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_summary_of_five_scores_worked_out_by_hand() -> None:
    s = stats.summarize([1, 2, 3, 4, 5])
    assert (s.n, s.mean, s.minimum, s.maximum) == (5, 3, 1, 5)
    assert s.std == pytest.approx(math.sqrt(2.5))
    assert s.mean_interval == pytest.approx((3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5)))
    # chi-square's 97.5 % and 2.5 % points at 4 degrees of freedom, from a printed table
    assert s.std_interval == pytest.approx((math.sqrt(10 / 11.1433), math.sqrt(10 / 0.484419)), rel=1e-5)


def test_missing_seeds_are_left_out() -> None:
    a, b = stats.summarize([1.0, 3.0, NAN]), stats.summarize([NAN, 10.0, NAN])
    assert (a.n, a.mean, b.n, b.mean) == (2, 2.0, 1, 10.0)


@pytest.mark.parametrize("sample", [[], [NAN], [0.5], [0.5, 0.5, 0.5], [0.1 + 0.2, 0.3, 0.3]])
def test_no_interval_without_spread(sample: list[float], rng: np.random.Generator) -> None:
    s = stats.summarize(sample)
    assert np.isnan([*s.mean_interval, *s.std_interval]).all()
    other = np.zeros(len(sample))
    mean = stats.compare_means(sample, other, rng)
    assert np.isnan([*mean.interval, mean.p, mean.effect, mean.standard_error, mean.df]).all()


def test_a_matrix_is_not_a_sample() -> None:
    with pytest.raises(ValueError, match="one axis"):
        stats.summarize(np.ones((2, 2)))
    with pytest.raises(ValueError, match="Rows are seeds"):
        stats.compare_means([1, 2], [1, 2, 3], np.random.default_rng(0))


def test_paired_comparison_agrees_with_scipy(rng: np.random.Generator) -> None:
    b = rng.normal(70, 2, size=9)
    a = b + rng.normal(0.4, 0.5, size=9)
    found, oracle = stats.compare_means(a, b, rng), st.ttest_rel(a, b)
    low, high = oracle.confidence_interval(0.95)
    assert found.method == "paired"
    assert found.n == (9, 9)
    assert found.p == pytest.approx(oracle.pvalue)
    assert found.interval == pytest.approx((low, high))
    assert found.df == 8
    assert found.standard_error == pytest.approx(st.sem(a - b))
    flips = st.permutation_test((a - b,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert found.p_sign_flip == pytest.approx(flips.pvalue)
    # Hedges' J at 8 degrees of freedom is Gamma(4) / (2 Gamma(3.5)) = 6 / (2 * 3.3233509) = 0.9027033
    assert found.effect == pytest.approx(0.9027033 * np.mean(a - b) / np.std(a - b, ddof=1))


def test_pairs_are_the_seeds_that_both_have(rng: np.random.Generator) -> None:
    a, b = np.array([1.0, 2.5, NAN, 4.0, 5.5]), np.array([0.0, 2.0, 9.0, NAN, 3.0])
    found = stats.compare_means(a, b, rng)
    assert found.differences == (1.0, 0.5, 2.5)
    assert found.interval == pytest.approx(tuple(st.ttest_rel(a[[0, 1, 4]], b[[0, 1, 4]]).confidence_interval()))


def test_welch_where_seeds_do_not_match(rng: np.random.Generator) -> None:
    x, y = rng.normal(1, 1, size=5), rng.normal(0, 3, size=4)
    a, b = np.full(9, NAN), np.full(9, NAN)
    a[:5], b[5:] = x, y
    found, oracle = stats.compare_means(a, b, rng), st.ttest_ind(x, y, equal_var=False)
    assert (found.method, found.n, found.effect_name) == ("welch", (5, 4), "g")
    assert found.p == pytest.approx(oracle.pvalue)
    assert found.interval == pytest.approx(tuple(oracle.confidence_interval()))
    assert found.df == pytest.approx(oracle.df)
    assert found.difference / found.standard_error == pytest.approx(oracle.statistic)
    assert np.isnan(found.p_sign_flip)


def test_welch_s_effect_has_the_degrees_of_freedom_of_the_mean_variance(rng: np.random.Generator) -> None:
    """Hedges' g of 12 and 2 seeds is unbiased where both variances are 1; with Welch's own df it was 0.3 of that."""
    effects, nothing = [], np.full(12, NAN)
    for _ in range(600):
        x, y = rng.normal(1, 1, size=12), rng.normal(0, 1, size=2)
        found = stats.compare_means([*x, NAN, NAN], [*nothing, *y], rng)
        effects.append(found.effect)
    assert np.nanmean(effects) == pytest.approx(1, abs=0.15)
    s, t = x.var(ddof=1), y.var(ddof=1)  # of the last, by its formula
    df = (s + t) ** 2 / (s**2 / 11 + t**2)
    j = math.gamma(df / 2) / math.gamma((df - 1) / 2) / math.sqrt(df / 2)
    assert found.effect == pytest.approx(j * (x.mean() - y.mean()) / math.sqrt((s + t) / 2))


@pytest.mark.parametrize(
    ("differences", "p"), [([1, 2, 3], 0.25), ([1, 1, -1], 1.0), ([1] * 5, 2 / 32), ([2.0], 1.0)]
)
def test_sign_flips_counted_by_hand(differences: list[float], p: float, rng: np.random.Generator) -> None:
    assert stats.sign_flip_p(differences, rng) == p


def test_sign_flips_at_twenty_seeds_are_exact_and_above_random(rng: np.random.Generator) -> None:
    assert stats.sign_flip_p(np.ones(20), rng) == 2 / 2**20
    differences = rng.normal(0.4, 1, size=25)
    assert stats.sign_flip_p(differences, rng) == pytest.approx(st.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_hedges_correction_by_hand() -> None:
    assert stats.hedges_correction(4) == pytest.approx(math.sqrt(2 / math.pi))
    assert np.isnan(stats.hedges_correction(1))


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, NAN, 0.03]) == pytest.approx([0.03, 0.06, NAN, 0.06], nan_ok=True)
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_false_alarms_are_as_rare_as_promised(rng: np.random.Generator) -> None:
    t, flips = [], []
    for _ in range(1000):
        mean = stats.compare_means(rng.normal(size=6), rng.normal(size=6), rng)
        t.append(mean.p < 0.05)
        flips.append(mean.p_sign_flip < 0.05)
    assert np.mean(t) == pytest.approx(0.05, abs=0.022)
    assert np.mean(flips) == pytest.approx(2 / 64, abs=0.018)  # p can be 2/64, 4/64, ...: only the first is below
