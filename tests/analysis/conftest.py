"""Networks that several files of tests analyse."""

import shutil
from pathlib import Path

import pytest

from abn_exp.training.run import run
from tests.helpers.runs import once, plan_in


@pytest.fixture
def study(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """Return the test's own copy of a study of trained networks: BN and ABN on the digits, seeds 0 and 1."""

    def make(folder: Path) -> None:
        for norm in ("bn", "abn"):
            for seed in (0, 1):
                run(plan_in(folder, f"norm={norm}", f"seed={seed}"), "python train.py")

    shutil.copytree(once(tmp_path_factory, "analysed", make), tmp_path / "results")
    return tmp_path / "results" / "runs"
