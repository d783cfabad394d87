"""Optional W&B logging; a failure inside W&B is a warning, since the record of a run is on disk.

Without a key a run is written offline (`wandb sync` uploads it later); a server that cannot be reached costs one
wait a process, and then everything goes offline. What fails inside W&B is a warning, not the end of a run. `wandb`
is imported only where it is used.
"""

import csv
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from abn_exp.config import WandbConfig
from abn_exp.errors import ConfigError

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30  # seconds that a server which cannot be reached may cost, once a process
FINISH_TIMEOUT = 25  # seconds that a run's end waits for uploads; what is left is on disk for `wandb sync`
MAX_TAG, MAX_NAME = 64, 128  # characters that W&B takes

_unreachable = False  # a server that did not answer is not asked again by this process


class Tracker:
    """One W&B run as a context: an exception inside marks it as failed. Mode "disabled" makes every call a no-op.

    Raises ConfigError where `wandb.mode=online` was asked for and there is no key that the server takes.
    """

    def __init__(self, settings: WandbConfig, *, group: str, name: str, tags: list[str], **init: Any) -> None:
        """`settings.group` wins over `group`; `init` goes to `wandb.init`: job_type, config, id, resume."""
        self.run: Any = None
        self._warned = False
        if (mode := _resolve_mode(settings.mode)) == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B's own telemetry waits 20 s for a server that is silent
        arguments = {
            "project": settings.project,
            "entity": settings.entity,
            "dir": settings.dir,
            "group": _fit(settings.group if settings.group is not None else group, MAX_NAME),
            "name": _fit(name, MAX_NAME),
            "tags": [_fit(tag, MAX_TAG) for tag in dict.fromkeys([*tags, *settings.tags])],
            "notes": settings.notes,
            **init,
        }
        self.run = _init(mode, arguments, required=settings.mode == "online")
        if self.run is None:
            return
        self._attempt(_define_axes)
        if self.run.offline:
            log.info("W&B: offline, run %s; `wandb sync --yes` uploads it once you are logged in", self.run.id)
        else:
            log.info("W&B: %s", self.run.url)

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run is not None else None

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one epoch's numbers; `epoch` among them is the x axis."""
        self._attempt(lambda run: run.log(metrics))

    def summarize(self, values: dict[str, Any]) -> None:
        """Write the numbers that the run is remembered by."""
        self._attempt(lambda run: run.summary.update(values))

    def log_report(self, folder: Path) -> None:
        """Log a report's tables and figures."""
        self._attempt(lambda run: _log_report(run, folder))

    def _attempt(self, act: Callable[[Any], object]) -> None:
        """Do something to the W&B run; the first exception is a warning, since the record is on disk."""
        if self.run is None:
            return
        try:
            act(self.run)
        except Exception as error:
            if not self._warned:
                log.warning(
                    "W&B: %s (%s); the run goes on, its record is complete on disk", error, type(error).__name__
                )
            self._warned = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without finish() the next run of this process would be written into this one.
        self._attempt(lambda run: run.finish(exit_code=0 if kind is None else 1))


def _fit(text: str, limit: int) -> str:
    """Return `text`; where it is longer than `limit`, its beginning, a digest of all of it, and its end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 15]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}{text[-8:]}"


def _define_axes(run: Any) -> None:
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    run.define_metric("val/acc", step_metric="epoch", summary="max,last")


def _log_report(run: Any, folder: Path) -> None:
    import wandb

    for name in ("report", "runs"):
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        run.log({name: wandb.Table(columns=list[str | int](header), data=rows)})
    figures = sorted((folder / "figures").glob("*.png"))
    run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})


def _resolve_mode(mode: str) -> str:
    """Turn "auto" into what this machine can do without asking anybody; WANDB_MODE=disabled wins over everything."""
    variable = os.environ.get("WANDB_MODE", "")
    variable = {"dryrun": "offline", "run": "online"}.get(variable, variable)  # W&B's own older names
    if "disabled" in (mode, variable):
        return "disabled"
    if mode == "auto" and variable:
        if variable not in ("online", "offline"):
            raise ConfigError(f"WANDB_MODE={variable} is not allowed: it should be online, offline or disabled.")
        mode = variable
    if mode == "offline" or _unreachable:
        return "offline"
    import wandb

    why = ""
    try:
        has_key = bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:
        has_key, why = False, f" ({_first_line(error)})"
    if has_key:
        return "online"
    if mode == "online":
        raise ConfigError(
            f"wandb.mode=online needs a key{why}: run `wandb login`, or take wandb=auto or wandb=offline."
        )
    if why:
        log.warning("W&B: the key cannot be used%s; going on offline", why)
    return "offline"


def _init(mode: Any, arguments: dict[str, Any], *, required: bool) -> Any:
    """Start the run, offline where the server does not answer in time; None where not even that is possible."""
    import wandb

    global _unreachable
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, console="off", silent=True)
    try:
        Path(arguments["dir"]).mkdir(parents=True, exist_ok=True)
        if mode == "online":
            try:
                return wandb.init(mode="online", settings=settings, **arguments)
            except wandb.errors.Error as error:
                if required and isinstance(error, wandb.errors.AuthenticationError):
                    raise ConfigError(f"wandb.mode=online, but the key is refused: {_first_line(error)}.") from error
                _unreachable = True
                log.warning("W&B: no connection (%s); going on offline", _first_line(error))
        return wandb.init(mode="offline", settings=settings, **arguments)
    except ConfigError:
        raise
    except Exception as error:
        log.warning("W&B: %s (%s); going on without it", _first_line(error), type(error).__name__)
        return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
