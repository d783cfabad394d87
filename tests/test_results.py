"""Reading records, those of earlier versions too."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from abn_exp import results
from abn_exp.errors import DamagedFile
from abn_exp.report.pack import pack
from abn_exp.results import (
    SCHEMA,
    find_runs,
    load_runs,
    read_metrics,
    read_result,
    restore_replaced,
    set_aside,
)
from abn_exp.trained_network import load_network, read_config
from tests.helpers.records import finish_run, study
from tests.helpers.runs import plan_in


def test_a_record_of_schema_1_is_read_as_one_of_today(tmp_path: Path) -> None:
    directory = finish_run(tmp_path, "bn", 0, 0.5, device="CPU (AMD EPYC, 2 threads)")
    (directory / "SHA256SUMS").unlink()
    today = json.loads((directory / "result.json").read_text())
    older = {key: value for key, value in today.items() if key not in ("threads", "code")} | {"schema": 1}
    (directory / "result.json").write_text(json.dumps(older))
    lines = read_metrics(directory)
    earlier = "".join(json.dumps({**line, "epoch": line["epoch"] - 1}) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(earlier)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert read_metrics(directory) == lines
    result = read_result(directory)
    assert result is not None
    assert (result.schema, result.threads, result.code, result.best_epoch) == (SCHEMA, 2, None, 2)
    (directory / "result.json").write_text(json.dumps(today | {"schema": SCHEMA + 1}))
    with pytest.raises(ValueError, match=f"not a record of schema 1 to {SCHEMA}"):
        read_result(directory)


def test_a_metric_added_later_leaves_older_records_readable(tmp_path: Path) -> None:
    directory = finish_run(tmp_path, "bn", 0, 0.5)
    (directory / "SHA256SUMS").unlink()
    record = json.loads((directory / "result.json").read_text())
    del record["test_acc"]
    (directory / "result.json").write_text(json.dumps(record))
    with pytest.raises(DamagedFile, match="it lacks test_acc"):
        read_result(directory)


def test_results_lead_to_their_runs(tmp_path: Path) -> None:
    study(tmp_path, {"bn": [0.5], "abn": [0.6]})
    results = load_runs(tmp_path)
    assert [result.directory for result in results] == [run.directory for run in find_runs(tmp_path)]
    directory = results[0].directory
    assert directory is not None
    assert read_config(directory) == {"a": 1}
    with pytest.raises(FileNotFoundError):
        load_network(results[0])
    assert "directory" not in json.loads((directory / "result.json").read_text())


def test_runs_are_found_from_within_their_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = study(tmp_path / "results" / "first", {"bn": [0.5], "abn": [0.6]})
    monkeypatch.setattr("abn_exp.report.build.draw", lambda report: {})
    packed = pack(folder).folder
    for place in (folder / "digits", folder / "digits/binarynet/bn/fixed", packed):
        monkeypatch.chdir(place)
        (first, *_) = load_runs(".")
        assert (first.dataset, first.seed) == ("digits", 0)
        assert {run.status for run in find_runs(Path("."))} == {"finished"}


def test_results_as_a_data_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    short, long = (yaml.safe_dump(plan_in(tmp_path, f"recipe.epochs={n}").config.model_dump()) for n in (2, 9))
    study(tmp_path, {"bn": [0.5, 0.7], "abn": [0.6]}, config=short)
    finish_run(tmp_path, "abn", 0, 0.8, variant="fixed_epochs-9", config=long)
    frame = load_runs(tmp_path, frame=True)
    assert isinstance(frame, pandas.DataFrame)
    results = load_runs(tmp_path)
    assert frame["test_acc"].tolist() == [result.test_acc for result in results]
    assert frame["directory"].tolist() == [result.directory for result in results]
    assert frame["parameters.binary"].tolist() == [900] * 4
    assert frame["recipe.epochs"].tolist() == [2, 9, 2, 2]  # the one option that differs
    assert not [column for column in frame if column.startswith(("dataset.", "norm."))]
    assert frame.groupby("norm")["test_acc"].mean()["bn"] == pytest.approx(0.6)


def test_a_data_frame_needs_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    study(tmp_path, {"bn": [0.5]})
    with pytest.raises(ImportError, match=r'needs pandas: pip install "abn_exp\[notebook\]"'):
        load_runs(tmp_path, frame=True)


def test_a_run_is_set_aside_and_put_back_whenever_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kill between any two steps, in either direction, and while what was replaced is removed."""

    def made(name: str) -> Path:
        directory = finish_run(tmp_path / name, "bn", 0, 0.7)
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "last.ckpt").write_bytes(b"weights")
        return directory

    def files(directory: Path) -> dict[str, bytes]:
        found = (path for path in directory.rglob("*") if path.is_file())
        return {str(path.relative_to(directory)): path.read_bytes() for path in found}

    def killed(number: int, act: Callable[[], object]) -> bool:
        """Do as much as a kill before the so manieth step lets it; tell whether it came to its end."""
        left = iter(range(number))

        def step(then: Callable[..., object]) -> Callable[..., object]:
            def checked(*arguments: Any) -> object:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return then(*arguments)

            return checked

        with monkeypatch.context() as patch:
            patch.setattr(results.os, "replace", step(os.replace))
            patch.setattr(results, "_remove", step(results._remove))
            try:
                act()
            except KeyboardInterrupt:
                return False
        return True

    def train_something(directory: Path, epochs: int) -> None:
        (directory / "config.yaml").write_text("of the new one")
        (directory / "metrics.jsonl").write_text('{"epoch": 1}\n' * epochs)

    for number in range(50):
        directory = made(f"aside-{number}")
        before = files(directory)
        whole = killed(number, lambda: set_aside(directory))  # noqa: B023 (called here)
        assert restore_replaced(directory)
        assert files(directory) == before
        if whole:
            break
    assert 3 < number < 40
    for epochs in (0, 1):
        for number in range(50):
            directory = made(f"back-{epochs}-{number}")
            set_aside(directory)
            train_something(directory, epochs)
            whole = killed(number, lambda: restore_replaced(directory))  # noqa: B023
            assert restore_replaced(directory) is (epochs == 0 and not whole)
            left = files(directory)
            assert left == before if epochs == 0 else left.keys() == {"config.yaml", "metrics.jsonl"}
            if whole:
                break
        assert 3 < number < 40


def test_a_damaged_file_is_told_by_another_process_too() -> None:
    error = DamagedFile(Path("a/b"), ValueError("it is\nempty"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a/b is damaged: it is empty"
