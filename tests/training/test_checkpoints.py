"""What is kept of a finished run, what it takes on disk, and what still works with it."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abn_exp.files import writing
from abn_exp.identity import RunPlan
from abn_exp.models.build import build_network
from abn_exp.results import load_runs
from abn_exp.trained_network import load_network, read_checkpoint
from abn_exp.training import checkpoints
from abn_exp.training.checkpoints import keep_weights
from abn_exp.training.estimate import disk_use
from abn_exp.training.run import run
from tests.helpers.runs import WEIGHTS, plan_in

Make = Callable[..., RunPlan]


def plan(folder: Path, *overrides: str) -> RunPlan:
    return plan_in(folder, "recipe.epochs=4", *overrides)


@pytest.fixture(scope="module")
def all_kept(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A run whose checkpoints are whole."""
    made = plan(tmp_path_factory.mktemp("all"), "keep=all")
    run(made, "python train.py")
    return made


@pytest.fixture
def weights_kept(all_kept: RunPlan, tmp_path: Path) -> RunPlan:
    """The same run, of which the weights are kept."""
    made = plan(tmp_path)
    shutil.copytree(all_kept.directory, made.directory)
    text = (made.directory / "config.yaml").read_text().replace("keep: all", "keep: weights")
    (made.directory / "config.yaml").write_text(text)
    (made.directory / "SHA256SUMS").unlink()
    run(made, "python train.py")
    return made


def names(made: RunPlan) -> set[str]:
    return {path.name for path in (made.directory / "checkpoints").iterdir()}


def test_weights_are_kept_and_the_optimizer_s_state_is_not(all_kept: RunPlan, weights_kept: RunPlan) -> None:
    assert names(all_kept) == {"last.ckpt", "previous-last.ckpt", "best.ckpt"}
    assert names(weights_kept) == {"last.ckpt", "best.ckpt"}
    for weights in WEIGHTS:
        whole = load_network(all_kept.directory, weights).state_dict()
        kept = load_network(weights_kept.directory, weights).state_dict()
        assert all(torch.equal(whole[name], kept[name]) for name in whole)
    assert read_checkpoint(all_kept.directory / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert not read_checkpoint(weights_kept.directory / "checkpoints" / "last.ckpt")["optimizer_states"]


def test_a_run_drops_the_state_by_itself(tmp_path: Path) -> None:
    made = plan(tmp_path, "recipe.epochs=2")
    run(made, "python train.py")
    assert names(made) == {"last.ckpt", "best.ckpt"}
    assert not read_checkpoint(made.directory / "checkpoints" / "last.ckpt")["optimizer_states"]


def test_a_lost_record_is_made_again_from_the_weights(all_kept: RunPlan, weights_kept: RunPlan) -> None:
    for name in ("result.json", "metrics.jsonl"):
        (weights_kept.directory / name).unlink()
    (weights_kept.directory / "SHA256SUMS").unlink(missing_ok=True)
    before = (all_kept.directory / "metrics.jsonl").read_text()
    again = run(weights_kept, "python train.py")
    assert (weights_kept.directory / "metrics.jsonl").read_text() == before
    (first,) = load_runs(all_kept.directory.parents[4])
    assert (again.test_loss, again.test_acc_best_val) == (first.test_loss, first.test_acc_best_val)


def test_a_full_disk_leaves_the_checkpoints_whole(
    all_kept: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(all_kept.directory, tmp_path / "run")

    size = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 10, before[1]))  # no file may grow beyond it
    try:
        keep_weights(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "last.ckpt'; the optimizer's state stays in the checkpoints" in caplog.text
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"]


@pytest.mark.parametrize(
    ("optimizer", "keep"),
    [("name=adam", "weights"), ("name=adam", "all"), ("name=sgd", "weights"), ("_target_=torch.optim.Rprop", "all")],
)
def test_the_disk_that_a_run_takes_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, keep: str
) -> None:
    words = ["model.width=0.125", "dataset.train_images=100", "recipe.epochs=3"]
    made = plan(tmp_path, *words, f"recipe.optimizer.{optimizer}", f"keep={keep}")
    with torch.device("meta"):
        network = build_network(made.config.model, made.config.norm, 10, 32)
    told = disk_use(made.config, network)
    folder = made.directory / "checkpoints"
    sizes = []

    def replace(source: str, target: str) -> None:
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.*")))
        moved(source, target)

    moved = os.replace
    monkeypatch.setattr(checkpoints.os, "replace", replace)
    run(made, "python train.py")
    kept = sum(path.stat().st_size for path in folder.iterdir())
    assert told.kept == pytest.approx(kept, rel=0.1)
    assert told.most == pytest.approx(max(sizes), rel=0.1)


def test_a_run_goes_on_in_a_folder_that_was_moved(all_kept: RunPlan, tmp_path: Path) -> None:
    """Its best epoch so far is known there, too: here the first of four, so that the others must not replace it."""
    moved = plan(tmp_path, "keep=all")
    shutil.copytree(all_kept.directory, moved.directory)
    folder = moved.directory / "checkpoints"
    before = read_checkpoint(folder / "previous-last.ckpt")
    (best,) = [state for key, state in before["callbacks"].items() if "'monitor': 'val/acc'" in key]
    best |= {"best_model_score": torch.tensor(2.0), "current_score": torch.tensor(2.0)}
    best["best_k_models"] = {path: torch.tensor(2.0) for path in best["best_k_models"]}
    best["kth_value"] = torch.tensor(2.0)
    with writing(folder / "last.ckpt") as file:
        torch.save(before, file)
    for name in ("result.json", "SHA256SUMS"):
        (moved.directory / name).unlink()
    untouched = (folder / "best.ckpt").read_bytes()
    run(moved, "python train.py")
    assert (folder / "best.ckpt").read_bytes() == untouched
    (state,) = [
        state
        for key, state in read_checkpoint(folder / "last.ckpt")["callbacks"].items()
        if "'monitor': 'val/acc'" in key
    ]
    assert Path(state["best_model_path"]) == folder / "best.ckpt"


def test_its_state_has_the_name_of_before() -> None:
    """So that checkpoints of older runs are gone on from."""
    assert checkpoints._Checkpoint(monitor="val/acc").state_key.startswith("ModelCheckpoint{")
