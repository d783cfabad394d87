"""`recipe.epochs` raised: a run goes on from a shorter one's end, and ends as if it had been trained at once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abn_exp.identity import RunPlan
from abn_exp.results import read_metrics, read_result
from abn_exp.trained_network import read_checkpoint
from abn_exp.training.extend import begin_with_shorter_run
from abn_exp.training.run import run
from tests.helpers.runs import plan_in

Make = Callable[..., RunPlan]
CONSTANT = ["recipe.schedule.name=constant", "recipe.schedule.warmup_epochs=1", "recipe.clip_latent_weights=true"]
CPU = torch.device("cpu")
TIMES = {"train_seconds", "images_per_second", "seconds"}


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    plan = plan_in(tmp_path_factory.mktemp("shorter"), *CONSTANT, "recipe.epochs=2", "keep=all")
    run(plan, "python train.py")
    return plan


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    plan = plan_in(tmp_path_factory.mktemp("at_once"), *CONSTANT, "recipe.epochs=5", "keep=all")
    run(plan, "python train.py")
    return plan


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal(one: object, other: object) -> None:
    """Equal bit for bit, tensors too, paths and times aside."""
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one.keys() - TIMES:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        assert len(one) == len(other)
        for parts in zip(one, other, strict=True):
            assert_equal(*parts)
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)
    else:
        assert one == other


def test_a_longer_run_begins_where_the_shorter_ended(
    shorter: RunPlan, at_once: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(shorter.config.results_dir, tmp_path, dirs_exist_ok=True)
    plan = plan_in(tmp_path, *CONSTANT, "recipe.epochs=5", "keep=all")
    record = plan.directory.parents[1] / shorter.variant / "seed-0"
    assert record != plan.directory
    before = files(record)
    with caplog.at_level("INFO"):
        result = run(plan, "python train.py")
    assert f"the first 2 epochs are those of {record}" in caplog.text
    assert [line.split("epoch ")[1][0] for line in caplog.messages if line.startswith("epoch ")] == ["3", "4", "5"]
    expected = read_result(at_once.directory)
    assert expected is not None
    assert_equal(vars(result) | {"directory": None}, vars(expected) | {"directory": None})
    assert_equal(read_metrics(plan.directory), read_metrics(at_once.directory))
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (read_checkpoint(p.directory / "checkpoints" / name) for p in (plan, at_once))
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_equal(ours.get(part), theirs.get(part))
    assert files(record) == before


def test_what_is_forced_begins_at_the_start(
    shorter: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(shorter.config.results_dir, tmp_path, dirs_exist_ok=True)
    with caplog.at_level("INFO"):
        run(plan_in(tmp_path, *CONSTANT, "recipe.epochs=3", "keep=all", "force=true"), "python train.py")
    assert [line.split("epoch ")[1][0] for line in caplog.messages if line.startswith("epoch ")] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["recipe.schedule.name=cosine"], "with recipe.schedule.name=cosine the rate of each depends on how many"),
        (["recipe.clip_latent_range=[0,0.5]", *CONSTANT], "recipe.clip_latent_range is a share of them all"),
        (CONSTANT, "but only its weights (keep=all keeps more)"),
    ],
)
def test_otherwise_it_begins_at_the_start_and_says_why(
    make_plan: Make, caplog: pytest.LogCaptureFixture, overrides: list[str], why: str
) -> None:
    keep = "keep=weights" if overrides is CONSTANT else "keep=all"
    run(make_plan(*overrides, "recipe.epochs=2", keep), "python train.py")
    caplog.clear()
    plan = make_plan(*overrides, "recipe.epochs=3")
    with caplog.at_level("INFO"):
        run(plan, "python train.py")
    assert why in caplog.text
    assert "training begins at the start" in caplog.text
    assert len([line for line in caplog.messages if line.startswith("epoch ")]) == 3


def test_another_run_s_epochs_are_not_taken(
    at_once: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(at_once.config.results_dir, tmp_path, dirs_exist_ok=True)
    for other in (["seed=1"], ["recipe.optimizer.lr=0.01"], ["norm=bn"], ["recipe.epochs=4"]):
        plan = plan_in(tmp_path, *CONSTANT, "recipe.epochs=6", *other)
        with caplog.at_level("INFO"):
            begin_with_shorter_run(plan, CPU)
        assert not plan.directory.exists()
    assert not caplog.messages
    plan = plan_in(tmp_path, *CONSTANT, "recipe.epochs=6")
    begin_with_shorter_run(plan, CPU)
    assert (plan.directory / "checkpoints" / "last.ckpt").exists()


def longer_run(shorter: RunPlan, folder: Path) -> tuple[RunPlan, Path]:
    """Return the plan of a longer run, and the last checkpoint of the shorter one's copy beside it."""
    shutil.copytree(shorter.config.results_dir, folder, dirs_exist_ok=True)
    plan = plan_in(folder, *CONSTANT, "recipe.epochs=3")
    return plan, plan.directory.parents[1] / shorter.variant / "seed-0" / "checkpoints" / "last.ckpt"


def test_a_shorter_run_on_another_kind_of_device_is_not_gone_on_from(
    shorter: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, last = longer_run(shorter, tmp_path)
    torch.save({**read_checkpoint(last), "device": "NVIDIA H200"}, last)
    with caplog.at_level("INFO"):
        begin_with_shorter_run(plan, CPU)
    assert "has 2 of these epochs, but was trained on NVIDIA H200" in caplog.text
    assert "training begins at the start" in caplog.text
    assert not plan.directory.exists()


def test_a_shorter_run_on_other_images_is_not_gone_on_from(
    shorter: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, last = longer_run(shorter, tmp_path)
    checkpoint = read_checkpoint(last)
    torch.save({**checkpoint, "inputs": checkpoint["inputs"] | {"mean": (0.5, 0.5, 0.5)}}, last)
    with caplog.at_level("INFO"):
        run(plan, "python train.py")
    assert "which was trained on other images: training begins at the start" in caplog.text
    assert len([line for line in caplog.messages if line.startswith("epoch ")]) == 3


def test_a_damaged_checkpoint_of_the_shorter_run_is_told(
    shorter: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, last = longer_run(shorter, tmp_path)
    last.write_bytes(last.read_bytes()[:-1000])
    with caplog.at_level("INFO"):
        run(plan, "python train.py")
    assert "cannot be gone on from" in caplog.text
    assert "training begins at the start" in caplog.text
    assert len(read_metrics(plan.directory)) == 3
