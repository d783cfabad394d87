"""Time to accuracy: when our loop with a decayed rate is as accurate as the conventional loop at its end.

The conventional loop has a constant rate. The results are written as CSV, a Markdown summary and a figure.
"""

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from abn_exp import models, provenance
from abn_exp.config import Config, parse
from abn_exp.data.catalog import CATALOG
from abn_exp.files import write_text_atomic
from abn_exp.models.build import initialize_
from abn_exp.options import all_options
from abn_exp.report import figures
from abn_exp.report.formatting import interval_text, number_text, p_text, signed_text
from abn_exp.report.stats import MeanComparison, compare_means, summarize
from abn_exp.results import find_runs
from abn_exp.trained_network import read_config
from abn_exp.training.estimate import image_counts
from abn_exp.training.parallel import random_data
from benchmarks import measure
from benchmarks.conventional import ConventionalLoop, Norm, conventional
from benchmarks.measure import Quartiles, quartiles
from benchmarks.ours import OurLoop
from benchmarks.report import cell, device_folder, table

REFERENCE = "constant"
VARIED = ("seed", "recipe.schedule.name", "recipe.epochs")
NETWORKS = ("binarynet", "vgg_small", "resnet18_paper")  # those whose signs have the conventional loop's gradient
NORM = "abn"  # which the conventional loop has


@dataclass(frozen=True)
class Budget:
    """The accuracies of a schedule at the end of its epochs."""

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
    soonest: Row | None  # the least of our times whose difference to the constant rate is not below zero

    @property
    def ratio(self) -> float | None:
        """How many times sooner than the conventional loop, or None where no budget is enough."""
        return None if self.soonest is None else self.rows[0].hours / self.soonest.hours


def read(folder: Path) -> tuple[Config, tuple[str, str, str], list[Budget]]:
    """Return the configuration, the cell and the budgets of a folder of study=budget; each has at least two seeds.

    Raises ValueError for what cannot be compared.
    """
    runs = [run for run in find_runs(folder) if run.result is not None]
    if len({run.result.device_kind for run in runs if run.result is not None}) > 1:
        raise ValueError(f"{folder} has runs on several kinds of device, which are not averaged.")
    cells = {(run.dataset, run.model, run.norm) for run in runs}
    if len(cells) != 1:
        what = "name the folder of one data set, model and norm"
        raise ValueError(f"{folder} has finished runs of {len(cells)} cells; {what}.")
    configs = [parse(read_config(run.directory)) for run in runs]
    options = [all_options(config.model_dump()) for config in configs]
    others = [{key: value for key, value in each.items() if key not in VARIED} for each in options]
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


def measure_budgets(folder: Path, device: torch.device, workers: int, repetitions: int) -> TimeToAccuracy:
    """Measure an epoch of both loops side by side, and compare the budgets of a folder in hours.

    Both run on as many threads as the runs did. The accuracies are the runs'; what the conventional loop computes is
    what ours computes with a constant rate. Raises ValueError where the folder has not what it takes.
    """
    config, cell, budgets = read(folder)
    dataset, model, norm = cell
    if dataset not in CATALOG:
        raise ValueError(f"{dataset} is not one of {', '.join(CATALOG)}; nothing is known of its images.")
    if model not in NETWORKS:
        raise ValueError(f"{model} is not one of {', '.join(NETWORKS)}; there is no conventional loop for it.")
    if norm != NORM:
        raise ValueError(f"norm={norm} is not {NORM}; there is no conventional loop for it.")
    signs = config.model["binarization"]
    if {signs["weight_estimator"], signs["activation_estimator"]} != {"identity"} or signs["pad_value"] != 0:
        raise ValueError(f"{folder} has other gradients of a sign, or another padding, than the conventional loop.")
    options, size, images = config.dataset, config.recipe.batch_size, image_counts(config)[0]
    data = random_data(12 * size, 500, options.image_size)
    torch.set_num_threads(config.threads)
    blank = config.model_copy(update={"dataset": options.model_copy(update={"train_images": None})})
    build = getattr(models, model)
    network = build(len(data.classes), options.image_size, Norm, width=config.model["width"])
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
    decayed = [row for row in rows if row.budget.schedule != REFERENCE]
    enough = [row for row in decayed if row.against is not None and row.against.difference >= 0]
    soonest = min(enough, key=lambda row: row.hours, default=None)
    return TimeToAccuracy(config, (dataset, model, norm), images, epoch, tuple(rows), soonest)


def _hours(budget: Budget, epoch: Quartiles) -> float:
    return budget.epochs * epoch.median / 3600


def _against(budget: Budget, reference: Budget) -> MeanComparison:
    seeds = sorted(budget.by_seed.keys() | reference.by_seed.keys())
    table = [[b.by_seed.get(seed, np.nan) for seed in seeds] for b in (budget, reference)]
    return compare_means(table[0], table[1], np.random.default_rng(0))


