"""A run as a user would try it: recorded, repeatable, paired by seed, resumable, refusing what it cannot do."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

import train as train_py
from abn_exp import provenance
from abn_exp.data.prepare import load
from abn_exp.errors import ConfigError, Diverged, NotContinued, Stopped
from abn_exp.files import run_lock
from abn_exp.identity import RunPlan
from abn_exp.models.build import build_network, initialize_
from abn_exp.report.checks import provenance_differences
from abn_exp.report.comparisons import collect_cells
from abn_exp.results import REPLACED, RunResult, find_runs, load_runs, read_metrics, read_result, set_aside
from abn_exp.trained_network import load_input_format, load_network, load_predictions, read_checkpoint, write_config
from abn_exp.training import checkpoints, setup
from abn_exp.training import run as run_module
from abn_exp.training.callbacks import EpochLogger
from abn_exp.training.classifier import LitClassifier
from abn_exp.training.run import run
from abn_exp.training.setup import make_loaders
from tests.helpers.cli import Cli, until
from tests.helpers.faults import differences
from tests.helpers.runs import REPOSITORY, TINY, WEIGHTS, plan_in

Make = Callable[..., RunPlan]


def command(tmp_path: Path, *overrides: str, folder: str = "results") -> list[str]:
    return [f"results_dir={tmp_path / folder}", *TINY, *overrides]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """Return the plan of an undisturbed run that has ended, to be read only."""
    plan = plan_in(tmp_path_factory.mktemp("plain"))
    run(plan, "python train.py")
    return plan


def test_a_run_leaves_a_complete_record(make_plan: Make) -> None:
    plan = make_plan()
    result = run(plan, "python train.py")
    names = {path.name for path in plan.directory.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "train.log", "result.json"} <= names
    assert {path.name for path in (plan.directory / "checkpoints").iterdir()} >= {"last.ckpt", "best.ckpt"}
    written = json.loads((plan.directory / "result.json").read_text())
    assert written.keys() == {f.name for f in fields(RunResult)} - {"directory"}
    assert load_runs(plan.directory.parents[4]) == [result]
    metrics = read_metrics(plan.directory)
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert {"train/loss", "train/acc", "val/acc", "val/acc_top5", "lr", "seconds"} <= metrics[0].keys()
    assert any(key.startswith("bnn/flip_ratio/") for key in metrics[0])
    assert result.val_acc_last == metrics[-1]["val/acc"]
    assert result.val_acc_best == max(line["val/acc"] for line in metrics)
    assert result.test_acc_peak is None


def test_what_a_run_is_made_with_is_read_before_it_trains(make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, str] = {}
    monkeypatch.setattr("abn_exp.provenance.versions", lambda: versions["torch"])
    plan = make_plan()
    with pytest.raises(KeyError):
        run(plan, "python train.py")
    assert not (plan.directory / "metrics.jsonl").exists()


def test_test_accuracy_is_that_of_the_last_weights(make_plan: Make) -> None:
    """Against the saved network, evaluated image by image of the test set without any loader of ours."""
    plan = make_plan("recipe.epochs=3", "model=resnet18_paper", "model.width=0.25")
    result = run(plan, "python train.py")
    data, options = load("digits", "."), plan.config.dataset
    assert options.mean is not None
    assert options.std is not None
    mean, std = (torch.tensor(values)[:, None, None] for values in (options.mean, options.std))
    for weights, expected in zip(WEIGHTS, (result.test_acc, result.test_acc_best_val), strict=True):
        network = load_network(plan.directory, weights)
        with torch.no_grad():
            guesses = torch.cat([network((i / 255 - mean) / std) for i in data.test.images[:, None]]).argmax(1)
        # One image may sit on a sign's edge, where the batch's size decides the last bit.
        assert (guesses == data.test.labels).float().mean().item() == pytest.approx(expected, abs=0.006)
        found = load_predictions(result)
        predicted, correct = getattr(found, weights), getattr(found, f"{weights}_correct")
        assert predicted.dtype == np.uint8
        assert (torch.from_numpy(predicted) != guesses).float().mean() < 0.006
        assert np.array_equal(correct, predicted == data.test.labels.numpy())
        assert correct.mean() == pytest.approx(expected, abs=1e-12)  # the very images that the accuracy counts
    assert found.labels_sha256 == hashlib.sha256(data.test.labels.numpy().tobytes()).hexdigest()
    inputs = load_input_format(result)
    assert (inputs.image_size, inputs.classes) == (32, tuple("0123456789"))
    expected_images = (data.test.images / 255 - mean) / std
    torch.testing.assert_close(inputs.normalize(data.test.images), expected_images, rtol=0, atol=1e-6)


def test_an_unfinished_run_of_the_old_count_goes_on_in_the_new_one(make_plan: Make) -> None:
    """Its metrics and the lines in its checkpoint begin with epoch 0."""
    whole, plan = make_plan("name=whole", "recipe.epochs=3"), make_plan("recipe.epochs=3")
    run(whole, "python train.py")
    interrupt_after(plan, epochs=2)
    last = plan.directory / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    (logged,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("EpochLogger")]
    assert [line["epoch"] for line in logged["lines"]] == [1, 2]
    logged["lines"] = [{**line, "epoch": line["epoch"] - 1} for line in logged["lines"]]
    torch.save(checkpoint, last)
    metrics = plan.directory / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in logged["lines"]))
    assert [line["epoch"] for line in read_metrics(plan.directory)] == [1, 2]
    run(plan, "python train.py")
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    assert differences(plan.directory, whole.directory) == []


def test_a_run_does_not_go_on_on_another_kind_of_device(make_plan: Make) -> None:
    """Its record names one device. A checkpoint of an earlier version, which names none, is gone on with."""
    plan = make_plan()
    interrupt_after(plan, epochs=1)
    last = plan.directory / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint.pop("device") == "cpu"
    torch.save({**checkpoint, "device": "NVIDIA H200"}, last)
    with pytest.raises(ConfigError, match="was begun on NVIDIA H200 and cannot go on on cpu; choose the"):
        run(plan, "python train.py")
    assert len(read_metrics(plan.directory)) == 1
    assert not (plan.directory / "FAILED").exists()
    torch.save(checkpoint, last)
    assert run(plan, "python train.py").epochs == 2


def test_a_run_does_not_go_on_with_other_images(make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a folder may change while its path does not."""
    plan = make_plan()
    interrupt_after(plan, epochs=1)
    before = (plan.directory / "input.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("abn_exp.training.run.normalization", lambda *_: ((0.5,) * 3, (0.2,) * 3))
        with pytest.raises(ConfigError, match="The images have changed since"):
            run(plan, "python train.py")
    assert (plan.directory / "input.json").read_bytes() == before
    assert not (plan.directory / "FAILED").exists()
    assert run(plan, "python train.py").epochs == 2


def test_nor_with_the_same_pixels_in_another_order_or_under_other_labels(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    interrupt_after(plan, epochs=1)
    data = setup.load_data(plan.config)
    turned = replace(data, test=replace(data.test, labels=data.test.labels.flip(0)))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_data", lambda config: turned)
        with pytest.raises(ConfigError, match=r"The images have changed since .* \(their pixels, labels, order,"):
            run(plan, "python train.py")
    last = plan.directory / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(last)
    del checkpoint["inputs"]["images"]  # as an older version wrote it
    torch.save(checkpoint, last)
    assert run(plan, "python train.py").epochs == 2


def test_a_signal_that_lightning_alone_has_seen_ends_the_run_before_the_epoch_counts(
    plain: RunPlan, make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a launcher whose own handler of SIGTERM raises nothing: in the last group of an epoch's steps, too."""
    plan, step, seen = make_plan(), LitClassifier._shared_step, []

    def signalled(self: LitClassifier, *arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 3:
            self.trainer._signal_connector.received_sigterm = True
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LitClassifier, "_shared_step", signalled)
        with pytest.raises(Stopped):
            run(plan, "python train.py")
    assert len(seen) == 3  # of more, which are one group
    assert read_metrics(plan.directory) == []
    run(plan, "python train.py")
    assert differences(plain.directory, plan.directory) == []


@pytest.mark.parametrize("stage", ["load_data", "_test"])  # before and after what begins to train
@pytest.mark.parametrize(
    "error", [NotContinued("on another device"), ConfigError("no data"), OSError("no disk"), Stopped(signal.SIGINT)]
)
def test_a_damaged_record_stays_where_it_cannot_be_made_again(
    plain: RunPlan, make_plan: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, stage: str
) -> None:
    """As after a copy that left files out, on a machine without the images, and told where they might be."""
    plan = make_plan("dataset.root=/nowhere")
    shutil.copytree(plain.config.results_dir, plan.config.results_dir)
    result = read_result(plan.directory)
    predictions = plan.directory / "predictions.npz"
    content = predictions.read_bytes()
    predictions.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, stage, Mock(side_effect=error))
        with pytest.raises(type(error)):
            run(plan, "python train.py dataset.root=/nowhere")
    assert find_runs(plan.study)[0].status == "damaged"
    assert not (plan.directory / "FAILED").exists()
    predictions.write_bytes(content)
    assert find_runs(plan.study)[0].result == result


def test_a_divergence_stays_recorded_where_nothing_is_trained_in_its_place(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan("recipe.optimizer.name=sgd", "recipe.optimizer.lr=1e38")
    with pytest.raises(Diverged):
        run(plan, "python train.py")
    before = (plan.directory / "FAILED").read_bytes()
    for stage, error in (
        ("abn_exp.training.run.load_data", NotContinued("on another device")),
        ("abn_exp.training.classifier.LitClassifier._shared_step", ConfigError("the memory is used up")),
        ("abn_exp.training.classifier.LitClassifier._shared_step", Stopped(signal.SIGINT)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(stage, Mock(side_effect=error))
            with pytest.raises(type(error)):
                run(plan, "python train.py")
        assert (plan.directory / "FAILED").read_bytes() == before
        assert len(read_metrics(plan.directory)) == 1
    assert "stopped by SIGINT in epoch 1 of 2; the same command begins the run again" in caplog.text


def test_a_run_of_several_parts_records_what_each_was_made_with(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan()
    interrupt_after(plan, epochs=1)
    monkeypatch.setattr(provenance, "code_digest", lambda: "of later code")
    result = run(plan, "python train.py")
    assert "its epochs so far are of other code, libraries or hardware; the record names both" in caplog.text
    (earlier,) = result.earlier
    assert earlier == {"code": earlier["code"]} | {
        name: getattr(result, name) for name in ("versions", "git_commit", "device", "threads")
    }
    assert (result.code, read_result(plan.directory)) == ("of later code", result)
    whole = make_plan("seed=1")
    run(whole, "python train.py")
    (line,) = provenance_differences(collect_cells(find_runs(plan.study)))
    assert f"code: {earlier['code']}, then of later code (abn 1), of later code (abn 1)" in line


def test_memory_that_is_used_up_is_told_in_a_sentence(make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    plan = make_plan()
    monkeypatch.setattr(LitClassifier, "training_step", full)
    with pytest.raises(ConfigError) as caught:
        run(plan, "python train.py")
    sentence = "the memory of cpu is used up (CUDA out of memory)"
    assert str(caught.value) == f"{sentence}; use a smaller recipe.batch_size, or fewer seeds_at_once."
    assert not (plan.directory / "config.yaml").exists()  # it never began


def interrupt_after(plan: RunPlan, epochs: int) -> None:
    """Run a plan as if it was stopped at the end of an epoch."""
    begin_epoch = EpochLogger.on_train_epoch_start

    def stop(self: EpochLogger, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == epochs:
            raise Stopped(signal.SIGTERM)
        begin_epoch(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochLogger, "on_train_epoch_start", stop)
        with pytest.raises(Stopped):
            run(plan, "python train.py")


def test_a_finished_run_is_shown_and_not_run_again(make_plan: Make, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_plan()
    with caplog.at_level("INFO"):
        result = run(plan, "python train.py")
    lines = [line for message in caplog.messages for line in message.splitlines() if str(plan.directory) not in line]
    assert max(map(len, lines)) <= 80
    epoch = re.compile(r"epoch 2/2 loss \d.\d{3} acc 0.\d{3} val 0.\d{3} best 0.\d{3} \d+ img/s ETA 0:00:00")
    assert any(map(epoch.fullmatch, lines))
    before = (plan.directory / "result.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert run(plan, "python train.py") == result
    assert "force=true runs it again" in caplog.text
    assert (plan.directory / "result.json").stat().st_mtime_ns == before
    again = run(make_plan("force=true"), "python train.py")
    assert (plan.directory / "result.json").stat().st_mtime_ns > before
    assert again.test_loss == result.test_loss


def test_force_loses_nothing_before_something_new_is_trained(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a mistake, nor by a stop, nor by a kill before the first epoch has ended."""
    plan, forced = make_plan(), make_plan("force=true")
    result = run(plan, "python train.py")

    def files() -> dict[str, bytes]:
        found = (path for path in plan.directory.rglob("*") if path.is_file() and path.name != "train.log")
        return {str(path.relative_to(plan.directory)): path.read_bytes() for path in found}

    before = files()
    for error in (ConfigError("there is no such data"), Stopped(signal.SIGINT)):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "load_data", Mock(side_effect=error))
            with pytest.raises(type(error)):
                run(forced, "python train.py")
        assert files() == before
    set_aside(plan.directory)  # and then SIGKILL
    shutil.copy(plan.directory / REPLACED / "config.yaml", plan.directory)
    assert [path.status for path in find_runs(plan.study)] == ["unfinished"]
    assert run(plan, "python train.py") == result
    assert files() == before
    assert run(forced, "python train.py").test_loss == result.test_loss
    assert not (plan.directory / REPLACED).exists()


def test_force_replaces_what_has_neither_result_nor_checkpoint(make_plan: Make) -> None:
    """A run that diverged in its first epoch, or of which another configuration was written before it began."""
    plan, other = make_plan(), make_plan("recipe.optimizer.lr=0.5")
    write_config(plan.directory, other.config.model_dump(), "python train.py")
    with pytest.raises(ConfigError, match="was made by another configuration"):
        run(plan, "python train.py")
    assert run(make_plan("force=true"), "python train.py").test_acc > 0


def test_whoever_looks_at_the_lock_of_a_run_does_not_refuse_it(make_plan: Make) -> None:
    plan, held, enough = make_plan(), threading.Event(), threading.Event()
    plan.directory.mkdir(parents=True)

    def hold() -> None:
        with run_lock(plan.directory):
            held.set()
            enough.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with pytest.raises(ConfigError, match="is being written by another process"):
        run(plan, "python train.py", patience=0.1)
    threading.Timer(0.3, enough.set).start()
    assert run(plan, "python train.py", patience=30).test_acc > 0
    thread.join()


def test_same_command_twice_is_bit_identical(plain: RunPlan, make_plan: Make) -> None:
    other, different = make_plan(), make_plan("seed=1")
    torch.rand(7)  # whatever else the process draws is not the run's business
    run(other, "python train.py")
    assert differences(plain.directory, other.directory) == []
    run(different, "python train.py")
    assert any(line.startswith("train/loss") for line in differences(plain.directory, different.directory))


def test_a_bar_changes_nothing(plain: RunPlan, make_plan: Make) -> None:
    bar = make_plan("progress=bar")
    run(bar, "python train.py")
    assert differences(plain.directory, bar.directory) == []


def test_steps_in_groups_are_those_one_by_one(
    plain: RunPlan, make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = make_plan()
    monkeypatch.setattr(run_module, "BATCHES_PER_GROUP", 1)
    run(single, "python train.py")
    assert differences(plain.directory, single.directory) == []


@pytest.mark.parametrize(
    "words", [["precision=bf16"], ["threads=2", "deterministic=false"], ["recipe=strong", "recipe.epochs=2"]]
)
def test_other_options_train(make_plan: Make, words: list[str]) -> None:
    plan = make_plan(*words, "recipe.schedule.warmup_epochs=1")
    assert run(plan, "python train.py").epochs == 2
    assert all(math.isfinite(line["train/loss"]) for line in read_metrics(plan.directory))


def test_norms_of_one_seed_start_alike_and_see_the_same_batches(make_plan: Make) -> None:
    starts, batches = [], []
    for norm in ("bn", "abn", "abn_scale", "iebn"):
        plan = make_plan(f"norm={norm}", "seed=3")
        config = plan.config
        network = build_network(config.model, config.norm, 10, 32)
        initialize_(network, config.seed)
        starts.append(dict(network.named_parameters()))
        loader = make_loaders(config, load("digits", "."), torch.device("cpu"))["train"]
        batches.append(torch.cat([images for images, _ in loader]))
    for start in starts[1:]:
        shared = [name for name in start if name in starts[0] and start[name].shape == starts[0][name].shape]
        assert any("conv" in name or "features" in name or "weight" in name for name in shared)
        assert all(torch.equal(start[name], starts[0][name]) for name in shared)
    assert all(torch.equal(batch, batches[0]) for batch in batches[1:])


def test_killed_and_resumed_equals_undisturbed(cli: Cli, tmp_path: Path) -> None:
    overrides = ["recipe.epochs=6", "recipe.clip_latent_weights=true"]
    undisturbed = cli.run(*command(tmp_path, *overrides, folder="whole"))
    assert undisturbed.code == 0, undisturbed.err
    words = command(tmp_path, *overrides, folder="killed")
    started = cli.start(*words)
    logged = (tmp_path / "killed").rglob
    assert until(lambda: any(len(path.read_text().splitlines()) >= 3 for path in logged("metrics.jsonl")))
    os.kill(started.pid, signal.SIGKILL)
    assert cli.wait(started).code == -signal.SIGKILL
    (metrics,) = (tmp_path / "killed").rglob("metrics.jsonl")
    assert not (metrics.parent / "result.json").exists()
    again = cli.run(*words)
    assert again.code == 0, again.err
    assert "going on from" in again.out
    whole = next((tmp_path / "whole").rglob("result.json")).parent
    assert differences(whole, metrics.parent) == []


def test_damaged_checkpoint_falls_back_to_the_one_before(make_plan: Make, caplog: pytest.LogCaptureFixture) -> None:
    whole, damaged = make_plan("name=whole", "keep=all"), make_plan("name=damaged", "keep=all")
    run(whole, "python train.py")
    run(damaged, "python train.py")
    (damaged.directory / "result.json").unlink()
    last = damaged.directory / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # one bit: torch.load would not notice
    last.write_bytes(content)
    with caplog.at_level("INFO"):
        run(damaged, "python train.py")
    assert "last.ckpt is damaged" in caplog.text
    assert "previous-last.ckpt" in caplog.text
    assert differences(whole.directory, damaged.directory) == []


def test_paper_recipe_records_the_peak(make_plan: Make) -> None:
    plan = make_plan("recipe=paper", "norm=abn_paper", "recipe.epochs=3")
    result = run(plan, "python train.py")
    accuracies = [line["test/acc"] for line in read_metrics(plan.directory)]
    assert result.test_acc_peak == max(accuracies)
    assert result.test_acc == accuracies[-1]
    assert result.val_acc_last is None
    assert result.test_acc_best_val is None
    rates = {line["lr"] for line in read_metrics(plan.directory)}
    assert rates == {1e-3}


def test_main_returns_the_validation_accuracy_and_never_the_test_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what Hydra's sweepers optimise."""
    returned = {}
    for recipe in ("fixed", "paper"):
        with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
            overrides = [f"recipe={recipe}", f"results_dir={tmp_path}", "dataset=digits", *TINY]
            cfg = compose("config", overrides, return_hydra_config=True)
            monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
            returned[recipe] = train_py.main.__wrapped__(cfg)
    (fixed, paper) = load_runs(tmp_path)
    assert returned == {"fixed": fixed.val_acc_last, "paper": None}
    assert fixed.val_acc_last != fixed.test_acc
    assert paper.recipe == "paper"


def test_divergence_ends_the_run_and_is_recorded(make_plan: Make) -> None:
    plan = make_plan("recipe.optimizer.name=sgd", "recipe.optimizer.lr=1e38")
    with pytest.raises(RuntimeError, match="diverged in epoch 1"):
        run(plan, "python train.py")
    (found,) = find_runs(plan.directory.parents[4])
    assert found.status == "diverged"
    assert found.reason is not None
    assert found.reason.startswith("diverged in epoch 1")
    assert not (plan.directory / "result.json").exists()


def test_a_directory_of_another_configuration_is_refused(make_plan: Make) -> None:
    plan = make_plan()
    plan.directory.mkdir(parents=True)
    run(plan, "python train.py")
    text = (plan.directory / "config.yaml").read_text()
    (plan.directory / "config.yaml").write_text(text.replace("epochs: 2\n", "epochs: 3\n"))
    with pytest.raises(ConfigError, match=r"another configuration \(different: recipe\.epochs\)"):
        run(plan, "python train.py")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recipe.epochs=0"], "error: recipe.epochs=0 is not allowed: it should be greater than 0."),
        (["recipe.batch_size=9999"], "error: recipe.batch_size=9999 is larger than the set"),
        (["dataset=folder", "dataset.path=nowhere"], "nowhere"),
        (["norm=abm"], "error: norm=abm is not allowed: it should be abn, "),
        (["dataset=cifar10", "dataset.root={tmp}", "dataset.download=false"], "cifar-10-python.tar.gz"),
        (["seed=abc"], "error: seed=abc is not allowed: it should be a valid integer"),
        (["device=cuda"], "error: device=cuda, but torch sees no CUDA device"),
        (["wandb=online"], "error: wandb.mode=online needs a key"),
    ],
)
def test_a_mistake_on_the_command_line(cli: Cli, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    arguments = [override.format(tmp=tmp_path) for override in overrides]
    small = [] if "dataset=" in overrides[0] else TINY[:2]
    environment: dict[str, str | None] = {"WANDB_MODE": None, "HOME": str(tmp_path)}
    done = cli.run(f"results_dir={tmp_path / 'results'}", *small, *arguments, env=environment)
    assert done.code != 0
    assert sentence in done.err
    assert not list((tmp_path / "results").rglob("*"))  # what never began leaves nothing
    assert "Traceback" not in done.err + done.out
    assert not list(tmp_path.rglob("result.json"))


def test_a_checkpoint_holds_what_was_there_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may be slow: training goes on meanwhile, and the next checkpoint waits."""
    may_write, write = threading.Semaphore(0), checkpoints._write_checkpoint

    def slowly(*arguments: Any) -> None:
        assert may_write.acquire(timeout=60)
        write(*arguments)

    def saved(path: Path) -> torch.Tensor:
        return checkpoints.read_checkpoint(path)["state_dict"]["weight"]

    monkeypatch.setattr(checkpoints, "_write_checkpoint", slowly)
    weight, plugin, path = torch.zeros(3), checkpoints.AtomicCheckpointIO(), tmp_path / "last.ckpt"
    plugin.save_checkpoint({"state_dict": {"weight": weight}}, path)
    weight.add_(1)
    assert not path.exists()
    may_write.release()
    plugin.save_checkpoint({"state_dict": {"weight": weight}}, path)
    assert torch.equal(saved(path), torch.zeros(3))
    may_write.release()
    plugin.teardown()
    assert torch.equal(saved(path), torch.ones(3))
    assert torch.equal(saved(checkpoints.previous(path)), torch.zeros(3))


def test_what_the_disk_refuses_comes_up_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()  # where a folder belongs
    plugin = checkpoints.AtomicCheckpointIO()
    plugin.save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(OSError, match="checkpoints"):
        plugin.teardown()
    plugin.teardown()
