"""What runs will take: the counts that it follows from, and what is said of it before they begin."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from abn_exp.identity import RunPlan
from abn_exp.trained_network import write_config
from abn_exp.training import estimate
from abn_exp.training.estimate import (
    Speed,
    disk_sentence,
    disk_use,
    dry_run,
    image_counts,
    measure_speed,
    seconds_left,
)
from abn_exp.training.setup import load_data, make_loaders
from tests.helpers.records import finish_run, start_run

Make = Callable[..., RunPlan]


@pytest.mark.parametrize("overrides", [[], ["dataset.train_images=null"], ["recipe.val_fraction=0"]])
def test_images_are_counted_as_the_loaders_have_them(make_plan: Make, overrides: list[str]) -> None:
    config = make_plan(*overrides).config
    loaders = make_loaders(config, load_data(config), torch.device("cpu"))
    counts = [len(loaders[stage].labels) if stage in loaders else 0 for stage in ("train", "val", "test")]
    assert image_counts(config) == pytest.approx(tuple(counts), abs=1)  # the split rounds in each class


def test_of_a_set_that_is_there_in_part_its_own_images_are_counted(make_plan: Make) -> None:
    config = make_plan("dataset=cifar10", "+dataset.images=[5000,1000]", "recipe.val_fraction=0.1", tiny=False).config
    assert image_counts(config) == (4500, 500, 1000)


def test_training_and_evaluation_are_measured_and_no_initial_weights_taken(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are of a network for another number of classes than the random images have."""

    def rate(act: Callable[[Any], object], batches: Iterator[Any], *_: object) -> float:
        act(next(batches))
        return 1.0 if torch.is_grad_enabled() else 2.0

    monkeypatch.setattr("abn_exp.training.parallel.images_per_second", rate)
    plan = make_plan()
    config = plan.config.model_copy(update={"init_from": "nowhere", "init_digest": "0"})
    assert measure_speed(replace(plan, config=config), 0.1) == Speed(1.0, 2.0)


@pytest.mark.parametrize("rates", [{}, {1: 10.0}])
def test_a_gain_that_could_not_be_measured_is_none(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch, rates: dict[int, float]
) -> None:
    monkeypatch.setattr("abn_exp.training.parallel.measure", lambda *_: rates)
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: Speed(100.0, 1000.0))
    lines = list(dry_run([make_plan("seeds_at_once=2", f"seed={seed}") for seed in (0, 1)]))
    assert any("2 at a time, which is 1.00 times as fast as one" in line for line in lines)


def test_time_is_that_of_the_epochs_that_are_left(make_plan: Make) -> None:
    """900 + 100 images an epoch at 100 and 1000 a second; the test set is read for the last and the best weights."""
    plan = make_plan("dataset.train_images=1000", "recipe.epochs=10", "recipe.val_fraction=0.1")
    assert seconds_left(plan, image_counts(plan.config), Speed(100.0, 1000.0), 3) == pytest.approx(
        7 * (9.0 + 0.1) + 2 * 0.359
    )
    peeking = make_plan("recipe=paper", "dataset.train_images=1000", "recipe.epochs=10")
    assert seconds_left(peeking, image_counts(peeking.config), Speed(100.0, 1000.0), 0) == pytest.approx(
        10 * (10.0 + 0.359) + 0.359
    )


def test_a_disk_that_is_too_small_is_said(make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [make_plan(f"seed={seed}") for seed in range(3)]
    text = disk_sentence(plans, 2)
    found = re.fullmatch(r"checkpoints: ([\d.]+) MB kept, ([\d.]+) MB while .*; [\d.,]+ .B are free", text)
    assert found is not None
    assert 0 < float(found[1]) < float(found[2])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    assert disk_sentence(plans, 2).endswith("1.0 MB are free, WHICH IS NOT ENOUGH")


def test_state_that_is_no_tensor_takes_no_place(make_plan: Make) -> None:
    """As an epoch that a layer of one's own counts, in torch's way."""

    class Counting(torch.nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    config = make_plan().config
    assert disk_use(config, Counting(2, 3)) == disk_use(config, torch.nn.Linear(2, 3))


def test_a_dry_run_lists_the_runs_and_adds_up_what_is_left(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["dataset.train_images=1000", "recipe.epochs=4", "recipe.val_fraction=0", "seeds_at_once=2"]
    plans = [make_plan(*words, f"seed={seed}", f"norm={norm}") for seed in (0, 1) for norm in ("bn", "abn")]
    begun = next(plan for plan in plans if plan.directory.name == "seed-0" and "/bn/" in str(plan.directory))
    folder, variant = begun.directory.parents[4], begun.directory.parts[-2]
    start_run(folder, "bn", 0, epochs=3, variant=variant, config="recipe: {epochs: 4}\n")
    write_config(begun.directory.with_name("seed-1"), {"recipe": {"epochs": 4}}, "python train.py")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: Speed(100.0, 359.0))
    monkeypatch.setattr("abn_exp.training.parallel.measure", lambda *_: {1: 100.0, 2: 160.0})
    lines = list(dry_run(plans))
    assert lines[:3] == [str(plans[1].directory.parent), "  seed-0    not begun", "  seed-1    not begun"]
    assert lines[3] == "  2 to do, 0:00:41 for one, 100 img/s"  # 4 epochs of 10 s, and a second for the test set
    assert lines[4:8] == [
        str(begun.directory.parent),
        "  seed-0    stopped    3/4",
        "  seed-1    not begun",
        "  2 to do, 0:00:41 for one, 100 img/s",
    ]
    assert lines[8] == "4 runs, 0 of them finished, 4 to do"
    assert lines[9] == "time: about 0:01:24, 2 at a time, which is 1.60 times as fast as one"  # (3 * 41 + 11) / 1.6
    assert lines[10].startswith("checkpoints: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_result_of_another_configuration_is_not_counted_as_finished(make_plan: Make, tmp_path: Path) -> None:
    plan = make_plan()
    variant = plan.directory.parts[-2]
    other = yaml.safe_dump(make_plan("recipe.label_smoothing=0.1").config.model_dump())
    finish_run(plan.study, plan.choices["norm"], 0, 0.9, variant=variant, config=other)
    lines = list(dry_run([plan]))
    assert lines[1] == "  seed-0    refused    it holds the result of another configuration"
    assert lines[-1] == "1 runs, 0 of them finished, 0 to do, 1 refused"


def test_seeds_are_listed_by_number_and_looks_add_at_most_so_many_runs(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: Speed(100.0, 359.0))
    plans = [make_plan(f"seed={seed}", "looks=[2,3]") for seed in (10, 2)]
    lines = list(dry_run(plans))
    assert lines[1:3] == ["  seed-2    not begun", "  seed-10   not begun"]
    assert "2 runs at most, 0 of them finished, 2 to do" in lines