# --- Its report ---

# (loop, rate): colour, marker
STYLES = {
    ("conventional", REFERENCE): ("black", "o"),
    ("ours", REFERENCE): ("0.5", "^"),
    ("ours", "cosine"): (figures.VERMILLION, "s"),
    ("ours", "linear"): (figures.BLUE, "D"),
}


def write(found: TimeToAccuracy, device_name: str, command: str, folder: Path) -> Path:
    """Write the files beside the device's other ones; return the summary's path."""
    folder = device_folder(folder, device_name)
    lines = ["loop,schedule,epochs,hours,seed,test_acc_percent"]
    for row in found.rows:
        start = f"{row.loop},{row.budget.schedule},{row.budget.epochs},{row.hours:.6g}"
        lines += [f"{start},{seed},{accuracy:.6g}" for seed, accuracy in sorted(row.budget.by_seed.items())]
    write_text_atomic(folder / "time_to_accuracy.csv", "\n".join(lines) + "\n")
    write_text_atomic(folder / "time_to_accuracy.md", _markdown(found, device_name, command))
    figures.save(_figure(found), folder, "time_to_accuracy")
    return folder / "time_to_accuracy.md"


def _markdown(found: TimeToAccuracy, device_name: str, command: str) -> str:
    dataset, model, norm = found.cell
    config, epoch = found.config, found.epoch
    width = f" at width {config.model['width']:g}" if "width" in config.model else ""
    header = ["loop", "rate", "epochs", "n", "test accuracy, %", "minus the constant rate at its end"]
    header += ["p, uncorrected", "hours"]
    verdict = "No decayed budget that was run is as accurate, in the mean, as the constant rate at its end."
    if found.soonest is not None:
        verdict = (
            f"As accurate, in the mean, as the constant rate at its end: {found.soonest.budget.epochs} epochs of a "
            f"{found.soonest.budget.schedule} rate, {found.soonest.hours:.3g} hours instead of "
            f"{found.rows[0].hours:.3g}, {found.ratio:.1f} times sooner."
        )
    return "\n".join(
        [
            f"# Time to accuracy on {device_name}\n",
            f"Made by `{command}` on {datetime.now(UTC):%Y-%m-%d} at commit {provenance.git_commit()}. {dataset}, "
            f"{model}{width}, {norm}; {found.images:,} images an epoch, batches of {config.recipe.batch_size}, "
            f"precision {config.precision}. An epoch takes {cell(epoch['conventional'])} s in the conventional loop, "
            f"{cell(epoch['ours'])} s in ours: medians (quartiles) of interleaved repetitions, evaluations left out. "
            "What the conventional loop computes is what ours computes with a constant rate; the accuracies are of "
            "our runs.\n",
            f"**{verdict}**\n",
            table([*header, "conventional hours / these"], [_line(row, found) for row in found.rows]),
            "Accuracies: mean ± standard deviation between seeds; differences with 95 % intervals, paired by seed "
            "where both have the same seeds.\n",
            "![Accuracy against hours](time_to_accuracy.png)\n",
        ]
    )


def _line(row: Row, found: TimeToAccuracy) -> list[str]:
    summary, against = summarize(row.budget.accuracies), row.against
    accuracy = f"{number_text(summary.mean)} ± {number_text(summary.std)}"
    own = [row.loop, row.budget.schedule, f"{row.budget.epochs}", f"{summary.n}", accuracy, "", ""]
    if against is not None:
        own[-2:] = [f"{signed_text(against.difference)} ({interval_text(against.interval)})", p_text(against.p)]
    return [*own, f"{row.hours:.3g}", f"{found.rows[0].hours / row.hours:.1f}"]


def _figure(found: TimeToAccuracy) -> Figure:
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(4.5, 3), layout="constrained")
        ax = figure.add_subplot()
        for (loop, schedule), (color, marker) in STYLES.items():
            rows = [row for row in found.rows if (row.loop, row.budget.schedule) == (loop, schedule)]
            if not rows:
                continue
            summaries = [summarize(row.budget.accuracies) for row in rows]
            spread = np.abs([(s.mean_interval[0] - s.mean, s.mean_interval[1] - s.mean) for s in summaries]).T
            hours, means = [row.hours for row in rows], [s.mean for s in summaries]
            ax.errorbar(hours, means, spread, color=color, marker=marker, capsize=2, label=f"{loop}, {schedule} rate")
        ax.axhline(found.rows[0].budget.mean, color="black", linewidth=0.6, linestyle=":")
        ax.set(xscale="log", xlabel="Hours of training", ylabel="Test accuracy (%)")
        hours = sorted({row.hours for row in found.rows})
        ax.set_xticks(hours, [f"{h:.2g}" for h in hours])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.legend(loc="lower right")
        figure.suptitle("Accuracy against time: mean and 95 % interval over seeds", fontsize=8.5)
    return figure
