"""scripts/on_gpu.sh, with a stub in place of Python."""

import os
import re
import subprocess
from pathlib import Path

from tests.helpers.runs import REPOSITORY


def test_a_cpu_trains_nothing_in_a_gpu_s_place(tmp_path: Path) -> None:
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\necho "$*" >> {calls}\ncase "$1" in -c) exit 1;; esac\n')
    stub.chmod(0o755)
    for verb in ("tests", "benchmark", "planned", "study", "all"):
        done = subprocess.run(
            ["bash", "scripts/on_gpu.sh", verb],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHON": str(stub)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr == "error: torch sees no CUDA device; device=cpu tries it on a CPU.\n"
    assert "train.py" not in calls.read_text()


def test_planned_studies_follow_each_other_whatever_fails(tmp_path: Path) -> None:
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\necho "$*" >> {calls}\ncase "$*" in *study=schedules*) exit 1;; esac\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/on_gpu.sh", "planned", "100", "device=cpu"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHON": str(stub)},
        capture_output=True,
        text=True,
    )
    said = [call for call in calls.read_text().splitlines() if call.startswith("train.py")]
    assert [re.findall(r" study=(\w+)", call) for call in said] == [
        ["trained"],
        ["schedules"],
        ["trained"],
        ["ablation"],
    ]
    assert "seed=range(20,40)" in said[0]
    assert "seed=range(0,20) dataset=cifar100" in said[2]
    assert "seed=range(40,50)" in said[3]
    assert all("name=" in call and "-tried " in call for call in said)  # not the names of what a GPU trains
    assert done.returncode == 1
    assert "the study ended with code 1" in done.stderr
