"""CPUs and memory that this process may use, which in a container or a cluster's job is less than the machine has."""

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path("/")  # where /proc and /sys are


def cpu_count() -> int:
    """Return the number of CPUs: those of the process's affinity, or fewer where a cgroup has a quota of CPU time."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    quotas = [*_limits("cpu", "cpu.max", _quota), *_limits("cpu", "cpu.cfs_quota_us", _quota_v1)]
    return max(1, math.ceil(min([count, *quotas])))


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, in whatever way: nobody else would end it.

    For a process of `multiprocessing`.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def available_memory() -> float:
    """Return the bytes of memory that are available: of the machine, or within the limit of a cgroup.

    Infinity where neither is known.
    """
    now = partial(_left, usage="memory.current", cache="inactive_file")
    v1 = partial(_left, usage="memory.usage_in_bytes", cache="total_inactive_file")
    left = [*_limits("memory", "memory.max", now), *_limits("memory", "memory.limit_in_bytes", v1)]
    return max(0.0, min([_table(ROOT / "proc/meminfo").get("MemAvailable:", math.inf) * 1024, *left]))


def _limits(controller: str, name: str, read: Callable[[Path], float]) -> Iterator[float]:
    """Yield `read(file)` for the file of every cgroup that this process is in, up to the outermost one.

    Version 2 has one tree of cgroups, version 1 one for each controller. Inside a container, the path in
    /proc/self/cgroup may be the one outside; the container's own cgroup is then the root of the tree.
    """
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = ROOT / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        tree = mount if number == "0" else mount / controller if controller in controllers.split(",") else None
        if tree is not None:
            own = tree / path.lstrip("/")
            for folder in (own, *own.parents[: len(own.parts) - len(tree.parts)]):
                try:
                    yield read(folder / name)
                except (OSError, ValueError):  # no such file, or no limit
                    continue


def _quota(path: Path) -> float:
    """Read "200000 100000": microseconds of CPU time in each period of so many; "max" is no limit."""
    quota, period = path.read_text(encoding="ascii").split()
    return int(quota) / int(period)


def _quota_v1(path: Path) -> float:
    quota = int(path.read_text(encoding="ascii"))
    if quota <= 0:
        raise ValueError("no limit")
    return quota / int(path.with_name("cpu.cfs_period_us").read_text(encoding="ascii"))


def _left(path: Path, usage: str, cache: str) -> float:
    """Return what is left of a limit; the inactive page cache counts as used there, but can be reclaimed."""
    used = int(path.with_name(usage).read_text(encoding="ascii"))
    return int(path.read_text(encoding="ascii")) - used + _table(path.with_name("memory.stat")).get(cache, 0)


def _table(path: Path) -> dict[str, int]:
    """Read lines of a name, a number and an optional unit."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) > 1 and words[1].isdecimal()}
