"""A run that takes no step any more is named, and no other."""

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from abn_exp.identity import RunPlan
from abn_exp.training import watch
from abn_exp.training.watch import FACTOR, FLOOR, StepWatch


def look(watch: StepWatch, *looks: tuple[int, float]) -> list[str]:
    """Look at the number of steps at several moments; return what was said."""
    return [said for count, now in looks if (said := watch.standstill(count, now)) is not None]


def test_nothing_is_said_before_the_first_step() -> None:
    assert look(StepWatch(), (0, 0.0), (0, 1e9)) == []


def test_a_first_step_may_take_as_long_as_a_compiler() -> None:
    assert look(StepWatch(), (0, 50.0), (1, 100.0), (1, 99.0 + FLOOR)) == []
    assert look(StepWatch(), (1, 100.0), (1, 101.0 + FLOOR)) == [f"no step for {FLOOR + 1:.0f} s"]


def test_quick_steps_are_missed_after_the_floor_and_slow_ones_after_a_multiple() -> None:
    quick, slow = [(1 + 1000 * i, 10.0 * i) for i in range(4)], [(1 + i, 30.0 * i) for i in range(4)]
    assert look(StepWatch(), *quick, (3001, 29.0 + FLOOR)) == []
    assert look(StepWatch(), *quick, (3001, 31.0 + FLOOR)) == [
        f"no step for {FLOOR + 1:.0f} s, where one takes 0.01 s"
    ]
    assert look(StepWatch(), *slow, (4, 89.0 + 30 * FACTOR)) == []
    assert look(StepWatch(), *slow, (4, 91.0 + 30 * FACTOR)) == [
        f"no step for {30 * FACTOR + 1:.0f} s, where one takes 30 s"
    ]


def test_a_standstill_is_said_once_and_the_next_one_again() -> None:
    standing = StepWatch()
    assert len(look(standing, (1, 0.0), (2, 1.0), (2, 1e4), (2, 2e4))) == 1
    assert len(look(standing, (3, 2e4), (3, 1e7), (3, 2e7))) == 1


def test_a_run_of_this_process_is_looked_at_from_a_thread(
    make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "POLL", 0.01)
    monkeypatch.setattr(watch, "FLOOR", 0.05)
    plan, told = make_plan(), threading.Event()

    def seen(_: logging.LogRecord) -> bool:
        told.set()
        return True

    caplog.handler.addFilter(seen)
    with caplog.at_level(logging.WARNING), watch.watching(plan, SimpleNamespace(value=1)):
        assert told.wait(10)
    assert str(plan.directory) in caplog.text
    assert "no step for" in caplog.text
    assert "kill -9" in caplog.text
    assert threading.active_count() == 1 or all("look" not in thread.name for thread in threading.enumerate())
