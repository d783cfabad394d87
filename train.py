#!/usr/bin/env python
"""Train one cell with one seed, or sweep over several: `python train.py norm=abn dataset=cifar100`.

`python train.py --help` lists the groups and keys; `-m norm=bn,abn seeds=five` runs all combinations.
"""

import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from abn_exp.commandline import HYDRA_ERRORS, check_groups, hydra_sentence, overrides_last, share_config_store
from abn_exp.errors import (
    STOPPED,
    ConfigError,
    DamagedFile,
    Diverged,
    Stopped,
    end_with_reader,
    in_a_line,
    stop_on_signals,
)
from abn_exp.provenance import git_commit


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run what Hydra composed; return the validation accuracy, which Hydra's sweepers may optimise.

    None where there is no validation split, and for a run that failed inside a multirun; never the test accuracy.
    """
    hydra_config = HydraConfig.get()
    command = shlex.join(["python", "train.py", *hydra_config.overrides.task])
    try:
        # Imported where needed: --help should not wait for pydantic, nor a wrong value for torch and Lightning.
        from abn_exp.identity import plan_run, restore_quoted

        if hydra_config.mode == RunMode.MULTIRUN:  # with another launcher, whose processes may be somewhere else
            os.chdir(hydra_config.runtime.cwd)
        plan = plan_run(cfg, dict(hydra_config.runtime.choices))
        if hydra_config.mode == RunMode.MULTIRUN:
            from abn_exp.training.workers import Job, train_one

            label = f"{' '.join(plan.cell[:3])} s{plan.config.seed}"
            result = train_one(Job(plan, label, command)).result
            return None if result is None else result.val_acc_last
        from abn_exp.training.sweep import check_looks

        check_looks([plan], hydra_config.overrides.task, multirun=False)
        if plan.config.dry_run:
            from abn_exp.training.estimate import dry_run

            restore_quoted(plan)
            for line in dry_run([plan]):
                print(line, flush=True)
            return None
        from abn_exp.training.run import run

        return run(plan, command).val_acc_last
    except (ConfigError, DamagedFile, Diverged, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    stop_on_signals()
    git_commit()  # before anything can change it
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # what goes wrong comes here; Hydra would print it with its trace
    sys.argv[1:] = overrides_last(sys.argv[1:])
    if {"-h", "--help", "-c", "--cfg", "--info", "-i", "--hydra-help"} & {
        word.partition("=")[0] for word in sys.argv
    }:
        end_with_reader()
    if {"-h", "--help"} & set(sys.argv):
        share_config_store()
    conf = Path(__file__).parent / "conf"
    try:
        check_groups(sys.argv[1:], conf)
        main()
    except Stopped as stopped:
        if not stopped.reported:
            print(STOPPED.format(stopped.signal), file=sys.stderr)
        raise
    except HYDRA_ERRORS as error:
        sys.exit(f"error: {hydra_sentence(error, conf)}")
    except OSError as error:  # of Hydra's own files, in the current folder
        sys.exit(f"error: {error}")
    except ValueError as error:
        if HydraConfig.initialized():
            raise
        sys.exit(f"error: {in_a_line(error)}")  # of an override that Hydra does not expect
