"""Time to accuracy: how soon our loop, with a decayed rate, is where a constant rate ends in the conventional one."""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from abn_exp import models
from abn_exp.config import Config, parse
from abn_exp.data.catalog import CATALOG
from abn_exp.models.build import initialize_
from abn_exp.options import all_options
from abn_exp.report.stats import MeanComparison, compare_means
from abn_exp.results import find_runs, read_config
from abn_exp.training.parallel import random_data
from benchmarks import measure
from benchmarks.conventional import ConventionalLoop, Norm, conventional
from benchmarks.measure import Quartiles, quartiles
from benchmarks.ours import OurLoop

REFERENCE = "constant"
VARIED = ("seed", "recipe.schedule.name", "recipe.epochs")
NETWORKS = ("binarynet", "vgg_small", "resnet18", "resnet18_paper")


@dataclass(frozen=True)
class Budget:
    """What a schedule has reached when its epochs are spent."""

    schedule: str
    epochs: int
    by_seed: dict[int, float]  # percent

    @property
    def accuracies(self) -> list[float]:
        return [self.by_seed[seed] for seed in sorted(self.by_seed)]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)


@dataclass(frozen=True)
class Row:
    """A budget in one of the loops: its time, and its accuracy beside the constant rate's, paired by seed."""

    loop: str
    budget: Budget
    hours: float
    against: MeanComparison | None


@dataclass(frozen=True)
class TimeToAccuracy:
    config: Config
    cell: tuple[str, str, str]
    images: int  # seen in an epoch
    epoch: dict[str, Quartiles]  # seconds, by loop
    rows: tuple[Row, ...]
    soonest: Row | None  # the least of our times whose mean is not below the constant rate's

    @property
    def ratio(self) -> float | None:
        """How many times sooner than the conventional loop, or None where no budget is enough."""
        return None if self.soonest is None else self.rows[0].hours / self.soonest.hours


def read(folder: Path) -> tuple[Config, tuple[str, str, str], list[Budget]]:
    """Return the configuration, the cell and the budgets of a folder of study=budget; each has at least two seeds.

    Raises ValueError for what cannot be compared.
    """
    runs = [run for run in find_runs(folder) if run.result is not None]
    cells = {(run.dataset, run.model, run.norm) for run in runs}
    if len(cells) != 1:
        raise ValueError(
            f"{folder} has finished runs of {len(cells)} cells; name the folder of one data set, model and norm."
        )
    configs = [parse(read_config(run.directory)) for run in runs]
    others = [
        {key: value for key, value in all_options(config.model_dump()).items() if key not in VARIED}
        for config in configs
    ]
    if different := sorted(key for one in others for key in one if one[key] != others[0].get(key)):
        raise ValueError(f"{folder} has runs that differ in {different[0]}; only {', '.join(VARIED)} may vary.")
    found: dict[tuple[str, int], dict[int, float]] = {}
    for run, config in zip(runs, configs, strict=True):
        key = (config.recipe.schedule.name, config.recipe.epochs)
        assert run.result is not None
        found.setdefault(key, {})[run.seed] = 100 * run.result.test_acc
    budgets = [Budget(*key, by_seed) for key, by_seed in sorted(found.items()) if len(by_seed) > 1]
    if {budget.schedule for budget in budgets} <= {REFERENCE} or REFERENCE not in {b.schedule for b in budgets}:
        raise ValueError(
            f"{folder} needs at least two seeds of a constant rate and of a decayed one: python train.py study=budget"
        )
    return configs[0], cells.pop(), budgets


def time_to_accuracy(folder: Path, device: torch.device, workers: int, repetitions: int) -> TimeToAccuracy:
    """Measure an epoch of both loops side by side, and set the budgets of a folder against each other in hours.

    Both run on as many threads as the runs did. The accuracies are the runs'; what the conventional loop computes is
    what ours computes with a constant rate. Raises ValueError where the folder has not what it takes.
    """
    config, cell, budgets = read(folder)
    dataset, model, norm = cell
    if dataset not in CATALOG:
        raise ValueError(f"{dataset} is not one of {', '.join(CATALOG)}; nothing is known of its images.")
    if model not in NETWORKS:
        raise ValueError(f"{model} is not one of {', '.join(NETWORKS)}; there is no conventional loop for it.")
    options, size = config.dataset, config.recipe.batch_size
    held = CATALOG[dataset].train_count if options.images is None else options.images[0]
    images = round((options.train_images or held) * (1 - config.recipe.val_fraction))
    data = random_data(12 * size, 500, options.image_size)
    torch.set_num_threads(config.threads)
    blank = config.model_copy(update={"dataset": options.model_copy(update={"train_images": None})})
    build = getattr(models, model)
    network = build(options.num_classes or 2, options.image_size, Norm, width=config.model["width"])
    theirs = ConventionalLoop(conventional(initialize_(network, 0)), data, size, device, workers)
    ours = OurLoop(blank, data, device)
    steps = -(-images // size)
    calls = {"conventional": partial(theirs.train, 2, 4), "ours": partial(ours.train, 2, 4)}
    for call in calls.values():
        call()
    found = measure.interleaved(calls, repetitions)
    epoch = {name: quartiles([steps * seconds for seconds in times]) for name, times in found.items()}

    reference = max((b for b in budgets if b.schedule == REFERENCE), key=lambda b: b.epochs)
    rows = [Row("conventional", reference, _hours(reference, epoch["conventional"]), None)]
    for budget in sorted(budgets, key=lambda b: (b.schedule, b.epochs)):
        against = None if budget is reference else _against(budget, reference)
        rows.append(Row("ours", budget, _hours(budget, epoch["ours"]), against))
    enough = [row for row in rows if row.budget.schedule != REFERENCE and row.budget.mean >= reference.mean]
    soonest = min(enough, key=lambda row: row.hours, default=None)
    return TimeToAccuracy(config, (dataset, model, norm), images, epoch, tuple(rows), soonest)


def _hours(budget: Budget, epoch: Quartiles) -> float:
    return budget.epochs * epoch.median / 3600


def _against(budget: Budget, reference: Budget) -> MeanComparison:
    seeds = sorted(budget.by_seed.keys() | reference.by_seed.keys())
    table = [[b.by_seed.get(seed, np.nan) for seed in seeds] for b in (budget, reference)]
    return compare_means(table[0], table[1], np.random.default_rng(0))
