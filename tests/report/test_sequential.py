"""Boundaries against published tables, where many values make t normal, and against simulation at few."""

import numpy as np
import pytest
from scipy import stats as st

from abn_exp.report.sequential import Spending, _Chain, _r_of, nominal_levels, spent


@pytest.mark.parametrize(
    ("spending", "looks", "table"),
    [
        # Lan and DeMets' boundaries for a two-sided 5 % at equally spaced looks
        ("obrien_fleming", (500, 1000, 1500), [3.710, 2.511, 1.993]),
        ("pocock", (500, 1000, 1500), [2.279, 2.295, 2.296]),
        ("obrien_fleming", (400, 800, 1200, 1600, 2000), [4.877, 3.357, 2.680, 2.290, 2.031]),
    ],
)
def test_many_values_have_the_published_boundaries(
    spending: Spending, looks: tuple[int, ...], table: list[float]
) -> None:
    assert st.norm.isf(nominal_levels(looks, 0.025, spending)) == pytest.approx(table, abs=0.003)


@pytest.mark.parametrize("spending", ["obrien_fleming", "pocock"])
def test_all_is_spent_at_the_end_and_a_single_look_is_the_plain_test(spending: Spending) -> None:
    assert spent(1.0, 0.05, spending) == pytest.approx(0.05)
    assert spent(0.5, 0.05, spending) < 0.05
    assert nominal_levels((7,), 0.05, spending) == pytest.approx((0.05,))
    # a first look spends what the function gives: 2 - 2 Phi(1.96 / sqrt(0.25)) and 0.05 ln(1 + (e - 1) / 4)
    first = {"obrien_fleming": 2 * st.norm.sf(2 * 1.959964), "pocock": 0.05 * np.log(1 + (np.e - 1) / 4)}
    assert nominal_levels((5, 20), 0.05, spending)[0] == pytest.approx(first[spending], rel=1e-5)


@pytest.mark.parametrize(
    ("spending", "looks", "alpha"),
    [
        ("obrien_fleming", (5, 10, 20), 0.05),
        ("pocock", (3, 5, 10, 20), 0.05),  # the normal limit's levels would hold at 5.4 %
        ("pocock", (2, 3, 4, 5, 6), 0.05),  # one value more a look; the normal limit: 5.9 %
    ],
)
def test_t_tests_keep_their_error_at_few_values(spending: Spending, looks: tuple[int, ...], alpha: float) -> None:
    levels = nominal_levels(looks, alpha, spending)
    rng, draws = np.random.default_rng(3), 400_000
    crossed, spent_so_far = np.zeros(draws, bool), []
    x = rng.standard_normal((draws, looks[-1]))
    for n, level in zip(looks, levels, strict=True):
        t = x[:, :n].mean(axis=1) / (x[:, :n].std(axis=1, ddof=1) / np.sqrt(n))
        crossed |= t > st.t.isf(level, n - 1)
        spent_so_far.append(crossed.mean())
    expected = [spent(n / looks[-1], alpha, spending) for n in looks]
    errors = 3.5 * np.sqrt(np.array(expected) / draws)
    assert np.all(np.abs(np.array(spent_so_far) - expected) < errors)


def test_no_probability_is_lost_where_a_look_adds_one_value() -> None:
    chain = _Chain.first(2, 1.0)
    assert chain._above(3, np.array([-1.0]))[:, 0] == pytest.approx(1)
    mass = chain.mass.sum()
    for n, z in ((3, 1.5), (4, 5.0), (7, 5.0)):
        passed = chain.mass @ chain._above(n, _r_of(np.array([z]), n))[:, 0]
        chain = chain.advance(n, z)
        assert chain.mass.sum() == pytest.approx(mass - passed, abs=1e-9)
        mass = chain.mass.sum()


def test_a_look_without_anything_to_spend_is_refused() -> None:
    """At 6 of 200 values z is 13, where r cannot be told from 1; at 16 of 200 the level is 2e-15."""
    with pytest.raises(ValueError, match="The look at 5 of 200 values has no error to spend; look later"):
        nominal_levels((5, 6, 200), 0.025, "obrien_fleming")
    levels = nominal_levels((16, 17, 200), 0.025, "obrien_fleming")
    assert 1e-15 < levels[0] < levels[1] < 2e-14
    assert levels[2] == pytest.approx(0.025, rel=1e-3)


@pytest.mark.parametrize("looks", [(), (1, 2), (5, 5), (10, 5)])
def test_looks_increase(looks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="increasing"):
        nominal_levels(looks, 0.05, "pocock")
