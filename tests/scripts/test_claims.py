"""The README's table of claims is what its command writes from the quoted reports."""

import runpy

import pytest

from tests.helpers.runs import REPOSITORY

CLAIMS = runpy.run_path(str(REPOSITORY / "scripts" / "claims.py"))


def test_the_table_in_the_readme_is_that_of_the_reports() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert CLAIMS["replaced"](text) == text, "run python scripts/claims.py"


def test_a_number_that_is_not_there_is_an_error() -> None:
    absent = CLAIMS["Finding"]("x", "quoted/variance/report.csv", {"norm": "abn", "dataset": "mnist"})
    with pytest.raises(ValueError, match="has 0 rows with"):
        absent.text()


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        CLAIMS["replaced"]("# nothing")
