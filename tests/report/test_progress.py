"""What a listing of runs says, and what may be removed."""

import json
import re
from pathlib import Path

import pytest
from filelock import FileLock

from abn_exp.report import progress
from abn_exp.report.build import build_report
from abn_exp.report.progress import clean, clock, describe, list_runs, speed_text
from abn_exp.report.tables import accuracy_table, missing
from abn_exp.results import find_run, find_runs, has_begun, set_aside, write_result
from abn_exp.trained_network import write_config
from tests.helpers.records import finish_run, result_in, start_run
from tests.helpers.scripts import run_script

FOUR = "recipe: {epochs: 4}\n"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, one that runs if its lock is held, one that was stopped, one that failed, a damaged one, and
    one that has not begun."""
    finish_run(tmp_path, "bn", 0, 0.9167)
    for seed, epochs in ((1, 3), (2, 1), (3, 2)):
        directory = start_run(tmp_path, "bn", seed, epochs=epochs, config=FOUR)
        lines = [{"epoch": epoch, "seconds": 1000.0} for epoch in range(epochs)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory.with_name("seed-1") / "RUNNING").write_text("process 123 on here\n")
    (directory / "FAILED").write_text("killed by SIGSEGV, in epoch 3 of 4\n")
    (finish_run(tmp_path, "bn", 4, 0.5) / "result.json").write_text("{")
    write_config(directory.with_name("seed-5"), {"recipe": {"epochs": 4}}, "python train.py")
    return tmp_path


def directory(runs: Path, seed: int) -> Path:
    return runs / "digits" / "binarynet" / "bn" / "fixed" / f"seed-{seed}"


def test_each_run_is_listed_with_its_state_and_progress(runs: Path) -> None:
    with FileLock(directory(runs, 1) / ".lock"):
        lines = list_runs(runs)
    assert lines[0] == "digits/binarynet/bn/fixed"
    assert lines[1:5] == [
        "  seed-0    finished   4/4  test 91.67 %",
        "  seed-1    running    3/4  0:16:40 to go  process 123 on here",
        "  seed-2    stopped    1/4  0:50:00 to go",
        "  seed-3    failed     2/4  killed by SIGSEGV, in epoch 3 of 4",
    ]
    assert lines[5].startswith("  seed-4    damaged    ")
    assert "is damaged: its SHA-256 is not the one in SHA256SUMS" in " ".join(map(str.strip, lines))
    assert lines[-2] == "  seed-5    not begun"
    assert lines[-1] == "6 runs: 1 finished, 1 running, 1 stopped, 1 failed, 1 damaged, 1 not begun"
    assert max(map(len, lines)) <= 80
    assert "  seed-1    killed     3/4  0:16:40 to go" in list_runs(runs)


def test_a_damaged_line_of_one_run_hides_no_other(runs: Path) -> None:
    path = directory(runs, 2).with_name("seed-3") / "metrics.jsonl"
    path.write_text("x" + path.read_text()[1:])
    assert any("seed-3    damaged" in line for line in list_runs(runs))
    assert "metrics.jsonl is damaged" in describe(find_run(path.parent))[1]
    assert "metrics.jsonl is damaged" in str(build_report(runs).cells[0].unscored[3])


def test_what_is_finished_or_running_is_never_removed(runs: Path) -> None:
    with FileLock(directory(runs, 1) / ".lock"):
        listed = clean(runs, remove=False)
        assert len(find_runs(runs)) == 6
        removed = clean(runs, remove=True)
        assert [run.seed for run in find_runs(runs)] == [0, 1]
    for seed, state in ((2, "stopped"), (3, "failed"), (4, "damaged"), (5, "not begun")):
        assert any(re.fullmatch(rf"removed \({state}, \d+.\d MB\): .*seed-{seed}", line) for line in removed)
    assert [line.startswith("would remove") for line in listed] == [True] * 4
    clean(runs, remove=True)  # nobody trains it any more
    assert [run.seed for run in find_runs(runs)] == [0]


def test_a_run_that_ends_while_others_are_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found while it is trained, and has finished when its turn comes."""
    started = start_run(tmp_path, "bn", 0, config=FOUR)

    def finishes(path: Path) -> bool:
        if not (path / "result.json").exists():
            write_result(path, result_in(path, 0, 0.7))
        return False

    monkeypatch.setattr(progress, "is_running", finishes)
    assert clean(tmp_path, remove=True) == []
    assert (started / "result.json").is_file()


def test_what_force_was_to_replace_is_put_back_and_not_removed(tmp_path: Path) -> None:
    config = "recipe: {epochs: 4}\n"
    directory = finish_run(tmp_path / "study", "bn", 0, 0.7, config=config)
    before = (directory / "result.json").read_bytes()
    set_aside(directory)
    (directory / "config.yaml").write_text(config)
    assert clean(tmp_path / "study", remove=False) == [f"would put back (as it was before force=true): {directory}"]
    assert clean(tmp_path / "study", remove=True) == [f"put back (as it was before force=true): {directory}"]
    assert (directory / "result.json").read_bytes() == before


def test_the_folders_above_a_removed_run_go_where_they_are_empty(tmp_path: Path) -> None:
    study = tmp_path / "results" / "study"
    start_run(study, "abn", 0, config=FOUR)
    clean(study, remove=True)
    assert not study.exists()
    assert tmp_path.exists()


def test_a_run_of_which_only_the_configuration_is_there_has_not_begun(tmp_path: Path) -> None:
    write_config(tmp_path / "run", {"a": 1}, "python train.py")
    (tmp_path / "run" / ".lock").touch()
    assert not has_begun(tmp_path / "run")
    (tmp_path / "run" / "train.log").touch()
    assert has_begun(tmp_path / "run")


def test_an_interrupted_study_says_how_many_seeds_it_was_to_have(tmp_path: Path) -> None:
    """A norm of which no run has begun is not part of it yet."""
    finish_run(tmp_path, "bn", 0, 0.9)
    cell = directory(tmp_path, 0).parent
    for seed in (1, 2):
        write_config(cell / f"seed-{seed}", {"recipe": {"epochs": 4}}, "python train.py")
        write_config(cell.parents[1] / "abn" / "fixed" / f"seed-{seed}", {"a": 1}, "python train.py")
    report = build_report(tmp_path)
    (row,) = accuracy_table(report)[1]
    assert "1/3" in row
    assert missing(report) == [f"digits with binarynet, bn, seed {seed}: not begun" for seed in (1, 2)]


def test_speeds() -> None:
    assert [speed_text(speed) for speed in (0.0853, 7.34, 9.96, 17.2, 1886.4)] == [
        *["0.085 img/s", "7.3 img/s", "10 img/s", "17 img/s", "1886 img/s"]
    ]


def test_durations() -> None:
    assert [clock(0.4), clock(59.6), clock(3600 * 25 + 61)] == ["0:00:00", "0:01:00", "25:01:01"]


def test_the_script(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(monkeypatch, "runs", runs) == 0
    assert "6 runs: 1 finished" in capsys.readouterr().out
    assert run_script(monkeypatch, "runs", runs, "--clean") == 0
    assert "Nothing was removed; --yes removes them." in capsys.readouterr().out
    assert run_script(monkeypatch, "runs", runs, "--clean", "--yes") == 0
    assert run_script(monkeypatch, "runs", runs, "--clean") == 0
    assert "is finished or being trained" in capsys.readouterr().out
    assert run_script(monkeypatch, "runs", runs / "nowhere") == 1
    assert "There are no runs below" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "runs", runs, "--yes")
