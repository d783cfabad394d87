#!/usr/bin/env python
"""Train one cell with one seed, or sweep over several: `python train.py norm=abn dataset=cifar100`.

`python train.py --help` lists the groups and keys; `-m norm=bn,abn seeds=five` runs all combinations.
"""

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from abn_exp.commandline import hydra_sentence, overrides_last
from abn_exp.errors import STOPPED, ConfigError, Diverged, Terminated, in_a_line
from abn_exp.provenance import git_commit

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run what Hydra composed; return the validation accuracy, which is what a sweeper of Hydra's may optimise.

    None where there is no validation split, and for a run that failed inside a multirun; never the test accuracy.
    """
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    if multirun:
        _prefix_log_lines(cfg, hydra_config.runtime.choices)
    command = " ".join(["python train.py", *hydra_config.overrides.task])
    try:
        # Imported where needed: --help should not wait for pydantic, nor a wrong value for torch and Lightning.
        from abn_exp.identity import plan_run

        plan = plan_run(cfg, dict(hydra_config.runtime.choices))
        from abn_exp.training.run import run

        return run(plan, command).val_acc_last
    except Terminated:
        print(STOPPED.format("SIGTERM"), file=sys.stderr)
        raise
    except (ConfigError, Diverged, OSError) as error:
        if multirun:
            log.error("error: %s", error)
            return None
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception:
        if not multirun:
            raise
        log.exception("this run failed; the others go on")
        return None


def _prefix_log_lines(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Begin every line on the console with the run it is about; tables stay in the runs' own train.log."""
    label = " ".join(choices[group] for group in ("dataset", "model", "norm"))
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"[{label} s{cfg.seed}] %(message)s"))
        if not handler.filters:  # one process runs all jobs of a sweep
            handler.addFilter(lambda record: "\n" not in record.getMessage())


def _stop(*_: object) -> None:
    """Unwind, so that a launcher on this machine takes its workers down with it."""
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    git_commit()  # before anything can change it
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # what goes wrong comes here; Hydra would print it with its trace
    sys.argv[1:] = overrides_last(sys.argv[1:])
    try:
        main()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        sys.exit(f"error: {hydra_sentence(error, Path(__file__).parent / 'conf')}")
    except ValueError as error:
        if HydraConfig.initialized():
            raise
        sys.exit(f"error: {in_a_line(error)}")  # of an override that Hydra does not expect
