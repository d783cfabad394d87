"""Atomic writes, where a reader finds the old file or the whole new one at any moment, and the lock of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that replaces it at the end, flushed to the disk; removed on an exception.

    Raises OSError that names `path`, which a full disk's own error does not.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # "x": never through a link that was put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, at any moment, finds the old file or the whole new one."""
    with writing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # what a terminal sent need not be valid


def modified(path: Path) -> int | None:
    """Return when a file was written, in ns; None where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


@contextmanager
def run_lock(directory: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold the lock of a run, as the process that trains it does; yield whether it was free.

    `patience` is for how many seconds to wait until it is, negative: for ever.
    """
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def remove_temporary_files(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of killed processes. The caller holds `FileLock` under which they are written."""
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)
