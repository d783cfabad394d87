"""The command that writes a report: what it is not given right is a sentence and an exit code."""

from pathlib import Path

import pytest

from tests.helpers.records import BN, start_run, study
from tests.helpers.scripts import run_script


def test_a_norm_that_no_run_has_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(tmp_path / "study", {"bn": BN[:2], "abn": BN[:2]})
    before = sorted(folder.rglob("*"))
    assert run_script(monkeypatch, "report", folder, "--reference", "foo") == 1
    assert capsys.readouterr().err == (
        f"error: --reference=foo is not allowed: the runs below {folder} have abn, bn.\n"
    )
    assert sorted(folder.rglob("*")) == before


def test_a_folder_without_a_finished_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_run(tmp_path / "study", "bn", 0)
    assert run_script(monkeypatch, "report", tmp_path / "study") == 1
    assert capsys.readouterr().err == f"error: no run below {tmp_path / 'study'} is finished.\n"
    assert run_script(monkeypatch, "report", tmp_path / "elsewhere") == 1
    assert capsys.readouterr().err.startswith("error: There are no runs below")


def test_an_empty_folder_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "report", "")
    assert "argument FOLDER: it is empty; give a folder that train.py wrote: results/NAME" in capsys.readouterr().err
