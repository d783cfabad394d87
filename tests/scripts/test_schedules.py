"""The table of short schedules is what its command writes from the records."""

from pathlib import Path

import numpy as np
import pytest

from abn_exp.results import find_runs, write_result
from tests.helpers.records import RECORDED, result_in, start_run, table_rows
from tests.helpers.runs import REPOSITORY
from tests.helpers.scripts import load_script, run_script

SCHEDULES = load_script("schedules")
VALIDATION = {  # of three seeds, by row and norm
    ("fixed_epochs-10", "bn"): [0.740, 0.744, 0.751],
    ("fixed_epochs-10", "abn"): [0.742, 0.738, 0.741],
    ("fixed_lr-1", "bn"): [0.700, 0.705, 0.698],
    ("fixed_lr-1", "abn"): [0.790, 0.788, 0.785],
    ("fixed_lr-2", "bn"): [0.70, 0.71, 0.72],
}
LR = {"fixed_epochs-10": 0.005, "fixed_lr-1": 1.0, "fixed_lr-2": 0.005}


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    for (variant, norm), accuracies in VALIDATION.items():
        model = "resnet18" if variant == "fixed_lr-2" else "binarynet"
        for seed, accuracy in enumerate(accuracies, 1000):
            config = RECORDED.format(epochs=10, lr=LR[variant])
            directory = start_run(tmp_path, norm, seed, model=model, variant=variant, config=config)
            minutes = {"train_seconds": 60.0 * (seed - 990), "threads": 2}
            write_result(directory, result_in(directory, seed, 0.5, val_acc_last=accuracy, **minutes))
    return tmp_path


def test_rows_are_sorted_by_validation_accuracy_and_named_by_what_they_change(searched: Path) -> None:
    header, lines = SCHEDULES.table(find_runs(searched))
    shown = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(row["changed"], row["norm"]) for row in shown] == [
        *(("recipe.optimizer.lr=1", "bn"), ("recipe.optimizer.lr=1", "abn")),  # of the mean of both norms
        *(("-", "bn"), ("-", "abn")),
        ("model=resnet18", "bn"),
    ]
    for row, (variant, norm) in zip(shown, [("fixed_lr-1", "bn"), ("fixed_lr-1", "abn")], strict=False):
        accuracies = 100 * np.array(VALIDATION[variant, norm])
        mean, std = accuracies.mean(), accuracies.std(ddof=1)
        half = 4.302653 * std / np.sqrt(3)  # t(0.975, 2), from a table
        validation = f"{mean:.2f} ± {std:.2f} ({mean - half:.2f} to {mean + half:.2f})"
        assert row["validation (95 % interval)"] == validation
        assert (row["n"], row["core-minutes"]) == ("3", "22")
        minus = np.subtract(VALIDATION[variant, norm], VALIDATION[variant, "bn"]) * 100
        half = 4.302653 * minus.std(ddof=1) / np.sqrt(3)
        expected = f"+{minus.mean():.2f} ({minus.mean() - half:.2f} to {minus.mean() + half:.2f})"
        assert row["minus bn (validation, points)"] == ("" if norm == "bn" else expected)
        assert row["test (95 % interval)"].startswith("50.00 ± 0.00 (")


def test_a_row_in_which_a_run_failed_is_the_last_and_says_so(searched: Path) -> None:
    """Its mean is of the runs that are left."""
    for norm in ("bn", "abn"):
        config = RECORDED.format(epochs=10, lr=1.0)
        directory = start_run(searched, norm, 1003, variant="fixed_lr-1", config=config)
        (directory / "FAILED").write_text("diverged")
    header, lines = SCHEDULES.table(find_runs(searched))
    shown = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(row["changed"], row["n"]) for row in shown] == [
        *(("-", "3"), ("-", "3")),
        ("model=resnet18", "3"),
        *(("recipe.optimizer.lr=1", "3/4"), ("recipe.optimizer.lr=1", "3/4")),
    ]
    for seed in (1000, 1001, 1002):
        for norm in ("bn", "abn"):
            directory = searched / f"digits/binarynet/{norm}/fixed_lr-1/seed-{seed}"
            (directory / "result.json").unlink()
            (directory / "FAILED").write_text("diverged")
    line = dict(zip(header, SCHEDULES.table(find_runs(searched))[1][-1], strict=True))
    assert (line["n"], line["core-minutes"]) == ("0/4", "-")
    assert line["validation (95 % interval)"] == "- ± - (-)"


def test_a_second_stage_is_named_by_the_command_that_was_typed(searched: Path) -> None:
    for seed in (1000, 1001):
        config = (
            RECORDED.format(epochs=10, lr=0.005) + f"init_from: results/first/bn/seed-{seed}\ninit_digest: a{seed}\n"
        )
        directory = start_run(searched, "bn", seed, variant="fixed_init-a", config=config)
        write_result(directory, result_in(directory, seed, 0.5, val_acc_last=0.9))
    assert SCHEDULES.table(find_runs(searched))[1][0][0] == "init_from=results/first/NORM/seed-${seed}"


def test_the_page_is_written_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = SCHEDULES.PAGE.read_text(encoding="utf-8")
    text = SCHEDULES.replace_between(before, SCHEDULES.BEGIN, SCHEDULES.END, "| a |\n| --- |\n| 1 |")
    assert table_rows(text.split(SCHEDULES.BEGIN)[1].split(SCHEDULES.END)[0]) == [{"a": "1"}]
    assert text.split(SCHEDULES.BEGIN)[0] == before.split(SCHEDULES.BEGIN)[0]
    with pytest.raises(ValueError, match="once each"):
        SCHEDULES.replace_between("# nothing", SCHEDULES.BEGIN, SCHEDULES.END, "")
    assert run_script(monkeypatch, "schedules", tmp_path / "nothing") == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert SCHEDULES.PAGE.read_text(encoding="utf-8") == before


def test_the_page_in_the_repository_is_that_of_its_records() -> None:
    text = SCHEDULES.PAGE.read_text(encoding="utf-8")
    table = SCHEDULES.markdown_table(SCHEDULES.table(find_runs(REPOSITORY / "results/quoted/schedules")), 3)
    assert SCHEDULES.replace_between(text, SCHEDULES.BEGIN, SCHEDULES.END, table) == text, (
        "run python scripts/schedules.py"
    )
