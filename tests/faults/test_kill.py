"""Killed anywhere, the same command again ends with bit-identical weights and an equal record."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.cli import FORKED_WORKERS, NO_FIGURES, Cli, appears, until
from tests.helpers.faults import FULL, SMALL, Account, differences, on_images

SHARES = 2


@dataclass
class Whole:
    """The undisturbed run: where it is, how long it took, what it changed on the disk, in order."""

    directory: Path
    seconds: float
    trace: list[str]


def directory_of(folder: Path) -> Path:
    return next(folder.rglob("config.yaml")).parent


@pytest.fixture(scope="module")
def whole(cli: Cli, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    done = cli.run(*on_images(images, folder), watch=folder)
    assert done.code == 0, done.err
    return Whole(directory_of(folder), time.monotonic() - started, done.trace)


def again(cli: Cli, images: Path, folder: Path, whole: Whole) -> list[str]:
    """Give the command once more; say what is not as if nothing had happened."""
    done = cli.run(*on_images(images, folder))
    if done.code != 0:
        return [f"exit code {done.code}: {done.err}"]
    lost = differences(whole.directory, directory_of(folder))
    return lost + [f"left behind: {path}" for path in folder.rglob("*.part")]


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.slow
def test_killed_at_a_change_of_a_file(
    cli: Cli, images: Path, tmp_path: Path, whole: Whole, account: Account, share: int
) -> None:
    """At every file that is made, renamed or removed; before the renaming, the new file is cut to its half."""
    count = len(whole.trace)
    assert count > 40
    assert any(".npz" in line for line in whole.trace)
    kinds = ("config.yaml", ".npz", "metrics.jsonl", "best.ckpt", "last.ckpt", "SHA256SUMS", "result.json")
    renames = [max(i for i, line in enumerate(whole.trace) if "rename" in line and kind in line) for kind in kinds]
    moments = list(range(count)) if FULL else sorted({*renames, count // 2, count - 1})
    lost = []
    for moment in moments[share::SHARES]:
        folder = tmp_path / str(moment)
        folder.mkdir()
        done = cli.run(*on_images(images, folder), watch=folder, kill_at=moment)
        if done.code != -signal.SIGKILL:
            lost.append(f"at {whole.trace[moment]}: not killed, {done.err}")
        lost += [f"at {whole.trace[moment]}: {line}" for line in again(cli, images, folder, whole)]
    account(
        "kill",
        "SIGKILL at a change of a file (start, data, epoch, checkpoint, record)",
        len(moments[share::SHARES]),
        lost,
    )


@pytest.mark.parametrize("share", range(SHARES))
def test_killed_at_any_time(
    cli: Cli, images: Path, tmp_path: Path, whole: Whole, account: Account, share: int
) -> None:
    times = random.Random(share)
    lost, count = [], 25 if FULL else 2
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(1 + number % 3):  # some of them more than once
            started = cli.start(*on_images(images, folder))
            time.sleep(times.uniform(0, whole.seconds))
            os.kill(started.pid, signal.SIGKILL)
            cli.wait(started)
        lost += again(cli, images, folder, whole)
    account("kill", "SIGKILL at random times, up to three in a row", count, lost)


def test_sweep_killed_between_its_runs(cli: Cli, tmp_path: Path, account: Account) -> None:
    for seed in (0, 1):
        done = cli.run(f"seed={seed}", *SMALL, f"results_dir={tmp_path / 'whole'}", cwd=tmp_path)
        assert done.code == 0, done.err
    begun = "seed-1/train.log"
    moments = [begun, ".runs.csv", ".report.md", "learning_curves.png"] if FULL else [begun]
    lost = []
    for moment in moments:
        folder = tmp_path / f"killed-{Path(moment).name}"
        words = ["-m", "seed=0,1", *SMALL, f"results_dir={folder}", "hydra/launcher=basic"]
        done = cli.run(*words, watch=folder, kill_at=moment, cwd=tmp_path)
        assert done.code == -signal.SIGKILL, done.err
        first = next(folder.rglob("seed-0")) / "result.json"
        before = first.stat().st_mtime_ns
        done = cli.run(*words, cwd=tmp_path, inject="" if FULL else NO_FIGURES)
        if done.code != 0 or first.stat().st_mtime_ns != before:
            lost.append(f"{moment}: exit code {done.code}, or a finished run was run again: {done.err}")
        for name in ("seed-0", "seed-1"):
            lost += differences(next((tmp_path / "whole").rglob(name)), next(folder.rglob(name)))
        if len(next(folder.rglob("runs.csv")).read_text().splitlines()) != 3:
            lost.append(f"{moment}: the report lacks a run")
    account("kill", "SIGKILL between two runs of a sweep and in its report", len(moments), lost)


# SIGTERM comes while the main thread waits for a thread of its own to begin, as it often does on a busy machine.
STOPPED_IN_START = """
import os, signal, threading
begin = threading.Thread.start
def start(self):
    begin(self)
    if not self.daemon:
        os.kill(os.getpid(), signal.SIGTERM)
