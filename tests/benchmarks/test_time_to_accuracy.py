"""Time to accuracy: the right runs, the right hours, the least that is enough."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from abn_exp.identity import RunPlan
from abn_exp.results import write_result
from benchmarks.time_to_accuracy import TimeToAccuracy, measure_budgets, read, write
from tests.helpers.records import result_in
from tests.helpers.runs import plan_in
from tests.helpers.scripts import run_script

Reached = dict[tuple[str, int], tuple[float, ...]]
REACHED: Reached = {
    ("constant", 2): (0.60, 0.62),
    ("constant", 4): (0.70, 0.74),
    ("cosine", 1): (0.65, 0.66),
    ("cosine", 2): (0.71, 0.74),
    ("cosine", 4): (0.80, 0.81),
}


@cache
def composed(*words: str) -> RunPlan:
    return plan_in(Path("results"), *words)


def finish(folder: Path, plan: RunPlan, accuracy: float, **others: str) -> None:
    directory = folder.joinpath(*plan.directory.parts[-5:])
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(plan.config.model_dump()))
    epochs = plan.config.recipe.epochs
    write_result(directory, result_in(directory, plan.config.seed, accuracy, epochs=epochs, parameters={}, **others))


def folder_of(folder: Path, reached: Reached, *overrides: str) -> Path:
    """Fill a study's folder with runs that reached these accuracies."""
    for (schedule, epochs), accuracies in reached.items():
        for seed, accuracy in enumerate(accuracies):
            words = (f"recipe.schedule.name={schedule}", f"recipe.epochs={epochs}", f"seed={seed}")
            finish(folder, composed(*overrides, *words), accuracy)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> TimeToAccuracy:
    return measure_budgets(folder_of(tmp_path_factory.mktemp("reached"), REACHED), torch.device("cpu"), 1, 2)


def test_the_soonest_is_the_least_that_is_not_below(found: TimeToAccuracy) -> None:
    assert [(row.loop, row.budget.schedule, row.budget.epochs) for row in found.rows] == [
        ("conventional", "constant", 4),
        *(("ours", *key) for key in sorted(REACHED)),
    ]
    assert found.images == 180  # of 200, a tenth is for validation
    theirs, ours = found.epoch["conventional"].median, found.epoch["ours"].median
    assert theirs > 0 < ours
    assert [row.hours * 3600 for row in found.rows] == pytest.approx(
        [4 * theirs, *(n * ours for n in (2, 4, 1, 2, 4))]
    )
    assert found.soonest is found.rows[4]
    assert found.ratio == pytest.approx(2 * theirs / ours)
    against = found.rows[4].against
    assert against is not None
    assert against.differences == pytest.approx((1.0, 0.0))


def test_what_is_soonest_is_judged_by_the_seeds_that_both_have(tmp_path: Path) -> None:
    """A third seed of one side is not in their difference: 59.5 and 60.4 % are less than 60.0 and 61.0 %."""
    reached = {("constant", 4): (0.60, 0.61, 0.57), ("cosine", 4): (0.595, 0.604)}
    found = measure_budgets(folder_of(tmp_path, reached), torch.device("cpu"), 1, 1)
    assert found.soonest is None


def test_kinds_of_device_are_not_averaged(tmp_path: Path) -> None:
    folder_of(tmp_path, {("constant", 2): (0.60, 0.62), ("cosine", 2): (0.60, 0.61)})
    words = ("recipe.schedule.name=cosine", "recipe.epochs=2", "seed=2")
    finish(tmp_path, composed(*words), 0.7, device="NVIDIA H200")
    with pytest.raises(ValueError, match="has runs on several kinds of device, which are not averaged"):
        read(tmp_path)


def test_none_is_soonest_where_none_is_enough(tmp_path: Path) -> None:
    low = {key: tuple(a - 0.2 * (key[0] == "cosine") for a in accuracies) for key, accuracies in REACHED.items()}
    found = measure_budgets(folder_of(tmp_path / "low", low), torch.device("cpu"), 1, 1)
    assert found.soonest is None
    assert found.ratio is None
    assert "**No decayed budget" in write(found, "CPU", "command", tmp_path).read_text()


def test_files(found: TimeToAccuracy, tmp_path: Path) -> None:
    path = write(found, "CPU (some, 1 thread)", "python scripts/benchmark.py --budget x", tmp_path / "out")
    text = path.read_text()
    assert "epochs of a cosine rate" in text
    assert "| ours | cosine | 2 | 2 | 72.50 ± 2.12 | +0.50 (-5.85 to 6.85) | 0.500 |" in text
    with open(path.with_suffix(".csv"), encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (1 + len(REACHED))
    assert {float(line["test_acc_percent"]) for line in lines if line["loop"] == "conventional"} == {70, 74}
    assert path.with_suffix(".png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("reached", "message"),
    [
        ({}, "finished runs of 0 cells"),
        ({("cosine", 2): (0.7, 0.7)}, "needs at least two seeds of a constant rate and of a decayed one"),
        ({("constant", 2): (0.7, 0.7)}, "needs at least two seeds"),
        ({("constant", 2): (0.7,), ("cosine", 2): (0.7, 0.7)}, "needs at least two seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, reached: Reached, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(folder_of(tmp_path, reached))


def test_runs_that_differ_in_something_else_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, {("constant", 2): (0.7, 0.7)})
    folder = folder_of(tmp_path, {("cosine", 2): (0.7, 0.7)}, "recipe.optimizer.lr=0.01")
    with pytest.raises(ValueError, match=r"differ in recipe\.optimizer\.lr; only seed, recipe\.schedule\.name"):
        read(folder)


def test_a_norm_without_a_conventional_loop_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {("constant", 2): (0.7, 0.7), ("cosine", 2): (0.7, 0.7)}, "norm=bn")
    with pytest.raises(ValueError, match=r"norm=bn is not abn; there is no conventional loop for it\."):
        measure_budgets(folder, torch.device("cpu"), 1, 1)


def test_other_gradients_than_the_conventional_loop_s_are_refused(tmp_path: Path) -> None:
    other = "model.binarization.activation_estimator=approx_sign"
    folder = folder_of(tmp_path, {("constant", 2): (0.7, 0.7), ("cosine", 2): (0.7, 0.7)}, other)
    with pytest.raises(ValueError, match="has other gradients of a sign, or another padding"):
        measure_budgets(folder, torch.device("cpu"), 1, 1)


def test_the_script_says_so_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(monkeypatch, "benchmark", "--budget", tmp_path, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path} has finished runs of 0 cells; name the folder of one data set, model and norm.\n"
    )
    assert not (tmp_path / "out").exists()
