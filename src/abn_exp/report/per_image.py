"""Evidence from the predictions of single test images, for the cells and comparisons of a report."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from abn_exp.report.comparisons import Cell, pairs_of
from abn_exp.report.image_stats import (
    CrossedMean,
    McNemar,
    SpreadSplit,
    agreement,
    crossed_mean,
    mcnemar,
    split_spread,
)
from abn_exp.results import Run
from abn_exp.trained_network import Predictions, load_predictions


@dataclass(frozen=True)
class CellImages:
    cell: Cell
    seeds: tuple[int, ...]  # those with predictions
    accuracy: CrossedMean
    split: SpreadSplit
    agreement: float  # between runs of different seeds


@dataclass(frozen=True)
class PairImages:
    cell: Cell
    base: Cell
    seeds: tuple[int, ...]  # those of which both runs have predictions
    difference: CrossedMean
    mcnemar: tuple[McNemar, ...]  # one a seed
    agreement: float  # between the two norms' runs of a seed


@dataclass(frozen=True)
class ImageEvidence:
    cells: list[CellImages]
    pairs: list[PairImages]
    left_out: list[str]  # a sentence each: finished runs without predictions, or of other test images


def image_evidence(cells: Sequence[Cell], reference: str) -> ImageEvidence:
    """Compute the statistics of the runs' predictions."""
    found = {
        cell.key: {run.seed: p for run in cell.runs if run.result and (p := read_predictions(run)) is not None}
        for cell in cells
    }
    of_cells, of_pairs, left_out = [], [], []
    for cell in cells:
        by_seed = found[cell.key]
        where = f"{cell.dataset} with {cell.model}, {cell.norm} ({cell.variant})"
        if missing := sorted(set(cell.scores["test_acc"]) - by_seed.keys()):
            left_out.append(f"{where}: no predictions of seeds {', '.join(map(str, missing))}.")
        if not _same_images(by_seed.values()):
            left_out.append(f"{where}: its runs were tested on different images.")
        elif by_seed:
            correct = np.array([p.last_correct for p in by_seed.values()])
            agreeing = agreement(itertools.combinations([p.last for p in by_seed.values()], 2))
            of_cells.append(CellImages(cell, tuple(by_seed), crossed_mean(correct), split_spread(correct), agreeing))
    for cell, base in pairs_of(cells, None, reference):
        ours, theirs = found[cell.key], found[base.key]
        seeds = tuple(sorted(ours.keys() & theirs.keys()))
        if not seeds or not _same_images([*ours.values(), *theirs.values()]):
            continue
        a, b = (np.array([side[seed].last_correct for seed in seeds]) for side in (ours, theirs))
        agreeing = agreement((ours[seed].last, theirs[seed].last) for seed in seeds)
        difference = crossed_mean(a.astype(np.float64) - b)
        of_pairs.append(PairImages(cell, base, seeds, difference, tuple(mcnemar(a, b)), agreeing))
    return ImageEvidence(of_cells, of_pairs, left_out if any(found.values()) else _none(cells))


def _same_images(predictions: Iterable[Predictions]) -> bool:
    return len({(p.labels_sha256, len(p.last)) for p in predictions}) <= 1


def _none(cells: Iterable[Cell]) -> list[str]:
    """Return a sentence where no finished run has predictions; nothing where no run is finished."""
    if not any(cell.scores["test_acc"] for cell in cells):
        return []
    return ["None of these runs has kept its predictions, so there are no numbers on single test images."]


def read_predictions(run: Run) -> Predictions | None:
    """Return what a finished run predicted; None where it has kept nothing."""
    try:
        return load_predictions(run)
    except FileNotFoundError:
        return None
