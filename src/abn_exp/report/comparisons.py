"""Cells of a study, and their comparison with a reference norm.

Scores are kept as fractions; samples are percent, differences and stds percentage points.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abn_exp.errors import DamagedFile
from abn_exp.report import stats
from abn_exp.report.pooled import RandomEffects, random_effects
from abn_exp.report.spread import SpreadJudgement, SpreadTested, compare_spreads, judge_spreads
from abn_exp.report.verdicts import Judgement, Tested, judge
from abn_exp.results import Run, has_begun, read_metrics
from abn_exp.trained_network import load_input_format, read_config

METRICS = ("test_acc", "test_acc_best_val", "test_acc_peak")

Group = tuple[str, str, str]  # dataset, model, variant
Key = tuple[str, str, str, str]  # dataset, model, norm, variant


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
    unscored: dict[int, str]  # by seed: why it has no score
    device: str | None = None  # "cpu" or the GPU's name, where the report has several kinds

    @property
    def begun(self) -> bool:
        return any(has_begun(run.directory) for run in self.runs)

    @property
    def key(self) -> Key:
        return self.dataset, self.model, self.norm, self.variant

    @property
    def columns(self) -> dict[str, object]:
        """The key, by the names of a CSV file's columns."""
        return {"dataset": self.dataset, "model": self.model, "norm": self.norm, "variant": self.variant}

    @property
    def group(self) -> Group:
        """What a comparison of norms holds fixed: (dataset, model, variant)."""
        return self.dataset, self.model, self.variant

    @property
    def failed(self) -> set[int]:
        """The seeds that failed or diverged; what was stopped or not begun is not among them."""
        return {run.seed for run in self.runs if run.status in ("failed", "diverged")}

    @property
    def ended(self) -> set[int]:
        """The seeds that have a test accuracy, failed or diverged."""
        return self.scores["test_acc"].keys() | self.failed

    def sample(self, metric: str, seeds: Iterable[int]) -> stats.Array:
        """Return the scores of ``seeds`` in percent, (num_seeds,), NaN where there is none."""
        return np.array([100 * self.scores[metric].get(seed, stats.NAN) for seed in seeds])

    def sample_at_chance(self, seeds: Iterable[int]) -> stats.Array:
        """Return the test accuracies of ``seeds`` in percent; what failed has that of guessing, 100 / classes."""
        classes = self._number_of_classes()
        failed = self.failed
        guessing = 100 / classes if classes else 0.0  # unknown: the lowest score
        scores = self.sample("test_acc", seeds)
        return np.where([seed in failed for seed in seeds], guessing, scores)

    def _number_of_classes(self) -> int | None:
        """Return what the configuration says, or else, of a folder of images, what a finished run found there."""
        whole = [run for run in self.runs if run.status != "damaged"]
        classes = next((read_config(run.directory).get("dataset", {}).get("num_classes") for run in whole), None)
        for run in whole if classes is None else []:
            with suppress(ValueError):  # an older run has not kept it
                if run.result is not None and (names := load_input_format(run).classes) is not None:
                    return len(names)
        return None if classes is None else int(classes)


@dataclass(frozen=True)
class Comparison:
    """One norm against the reference in the same group, by test_acc."""

    cell: Cell
    base: Cell
    mean: Judgement
    spread: SpreadJudgement
    primary: bool = False  # is the difference of means the study's primary comparison?
    primary_spread: bool = False  # or the ratio of stds?


@dataclass(frozen=True)
class Pooled:
    """One norm against the reference over the cells that have both: each seed averaged over them first."""

    norm: str
    reference: str
    cells: tuple[Cell, ...]  # the norm's
    judgement: Judgement
    random_effects: RandomEffects | None  # of the cells' differences
    primary: bool = False  # is it the study's primary comparison?


def collect_cells(runs: Iterable[Run], reference: str = "bn") -> list[Cell]:
    """Group runs by cell, sorted by dataset, model and variant; within these the reference comes first.

    Runs on different kinds of device are different cells: float32 itself is not the same arithmetic there.

    Raises ValueError where two directories hold the same seed of the same cell.
    """
    runs = list(runs)
    devices = _devices(runs)
    by_cell: dict[tuple[Key, str | None], dict[int, Run]] = {}
    for run in runs:
        of_cell = by_cell.setdefault((run.cell, devices.get(run.directory)), {})
        other = of_cell.setdefault(run.seed, run)
        if other is not run and (has_begun(run.directory) or has_begun(other.directory)):
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
        unscored = {seed: _why(run) for seed, run in ordered.items() if run.result is None}
        name = variant if device is None else f"{variant} on {device}"
        cells.append(Cell(dataset, model, norm, name, tuple(ordered.values()), scores, unscored, device))
    return sorted(cells, key=lambda c: (c.group, c.norm != reference, c.norm))


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
    if not has_begun(run.directory):
        return "not begun"
    text = reason if reason.startswith(run.status) else f"{run.status}: {reason}" if reason else run.status
    try:
        return f"{text} ({len(read_metrics(run.directory))} epochs recorded)"
    except DamagedFile as error:
        return f"{text}; {error}"


