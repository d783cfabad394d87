"""The command that writes a report: what it is not given right is a sentence and an exit code."""

import errno
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.records import BN, CLEARLY_ABOVE, RECORDED, start_run, study
from tests.helpers.runs import REPOSITORY
from tests.helpers.scripts import run_script


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return study(tmp_path / "claims", {"bn": BN, "abn": CLEARLY_ABOVE})


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
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: There are no runs below ")
    assert len(err.splitlines()) == 1


def test_an_empty_folder_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "report", "")
    assert "argument FOLDER: it is empty; give a folder that train.py wrote: results/NAME" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_report_is_written_and_printed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script(monkeypatch, "report", folder, "--reference", "abn") == 0
    assert "bn - abn is -0.94 points" in capsys.readouterr().out
    assert (folder / "report.md").is_file()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("fault", ["a directory in its place", "a read-only folder"])
def test_a_report_that_cannot_be_written_is_a_sentence_and_goes_elsewhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def read_only(path: Path, text: str) -> None:
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        path.write_text(text)

    if fault == "a directory in its place":
        (folder / "report.md").mkdir()
    else:
        for module in ("build", "looks"):
            monkeypatch.setattr(f"abn_exp.report.{module}.write_text_atomic", read_only)
    assert run_script(monkeypatch, "report", folder) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    why = "Read-only file system" if fault == "a read-only folder" else "Is a directory"
    assert sentence == f"error: {folder / 'report.md'}: {why}; --out=FOLDER writes elsewhere."
    assert run_script(monkeypatch, "report", folder, "--out", tmp_path / "elsewhere") == 0
    assert "## " in (tmp_path / "elsewhere" / "report.md").read_text()


def test_the_script_compares_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_figures: None
) -> None:
    config = RECORDED.format(epochs=4, lr=0.1)
    study(tmp_path / "a", {"bn": BN}, config=config)
    study(tmp_path / "b", {"abn": CLEARLY_ABOVE}, config=config)

    def script(*arguments: object) -> tuple[object, Any]:
        return run_script(monkeypatch, "report", *arguments), capsys.readouterr()

    code, said = script(tmp_path / "a", tmp_path / "b")
    assert (code, said.err) == (0, "")
    assert "a and b" in said.out
    assert not list(tmp_path.rglob("report.md"))
    assert script(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")[0] == 0
    assert (tmp_path / "both" / "runs.csv").read_text().count("\n") == 11
    code, said = script(tmp_path / "a", tmp_path / "a")
    assert (code, said.err.count("\n")) == (1, 1)
    assert "hold the same run twice" in said.err


def test_no_folder_is_made_to_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(monkeypatch, "report", tmp_path / "typo", "--watch") == 1
    assert f"There is no folder {tmp_path}/typo; give one that train.py writes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_page_is_written_served_and_says_where_until_ctrl_c(tmp_path: Path) -> None:
    folder = study(tmp_path / "claims", {"bn": BN[:2], "abn": CLEARLY_ABOVE[:2]})
    command = [sys.executable, str(REPOSITORY / "scripts/report.py"), str(folder), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        try:
            assert watching.stdout is not None
            url, _, rest = watching.stdout.readline().partition(" ")
            assert rest == f"shows {folder}; Ctrl-C ends it.\n"
            with urllib.request.urlopen(url, timeout=120) as answer:
                page = answer.read()
            assert page.startswith((folder / "report.html").read_bytes().partition(b"</body>")[0])
            assert f"{100 * sum(BN[:2]) / 2:.2f} ± ".encode() in page
            watching.send_signal(signal.SIGINT)
            out, err = watching.communicate(timeout=120)
            assert (watching.returncode, out, "Traceback" in err) == (0, "\n", False)
        finally:
            watching.kill()
