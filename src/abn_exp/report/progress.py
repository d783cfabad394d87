"""State and progress of the runs below a folder, and which of them may be removed."""

import statistics
import textwrap
from itertools import groupby
from pathlib import Path

from abn_exp.errors import DamagedFile
from abn_exp.files import run_lock
from abn_exp.results import (
    Run,
    find_run,
    find_runs,
    has_begun,
    is_set_aside,
    read_metrics,
    remove_run,
    restore_replaced,
)
from abn_exp.trained_network import read_config


def is_running(directory: Path) -> bool:
    """Return whether a process holds the run's lock."""
    if not (directory / ".lock").is_file():
        return False
    try:
        with run_lock(directory) as free:
            return not free
    except OSError:  # a folder that cannot be written: no process trains there
        return False


def list_runs(folder: Path) -> list[str]:
    """Return the runs by cell with state, epochs and time to go, and their number: lines of at most 80 characters,
    but for the paths, which are not broken. Of `results`, without those that were packed into `results/quoted`.

    Raises ValueError where there are none.
    """
    runs = [run for run in find_runs(folder) if not run.directory.is_relative_to(folder / "quoted")]
    if not runs:
        packed = ", or results/quoted" if (folder / "quoted").is_dir() else ""
        raise ValueError(
            f"There are no runs below {folder}; give a folder that train.py wrote, results or results/NAME{packed}."
        )
    lines, states = [], []
    for cell, group in groupby(runs, lambda run: run.directory.parent):
        lines.append(str(cell.relative_to(folder) if cell.is_relative_to(folder) else cell))
        for run in group:
            state, rest = describe(run)
            states.append(state)
            text, indent = f"{run.directory.name:<9} {state:<10} {rest}", " " * 23
            lines += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent=indent, break_on_hyphens=False)
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return [*lines, f"{len(runs)} runs: {counts}"]


def describe(run: Run) -> tuple[str, str]:
    """Return a run's state and details: epochs, accuracy or time to go, the reason of a failure."""
    if run.result is not None:
        epochs = run.result.epochs
        return "finished", f"{epochs}/{epochs}  test {100 * run.result.test_acc:.2f} %"
    if run.status == "damaged":
        return "damaged", run.reason or ""
    if not has_begun(run.directory):
        return "not begun", ""
    try:
        done, total, seconds = progress(run.directory)
    except DamagedFile as error:
        return "damaged", str(error)
    rest = f"{done}/{total}"
    if run.status != "unfinished":
        return run.status, f"{rest}  {run.reason}"
    if seconds is not None:
        rest += f"  {clock(seconds)} to go"
    marker = run.directory / "RUNNING"
    if is_running(run.directory):
        return "running", f"{rest}  {marker.read_text(encoding='utf-8').strip() if marker.is_file() else ''}".rstrip()
    return ("killed" if marker.is_file() else "stopped"), rest


def progress(directory: Path) -> tuple[int, int, float | None]:
    """Return the epochs done, the epochs in all, and the seconds for the rest at the run's median speed."""
    metrics, total = read_metrics(directory), read_config(directory)["recipe"]["epochs"]
    times = [line["seconds"] for line in metrics if "seconds" in line]
    left = total - len(metrics)
    return len(metrics), total, statistics.median(times) * left if times else None


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def speed_text(images_per_second: float) -> str:
    """Return a speed with two significant digits, or with all of those before the point."""
    return f"{images_per_second:.2g} img/s" if images_per_second < 10 else f"{images_per_second:.0f} img/s"


def clean(folder: Path, *, remove: bool) -> list[str]:
    """Remove, or only list, the runs that failed, are damaged, were stopped or have not begun.

    A run that a process is training stays, and so does what an archive holds. What `force` was to replace is put back
    where nothing was trained in its place.
    """
    lines = []
    for run in find_runs(folder):
        if run.result is not None or not run.directory.is_dir() or is_running(run.directory):
            continue
        state, _ = describe(run)
        with run_lock(run.directory) as free:
            # It may have been found while it was trained, and finished since.
            if not free or find_run(run.directory).result is not None:
                continue
            if is_set_aside(run.directory):
                done = "put back" if remove and restore_replaced(run.directory) else "would put back"
                lines.append(f"{done} (as it was before force=true): {run.directory}")
                continue
            size = sum(path.stat().st_size for path in run.directory.rglob("*") if path.is_file())
            if remove:
                remove_run(run.directory)
        lines.append(f"{'removed' if remove else 'would remove'} ({state}, {size / 1e6:.1f} MB): {run.directory}")
    return lines
