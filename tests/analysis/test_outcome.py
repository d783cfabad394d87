"""Slopes of accuracy over a measure, against other people's regressions."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from statsmodels.regression.linear_model import OLS

from abn_exp.analysis.outcome import STEP, between_norms, between_seeds, slopes
from abn_exp.report.comparisons import collect_cells
from abn_exp.results import find_runs
from tests.helpers.records import study

SEEDS, NORMS = 8, 4


def sample(slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Measures and accuracies, (seeds, norms): accuracy changes with the measure from seed to seed, and from norm to
    norm the other way round."""
    rng = np.random.default_rng(0)
    norm, own = np.linspace(0.1, 0.7, NORMS), rng.normal(0, 0.02, (SEEDS, NORMS))
    return norm + own, 80 - 3 * norm + slope * own + rng.normal(0, 0.1, (SEEDS, NORMS))


def test_between_seeds_is_an_analysis_of_covariance() -> None:
    x, y = sample(20)
    dummies = np.tile(np.eye(NORMS), (SEEDS, 1))
    fit = OLS(y.ravel(), np.column_stack([x.ravel(), dummies])).fit()
    slope, interval, p = between_seeds([np.array([a, b]) for a, b in zip(x.T, y.T, strict=True)])
    assert slope == pytest.approx(STEP * fit.params[0])
    assert interval == pytest.approx(STEP * fit.conf_int()[0])
    assert p == pytest.approx(fit.pvalues[0])
    assert slope == pytest.approx(20 * STEP, rel=0.25)


def test_between_norms_is_the_mean_of_the_seeds_slopes() -> None:
    x, y = sample(20)
    expected = [STEP * np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)]
    test = ttest_1samp(expected, 0)
    slope, interval, p = between_norms(x, y)
    assert (slope, p) == pytest.approx((np.mean(expected), test.pvalue))
    assert interval == pytest.approx(tuple(test.confidence_interval()))
    assert slope == pytest.approx(-3 * STEP, rel=0.35)


def test_each_direction_is_found_and_named(tmp_path: Path) -> None:
    x, y = sample(20)
    names = ["bn", "abn", "abn_forward", "abn_noshift"]
    folder = study(tmp_path / "study", {name: (y[:, i] / 100).tolist() for i, name in enumerate(names)})
    cells = collect_cells(find_runs(folder), "bn")
    scores = {
        run.directory: {"imbalance": x[run.seed, names.index(cell.norm)]} for cell in cells for run in cell.runs
    }
    norms, seeds = slopes(cells, scores, "imbalance")
    assert (norms.between, norms.norms, norms.n, norms.verdict) == ("norms", NORMS, SEEDS, "falls")
    assert (seeds.between, seeds.norms, seeds.n, seeds.verdict) == ("seeds", NORMS, SEEDS * NORMS, "rises")
    assert (
        "from norm to norm of one seed (4 norms, n = 8 seeds), test accuracy changes by -0.026 points"
        in norms.sentence
    )
    assert seeds.row()["slope"] == seeds.slope
    two = [cell for cell in cells if cell.norm in ("bn", "abn")]
    assert [slope.between for slope in slopes(two, scores, "imbalance")] == ["seeds"]
    same = {directory: {"imbalance": 0.5} for directory in scores}
    assert slopes(cells, same, "imbalance") == []


def test_chance_is_undecided() -> None:
    """Of 400 samples without a slope, 5 % are significant at 5 %."""
    rng = np.random.default_rng(1)
    found = [
        (between_norms(x, y)[2], between_seeds([np.array([a, b]) for a, b in zip(x.T, y.T, strict=True)])[2])
        for x, y in rng.normal(size=(400, 2, SEEDS, NORMS))
    ]
    for share in (np.array(found) < 0.05).mean(0):
        assert share == pytest.approx(0.05, abs=0.03)
