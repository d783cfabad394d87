"""Worker processes that train the runs of a multirun, one after another; one that dies fails only its current run."""

import logging
import multiprocessing
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

from hydra.core.utils import configure_log
from omegaconf import DictConfig

from abn_exp.errors import ConfigError, Diverged, stop
from abn_exp.files import write_text_atomic
from abn_exp.identity import RunPlan
from abn_exp.machine import end_with_parent
from abn_exp.provenance import git_commit
from abn_exp.report.progress import clock
from abn_exp.results import RunResult
from abn_exp.training.watch import POLL, Counter, StepWatch, epoch_reached, warn_of_standstill

GRACE = 30.0  # seconds that a stopped worker has to end: W&B's upload takes up to 25
STARTS = 3  # workers in a row that may die before they are ready for a run

log = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass(frozen=True)
class Job:
    """One run of a multirun."""

    plan: RunPlan
    label: str  # begins its lines on the console
    command: str
    title: str = ""  # what tells it from the others, where that is too long for the label


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job: its result, or why there is none."""

    result: RunResult | None = None
    error: str = ""


def train(jobs: Sequence[Job], count: int, job_logging: DictConfig) -> Generator[tuple[Job, Outcome]]:
    """Train `jobs`, `count` at a time, and yield each with its outcome as soon as it is known.

    A worker that dies leaves `FAILED` in the directory of its run, with the signal's name; another one replaces
    it. A run that takes no step for very long is named in a warning, and goes on. Close the iterator to stop.
    """
    waiting = list(reversed(jobs))
    workers: list[_Worker] = []
    deaths = 0  # in a row, of workers that were not ready yet
    try:
        for number in range(1, min(count, len(jobs)) + 1):
            workers.append(_Worker(number, job_logging))
        while waiting or any(worker.job for worker in workers):
            wait([end for worker in workers for end in (worker.connection, worker.process.sentinel)], POLL)
            for index, worker in enumerate(workers):
                for outcome in worker.messages():
                    deaths, worker.ready = 0, True
                    if worker.job is not None and outcome is not None:
                        yield worker.job, outcome
                        worker.job = None
                if worker.process.is_alive():
                    if worker.job is not None:
                        warn_of_standstill(worker.watch, worker.steps, worker.job.plan, worker.process.pid)
                    elif worker.ready and waiting:
                        worker.begin(waiting.pop())
                    continue
                if worker.job is not None:
                    error = _record_death(worker.job, worker.how_it_ended())
                    log.error("[%s] error: %s", worker.job.label, error)
                    yield worker.job, Outcome(error=error)
                deaths += not worker.ready
                if deaths >= STARTS:
                    error = f"no worker process can begin: {deaths} in a row, the last {worker.how_it_ended()}"
                    yield from ((job, Outcome(error=error)) for job in reversed(waiting))
                    waiting.clear()
                if waiting:
                    workers[index] = _Worker(worker.number, job_logging)
                else:
                    worker.job = None
            workers = [worker for worker in workers if worker.job or waiting or worker.process.is_alive()]
    finally:
        _stop(workers)


class _Worker:
    """A worker process as its parent sees it. `number` says which GPU is its own, see `select_device`."""

    def __init__(self, number: int, job_logging: DictConfig) -> None:
        self.number = number
        self.job: Job | None = None
        self.ready = False
        self.connection, theirs = _spawn.Pipe()
        self.steps = _spawn.RawValue("Q", 0)
        # Not a daemon: torch.compile and W&B start processes of their own.
        self.process = _spawn.Process(target=_work, args=(theirs, self.steps, job_logging), name=f"worker-{number}")
        with sigint_blocked():  # for the life of the worker, too: a terminal sends SIGINT to both
            self.process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        self.job, self.watch = job, StepWatch()
        self.steps.value = 0
        with suppress(OSError):  # it has just died, which the next check finds
            self.connection.send(job)

    def messages(self) -> Iterator[Outcome | None]:
        """Yield what the worker has sent: None once, when it is ready, then an outcome for each job."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)

    def how_it_ended(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with exit code {code}"
        hint = ", as Linux does where memory runs out" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"


def _stop(workers: list[_Worker]) -> None:
    """End the workers: those that wait at once, those that train by SIGTERM, what is left after GRACE by SIGKILL."""
    try:
        for worker in workers:
            if worker.job is not None or not worker.ready:
                worker.process.terminate()
            else:
                with suppress(OSError):
                    worker.connection.send(None)
            worker.connection.close()
        deadline = time.monotonic() + GRACE
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block SIGINT for processes that are started inside: a terminal sends it to all processes of a command."""
    resource_tracker.ensure_running()  # which, where it begins inside, unblocks the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _record_death(job: Job, how: str) -> str:
    """Write `FAILED` for a run whose process has died; return what it says."""
    directory = job.plan.directory
    reason = f"{how}, {epoch_reached(job.plan)}"
    if (directory / "config.yaml").is_file():
        with suppress(OSError):  # a full disk, which may be what it died of, ends no other run
            write_text_atomic(directory / "FAILED", reason + "\n")
            (directory / "RUNNING").unlink(missing_ok=True)
    return reason


def _work(connection: Connection, steps: Counter, job_logging: DictConfig) -> None:
    """Train one job after another until None comes or the parent has ended; runs in the worker process."""
    signal.signal(signal.SIGTERM, _stop_once)
    end_with_parent()  # a killed one sends no message, and a run that went on would keep its lock
    git_commit()  # of the code that is imported now
    from abn_exp.training.run import run  # noqa: F401 (seconds, spent once a worker)

    connection.send(None)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        configure_log(job_logging)
        connection.send(train_one(job, steps))


def _stop_once(number: int, _: object = None) -> None:
    """Stop, and ignore the signal from now on: it may come twice, to all processes and from the parent."""
    signal.signal(number, signal.SIG_IGN)
    stop(number)


def train_one(job: Job, steps: Counter | None = None) -> Outcome:
    """Train one run of a multirun in this process. An error ends this run alone; it is logged and returned.

    `steps` is a counter that another process watches; without it, this process watches the run itself.
    """
    from abn_exp.report.build import update_page
    from abn_exp.training.run import run

    _prefix_log_lines(job.label)
    if job.title:
        log.info(job.title)
    try:
        result = run(job.plan, job.command, steps)
        validation = "" if result.val_acc_last is None else f", validation {100 * result.val_acc_last:.2f} %"
        duration = f"{result.epochs} epochs in {clock(result.train_seconds)}"
        log.info("test %.2f %%%s, %s", 100 * result.test_acc, validation, duration)
        update_page(job.plan.study)
        return Outcome(result)
    except (ConfigError, Diverged, OSError) as error:
        log.error("error: %s", error)
        return Outcome(error=str(error))
    except Exception as error:
        log.exception("this run failed; the others go on")
        return Outcome(error=f"{type(error).__name__}: {error}")


def _prefix_log_lines(label: str) -> None:
    """Begin every line on the console with the run it is about; tables stay in the runs' own train.log."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"[{label}] %(message)s"))
        if not handler.filters:  # one process runs many jobs of a sweep
            handler.addFilter(lambda record: "\n" not in record.getMessage())
