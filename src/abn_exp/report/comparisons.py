"""Cells of a study, their comparison with a reference norm, and the verdicts that follow from the numbers.

Scores are kept as fractions; samples are percent, differences and stds percentage points.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from abn_exp.report import stats
from abn_exp.report.figures import NORM_STYLES
from abn_exp.results import Run, read_metrics

METRICS = ("test_acc", "test_acc_best_val", "test_acc_peak")

Decision = Literal["confirmed", "refuted", "not decided"]
Claim = Literal["mean", "spread"]
Group = tuple[str, str, str]


@dataclass(frozen=True)
class Cell:
    """All runs of one (dataset, model, norm, variant) on one kind of device.

    Scores are fractions, by metric and seed. Where a report has runs on several kinds of device, ``variant`` names
    this cell's.
    """

    dataset: str
    model: str
    norm: str
    variant: str
    runs: tuple[Run, ...]
    scores: dict[str, dict[int, float]]
    failed: dict[int, str]  # by seed: why it has no score
    device: str | None = None  # "cpu" or the GPU's name, where the report has several kinds

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.dataset, self.model, self.norm, self.variant

    @property
    def group(self) -> Group:
        """What a comparison of norms holds fixed: (dataset, model, variant)."""
        return self.dataset, self.model, self.variant

    def sample(self, metric: str, seeds: Iterable[int]) -> stats.Array:
        """Return the scores of ``seeds`` in percent, (num_seeds,), NaN where there is none."""
        return np.array([100 * self.scores[metric].get(seed, stats.NAN) for seed in seeds])


@dataclass(frozen=True)
class Comparison:
    """One norm against the reference in the same group, by test_acc."""

    cell: Cell
    reference: str
    mean: stats.MeanComparison
    spread: stats.SpreadComparison
    mean_p_holm: float = stats.NAN
    spread_p_holm: float = stats.NAN
    family: int = 1  # how many p values Holm's correction of the means is over


def collect_cells(runs: Iterable[Run], reference: str = "bn") -> list[Cell]:
    """Group runs by cell, sorted by dataset, model and variant; within these the reference comes first.

    Runs on different kinds of device are different cells: float32 itself is not the same arithmetic there.

    Raises ValueError where two directories hold the same seed of the same cell.
    """
    runs = list(runs)
    devices = _devices(runs)
    by_cell: dict[tuple[tuple[str, str, str, str], str | None], dict[int, Run]] = {}
    for run in runs:
        of_cell = by_cell.setdefault((run.cell, devices.get(run.directory)), {})
        other = of_cell.setdefault(run.seed, run)
        if other is not run:
            raise ValueError(
                f"{other.directory} and {run.directory} hold the same run twice; give the folder of one study."
            )
    cells = []
    for ((dataset, model, norm, variant), device), by_seed in by_cell.items():
        ordered = dict(sorted(by_seed.items()))
        results = {seed: run.result for seed, run in ordered.items() if run.result is not None}
        scores = {
            metric: {seed: value for seed, r in results.items() if (value := getattr(r, metric)) is not None}
            for metric in METRICS
        }
        failed = {seed: _why(run) for seed, run in ordered.items() if run.result is None}
        name = variant if device is None else f"{variant} on {device}"
        cells.append(Cell(dataset, model, norm, name, tuple(ordered.values()), scores, failed, device))
    order = [reference, *(norm for norm in NORM_STYLES if norm != reference)]
    return sorted(cells, key=lambda c: (c.group, order.index(c.norm) if c.norm in order else len(order), c.norm))


def _devices(runs: Sequence[Run]) -> dict[Path, str]:
    """Return each run's kind of device by its directory; nothing where there is only one kind.

    A run without a result counts to the kind on which most of its cell ran, or else most of all.
    """
    known = [(run.cell, run.result.device_kind) for run in runs if run.result is not None]
    if len({kind for _, kind in known}) < 2:
        return {}

    def most(run: Run) -> str:
        own = [kind for cell, kind in known if cell == run.cell]
        return Counter(own or [kind for _, kind in known]).most_common(1)[0][0]

    return {run.directory: run.result.device_kind if run.result is not None else most(run) for run in runs}


def _why(run: Run) -> str:
    """Say why a run has no score, and how far it came."""
    reason = run.reason if run.reason is not None else ""
    if run.status == "damaged":
        return reason
    text = reason if reason.startswith(run.status) else f"{run.status}: {reason}" if reason else run.status
    return f"{text} ({len(read_metrics(run.directory))} epochs recorded)"


def group_cells(cells: Iterable[Cell]) -> dict[Group, list[Cell]]:
    """Return the cells by (dataset, model, variant): the norms that can be compared with each other."""
    groups: dict[Group, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups


def started_seeds(cells: Iterable[Cell]) -> list[int]:
    """Return every seed that was started in any of these cells."""
    return sorted({run.seed for cell in cells for run in cell.runs})


def compare_cells(cells: Sequence[Cell], reference: str = "bn") -> list[Comparison]:
    """Compare each norm with the reference norm of its group, where the group has one."""
    found = []
    for group in group_cells(cells).values():
        seeds = started_seeds(group)
        base = next((cell for cell in group if cell.norm == reference), None)
        if base is None:
            continue
        for cell in group:
            if cell is not base:
                pair = cell.sample("test_acc", seeds), base.sample("test_acc", seeds)
                # A generator of its own each: no comparison's p depends on what else is in the folder.
                mean = stats.compare_means(*pair, np.random.default_rng(0))
                spread = stats.compare_spreads(*pair, np.random.default_rng(0))
                found.append(Comparison(cell, reference, mean, spread))
    means, spreads = stats.holm([c.mean.p for c in found]), stats.holm([c.spread.p for c in found])
    family = sum(not math.isnan(p) for p in means)
    return [
        replace(c, mean_p_holm=p, spread_p_holm=q, family=family)
        for c, p, q in zip(found, means, spreads, strict=True)
    ]


def verdict_mean(comparison: Comparison, place: str | None = None) -> tuple[Decision, str]:
    """Judge the claim that the norm's mean test accuracy is above the reference's; ``place`` is where, in words."""
    c, m = comparison, comparison.mean
    head = f"On {place if place is not None else f'{c.cell.dataset} with {c.cell.model}'}, {c.cell.norm}"
    n = f"n = {count_text(m)}"
    if math.isnan(m.difference):
        return "not decided", f"{head} cannot be compared with {c.reference} ({n}): not decided."
    differs = f"differs from {c.reference} by {signed_text(m.difference)} points"
    if math.isnan(m.p):
        why = "one seed has no interval" if min(m.n) < 2 else "the differences do not vary and give no interval"
        return "not decided", f"{head} {differs} ({n}): not decided, {why}."
    numbers = f"95 % interval {interval_text(m.interval)}, {n}, {p_equation(m.p)}, Holm {p_text(c.mean_p_holm)}"
    if c.mean_p_holm < stats.ALPHA:
        if m.difference > 0:
            return "confirmed", f"{head} is {signed_text(m.difference)} points above {c.reference} ({numbers})."
        return "refuted", f"{head} is {-m.difference:.2f} points below {c.reference} ({numbers})."
    why = "the interval holds a loss as well as a gain"
    if m.p < stats.ALPHA:
        why = f"the interval leaves out zero, but not after Holm's correction over {c.family} comparisons"
    return "not decided", f"{head} {differs} ({numbers}): not decided at this n, {why}."


def verdict_spread(comparison: Comparison, place: str | None = None) -> tuple[Decision, str]:
    """Judge the claim that the norm's std between seeds is below the reference's; ``place`` is where, in words."""
    c, s = comparison, comparison.spread
    head = f"On {place if place is not None else f'{c.cell.dataset} with {c.cell.model}'}, {c.cell.norm}"
    n = f"n = {s.n[0]}" if s.n[0] == s.n[1] else f"n = {s.n[0]} and {s.n[1]}"
    if math.isnan(s.ratio):
        why = "that takes two seeds of each, with different scores"
        return "not decided", f"{head}'s spread cannot be compared with {c.reference}'s ({n}): not decided, {why}."
    numbers = (
        f"{s.std[0]:.2f} against {s.std[1]:.2f} points, 95 % interval of the ratio "
        f"{interval_text(s.ratio_interval)}, {n}, Brown-Forsythe {p_equation(s.p)}, Holm {p_text(c.spread_p_holm)}"
    )
    text = f"{head} has {s.ratio:.2f} times the std of {c.reference} between seeds ({numbers})"
    if c.spread_p_holm < stats.ALPHA:
        return ("confirmed" if s.ratio < 1 else "refuted"), f"{text}."
    power = f"the test would notice a ratio of 2 in {'only ' if s.power < 0.8 else ''}{100 * s.power:.0f} % of cases"
    needed = f" (80 % takes {stats.seeds_needed()} seeds a norm)" if s.power < 0.8 else ""
    return "not decided", f"{text}: not decided, at {n} {power}{needed}."


def overall(comparisons: Sequence[Comparison], claim: Claim) -> str:
    """Return one sentence for the claim as a whole: in how many places it is confirmed, refuted or not decided.

    Norms with the same account share their words.
    """
    by_norm: dict[str, list[Comparison]] = {}
    for c in comparisons:
        by_norm.setdefault(c.cell.norm, []).append(c)
    accounts: dict[str, list[str]] = {}
    for norm, group in by_norm.items():
        judge = verdict_mean if claim == "mean" else verdict_spread
        decisions = [judge(c)[0] for c in group]
        counts = {d: decisions.count(d) for d in get_args(Decision) if d in decisions}
        first, *rest = counts.items()
        if rest:
            places = f"{first[0]} in {first[1]} of {len(group)}, " + ", ".join(f"{d} in {k}" for d, k in rest)
        else:
            places = first[0] + (f" in all {first[1]}" if len(group) > 1 else "")
        n = sorted({size for c in group for size in (c.mean.n if claim == "mean" else c.spread.n)})
        seeds = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
        accounts.setdefault(f"{places} ({seeds})", []).append(norm)
    what = "above {}" if claim == "mean" else "with less spread than {}"
    reference = what.format(comparisons[0].reference)
    return "; ".join(f"{', '.join(norms)} {reference}: {account}" for account, norms in accounts.items()) + "."


def count_text(mean: stats.MeanComparison) -> str:
    """Return how many seeds a comparison of means has."""
    n = mean.n
    return f"{n[0]} paired seeds" if mean.method == "paired" else f"{n[0]} and {n[1]} unpaired seeds"


def number_text(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def signed_text(value: float) -> str:
    """Return a difference with its sign; one that rounds to zero has a plus."""
    return "-" if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}"


def interval_text(interval: tuple[float, float]) -> str:
    return "-" if math.isnan(interval[0]) else f"{number_text(interval[0])} to {number_text(interval[1])}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else number_text(p, 4 if p < 0.1 else 3)


def p_equation(p: float) -> str:
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"