def group_cells(cells: Iterable[Cell]) -> dict[Group, list[Cell]]:
    """Return the cells by (dataset, model, variant): the norms that can be compared with each other."""
    groups: dict[Group, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups


def learning_curves(cells: Iterable[Cell]) -> tuple[str, dict[str, dict[int, stats.Array]]]:
    """Return of which images the accuracy is, and norm -> seed -> its value in percent at every epoch.

    "validation", or "test" where a group has no validation split and was tested after every epoch.
    """
    lines = {cell.norm: {run.seed: _lines(run) for run in cell.runs if run.status != "damaged"} for cell in cells}

    def curves(key: str) -> dict[str, dict[int, stats.Array]]:
        every = {
            norm: {s: [100 * line[key] for line in r if key in line] for s, r in runs.items()}
            for norm, runs in lines.items()
        }
        return {norm: {s: np.array(curve) for s, curve in runs.items() if curve} for norm, runs in every.items()}

    validated = curves("val/acc")
    return ("validation", validated) if any(validated.values()) else ("test", curves("test/acc"))


def _lines(run: Run) -> list[dict[str, Any]]:
    """Return a run's metrics; none where they are damaged, of which `_why` tells."""
    try:
        return read_metrics(run.directory)
    except DamagedFile:
        return []


def started_seeds(cells: Iterable[Cell]) -> list[int]:
    """Return every seed that was started in any of these cells."""
    return sorted({run.seed for cell in cells for run in cell.runs})


def pairs_of(cells: Iterable[Cell], norm: str | None, reference: str) -> list[tuple[Cell, Cell]]:
    """Return the cells of ``norm`` (None: of any other norm), each with the reference's of its group."""
    found = []
    for group in group_cells(cells).values():
        base = next((cell for cell in group if cell.norm == reference), None)
        others = [cell for cell in group if cell.norm != reference and norm in (None, cell.norm)]
        found += [(cell, base) for cell in others if base is not None]
    return found


def compare(candidates: Sequence[Cell], references: Sequence[Cell], seeds: Sequence[int]) -> Tested:
    """Compare the means over cells, each seed's first; a seed that one cell lacks is left out.

    A generator of its own each: no p depends on what else is in the folder.
    """
    sides = candidates, references
    a, b = (np.mean([cell.sample("test_acc", seeds) for cell in side], axis=0) for side in sides)
    mean = stats.compare_means(a, b, np.random.default_rng(0))
    failed = tuple(sum(len(cell.failed & set(seeds)) for cell in side) for side in sides)
    if failed[0] == failed[1]:
        return Tested(mean, (failed[0], failed[1]))
    failing, others = sides if failed[0] > failed[1] else sides[::-1]
    if (mean.method == "paired" or len(failing) > 1) and failed_alone(failing, others, seeds):
        return Tested(mean, (failed[0], failed[1]), stats.compare_means([], [], np.random.default_rng(0)))
    a, b = (np.mean([cell.sample_at_chance(seeds) for cell in side], axis=0) for side in sides)
    return Tested(mean, (failed[0], failed[1]), stats.compare_means(a, b, np.random.default_rng(0)))


def failed_alone(failing: Sequence[Cell], others: Sequence[Cell], seeds: Iterable[int]) -> bool:
    """Tell whether a seed failed in one of ``failing`` and has not come to an end in another of these cells: no pair
    of that seed counts the failure, so that nothing can speak for the side that failed."""
    ended = [cell.ended for cell in (*failing, *others)]
    failures = {seed for cell in failing for seed in cell.failed} & set(seeds)
    return any(seed not in one for seed in failures for one in ended)


def one_kind_each(*sides: Iterable[Cell]) -> bool:
    """Tell whether the cells of each side ran on one kind of device: no average is over several kinds."""
    return all(len({cell.device for cell in side}) == 1 for side in sides)


def compare_cells(
    cells: Sequence[Cell],
    reference: str,
    delta: float,
    primary: Mapping[Key, Judgement] | None = None,
    primary_spreads: Mapping[Key, SpreadJudgement] | None = None,
    withheld: Collection[frozenset[Key]] = (),
) -> list[Comparison]:
    """Compare each norm with the reference norm of its group, where the group has one.

    The means are one family and the spreads another, each without those that were judged as primary; ``withheld`` are
    pairs of cells that are not to be compared yet.
    """
    primary, primary_spreads = dict(primary or {}), dict(primary_spreads or {})
    pairs = [(a, b) for a, b in pairs_of(cells, None, reference) if frozenset((a.key, b.key)) not in withheld]
    others = [(cell, base) for cell, base in pairs if cell.key not in primary]
    seeds = {group: started_seeds(members) for group, members in group_cells(cells).items()}
    judged = judge([compare([cell], [base], seeds[cell.group]) for cell, base in others], delta)
    means = primary | {cell.key: j for (cell, _), j in zip(others, judged, strict=True)}
    others = [(cell, base) for cell, base in pairs if cell.key not in primary_spreads]
    found = judge_spreads([compare_spread(cell, base) for cell, base in others])
    spreads = primary_spreads | {cell.key: s for (cell, _), s in zip(others, found, strict=True)}
    return [
        Comparison(cell, base, means[cell.key], spreads[cell.key], cell.key in primary, cell.key in primary_spreads)
        for cell, base in pairs
    ]


def compare_spread(cell: Cell, base: Cell) -> SpreadTested:
    seeds, failed = started_seeds([cell, base]), (len(cell.failed), len(base.failed))
    pair = cell.sample("test_acc", seeds), base.sample("test_acc", seeds)
    found = compare_spreads(*pair, np.random.default_rng(0))
    if failed[0] == failed[1]:
        return SpreadTested(found, failed)
    failing, other = (cell, base) if failed[0] > failed[1] else (base, cell)
    if failed_alone([failing], [other], seeds):
        return SpreadTested(found, failed, compare_spreads([], [], np.random.default_rng(0)))
    pair = cell.sample_at_chance(seeds), base.sample_at_chance(seeds)
    return SpreadTested(found, failed, compare_spreads(*pair, np.random.default_rng(0)))


def pool(
    cells: Sequence[Cell],
    reference: str,
    delta: float,
    primary: Mapping[frozenset[frozenset[Key]], Judgement | None],
) -> list[Pooled]:
    """Compare each norm with the reference over all groups that have both, where there are two or more, all on the
    same kind of device.

    All of these are one family: none is a part of another. What was judged as primary, by its pairs of cells, is not
    judged again; where it is None, it is left out.
    """
    norms = dict.fromkeys(cell.norm for cell in cells if cell.norm != reference)
    ended = [cell for cell in cells if cell.ended]  # a cell that only failed is not to be left out
    found = {norm: pairs_of(ended, norm, reference) for norm in norms}
    found = {
        norm: pairs for norm, pairs in found.items() if len(pairs) > 1 and one_kind_each(*zip(*pairs, strict=True))
    }
    before = {norm: primary[keys] for norm, pairs in found.items() if (keys := keys_of(pairs)) in primary}
    others = [norm for norm in found if norm not in before]
    judged = before | dict(
        zip(others, judge([pooled_difference(found[norm]) for norm in others], delta), strict=True)
    )
    return [
        Pooled(norm, reference, tuple(cell for cell, _ in pairs), j, cells_effect(pairs), norm in before)
        for norm, pairs in found.items()
        if (j := judged[norm]) is not None
    ]


def keys_of(pairs: Iterable[tuple[Cell, Cell]]) -> frozenset[frozenset[Key]]:
    """Return what identifies pairs of cells, in whatever order and whichever of the two is the reference."""
    return frozenset(frozenset((a.key, b.key)) for a, b in pairs)


def pooled_difference(pairs: Sequence[tuple[Cell, Cell]], seeds: Sequence[int] | None = None) -> Tested:
    """Compare candidates with references over cells, each seed averaged over them first; all seeds where none are
    given."""
    candidates, references = zip(*pairs, strict=True)
    return compare(candidates, references, started_seeds([*candidates, *references]) if seeds is None else seeds)


def cells_effect(pairs: Sequence[tuple[Cell, Cell]]) -> RandomEffects | None:
    """Return the random-effects mean of the cells' own differences."""
    means = [compare([cell], [base], started_seeds([cell, base])).mean for cell, base in pairs]
    return random_effects([m.difference for m in means], [m.standard_error for m in means])
