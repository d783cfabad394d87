"""Versions of code and libraries, and the hardware, for the record of a run."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # train.py asks for the commit before it has parsed its command
    import torch


CODE = (":(top)*.py", ":(top)*.yaml")  # of the whole repository, for git
READERS = ("report", "analysis", "deploy")  # folders of the package that train nothing

# Of a CPU, beyond what torch calls its capability: the instructions that decide which kernels oneDNN takes.
CPU_FEATURES = ("avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the libraries that compute, and what the CPU can do.

    The last bits of a result depend on them. torch's version has its build, such as "2.15.0+cpu". A distribution
    without metadata, such as a project that is on the path and not installed, is "unknown".
    """
    import torch

    found = {"python": platform.python_version()}
    for name in ("abn_exp", "torch", "torchvision", "pytorch-lightning", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    found["torch"] = str(torch.__version__)  # a plain string, as a checkpoint takes it
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if (cudnn := torch.backends.cudnn.version()) is not None:
        found["cudnn"] = str(cudnn)
    return {**found, "cpu capability": _cpu_capability()}


def _cpu_capability() -> str:
    """Return e.g. "AVX512, avx512_vnni": torch's name for its kernels, further instructions, what limits oneDNN."""
    import torch

    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    limits = (
        f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ
    )
    features = (name for name in CPU_FEATURES if has.get(name))
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *features, *limits])


def device_kind(device: "torch.device") -> str:
    """Return "cpu", or the GPU's name: between kinds, results of one configuration are not averaged."""
    return "cpu" if device.type == "cpu" else device_name(device, 1)


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
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]  # macOS, where platform knows no more than "arm"
        told = (
            subprocess.run(asked, capture_output=True, text=True, check=False) if sys.platform == "darwin" else None
        )
        return (told.stdout.strip() if told else "") or platform.processor() or platform.machine()


@cache
def code_digest() -> str:
    """Return twelve hexadecimal digits of the source files that can change a number of a run.

    These are the package's, without what only reads records and trained networks. As it was at the first call.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in READERS:
            digest.update(f"{name.as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def own_code(modules: Iterable[str]) -> dict[str, str]:
    """Return a digest of the file of each of these imported modules, by a name such as "mine/norms.py"; not of the
    package's, of which `code_digest` is, nor of installed ones."""
    own = sorted({name for name in modules if name.partition(".")[0] != "abn_exp"})
    files = {name: file for name in own if (file := getattr(sys.modules.get(name), "__file__", None))}
    return {
        name.replace(".", "/") + ".py": _file_digest(file)
        for name, file in files.items()
        if not {"site-packages", "dist-packages"} & {*Path(file).parts}
    }


@cache
def _file_digest(file: str) -> str:
    """Return twelve hexadecimal digits of a file as it was at the first call, which was soon after its import."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


@cache
def git_commit() -> str | None:
    """Return the commit of the code that runs, "-dirty" where it was changed since, or None outside a checkout.

    As it was at the first call: a commit made while a process runs does not change the code that it runs.
    """
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *CODE], cwd=here, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")
