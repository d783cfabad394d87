"""Warn of a run that has stopped taking steps: an endless loop in a library raises no error."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from abn_exp.identity import RunPlan
from abn_exp.results import read_metrics

FACTOR, FLOOR = 100.0, 600.0  # without a step for so many of the run's mean steps, and for so many seconds
POLL = 5.0  # seconds between two looks

log = logging.getLogger(__name__)


def epoch_reached(plan: RunPlan) -> str:
    """Return where a run is or was when it ended, in words."""
    epoch, epochs = len(read_metrics(plan.directory)) + 1, plan.config.recipe.epochs
    return f"in epoch {epoch} of {epochs}" if epoch <= epochs else "after its last epoch"


class Counter(Protocol):
    """Counts the batches that a run has begun, of training and of evaluation."""

    value: int


class StepWatch:
    """Says when a run has begun no new step for FACTOR times its mean step so far, and for FLOOR seconds at least.

    Nothing is reported before the first step: data may have to be downloaded and converted. The first step itself may
    take FLOOR seconds, in which a network is compiled.
    """

    def __init__(self) -> None:
        self.count, self.changed = 0, 0.0
        self.first: tuple[int, float] | None = None
        self.reported = False

    def standstill(self, count: int, now: float) -> str | None:
        """Return how long there has been no step, in words, where it is too long; once for each standstill."""
        if count != self.count:
            self.count, self.changed, self.reported = count, now, False
            self.first = self.first if self.first is not None else (count, now)
        if self.first is None or self.reported:
            return None
        steps = self.count - self.first[0]
        mean = (self.changed - self.first[1]) / steps if steps else 0.0
        waited = now - self.changed
        if waited < max(FLOOR, FACTOR * mean):
            return None
        self.reported = True
        usual = f", where one takes {mean:.2g} s" if steps else ""
        return f"no step for {waited:.0f} s{usual}"


def warn_of_standstill(watch: StepWatch, steps: Counter, plan: RunPlan, pid: int | None) -> None:
    """Log a standstill, the run's directory and what to do; whether to kill it is for the user to decide."""
    if standstill := watch.standstill(steps.value, time.monotonic()):
        log.warning(
            "%s in %s: this run may never end. `kill -9 %s` ends it, and the same command goes on from its last "
            "whole epoch.",
            standstill,
            plan.directory,
            pid,
        )


@contextmanager
def watching(plan: RunPlan, steps: Counter) -> Iterator[None]:
    """Watch a run of this process, from a thread, while the context is open."""
    ended = threading.Event()

    def look() -> None:
        watch = StepWatch()
        while not ended.wait(POLL):
            warn_of_standstill(watch, steps, plan, os.getpid())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
