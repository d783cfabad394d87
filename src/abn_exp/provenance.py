"""Versions of code and libraries, and the hardware, for the record of a run."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # train.py asks for the commit before it has parsed its command
    import torch


def versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the libraries that compute."""
    libraries = ("abn_exp", "torch", "torchvision", "pytorch-lightning", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def device_name(device: "torch.device", threads: int) -> str:
    """Return e.g. "NVIDIA H200" or "CPU (AMD EPYC 7B13, 1 thread)"."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"CPU ({_cpu_name()}, {threads} thread{'s' if threads > 1 else ''})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that does not say
        return platform.processor() or platform.machine()


@cache
def git_commit() -> str | None:
    """Return the commit of the code that runs, "-dirty" where it was changed since, or None outside a checkout.

    As it was at the first call: a commit made while a process runs does not change the code that it runs.
    """
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py", "*.yaml"], cwd=here, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")