threading.Thread.start = start
"""


def test_stopped_while_a_thread_starts(cli: Cli, tmp_path: Path, account: Account) -> None:
    """It hung: a thread that its executor did not know yet waited for work, and the process for the thread."""
    words = [*SMALL, "recipe.epochs=5000", f"results_dir={tmp_path}"]
    done = cli.run(*words, cwd=tmp_path, inject=STOPPED_IN_START, timeout=60)
    lost = [] if done.code == 128 + signal.SIGTERM else [f"exit code {done.code}: {done.err}"]
    lost += [] if list(tmp_path.rglob("*.ckpt")) else ["the checkpoint was not written"]
    account("kill", "SIGTERM while a checkpoint's thread starts", 1, lost)


def goes_on(log: Path) -> bool:
    return "going on from" in log.read_text()


def test_a_job_of_slurm_goes_on_after_sigterm(cli: Cli, tmp_path: Path) -> None:
    """Of submitit, which ignores it: SLURM requeues what it ends later, not what stops by itself."""
    words = [*SMALL, "recipe.epochs=60", f"results_dir={tmp_path}"]
    started = cli.start(*words, env={"SUBMITIT_EXECUTOR": "slurm"})
    assert until(appears(tmp_path, "last.ckpt")), started.err.read_text()
    os.kill(started.pid, signal.SIGTERM)
    done = cli.wait(started)
    assert done.code == 0, done.err
    (record,) = tmp_path.rglob("result.json")
    assert json.loads(record.read_text())["epochs"] == 60


@pytest.mark.parametrize("sweep", [False, True])
def test_asked_to_stop(cli: Cli, tmp_path: Path, account: Account, sweep: bool) -> None:
    lost = []
    for number, sent in enumerate((signal.SIGTERM, signal.SIGINT)):
        folder = tmp_path / str(number)
        words = ["-m", "seed=0,1"] if sweep else []
        words += [*SMALL, "recipe.epochs=5000", f"results_dir={folder}"]
        started = cli.start(*words, cwd=tmp_path, inject=FORKED_WORKERS)
        assert until(appears(folder, "previous-last.ckpt")), started.err.read_text()
        os.kill(started.pid, sent)
        done = cli.wait(started)
        name = signal.Signals(sent).name
        if done.code != 128 + sent:
            lost.append(f"{name}: exit code {done.code}: {done.err}")
        if "the same command goes on from the end of epoch" not in done.out or "Traceback" in done.out + done.err:
            lost.append(f"{name}: does not say how it goes on: {done.out[-300:]} {done.err}")
        if (
            list(folder.rglob("FAILED"))
            or list(folder.rglob("result.json"))
            or list(folder.rglob("seed-1/train.log"))
        ):
            lost.append(f"{name}: something else was done")
        resumed = cli.start(*words, cwd=tmp_path, inject=FORKED_WORKERS)
        log = next(folder.rglob("train.log"))
        if not until(partial(goes_on, log)):
            lost.append(f"{name}: it does not go on: {resumed.err.read_text()}")
        os.kill(resumed.pid, signal.SIGKILL)
        cli.wait(resumed)
    account("kill", f"SIGTERM and SIGINT {'in a sweep' if sweep else 'in a run'}: 143 and 130", 2, lost)
