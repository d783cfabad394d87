"""Networks that several files of tests analyse."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import trained_study


@pytest.fixture
def study(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """Return the test's own copy of a study of trained networks."""
    return shutil.copytree(trained_study(tmp_path_factory), tmp_path / "results" / "runs")
