"""Numbers that are none: the run stops, says in which epoch and where, and the report shows it."""

import shutil
from pathlib import Path

import pytest

from abn_exp.report import build as report
from abn_exp.results import find_runs
from tests.helpers.cli import Cli
from tests.helpers.faults import SMALL, Account, differences

# What befalls a run in its second epoch, and what the run says of it.
FAULT = """
import torch
from abn_exp.training.classifier import LitClassifier
from abn_exp.binarize import BinaryConv2d
def later(self):
    return self.trainer.current_epoch == 1
{}
"""
IN_PLACE = """
def befall(self, *rest):
    if later(self):
        with torch.no_grad():
            {}
LitClassifier.on_train_batch_end = befall
"""
IN_IMAGES = """
real = LitClassifier.training_step
def befall(self, batches, *rest):
    if later(self):
        batches = [(images * float("{}"), labels) for images, labels in batches]
    return real(self, batches, *rest)
LitClassifier.training_step = befall
"""
IN_LOSS = """
import abn_exp.training.classifier as c
real = LitClassifier._shared_step
def befall(self, batch, stage):
    with torch.no_grad():
        loss, predicted = real(self, batch, stage)
    if later(self) and stage == "{}":
        self._sums[stage] = self._sums[stage] * float("{}")
    return loss.requires_grad_(), predicted
LitClassifier._shared_step = befall
"""
FAULTS = {
    "a latent weight is NaN, which its sign hides": (
        IN_PLACE.format("self.network.layer2.conv.weight[0, 0, 0, 0] = float('nan')"),
        "layer2.conv.weight",
    ),
    "a latent weight is infinite": (
        IN_PLACE.format("self.network.layer2.conv.weight[0, 0, 0, 0] = float('inf')"),
        "layer2.conv.weight",
    ),
    "a bias is NaN": (IN_PLACE.format("self.network.stem.norm.bias[0] = float('nan')"), "stem.norm.bias"),
    "a running variance is infinite": (
        IN_PLACE.format("self.network.layer1.norm.running_var[0] = float('inf')"),
        "layer1.norm.running_var",
    ),
    "the images of a step are NaN": (IN_IMAGES.format("nan"), "stem.conv.weight"),
    "the images of a step are infinite": (IN_IMAGES.format("inf"), "stem.conv.weight"),
    "the training loss is NaN": (IN_LOSS.format("train", "nan"), "train/loss"),
    "the training loss is infinite": (IN_LOSS.format("train", "inf"), "train/loss"),
    "the validation loss is NaN": (IN_LOSS.format("val", "nan"), "val/loss"),
}


def test_what_is_not_finite_ends_the_run(
    cli: Cli, tmp_path: Path, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", lambda _: {})
    lost = []
    for number, (fault, (code, name)) in enumerate(FAULTS.items()):
        words = [*SMALL, f"results_dir={tmp_path / str(number)}"]
        done = cli.run(*words, inject=FAULT.format(code))
        said = f"diverged in epoch 2: {name} is not finite"
        if done.code != 1 or done.err != f"error: {said}\n":
            lost.append(f"{fault}: exit code {done.code}: {done.err}")
        runs = find_runs(tmp_path / str(number))
        if [(run.status, run.reason) for run in runs] != [("diverged", said)]:
            lost.append(f"{fault}: recorded as {runs}")
    # Once the fault is gone, the last whole epoch is good to go on from.
    for number in range(2):
        done = cli.run(*SMALL, f"results_dir={tmp_path / str(number)}")
        assert done.code == 0, done.err
    lost += differences(find_runs(tmp_path / "0")[0].directory, find_runs(tmp_path / "1")[0].directory)
    account(
        "numbers", "NaN or inf in images, loss, weights, running statistics: stops, says where", len(FAULTS), lost
    )

    # Two seeds of a cell, one of them diverged.
    diverged = find_runs(tmp_path / "2")[0].directory
    beside = find_runs(tmp_path / "0")[0].directory
    shutil.copytree(diverged, beside.with_name("seed-1"))
    report.write_report(beside.parents[4])
    text = (beside.parents[4] / "report.md").read_text()
    line = next((line for line in text.splitlines() if "diverged in epoch 2" in line), "")
    assert "seed 1" in line, text
    assert any("| abn | 1/2 |" in line for line in text.splitlines()), text
    account("numbers", "a cell of which one seed diverged says so in its report", 1, [])
