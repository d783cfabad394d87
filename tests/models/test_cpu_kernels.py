"""No network makes a kernel of an older CPU write beyond its memory: trained as such a CPU would, in processes."""

import os
import subprocess
import sys

import pytest

from tests.helpers.runs import REPOSITORY
from tests.helpers.two_steps import combinations

# oneDNN's and torch's own kernels of a CPU with AVX2 and nothing newer.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
TIME_LIMIT = 300  # seconds, for 10 of computing; a heap that was overwritten may also loop without an end


@pytest.mark.slow
def test_every_network_trains_on_a_cpu_with_avx2_and_nothing_newer() -> None:
    """A process that dies, or does not end, has named what it was about to try."""
    command = [sys.executable, "-m", "tests.helpers.two_steps"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **AVX2},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=TIME_LIMIT)
        end = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        end = f"no end in {TIME_LIMIT} s"
    reports = dict(line.split(": ", 1) for line in out.splitlines())
    assert process.returncode == 0, f"{end}, at {list(reports)[-1] if reports else 'its start'}: {err[-2000:]}"
    assert list(reports) == combinations()
    for combination, report in reports.items():
        refused = combination.endswith("exact16") and report.startswith("precision=exact16, but ")
        assert report == "trained" or refused, f"{combination}: {report}"
