"""Watches a process for what hostile files would have it do: programs, connections, files outside one folder."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STARTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.connect", "pty.spawn")
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree")
_watches: list[tuple[str, list[str]]] = []


def is_forbidden(event: str, args: tuple[Any, ...], inside: str) -> bool:
    """Whether an event, as Python's audit hooks have it, starts something or changes a file outside a folder."""

    def outside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        path = os.path.abspath(os.fsdecode(path))
        allowed = (inside + "/", "/dev/null", "/dev/shm/", "/proc/self/")
        return path != inside and not path.startswith(allowed) and "/__pycache__/" not in path

    if event == "open":
        mode, flags = args[1], args[2]
        writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & WRITES
        return bool(writes) and outside(args[0])
    if event in ("os.rename", "os.link", "os.symlink"):
        return outside(args[1]) or (event == "os.rename" and outside(args[0]))
    if event == "subprocess.Popen":
        return "git" not in os.path.basename(os.fsdecode(args[0]))  # whose commit a record holds
    return event in STARTS or (event in CHANGES and outside(args[0]))


def watch_process(inside: str, notes: str) -> None:
    """Append to the file `notes` what this process does from now on that is forbidden."""
    over: list[bool] = []
    atexit.register(over.append, True)  # what the process cleans up at its end was there before
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not over and is_forbidden(event, args, inside):
            os.write(descriptor, f"{event} {repr(args)[:300]}\n".encode(errors="replace"))

    sys.addaudithook(hook)


@contextmanager
def watched(inside: Path) -> Iterator[list[str]]:
    """Give a list of what this process does meanwhile that is forbidden."""
    _add_hook()
    watch: tuple[str, list[str]] = str(inside), []
    _watches.append(watch)
    try:
        yield watch[1]
    finally:
        _watches.remove(watch)


@cache
def _add_hook() -> None:
    """Once a process, for a hook cannot be taken away."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        for inside, notes in _watches:
            if is_forbidden(event, args, inside):
                notes.append(f"{event} {repr(args)[:300]}")

    sys.addaudithook(hook)
