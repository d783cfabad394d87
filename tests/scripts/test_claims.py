"""The README's table of claims is what its command writes from the quoted reports."""

import csv

import pytest

from tests.helpers.runs import REPOSITORY
from tests.helpers.scripts import load_script

CLAIMS = load_script("claims")


def test_the_table_in_the_readme_is_that_of_the_reports() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert CLAIMS.replace_between(text, CLAIMS.BEGIN, CLAIMS.END, CLAIMS.block()) == text, (
        "run python scripts/claims.py"
    )


def test_runs_that_are_said_to_be_the_same_are() -> None:
    def scores(study: str, dataset: str, more: str = "") -> dict[tuple[str, str], str]:
        variant = f"fixed_dataset.train_images-5000_model.width-0.125_batch_size-64_epochs-6{more}"
        with open(REPOSITORY / f"results/quoted/{study}/runs.csv", encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if (r["dataset"], r["variant"]) == (dataset, variant)]
        return {(r["norm"], r["seed"]): r["test_acc"] for r in rows if r["model"] == "binarynet"}

    for dataset in ("cifar10", "cifar100"):
        own = scores("accuracy", dataset)
        assert len(own) == 10
        assert own.items() <= scores("variance", dataset).items()
    assert scores("protocols", "cifar10") == scores("accuracy", "cifar10")
    assert scores("confound", "cifar10", "_test_every_epoch-true") == scores("accuracy", "cifar10")


def test_a_number_that_is_not_there_is_an_error() -> None:
    absent = CLAIMS.Finding("x", "quoted/variance/report.csv", {"norm": "abn", "dataset": "mnist"})
    with pytest.raises(ValueError, match="has 0 rows with"):
        absent.text()
