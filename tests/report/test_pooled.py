import math

import numpy as np
import pytest
from statsmodels.stats.meta_analysis import combine_effects

from abn_exp.report.pooled import random_effects


@pytest.mark.parametrize("spread", [0.05, 1.0])  # without and with heterogeneity
def test_random_effects_agree_with_statsmodels(spread: float) -> None:
    rng = np.random.default_rng(5)
    errors = rng.uniform(0.1, 0.4, size=7)
    means = rng.normal(-0.5, spread, size=7) + 0.1 * errors
    found = random_effects(means, errors)
    assert found is not None
    oracle = combine_effects(means, errors**2, method_re="chi2")
    table = oracle.summary_frame()
    # statsmodels keeps an estimate of tau^2 below zero; at 0 the random-effects mean is the fixed one
    row = table.loc["random effect" if oracle.tau2 > 0 else "fixed effect"]
    assert (found.tau == 0) == (oracle.tau2 <= 0) == (spread == 0.05)
    assert found.mean == pytest.approx(row["eff"])
    assert found.interval == pytest.approx((row["ci_low"], row["ci_upp"]))
    assert found.tau**2 == pytest.approx(max(0, oracle.tau2))
    assert found.q == pytest.approx(oracle.q)
    assert found.p_q == pytest.approx(oracle.test_homogeneity().pvalue)
    assert found.i_squared == pytest.approx(max(0, oracle.i2))
    knapp = combine_effects(means, errors**2, method_re="chi2", use_t=True).conf_int(alpha=0.05, use_t=True)
    # statsmodels: (fixed, random, fixed with Hartung and Knapp's scale, random with it)
    assert found.interval_hartung_knapp == pytest.approx(tuple(map(float, knapp[3 if oracle.tau2 > 0 else 2])))


def test_three_cells_by_hand() -> None:
    # y = 0, 2, 4 and w = 1, 1, 1/4: the fixed mean is (0 + 2 + 1) / 2.25
    found = random_effects([0, 2, 4, 9], [1, 1, 2, math.nan])
    assert found is not None
    fixed = 3 / 2.25
    q = fixed**2 + (2 - fixed) ** 2 + (4 - fixed) ** 2 / 4
    tau_squared = (q - 2) / (2.25 - (1 + 1 + 1 / 16) / 2.25)
    assert found.k == 3
    assert found.q == pytest.approx(q)
    assert found.tau == pytest.approx(math.sqrt(tau_squared))
    assert found.i_squared == pytest.approx(1 - 2 / q)


def test_one_cell_has_no_mean_over_cells() -> None:
    assert random_effects([1.0, 2.0], [0.1, math.nan]) is None
