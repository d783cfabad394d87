"""Saved weights on any data set: the numbers of the run's record on its own, refusals where it does not fit."""

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from abn_exp.analysis.evaluate import evaluate
from abn_exp.data.prepare import load
from abn_exp.results import RunResult, find_runs
from abn_exp.trained_network import load_network
from tests.helpers.datasets import write_folder
from tests.helpers.runs import trained_study
from tests.helpers.scripts import run_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    found = find_runs(trained_study(tmp_path_factory))[0]
    assert found.result is not None
    return found.directory, found.result


def test_its_own_test_images_give_the_numbers_of_the_record(trained: tuple[Path, RunResult]) -> None:
    directory, result = trained
    last, best = evaluate(directory), evaluate(directory, weights="best")
    assert last.accuracy == pytest.approx(result.test_acc, abs=1e-7)
    assert last.loss == pytest.approx(result.test_loss, abs=1e-5)
    assert best.accuracy == pytest.approx(result.test_acc_best_val, abs=1e-7)
    assert len(evaluate(directory, part="train").labels) == 1438


def test_the_script_writes_what_the_network_says_of_each_image(
    trained: tuple[Path, RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On images of the digits in a folder, against the network called by hand, normalised as in training."""
    directory, _ = trained
    digits = load("digits", ".")
    for part in ("train", "test"):
        for i in range(30):
            image = Image.fromarray(digits.test.images[i].permute(1, 2, 0).numpy())
            folder = tmp_path / "images" / part / str(int(digits.test.labels[i]))
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:03}.png")
    out = tmp_path / "out" / "predictions.csv"
    words = [
        "dataset=folder",
        f"dataset.path={tmp_path / 'images'}",
        f"dataset.root={tmp_path}",
        "dataset.image_size=32",
    ]
    assert run_script(monkeypatch, "evaluate", directory, *words, "--out", out) == 0
    said = capsys.readouterr().out
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    order = sorted(range(30), key=lambda i: (int(digits.test.labels[i]), i))
    network = load_network(directory)
    with torch.no_grad():
        expected = network((digits.test.images[order] / 255 - 0.3055) / 0.3237).softmax(1)
    assert [int(row["image"]) for row in rows] == list(range(30))
    assert [int(row["label"]) for row in rows] == digits.test.labels[order].tolist()
    assert [int(row["prediction"]) for row in rows] == expected.argmax(1).tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], expected.max(1).values, atol=1e-4)
    accuracy = (expected.argmax(1) == digits.test.labels[order]).float().mean().item()
    assert f"30 images: accuracy {100 * accuracy:.2f} %" in said


def test_folders_of_one_name_have_files_of_their_own(
    trained: tuple[Path, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(trained[0], tmp_path / "seed-0")
    for kind in ("fog", "noise"):
        write_folder(tmp_path / kind / "1", [f"{label}" for label in range(10)])
        words = ["dataset=folder", f"dataset.path={tmp_path / kind / '1'}", f"dataset.root={tmp_path}"]
        assert run_script(monkeypatch, "evaluate", directory, *words) == 0
    names = [path.name for path in (directory / "evaluation").iterdir()]
    assert len(names) == 2
    assert all(re.fullmatch(r"folder-1-[0-9a-f]{8}-test-last\.csv", name) for name in names)


def test_a_set_that_is_there_in_part_is_evaluated(
    trained: tuple[Path, RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_folder(tmp_path / "cifar10", [f"{label}" for label in range(10)])
    words = ["dataset=cifar10", f"dataset.root={tmp_path}", "dataset.download=false"]
    assert run_script(monkeypatch, "evaluate", trained[0], *words, "--out", tmp_path / "found.csv") == 0
    assert "20 images: accuracy" in capsys.readouterr().out


def test_classes_of_the_same_names_are_the_same_classes(
    trained: tuple[Path, RunResult], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A set that lists the digits backwards has the same accuracy; one with other names is taken in its order."""
    digits = load("digits", ".")
    turned = replace(digits.test, labels=9 - digits.test.labels)
    for names, same in ((digits.classes[::-1], True), (tuple("abcdefghij"), False)):
        backwards = replace(digits, test=turned, classes=names)
        monkeypatch.setattr("abn_exp.analysis.evaluate.load_data", lambda config, data=backwards: data)
        found = evaluate(trained[0])
        assert torch.equal(found.labels, digits.test.labels if same else turned.labels)
        assert ("names its classes otherwise" in caplog.text) is not same


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dataset=cifar10", "dataset.root={tmp}", "dataset.download=false"], "cifar-10-python.tar.gz"),
        (["dataset=tinyimagenet"], "has images of 64 pixels a side, but this network takes 32"),
        (["dataset=folder", "dataset.path={tmp}/two"], "folder has 2 classes, but this network tells 10 apart"),
        (["norm=bn"], "norm=bn is not allowed: only dataset=... and dataset.KEY=... are chosen here"),
        (["dataset=cifra10"], "cifra10"),
        (["dataset.root={tmp}"], "is not enough: choose the data set as well"),  # else it were digits
    ],
)
def test_a_set_that_does_not_fit_is_refused_in_a_sentence(
    trained: tuple[Path, RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "two" / part / label).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32)).save(tmp_path / "two" / part / label / f"{i}.png")
    given = [word.format(tmp=tmp_path) for word in words]
    if "dataset=folder" in words:
        given.append(f"dataset.root={tmp_path}")
    assert run_script(monkeypatch, "evaluate", trained[0], *given) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert sentence in err
    assert not (trained[0] / "evaluation").exists()


def test_a_run_without_weights_is_refused(
    trained: tuple[Path, RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_script(monkeypatch, "evaluate", tmp_path) == 1
    assert "is no run's folder; give one that holds config.yaml" in capsys.readouterr().err
    shutil.copy(trained[0] / "config.yaml", tmp_path)
    assert run_script(monkeypatch, "evaluate", tmp_path, "--weights", "best") == 1
    assert "has no checkpoints/best.ckpt" in capsys.readouterr().err
    shutil.copytree(trained[0] / "checkpoints", tmp_path / "checkpoints")
    assert run_script(monkeypatch, "evaluate", tmp_path) == 1
    assert "is not of a finished run; train to the end first." in capsys.readouterr().err
