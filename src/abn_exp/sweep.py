"""What a multirun adds to its runs: a check of all of them before the first, and the account at its end."""

import logging
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from abn_exp.config import ConfigError
from abn_exp.experiment import RunPlan, plan
from abn_exp.results import find_runs

log = logging.getLogger(__name__)


class SweepCallback(Callback):
    """Hydra calls it around a multirun. SystemExit is the one exception of a callback that Hydra lets through."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse the whole sweep where one of its runs cannot be right; say what there is to do."""
        try:
            self.plans = expand(config)
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None
        status = {run.directory: run.status for run in find_runs(self.plans[0].directory.parents[4])}
        states = [status.get(this.directory, "new") for this in self.plans]
        log.info(
            "%d runs: %d finished, %d to go on with or begin",
            len(states),
            states.count("finished"),
            len(states) - states.count("finished"),
        )

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        pass


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
