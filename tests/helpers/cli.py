"""`python train.py`, as a command that costs a tenth of a second and can be killed at any change of a file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.runs import REPOSITORY

# The workers of a multirun as forks: each spares importing torch and Lightning. `test_workers` starts them as it is.
FORKED_WORKERS = """
import multiprocessing
import abn_exp.training.workers as workers
workers._spawn = multiprocessing.get_context("fork")
"""

# A report without drawing its figures, for a sweep of which only its tables are read.
NO_FIGURES = "import abn_exp.report.figures; abn_exp.report.figures.save = lambda *_: None\n"

# The second process of a run with devices=2 as a fork that waits, from the command's start, until Lightning launches
# it: that spares importing torch and Lightning. `test_ddp` starts one as it is.
FORKED_RANK = """
import json, os, subprocess, sys
from types import SimpleNamespace
import pytorch_lightning.strategies.launchers.subprocess_script as launcher
launched, launch = os.pipe()
forked = os.fork()
if forked:
    os.close(launched)
    class Rank(subprocess.Popen):
        def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
            assert args[0] == sys.executable and args[1].endswith("train.py"), args
            self.pid, self._child_created = forked, True
            with open(launch, "w") as file:
                json.dump([args[2:], env, cwd], file)
    launcher.subprocess = SimpleNamespace(Popen=Rank)
else:
    os.close(launch)
    with open(launched) as file:
        told = file.read()
    if not told:  # the command has ended without it
        os._exit(0)
    sys.argv[1:], environment, cwd = json.loads(told)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
"""


@dataclass
class Done:
    """A command that has ended: its exit status, -9 for SIGKILL and so on, and what it printed."""

    code: int
    out: str
    err: str
    trace: list[str]


@dataclass
class Started:
    pid: int
    out: Path
    err: Path
    trace: Path


class Cli:
    """`python train.py`, in forks of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environment |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def start(
        self,
        *arguments: str,
        env: dict[str, str | None] | None = None,
        inject: str = "",
        watch: Path | None = None,
        kill_at: int | str | None = None,
        cwd: Path = REPOSITORY,
        new_group: bool = False,
        program: Path = REPOSITORY / "train.py",
    ) -> Started:
        """Start a command. `inject` is run before it; `kill_at` kills it at that change of a file below `watch`:
        its number, or a part of its path. `new_group` makes it a process group, as a shell does. `program` is
        another one than train.py."""
        self.count += 1
        out, err, trace = (self.folder / f"{self.count}.{kind}" for kind in ("out", "err", "trace"))
        out.touch()  # it may be killed before it has opened them
        err.touch()
        job: dict[str, Any] = {"arguments": arguments, "env": {"HOME": str(self.folder), **(env or {})}}
        job |= {"inject": inject, "cwd": str(cwd), "out": str(out), "err": str(err), "trace": str(trace)}
        job |= {"kill_at": kill_at, "watch": str(watch) if watch else None, "new_group": new_group}
        job["program"] = str(program)
        return Started(self._ask(start=job), out, err, trace)

    def wait(self, started: Started, timeout: float = 120) -> Done:
        code = self._ask(wait=started.pid, timeout=timeout)
        if code is None:
            os.kill(started.pid, signal.SIGKILL)
            self._ask(wait=started.pid, timeout=10)
            raise TimeoutError(f"not done in {timeout} s: {started.out.read_text()} {started.err.read_text()}")
        trace = started.trace.read_text().splitlines() if started.trace.exists() else []
        return Done(code, started.out.read_text(), started.err.read_text(), trace)

    def run(self, *arguments: str, timeout: float = 120, **options: Any) -> Done:
        return self.wait(self.start(*arguments, **options), timeout)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def appears(folder: Path, pattern: str) -> Callable[[], list[Path]]:
    """Return a function that lists the files of that name below a folder, to wait for."""
    return lambda: list(folder.rglob(pattern))


def until(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Wait for a condition; return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False
