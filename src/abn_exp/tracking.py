"""Weights & Biases, the window on a run. It is never asked for, never waited for, and never the record.

Without a key a run is written offline (`wandb sync` uploads it later); a server that cannot be reached costs one
wait a process, and then everything goes offline. `wandb` is imported only where it is used.
"""

import csv
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from abn_exp.config import ConfigError, WandbConfig

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30  # seconds that an unreachable server may cost, once a process

_unreachable = False  # a server that did not answer is not asked again by this process


class Tracker:
    """One W&B run as a context: an exception inside marks it as failed. Mode "disabled" makes every call a no-op."""

    def __init__(self, settings: WandbConfig, **init: Any) -> None:
        """`init` goes to `wandb.init`: group, name, job_type, tags, config, id, ..."""
        self.run: Any = None
        if (mode := _resolve_mode(settings.mode)) == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        arguments = {"project": settings.project, "entity": settings.entity, "dir": settings.dir, **init}
        Path(settings.dir).mkdir(parents=True, exist_ok=True)
        self.run = _init(mode, arguments)
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")
        self.run.define_metric("val/acc", step_metric="epoch", summary="max,last")
        where = "offline" if self.run.offline else self.run.url
        log.info("W&B: %s, run %s", where, self.run.id)
        if mode == "offline":
            log.info("W&B: `wandb sync --yes` uploads it once you are logged in")

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run is not None else None

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one epoch's numbers; `epoch` among them is the x axis."""
        if self.run is not None:
            self.run.log(metrics)

    def summarize(self, values: dict[str, Any]) -> None:
        """Write the numbers that the run is remembered by."""
        if self.run is not None:
            self.run.summary.update(values)

    def log_report(self, folder: Path) -> None:
        """Log a report's tables and figures."""
        if self.run is None:
            return
        import wandb

        for name in ("report", "runs"):
            with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            self.run.log({name: wandb.Table(columns=list[str | int](header), data=rows)})
        figures = sorted((folder / "figures").glob("*.png"))
        self.run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without finish() the next run of this process would be written into this one.
        if self.run is not None:
            self.run.finish(exit_code=0 if kind is None else 1)


def _resolve_mode(mode: str) -> str:
    """Turn "auto" into what this machine can do without asking anybody."""
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return "disabled"
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if mode == "offline" or (mode == "auto" and _unreachable):
        return "offline"
    import wandb

    try:
        has_key = bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:
        log.warning("W&B: the key is not usable (%s)", str(error).splitlines()[0])
        has_key = False
    if mode == "online" and not has_key:
        raise ConfigError("wandb.mode=online needs a key: run `wandb login`, or take wandb=auto or wandb=offline.")
    return "online" if has_key else "offline"


def _init(mode: Any, arguments: dict[str, Any]) -> Any:
    """Start the run, offline where the server does not answer in time."""
    import wandb

    global _unreachable
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT, console="off", silent=True)
    try:
        return wandb.init(mode=mode, settings=settings, **arguments)
    except (wandb.errors.CommError, wandb.errors.AuthenticationError) as error:
        _unreachable = True
        log.warning("W&B: no connection (%s); going on offline", str(error).splitlines()[0])
        return wandb.init(mode="offline", settings=settings, **arguments)
