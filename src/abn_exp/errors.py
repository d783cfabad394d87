"""Errors that a user can fix, and one-line messages for them. Imports nothing heavy."""

import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

STOPPED = "stopped by {}; the same command goes on from the last whole epoch"


class ConfigError(ValueError):
    """A configuration that cannot be run; its text is one sentence a line, meant for the person who typed it."""


class NotContinued(ConfigError):
    """An unfinished run that was begun elsewhere: on another kind of device, on other images."""


class DamagedFile(ValueError):
    """A file of a run is not what was written."""

    def __init__(self, path: Path, what: object) -> None:
        super().__init__(path, str(what))  # with which another process makes it again

    def __str__(self) -> str:
        path, what = self.args
        return f"{path} is damaged: {' '.join(what.split())}"


class Diverged(RuntimeError):
    """A loss, a weight or a running statistic is no longer a finite number."""


class Stopped(SystemExit):
    """SIGINT or SIGTERM has come; the exit code is what a shell makes of it, 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name
        self.reported = False  # whether the user has been told what is done and how to go on


def stop(number: int, _: object = None) -> None:
    """Handle a signal by raising `Stopped`, so that whatever is open is closed."""
    raise Stopped(number)


def stop_on_signals() -> None:
    """Let SIGTERM and SIGINT raise `Stopped`; SIGINT stays ignored where it is, as in the background of a script."""
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)


def end_with_reader() -> None:
    """Let a command that only prints end in silence when its reader does: `... | head`. Not for what trains."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def in_a_line(error: Exception) -> str:
    """Return the message of Hydra, OmegaConf or YAML in one line, without search paths and links."""
    return " ".join(re.split(r"\nConfig search path|\n?See https?:", str(error))[0].split())


def flat(node: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested dictionaries, joined by dots, with their values; a section comes before its keys."""
    for name, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{prefix}{name}", value
        yield from flat(value, f"{prefix}{name}.")


def flat_keys(node: object) -> list[str]:
    """Return the keys of nested dictionaries, joined by dots."""
    return [key for key, _ in flat(node)]


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return a sentence on a key that the configuration does not have, with the most similar key of `known`.

    Keys with the same last part come first ("epochs": recipe.epochs), then keys of similar spelling.
    """
    known = sorted(other for other in set(known) if not f"{key}.".startswith(f"{other}."))
    same = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = get_close_matches(key, same, n=1, cutoff=0) or get_close_matches(key, known, n=1)
    suggestion = f"did you mean {close[0]}? " if close else ""
    return f"{key} is not a key of the configuration; {suggestion}`python train.py --cfg job` lists them all."


def validation_sentence(error: dict[str, Any], known: Iterable[str] = ()) -> str:
    """Return a sentence on one mistake that pydantic found, with the key and the value as they were typed.

    `known` are the keys that a misspelt one is compared with.
    """
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing; every key of the configuration needs a value."
    if error["type"] == "extra_forbidden":
        return unknown_key(key, known)
    if error["type"] in ("model_type", "dict_type"):
        return f"{key}={error['input']} is not allowed: it is a section; give its keys, each as {key}.KEY=VALUE."
    message = re.sub("^(Value error, |Input |String )", "", error["msg"])
    if error["type"] == "value_error":
        return f"{message}."
    return f"{key}={shorten(str(error['input']), 80)} is not allowed: it {message}."
