"""Whether test accuracy goes with a measure of trained networks: from norm to norm, and from seed to seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import linregress, ttest_1samp
from scipy.stats import t as student

from abn_exp.analysis.summary import DIGITS, Scores, group_title
from abn_exp.report import stats
from abn_exp.report.comparisons import Cell, Group, group_cells
from abn_exp.report.formatting import interval_text, number_text, p_equation, p_text, signed_text

STEP = 0.01  # of a measure between 0 and 1, for which a change of accuracy is given
LEAST_NORMS = 3  # two give no more than the difference of their accuracies


@dataclass(frozen=True)
class Slope:
    """How many points test accuracy changes for STEP more of a measure, with its 95 % interval and p.

    `between` norms: a least-squares line through the networks of one seed, one a norm; the mean of the slopes over n
    seeds, with Student's interval and test. It is of these norms, which differ in other things, too. Between seeds:
    one slope through n networks, each less the mean of its norm (analysis of covariance), with n - norms - 1 degrees
    of freedom; it takes the networks as independent.
    """

    where: str
    group: Group
    measure: str
    between: str  # norms, seeds
    norms: int
    n: int
    slope: float
    interval: stats.Interval
    p: float
    p_holm: float = stats.NAN

    @property
    def verdict(self) -> str:
        """rises, falls or undecided: p < 0.05 after Holm's correction."""
        if not self.p_holm < stats.ALPHA:
            return "undecided"
        return "rises" if self.slope > 0 else "falls"

    @property
    def sentence(self) -> str:
        compared = (
            f"from norm to norm of one seed ({self.norms} norms, n = {self.n} seeds)"
            if self.between == "norms"
            else f"from seed to seed of one norm (n = {self.n} networks)"
        )
        return (
            f"On {self.where}, {compared}, test accuracy changes by {signed_text(self.slope, DIGITS)} points for "
            f"{number_text(STEP)} more of {self.measure} (95 % interval {interval_text(self.interval, DIGITS)}, "
            f"{p_equation(self.p)}, Holm {p_text(self.p_holm)})."
        )

    def row(self) -> dict[str, object]:
        """Return it as a row of a CSV file."""
        row: dict[str, object] = dict(zip(("dataset", "model", "variant"), self.group, strict=True))
        row |= {"measure": self.measure, "between": self.between, "norms": self.norms, "n": self.n}
        row |= {"slope": self.slope, "slope_low": self.interval[0], "slope_high": self.interval[1]}
        return row | {"p": self.p, "p_holm": self.p_holm, "verdict": self.verdict}


def slopes(cells: Sequence[Cell], scores: Scores, measure: str) -> list[Slope]:
    """Return the slopes of each group that has enough networks; Holm's correction is over them all."""
    found = []
    for group, members in group_cells(cells).items():
        points = of_networks(members, scores, measure)
        what = group_title(cells, group), group, measure
        norms = len(points)
        seeds = sorted(set.intersection(*map(set, points.values())))
        if norms >= LEAST_NORMS and len(seeds) > 1:
            x, y = np.array([[points[norm][seed] for norm in points] for seed in seeds]).transpose(2, 0, 1)
            found.append(Slope(*what, "norms", norms, len(seeds), *between_norms(x, y)))
        n = sum(map(len, points.values()))
        if n - norms > 1:
            by_norm = [np.array(list(of_seed.values())).T for of_seed in points.values()]
            found.append(Slope(*what, "seeds", norms, n, *between_seeds(by_norm)))
    found = [slope for slope in found if not math.isnan(slope.slope)]  # a measure that does not vary has none
    adjusted = stats.holm([slope.p for slope in found])
    return [replace(slope, p_holm=p) for slope, p in zip(found, adjusted, strict=True)]


def of_networks(members: Sequence[Cell], scores: Scores, measure: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Return by norm and seed a network's measure and its test accuracy in percent."""
    return {
        cell.norm: {
            run.seed: (scores[run.directory][measure], 100 * run.result.test_acc)
            for run in cell.runs
            if run.result is not None
        }
        for cell in members
    }


def between_norms(x: stats.Array, y: stats.Array) -> tuple[float, stats.Interval, float]:
    """Measures and accuracies, (seeds, norms) -> slope for STEP, interval, p."""
    if not all(map(stats.has_spread, x)):
        return stats.NAN, (stats.NAN, stats.NAN), stats.NAN
    found = STEP * np.array([linregress(a, b).slope for a, b in zip(x, y, strict=True)])
    return float(found.mean()), stats.t_interval(found), float(ttest_1samp(found, 0).pvalue)


def between_seeds(by_norm: Sequence[stats.Array]) -> tuple[float, stats.Interval, float]:
    """Measures and accuracies of each norm's networks, (2, n) -> slope for STEP, interval, p."""
    x, y = np.concatenate([points - points.mean(1, keepdims=True) for points in by_norm], axis=1)
    if not stats.has_spread(x, 1.0):
        return stats.NAN, (stats.NAN, stats.NAN), stats.NAN
    fit, freedom = linregress(x, y), len(x) - len(by_norm) - 1
    slope, error = STEP * fit.slope, STEP * fit.stderr * math.sqrt((len(x) - 2) / freedom)
    half = student.ppf(0.975, freedom) * error
    p = float(2 * student.sf(abs(slope / error), freedom)) if error > 0 else stats.NAN
    return float(slope), (float(slope - half), float(slope + half)), p
