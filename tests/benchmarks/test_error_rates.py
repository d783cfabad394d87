"""The simulation decides as the report does, and notices an error rate that is too high."""

from dataclasses import replace

import numpy as np
import pytest

from abn_exp.report import verdicts
from abn_exp.report.verdicts import PValues
from benchmarks import error_rates
from benchmarks.error_rates import CHANCE, DELTA, NAMES, designs, rates, too_high


def decide_one(d: np.ndarray, x_failed: np.ndarray, y_failed: np.ndarray, level: float, level_delta: float) -> str:
    def p_values(values: np.ndarray) -> PValues:
        with np.errstate(divide="ignore", invalid="ignore"):
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return verdicts.t_tests(values.mean() if len(values) else np.nan, error, len(values) - 1, DELTA)

    scored = np.select([x_failed & y_failed, x_failed, y_failed], [0.0, CHANCE, -CHANCE], d)
    failed = int(x_failed.sum()), int(y_failed.sum())
    p = verdicts.guard_against_failures(p_values(d[~x_failed & ~y_failed]), p_values(scored), failed)
    return verdicts.decide(p, level, level_delta)


@pytest.mark.parametrize("n", [3, 8])
def test_verdicts_in_arrays_are_the_reports(n: int) -> None:
    rng = np.random.default_rng(n)
    d = rng.normal(rng.choice([-1, -0.3, 0, 0.3, 1], size=(400, 1)), 0.3, size=(400, n))
    x_failed, y_failed = (rng.random(d.shape) < rng.choice([0, 0.15], size=(400, 1)) for _ in range(2))
    found = [NAMES[i] for i in error_rates.decide(d, x_failed, y_failed, 0.05, 0.04)]
    expected = [decide_one(*row, 0.05, 0.04) for row in zip(d, x_failed, y_failed, strict=True)]
    assert found == expected
    assert set(found) == set(NAMES)


def test_looks_end_at_the_first_verdict() -> None:
    design = designs()[-1]
    d = np.tile(np.linspace(-0.1, 0.1, 20) + 3, (3, 1))  # clear at five seeds
    d[1] = np.resize([3, -3], 20)  # never
    d[2, :5], d[2, 5:] = [4, -4, 0, 3, -2], np.linspace(2.9, 3.1, 15)  # clear by twenty
    none = np.zeros(d.shape, bool)
    verdict, seeds = error_rates.run_design(design, d, none, none)
    assert [NAMES[i] for i in verdict] == ["better", "undecided", "better"]
    assert list(seeds) == [5, 20, 20]


@pytest.mark.parametrize("shape", error_rates.SHAPES)
@pytest.mark.parametrize("failures", error_rates.FAILURES)
def test_no_error_rate_is_too_high(shape: str, failures: str) -> None:
    rng, draws = np.random.default_rng(1), 4_000
    for design in designs():
        found = rates(design, shape, failures, draws, rng)
        assert too_high(found, draws) == []
    assert found.shares["better"][1] > found.shares["better"][0] == found.better
    assert [sum(share[i] for share in found.shares.values()) for i in (0, 1)] == pytest.approx([1, 1])
    assert too_high(replace(found, at_delta=0.062), draws) == ["at_delta"]


def test_looks_without_a_plan_err_three_times_as_often() -> None:
    (_, few), (_, many) = error_rates.unguarded_looks(20_000, np.random.default_rng(2))
    assert few == pytest.approx(0.15, abs=0.01)
    assert many == pytest.approx(0.225, abs=0.012)


def test_losses_look_like_less_spread_unless_failures_count() -> None:
    plain, guarded = error_rates.less_spread_after_losses(400, np.random.default_rng(3))
    assert plain > 0.08
    assert guarded < 0.02
