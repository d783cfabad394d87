"""Worker processes: what hangs is named, what is stopped goes on later, what cannot start ends the sweep."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from abn_exp.errors import Stopped, stop
from abn_exp.identity import RunPlan
from abn_exp.results import find_runs, read_metrics
from abn_exp.training import watch, workers
from abn_exp.training.run import run
from abn_exp.training.workers import Job, train
from tests.helpers.die import die

QUIET = OmegaConf.create({"version": 1, "root": None, "disable_existing_loggers": False})


def job(plan: RunPlan) -> Job:
    return Job(plan, "label", "python train.py")


@pytest.mark.slow
def test_a_run_that_stands_still_is_named_and_one_that_is_stopped_goes_on_later(
    make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker is halted by SIGSTOP, as by an endless loop of a library; then the sweep is stopped.

    What a worker finds is what this process finds.
    """
    monkeypatch.setattr(workers, "POLL", 0.05)
    monkeypatch.setattr(watch, "FLOOR", 1.0)
    monkeypatch.setattr(watch, "FACTOR", 2.0)
    quick, endless = make_plan("recipe.epochs=1"), make_plan("recipe.epochs=5000", "device=cpu")
    told = threading.Event()

    def seen(record: logging.LogRecord) -> bool:
        if "no step for" in record.getMessage():
            told.set()
        return True

    caplog.handler.addFilter(seen)

    def halt() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(read_metrics(endless.directory)) < 2:
            time.sleep(0.05)
        pid = int((endless.directory / "RUNNING").read_text().split()[1])
        os.kill(pid, signal.SIGSTOP)
        told.wait(60)
        os.kill(pid, signal.SIGCONT)
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    thread = threading.Thread(target=halt)
    try:
        with closing(train([job(quick), job(endless)], 1, QUIET)) as outcomes, caplog.at_level(logging.WARNING):
            thread.start()
            done, outcome = next(outcomes)
            assert done.plan is quick
            assert outcome.result is not None
            assert len(read_metrics(quick.directory)) == 1
            here = run(make_plan("recipe.epochs=1", "name=here"), "python train.py")
            assert (here.test_loss, here.val_acc_last) == (outcome.result.test_loss, outcome.result.val_acc_last)
            with pytest.raises(Stopped):
                next(outcomes)
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join()
    assert str(endless.directory) in caplog.text
    statuses = {found.directory: found.status for found in find_runs(endless.directory.parents[4])}
    assert statuses[endless.directory] == "unfinished"
    assert not (endless.directory / "RUNNING").exists()
    assert "stopped by SIGTERM in epoch" in (endless.directory / "train.log").read_text()


def test_workers_that_cannot_start_end_the_sweep(
    make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_work", die)
    jobs = [job(make_plan(f"seed={seed}")) for seed in range(3)]
    outcomes = list(train(jobs, 1, QUIET))
    assert [done for done, _ in outcomes] == jobs
    assert all(outcome.result is None for _, outcome in outcomes)
    assert {outcome.error for _, outcome in outcomes} == {
        "no worker process can begin: 3 in a row, the last killed by SIGKILL, as Linux does where memory runs out"
    }
    assert not jobs[0].plan.directory.exists()


def test_a_worker_without_a_run_is_told_to_end() -> None:
    """The end of its pipe is not enough: where workers are forked, others hold that, too."""
    ours, theirs = multiprocessing.Pipe()
    done: list[str] = []
    process = SimpleNamespace(terminate=lambda: done.append("SIGTERM"), join=lambda _=None: None, kill=lambda: None)
    idle = SimpleNamespace(connection=ours, process=process, job=None, ready=True)
    workers._stop([idle])  # type: ignore[list-item]
    assert theirs.recv() is None
    assert not done


def test_a_worker_does_not_hear_ctrl_c() -> None:
    """Of its terminal, which sends it to all processes: not even the first, whose start begins another process."""
    program = (
        "import signal\nfrom multiprocessing import resource_tracker\n"
        "from abn_exp.training.workers import sigint_blocked\n"
        "with sigint_blocked():\n    resource_tracker.ensure_running()\n"
        "    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
