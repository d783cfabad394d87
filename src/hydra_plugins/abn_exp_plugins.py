"""Hydra plug-ins: the sweeper `study` and the launcher `workers`.

The sweeper is the basic one, with lists of cases besides products, and with looks at which it may end. The launcher
hands the runs of a multirun to worker processes of this machine.

Hydra finds them in packages of this name alone and imports them at the start of every command, so that nothing heavy
is imported here.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class StudySweeperConf:
    _target_: str = "hydra_plugins.abn_exp_plugins.StudySweeper"
    params: dict[str, str] = field(default_factory=dict)  # as of Hydra's basic sweeper: all combinations are run
    cases: list[list[str]] | None = None  # lists of overrides, each run with all these combinations


@dataclass
class WorkersConf:
    _target_: str = "hydra_plugins.abn_exp_plugins.WorkerLauncher"


ConfigStore.instance().store(group="hydra/sweeper", name="study", node=StudySweeperConf, provider="abn_exp")
ConfigStore.instance().store(group="hydra/launcher", name="workers", node=WorkersConf, provider="abn_exp")


class StudySweeper(BasicSweeper):
    """Run each case with every combination of ``params``; with the key `looks`, a batch a look until it is enough."""

    def __init__(self, params: dict[str, str] | None = None, cases: list[list[str]] | None = None) -> None:
        super().__init__(None, params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        from abn_exp.training.sweep import sweep_params

        self.callbacks = hydra_context.callbacks.callbacks
        self.params = sweep_params(config)

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        from abn_exp.training.sweep import split_into_batches

        assert self.config is not None
        batches = split_into_batches(self.config, overrides)
        if isinstance(self.launcher, WorkerLauncher):  # which leaves out finished runs by itself
            return batches
        to_do = [c.to_do for c in self.callbacks if hasattr(c, "to_do")]
        return [[job for job in batch if all(asked(job) for asked in to_do)] for batch in batches]

    def sweep(self, arguments: list[str]) -> Any:
        """Run all batches. What ends another launcher, as a job that was killed, does not end the list of what is
        finished and what is missing."""
        try:
            return super().sweep(arguments)
        except Exception as error:
            if isinstance(self.launcher, WorkerLauncher) or isinstance(error, HydraException):
                raise
            for callback in self.callbacks:
                if hasattr(callback, "cut_short"):
                    callback.cut_short(self.batch_index, f"{type(error).__name__}: {error}")
            return []

    def is_done(self) -> bool:
        """Ask before each batch but the first whether the comparison is decided by what the batches before found.

        A batch of which everything is finished is passed over.
        """
        assert self.config is not None
        while True:
            looked = self.batch_index if self.config.get("looks") is not None else 0
            decided = looked and any(c.decided(looked) for c in self.callbacks if hasattr(c, "decided"))
            if decided or super().is_done():
                return True
            assert self.overrides is not None
            if self.overrides[self.batch_index]:
                return False
            self.batch_index += 1


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
