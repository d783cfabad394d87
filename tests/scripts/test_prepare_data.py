"""The command that gets data sets ahead of time: each set once, nothing else written, errors in a sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.datasets import pixels
from tests.helpers.scripts import run_script


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with converted files of CIFAR, in an empty working directory."""
    split: dict[str, Any] = {f"{part}_{key}": value for part in ("train", "test") for key, value in _split().items()}
    for name in ("cifar10", "cifar100"):
        np.savez(tmp_path / f"{name}.npz", classes=np.array(list("abcdefghij")), **split)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path


def _split() -> dict[str, np.ndarray]:
    return {"images": pixels(10), "labels": np.arange(10)}


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "dataset=cifar10,cifar100"],
        ["dataset=cifar10,cifar100", "-m", "norm=bn,abn", "seeds=three"],
        ["study=variance", "recipe.epochs=1"],
    ],
)
def test_several_sets_are_prepared_once_each_and_nothing_else_is_written(
    root: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(monkeypatch, "prepare_data", *words, f"dataset.root={root}") == 0
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("name")]
    assert names == ["cifar10", "cifar100"]
    assert not list((root / "empty").iterdir())


def test_one_set_that_cannot_be_had_leaves_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["dataset=tinyimagenet,cifar10", f"dataset.root={root}", "dataset.download=false"]
    assert run_script(monkeypatch, "prepare_data", *words) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: tinyimagenet is not in {root} and downloads are off: put http")
    assert "name      cifar10" in shown.out


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("dataset=cifar", "error: dataset=cifar is not allowed: it should be cifar10, cifar100, digits, folder,"),
        ("datset=cifar10", "error: datset is not a key of the configuration; did you mean dataset?"),
        ("dataset.image_size=30", "error: dataset.image_size=30 is not allowed: it should be a multiple of 8."),
        ("dataset=folder", "error: dataset=folder needs dataset.path=FOLDER"),
        ("--config-dir=/nonexistent", "error: --config-dir=/nonexistent is not a folder"),
    ],
)
def test_a_mistake_is_one_sentence(
    word: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(monkeypatch, "prepare_data", word) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(sentence)
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
