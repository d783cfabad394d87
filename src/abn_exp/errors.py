"""Errors that a user can fix, and one-line messages for them. Imports nothing heavy."""

from pathlib import Path
from textwrap import shorten
from typing import Any

STOPPED = "stopped by {}; the same command goes on from the last whole epoch"


class ConfigError(ValueError):
    """A configuration that cannot be run; its text is one sentence a line, meant for the person who typed it."""


class DamagedFile(ValueError):
    """A file of a run is not what was written."""

    def __init__(self, path: Path, what: object) -> None:
        super().__init__(f"{path} is damaged: {' '.join(str(what).split())}")
        self.path = path


class Diverged(RuntimeError):
    """A loss, a weight or a running statistic is no longer a finite number."""


class Terminated(SystemExit):
    """SIGTERM has come. Unlike Lightning's own exception, whose exit code 0 reads as success, it exits with 143."""

    def __init__(self) -> None:
        super().__init__(143)


def in_a_line(error: Exception) -> str:
    """Return what Hydra, OmegaConf or YAML says of a wrong command line or file, without its search path."""
    return " ".join(str(error).split("\nConfig search path")[0].split())


def validation_sentence(error: dict[str, Any]) -> str:
    """One mistake that pydantic found, in one sentence with the key and the value as they were typed."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing; every key of the configuration needs a value."
    if error["type"] == "extra_forbidden":
        return f"{key} is not a key of the configuration; `python train.py --cfg job` lists them all."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error":
        return f"{message}."
    return f"{key}={shorten(str(error['input']), 80)} is not allowed: it {message}."
