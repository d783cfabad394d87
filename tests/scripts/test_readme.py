"""What README.md says in numbers and in Python holds."""

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from abn_exp.data.prepare import load
from abn_exp.results import load_predictions
from tests.helpers.runs import REPOSITORY, trained_study

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_table_of_norms_is_what_scipy_makes_of_the_runs() -> None:
    text = README.split("on CIFAR-10, five paired seeds")[1].split("`abn_gate`")[0]
    scores: dict[str, list[float]] = {}
    with open(REPOSITORY / "results/quoted/ablation/runs.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            scores.setdefault(row["norm"], []).append(100 * float(row["test_acc"]))
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) == 7
    for name, n, accuracy, interval, minus, between, _ in lines:
        x, bn = np.array(scores[name.strip("`")]), np.array(scores["bn"])
        low, high = stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))
        assert (n, accuracy) == (str(len(x)), f"{x.mean():.2f} ± {x.std(ddof=1):.2f}")
        assert interval == f"{low:.2f} to {high:.2f}"
        if name != "`bn`":
            low, high = stats.ttest_rel(x, bn).confidence_interval(0.95)
            assert (minus, between) == (f"{(x - bn).mean():+.2f}", f"{low:.2f} to {high:.2f}")


def test_its_python_runs(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"^```python\n(from abn_exp\.results.*?)^```", README, re.M | re.S)
    shutil.copytree(trained_study(tmp_path_factory), tmp_path / "results" / "NAME")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"images": load("digits", ".").test.images}
    exec(block, scope)
    # One image may sit on a sign's edge, where the batch's size decides the last bit.
    assert (scope["labels"].numpy() != load_predictions(scope["best"]).last).mean() < 0.02
