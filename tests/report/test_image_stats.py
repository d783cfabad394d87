"""Statistics on single test images, against simulation with a known truth and against scipy and statsmodels."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as st
from statsmodels.stats.contingency_tables import mcnemar

from abn_exp.report import image_stats as images


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def draw(
    rng: np.random.Generator, seeds: int, count: int, seed_std: float, image_std: float, norm: float = 0.0
) -> np.ndarray:
    """Runs that classify an image rightly where its ease, the network's skill and luck add up above zero."""
    skill, ease = rng.normal(0, seed_std, size=(seeds, 1)), rng.normal(0.8, image_std, size=count)
    return skill + ease + norm + rng.normal(size=(seeds, count)) > 0


def test_variance_of_a_crossed_mean_is_that_of_a_two_way_table(rng: np.random.Generator) -> None:
    x = draw(rng, 6, 40, 0.3, 1.0).astype(float)
    found = images.crossed_mean(x)
    x = 100 * x
    n, m = x.shape
    a, b = x.mean(1) - x.mean(), x.mean(0) - x.mean()
    rest = x - x.mean() - a[:, None] - b
    ms = m * (a @ a) / (n - 1), n * (b @ b) / (m - 1), (rest**2).sum() / ((n - 1) * (m - 1))
    error = math.hypot(found.from_seeds, found.from_images)
    assert error == pytest.approx(math.sqrt((ms[0] + ms[1] - ms[2]) / (n * m)))
    assert found.from_seeds == pytest.approx(x.mean(1).std(ddof=1) / math.sqrt(n))
    assert found.mean == pytest.approx(x.mean())


def test_the_interval_covers_new_seeds_and_a_new_test_set(rng: np.random.Generator) -> None:
    """A difference of two norms on the same images; the truth is a mean over very many seeds and images."""

    def difference(seeds: int, count: int) -> np.ndarray:
        skill, ease = rng.normal(0, 0.2, size=(seeds, 1)), rng.normal(0.8, 1, size=count)
        taste = rng.normal(0, 1.2, size=count)  # an image may suit one norm
        a = skill + ease + taste + rng.normal(0, 0.1, size=(seeds, 1)) + rng.normal(size=(seeds, count)) > 0
        b = skill + ease + rng.normal(0, 0.1, size=(seeds, 1)) + rng.normal(size=(seeds, count)) > 0
        return a.astype(np.float32) - b

    truth = 100 * np.mean([difference(40, 20_000).mean() for _ in range(10)])
    covered, by_seeds_alone = [], []
    for _ in range(300):
        d = difference(12, 150)
        low, high = images.crossed_mean(d).interval
        covered.append(low < truth < high)
        alone = st.ttest_1samp(100 * d.mean(axis=1), 0).confidence_interval()
        by_seeds_alone.append(alone.low < truth < alone.high)
    assert np.mean(covered) > 0.925
    assert np.mean(by_seeds_alone) < 0.85


@pytest.mark.parametrize("seeds", [2, 3, 12])
@pytest.mark.parametrize("seed_std", [0.05, 1.0])  # less and more than the images' part, 1 / sqrt(30)
def test_the_interval_covers_at_few_seeds(rng: np.random.Generator, seeds: int, seed_std: float) -> None:
    covered = []
    for _ in range(2000):
        skill, ease = rng.normal(0, seed_std, size=(seeds, 1)), rng.normal(size=30)
        low, high = images.crossed_mean(skill + ease + rng.normal(size=(seeds, 30))).interval
        covered.append(low < 0 < high)
    assert np.mean(covered) > 0.94


def test_the_split_is_the_covariance_of_halves_averaged_over_all_of_them(rng: np.random.Generator) -> None:
    correct = draw(rng, 7, 8, 0.8, 1.0)
    found = images.split_spread(correct)
    halves = [list(half) for half in itertools.combinations(range(8), 4)]
    accuracies = [(100 * correct[:, half].mean(1), 100 * np.delete(correct, half, axis=1).mean(1)) for half in halves]
    covariance = np.mean([np.cov(a, b)[0, 1] for a, b in accuracies])
    variance = (100 * correct.mean(1)).var(ddof=1)
    assert found.std**2 == pytest.approx(variance)
    assert found.std_of_networks**2 == pytest.approx(max(0, covariance))
    assert found.std_of_test_set**2 == pytest.approx(variance - covariance)
    low, high = found.interval_of_networks
    assert high**2 == pytest.approx(6 * variance / st.chi2.ppf(0.025, 6) - (variance - covariance))
    assert 0 <= low < high


def test_networks_that_are_equally_good_have_a_spread_of_the_test_set_alone(rng: np.random.Generator) -> None:
    alike = [images.split_spread(draw(rng, 20, 500, 0.0, 1.0)) for _ in range(100)]
    assert np.mean([s.std_of_networks**2 for s in alike]) < 0.3 * np.mean([s.std**2 for s in alike])
    different = images.split_spread(draw(rng, 200, 500, 0.5, 1.0))
    endless = 100 * draw(rng, 400, 20_000, 0.5, 1.0).mean(axis=1).std()
    assert different.std_of_networks == pytest.approx(endless, rel=0.12)


def test_mcnemar_is_statsmodels(rng: np.random.Generator) -> None:
    a, b = draw(rng, 3, 200, 0.5, 1.0), draw(rng, 3, 200, 0.5, 1.0)
    for found, x, y in zip(images.mcnemar(a, b), a, b, strict=True):
        table = [[np.sum(x & y), np.sum(x & ~y)], [np.sum(~x & y), np.sum(~x & ~y)]]
        assert (found.candidate_alone, found.reference_alone) == (table[0][1], table[1][0])
        assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert images.mcnemar(a[:1], a[:1])[0].p == 1


def test_agreement_by_hand() -> None:
    runs = [np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0]), np.array([0, 1, 0, 0])]
    assert images.agreement(itertools.combinations(runs, 2)) == pytest.approx((3 / 4 + 2 / 4 + 3 / 4) / 3)
    assert images.agreement(itertools.pairwise(runs)) == pytest.approx(3 / 4)
    assert math.isnan(images.agreement(itertools.combinations(runs[:1], 2)))


def test_one_seed_has_no_interval() -> None:
    one = np.array([[True, False, True]])
    assert math.isnan(images.crossed_mean(one).from_seeds)
    assert math.isnan(images.split_spread(one).std)
