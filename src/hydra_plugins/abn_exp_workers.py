"""Hydra launcher `workers`: the runs of a multirun go to worker processes of this machine.

Hydra finds launchers in packages of this name alone and imports them at the start of every command, so that nothing
heavy is imported here.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class WorkersConf:
    _target_: str = "hydra_plugins.abn_exp_workers.WorkerLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="workers", node=WorkersConf, provider="abn_exp")


class WorkerLauncher(Launcher):
    """Hands the runs to the `SweepCallback`, which has checked and planned them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from abn_exp.training.sweep import SweepCallback

        if Path(inspect.getsourcefile(task_function) or "").name != "train.py":
            raise HydraException("hydra/launcher=workers trains networks; use hydra/launcher=basic for this command.")
        self.config = config
        self.sweep = next(c for c in hydra_context.callbacks.callbacks if isinstance(c, SweepCallback))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.sweep.launch(self.config, job_overrides)
