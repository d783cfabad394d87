"""Estimates before runs begin: the disk space of checkpoints and, with `dry_run=true`, the time from a few steps."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from abn_exp.config import Config
from abn_exp.data.catalog import CATALOG
from abn_exp.identity import RunPlan
from abn_exp.models.build import build_network
from abn_exp.optimizer import state_size
from abn_exp.records import read_run_file
from abn_exp.report.progress import clock, describe, progress, speed_text
from abn_exp.results import find_run

SECONDS = 2.0  # that each cell's speed is measured in training, and in evaluation


class DiskUse(NamedTuple):
    """Bytes of a run's checkpoints: what it keeps, and the most that it has while it trains."""

    kept: int
    most: int


def disk_use(config: Config, network: torch.nn.Module) -> DiskUse:
    """Return what the checkpoints of a run of this network will take; the network may be on the meta device."""
    state_dict = network.state_dict().values()  # with what `get_extra_state` of one's own layer gives, of any kind
    weights = sum(value.numel() * value.element_size() for value in state_dict if isinstance(value, torch.Tensor))
    trained = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    state = round(trained * state_size(config.recipe.optimizer.model_dump()))
    best = weights if config.recipe.val_fraction > 0 else 0
    last = weights + state
    several = min(config.recipe.epochs, 3)  # the last one, the one before, and the one that is being written
    if config.keep == "all":
        return DiskUse(min(config.recipe.epochs, 2) * last + best, several * last + best)
    return DiskUse(weights + best, several * last + best)


