"""What a multirun adds to its runs: a check of all of them before the first, and the account at its end."""

import logging
import shlex
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from abn_exp.config import ConfigError
from abn_exp.experiment import RunPlan, plan
from abn_exp.report import Report, print_report, write_report
from abn_exp.results import Run, find_runs, write_text_atomic
from abn_exp.tracking import Tracker

log = logging.getLogger(__name__)


class SweepCallback(Callback):
    """Hydra calls it around a multirun. SystemExit is the one exception of a callback that Hydra lets through."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse the whole sweep where one of its runs cannot be right; say what there is to do."""
        try:
            self.plans = expand(config)
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None
        finished = sum(run.status == "finished" for run in self._runs())
        self.complete = finished == len(self.plans) and not self.plans[0].config.force
        for folder in {this.directory.parents[4] for this in self.plans}:
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(folder / "command.txt", command(config) + "\n")
        log.info("%d runs, %d of them finished, %d to do", len(self.plans), finished, len(self.plans) - finished)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write and print the report of each folder; list what failed, and exit with 1 if anything did."""
        for folder in sorted({this.directory.parents[4] for this in self.plans}):
            report = write_report(folder)
            print_report(report)
            log.info("%s", folder / "report.md")
            if not self.complete:
                self._log_report(report, folder)
        if failed := [run for run in self._runs() if run.status != "finished"]:
            for run in failed:
                log.error("%s %s: %s", run.status.upper(), run.directory, run.reason or "no reason recorded")
            raise SystemExit(1)

    def _runs(self) -> list[Run]:
        """Return this multirun's runs as they are on disk, leaving out those that were never begun."""
        ours = {this.directory for this in self.plans}
        folders = {directory.parents[4] for directory in ours}
        return [run for folder in sorted(folders) for run in find_runs(folder) if run.directory in ours]

    def _log_report(self, report: Report, folder: Any) -> None:
        settings = self.plans[0].config.wandb
        name = f"{report.name}-report"
        with Tracker(settings, group=report.name, job_type="report", name=name, tags=["report"]) as tracker:
            tracker.log_report(folder)


def command(config: DictConfig) -> str:
    """Return what was typed to start a multirun."""
    overrides = config.hydra.overrides
    words = [word for word in overrides.hydra if word != "hydra.mode=MULTIRUN"]
    flag = ["-m"] if len(words) < len(overrides.hydra) else []
    return shlex.join(["python", "train.py", *flag, *overrides.task, *words])


def expand(config: DictConfig) -> list[RunPlan]:
    """Return the plan of every run of a multirun, in its order.

    Raises ConfigError where one of them is not allowed.
    """
    arguments = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*arguments, *config.hydra.overrides.task])
    plans = []
    for overrides in BasicSweeper.split_arguments(parsed, None)[0]:
        cfg = compose("config", list(overrides), return_hydra_config=True)
        plans.append(plan(cfg, dict(cfg.hydra.runtime.choices)))
    return plans
