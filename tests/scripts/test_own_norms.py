"""Norms of a user's own, in a file beside train.py, are found by each script that builds networks."""

import sys

import pytest

from tests.helpers.runs import REPOSITORY
from tests.helpers.scripts import load_script


@pytest.mark.parametrize("name", ["analyze", "evaluate", "export", "runs", "search"])
def test_a_script_imports_what_lies_beside_train(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = [path for path in sys.path if path not in ("", ".", str(REPOSITORY))]
    monkeypatch.setattr(sys, "path", elsewhere)
    load_script(name)
    assert str(REPOSITORY) in sys.path
