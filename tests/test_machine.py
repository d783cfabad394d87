"""CPUs and memory in trees of cgroups as Linux shows them."""

import math
import os
from pathlib import Path

import pytest

from abn_exp import machine

GIGABYTE = 10**9
UNLIMITED_V1 = 9223372036854771712


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 128 cores, all of which the affinity allows, and 100 GB that are free."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)), raising=False)
    write(tmp_path, {"proc/meminfo": f"MemTotal: 200000000 kB\nMemAvailable: {100 * GIGABYTE // 1024} kB"})
    return tmp_path


def test_without_cgroups_the_affinity_and_the_machine_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cpu_count() == 128
    assert machine.available_memory() == pytest.approx(100 * GIGABYTE, rel=1e-6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 77})
    assert machine.cpu_count() == 2


def test_elsewhere_than_on_linux_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.cpu_count() == 6
    assert machine.available_memory() == math.inf


def test_version_2_takes_the_tightest_of_the_cgroups_above(root: Path) -> None:
    job = "sys/fs/cgroup/slurm/job"
    write(root, {"proc/self/cgroup": "0::/slurm/job/step", "sys/fs/cgroup/cgroup.controllers": "cpu memory"})
    write(root, {f"{job}/step/cpu.max": "max 100000", f"{job}/cpu.max": "250000 100000"})
    write(root, {"sys/fs/cgroup/slurm/cpu.max": "1600000 100000"})
    write(root, {f"{job}/step/memory.max": "max", f"{job}/step/memory.current": 0})
    write(root, {f"{job}/memory.max": 8 * GIGABYTE, f"{job}/memory.current": 5 * GIGABYTE})
    write(root, {f"{job}/memory.stat": f"anon 1\ninactive_file {2 * GIGABYTE}\nactive_file 7"})
    assert machine.cpu_count() == 3  # two and a half
    assert machine.available_memory() == 5 * GIGABYTE


def test_version_1_has_a_tree_for_each_controller(root: Path) -> None:
    write(root, {"proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/"})
    cpu, memory = (f"sys/fs/cgroup/{name}/docker/abc" for name in ("cpu", "memory"))
    write(root, {f"{cpu}/cpu.cfs_quota_us": 400000, f"{cpu}/cpu.cfs_period_us": 100000})
    write(root, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000})
    write(root, {f"{memory}/memory.limit_in_bytes": 4 * GIGABYTE, f"{memory}/memory.usage_in_bytes": GIGABYTE})
    write(root, {"sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1})
    write(root, {"sys/fs/cgroup/memory/memory.usage_in_bytes": 7 * GIGABYTE})
    assert machine.cpu_count() == 4
    assert machine.available_memory() == 3 * GIGABYTE


def test_a_container_may_see_its_own_cgroup_as_the_root(root: Path) -> None:
    write(root, {"proc/self/cgroup": "0::/kubepods/pod/42", "sys/fs/cgroup/cpu.max": "50000 100000"})
    write(root, {"sys/fs/cgroup/memory.max": GIGABYTE, "sys/fs/cgroup/memory.current": 2 * GIGABYTE})
    assert machine.cpu_count() == 1  # half of one
    assert machine.available_memory() == 0.0


def test_this_machine() -> None:
    assert 1 <= machine.cpu_count() <= (os.cpu_count() or 1)
    assert machine.available_memory() > 0