def disk_sentence(plans: Sequence[RunPlan], count: int) -> str:
    """Return a sentence on the disk space of these runs, `count` trained at a time, and on what is free."""
    cells = {plan.directory.parent: plan for plan in plans}
    uses = {cell: disk_use(plan.config, _on_meta(plan)) for cell, plan in cells.items()}
    kept = sum(uses[plan.directory.parent].kept for plan in plans)
    most = kept + min(count, len(plans)) * max(use.most - use.kept for use in uses.values())
    folder = next(path for path in (plans[0].directory, *plans[0].directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    text = f"checkpoints: {_size(kept)} kept, {_size(most)} while they are trained; {_size(free)} are free"
    return text if most < free else f"{text}, WHICH IS NOT ENOUGH"


def _on_meta(plan: RunPlan) -> torch.nn.Module:
    config = plan.config
    with torch.device("meta"):
        return build_network(config.model, config.norm, config.dataset.num_classes or 2, config.dataset.image_size)


def _size(number: float) -> str:
    return f"{number / 1e6:,.1f} MB" if number < 1e9 else f"{number / 1e9:,.1f} GB"


@dataclass(frozen=True)
class Speed:
    """Images a second that a run trains on and is evaluated on."""

    train: float
    evaluation: float


def seconds_left(plan: RunPlan, counts: tuple[int, int, int], speed: Speed, done: int) -> float:
    """Return the seconds that a run takes after `done` epochs on so many images (`image_counts`); imports and the
    reading of data are not counted."""
    train, validation, test = counts
    recipe = plan.config.recipe
    evaluated = validation + (test if recipe.test_every_epoch else 0)
    epoch = train / speed.train + evaluated / speed.evaluation
    return (recipe.epochs - done) * epoch + test * (2 if validation else 1) / speed.evaluation


def image_counts(config: Config) -> tuple[int, int, int]:
    """Return the numbers of images to train on, to validate on, and to test on."""
    known = CATALOG.get(config.dataset.name)
    if config.dataset.images is not None:  # of a set that is there in part
        train, test = config.dataset.images
    elif known is not None:
        train, test = known.train_count, known.test_count
    else:
        from abn_exp.training.setup import load_data

        data = load_data(config)
        train, test = len(data.train.labels), len(data.test.labels)
    train = config.dataset.train_images or train
    validation = round(train * config.recipe.val_fraction)
    return train - validation, validation, test


def measure_speed(plan: RunPlan, seconds: float) -> Speed:
    """Train on random images for some seconds, evaluate for as many, and return the speeds.

    Of several devices one is measured, with its share of a batch; they are taken to be as fast, and not to wait.
    """
    from abn_exp.training.parallel import begin, images_per_second
    from abn_exp.training.setup import device_errors_explained, select_device

    with device_errors_explained(select_device(plan.config)):
        loop, batches = begin(plan.config, plan.choices["norm"])
        train = images_per_second(loop.step, batches, seconds, loop.device)
        loop.network.eval()
        with torch.no_grad():
            evaluate = partial(loop.loss, stage="val")
            evaluation = images_per_second(lambda batch: evaluate(*batch), batches, seconds, loop.device)
    return Speed(plan.config.devices * train, plan.config.devices * evaluation)


def dry_run(plans: Sequence[RunPlan]) -> Iterator[str]:
    """Yield the lines that `dry_run=true` prints: the runs and their states, and what those to do will take.

    Each cell that has runs to do is measured for some seconds, in this process.
    """
    to_do: list[RunPlan] = []
    total, finished = 0.0, 0
    ordered = sorted(plans, key=lambda plan: (plan.directory.parent, plan.config.seed))
    for cell, group in groupby(ordered, lambda plan: plan.directory.parent):
        yield str(cell)
        pending: list[tuple[RunPlan, int]] = []
        for plan in group:
            state, rest, done = _state(plan)
            finished += state == "finished" and not plan.config.force
            if state not in ("finished", "refused") or plan.config.force:
                pending.append((plan, 0 if plan.config.force else done))
            yield f"  {plan.directory.name:<9} {state:<10} {rest}".rstrip()
        if pending:
            counts = image_counts(pending[0][0].config)  # first: images that are not there are told at once
            speed = measure_speed(pending[0][0], SECONDS)
            times = [seconds_left(plan, counts, speed, done) for plan, done in pending]
            yield f"  {len(pending)} to do, {clock(max(times))} for one, {speed_text(speed.train)}"
            to_do += [plan for plan, _ in pending]
            total += sum(times)
    at_most = " at most" if plans[0].config.looks else ""
    refused = len(plans) - finished - len(to_do)
    last = f", {refused} refused" if refused else ""
    yield f"{len(plans)} runs{at_most}, {finished} of them finished, {len(to_do)} to do{last}"
    if to_do:
        count, gain = _at_once(to_do)
        several = f", {count} at a time, which is {gain:.2f} times as fast as one" if count > 1 else ""
        yield f"time: about {clock(total / gain)}{several}"
        yield disk_sentence(to_do, count)


def _state(plan: RunPlan) -> tuple[str, str, int]:
    """Return a run's state, what there is to say, and how many epochs it need not train again."""
    directory = plan.directory
    if read_run_file(directory, "config.yaml") is None:
        return "not begun", "", 0
    state, rest = describe(find_run(directory))
    if state == "finished" and not plan.config.force and plan.differing(directory):
        return "refused", "it holds the result of another configuration", 0
    return state, rest, progress(directory)[0] if state not in ("finished", "damaged", "not begun") else 0


def _at_once(plans: Sequence[RunPlan]) -> tuple[int, float]:
    """Return how many of the runs would be trained at a time, and how many times as fast as one at a time that is."""
    from abn_exp.training.parallel import candidates, choose, largest, measure
    from abn_exp.training.setup import select_device

    plan = largest(plans)
    config = plan.config
    device, wanted = select_device(config), config.seeds_at_once
    counts = candidates(len(plans), device, config.threads) if wanted == "auto" else [1, min(int(wanted), len(plans))]
    if max(counts) == 1:
        return 1, 1.0
    rates = measure(config, plan.choices["norm"], sorted(set(counts)), device)
    count = choose(rates) if wanted == "auto" else max(counts)
    return count, rates[count] / rates[1] if {1, count} <= rates.keys() else 1.0
