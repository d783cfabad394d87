"""Run train.py in forks of a process that has imported it: a command costs a tenth of a second instead of seconds.

Reads jobs from stdin, a JSON object a line, and answers each with a line. {"start": {...}} answers the process id;
{"wait": pid, "timeout": seconds} its return code, negative for a signal as in `subprocess`, null at the timeout.
"""

import gc
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(job: dict[str, Any]) -> None:
    """Number every operation below a folder that changes a file, and die in the one that is asked for."""
    folder, kill_at, trace = job["watch"], job.get("kill_at"), job["trace"]
    events: list[str] = []
    busy = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            return
        if event == "open":
            mode, flags = args[1], args[2]
            if not (set(mode) & set("wax+") if isinstance(mode, str) else isinstance(flags, int) and flags & WRITING):
                return
        path = os.fspath(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        path = os.fsdecode(path)
        if not path.startswith(folder):
            return
        busy = True
        events.append(f"{event} {path[len(folder) :]}")
        if len(events) - 1 == kill_at or (isinstance(kill_at, str) and kill_at in path[len(folder) :]):
            if event == "os.rename" and path.endswith(".part"):
                os.truncate(path, os.path.getsize(path) // 2)  # as if it had been killed inside its write
            os.kill(os.getpid(), signal.SIGKILL)
        with open(trace, "a") as file:
            file.write(events[-1] + "\n")
        busy = False

    sys.addaudithook(hook)


def run(job: dict[str, Any]) -> int:
    os.chdir(job["cwd"])
    if job["new_group"]:
        os.setsid()
    for stream, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
    for name, value in job["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv = [Path(job["program"]).name, *job["arguments"]]
    from wandb.sdk.data_types._private import MEDIA_TMP

    # The one that all forks share is gone when the first has ended; a killed fork leaves its own.
    MEDIA_TMP.name = tempfile.mkdtemp("wandb-media", dir=Path(job["out"]).parent)
    code: Any = 0
    try:
        exec(job["inject"], {})
        if job["watch"]:
            watch(job)
        runpy.run_path(job["program"], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        code = code if isinstance(code, int) else 0 if code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    gc.disable()  # while everything is imported
    repository = Path(__file__).parents[2]
    sys.path.insert(0, str(repository))
    import wandb  # noqa: F401
    from hydra import compose, initialize_config_dir
    from hydra._internal.hydra import Hydra

    import abn_exp.report.build
    import abn_exp.training.run
    import abn_exp.training.sweep
    import abn_exp.training.wandb_run  # noqa: F401
    from abn_exp import provenance
    from abn_exp.data.prepare import load
    from abn_exp.identity import plan_run

    provenance.git_commit(), provenance.code_digest()  # once, not in each fork
    load("digits", ".")
    os.fsync = lambda _: None  # type: ignore[assignment]  # as in conftest.py
    get_mode = Hydra.get_mode

    def mode_of(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        """Compose for `hydra.mode` alone only where something sets it."""
        sets_it = any(word.lstrip("+").startswith(("study=", "seeds=", "hydra")) for word in overrides)
        return get_mode(hydra, config_name, overrides) if sets_it else None

    Hydra.get_mode = mode_of  # type: ignore[assignment,method-assign]
    with initialize_config_dir(version_base="1.3", config_dir=str(repository / "conf")):  # Hydra's parser learns
        for dataset, norm in product(["digits", "folder dataset.path=. dataset.image_size=8"], ["abn", "bn"]):
            words = [*f"dataset={dataset} norm={norm}".split(), "seed=0", "seeds=three", "model.width=0.0625"]
            cfg = compose("config", words, return_hydra_config=True)
            plan_run(cfg, dict(cfg.hydra.runtime.choices))
    gc.collect()
    gc.enable()
    gc.freeze()  # what is here is in each fork: none looks at it again, and copies its pages by that
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    print("ready", flush=True)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = run(request["start"])
                finally:
                    os._exit(code)
            running.add(pid)
            print(json.dumps(pid), flush=True)
        else:
            deadline, done = time.monotonic() + request["timeout"], 0
            while not done and time.monotonic() < deadline:
                done, status = os.waitpid(request["wait"], os.WNOHANG)
                if not done:
                    time.sleep(0.005)
            running.discard(done)
            print(json.dumps(os.waitstatus_to_exitcode(status) if done else None), flush=True)
    for pid in running:  # of tests that failed before they had waited
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)  # without the seconds in which torch's extensions count what they leave behind


if __name__ == "__main__":
    main()
