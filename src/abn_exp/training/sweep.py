"""Hydra callback of a multirun: checks every run before the first starts; reports and lists failures at the end.

Hydra imports it at the start of every run, so what takes seconds to import (torch, matplotlib) is imported where it
is used.
"""

import logging
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from abn_exp.commandline import HYDRA_ERRORS, hydra_sentence
from abn_exp.config import Config, read
from abn_exp.errors import STOPPED, ConfigError, DamagedFile, Stopped
from abn_exp.files import modified, write_text_atomic
from abn_exp.identity import GROUPS, RunPlan, init_by_run, plan_of, quoted, restore_quoted
from abn_exp.machine import cpu_count
from abn_exp.records import read_run_file, read_study_file
from abn_exp.results import RunResult, find_run, has_begun, read_result
from abn_exp.trained_network import write_config
from abn_exp.training.workers import Job, train

if TYPE_CHECKING:
    from abn_exp.report.build import Report
    from abn_exp.report.looks import Plan

LABEL = 20  # characters of a run's label on the console, in front of lines of up to 57

log = logging.getLogger(__name__)


class SweepCallback(Callback):
    """Hydra calls it around a multirun. SystemExit is the only exception of a callback that Hydra does not catch."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse the whole sweep where one of its runs is not allowed; log what there is to do."""
        try:
            self._start(config)
        except HYDRA_ERRORS as error:  # some of which are OSErrors
            raise SystemExit(f"error: {hydra_sentence(error)}") from None
        except (ConfigError, DamagedFile, OSError) as error:
            raise SystemExit(f"error: {error}") from None
        except Exception:  # Hydra would only warn of it, and go on
            log.exception("the sweep cannot begin")
            raise SystemExit(1) from None

    def _start(self, config: DictConfig) -> None:
        _check_sweeper(config)
        if "WANDB_SWEEP_ID" in os.environ:
            raise ConfigError(
                "An agent of W&B has one run of W&B for a command, so that a command trains one run: leave out -m, "
                "study= and seeds=, and let the sweep's file list the values."
            )
        self._planned = expand(config)
        if not self._planned:
            last = f"; the looks end at seed {config.looks[-1] - 1}" if config.looks is not None else ""
            raise ConfigError(f"This command has no run{last}: choose other seeds.")
        # Two commands may be one run, where an option has no effect on what the other one chooses.
        self.plans = list({plan.directory: plan for plan in self._planned.values()}.values())
        self.errors, self.no_look, self.launcher_error = dict[Path, str](), "", ""
        self.before = {plan.directory: modified(plan.directory / "result.json") for plan in self.plans}
        _check_devices(self.plans)
        _check_launcher(self.plans, config)
        looks = check_looks(self.plans, config.hydra.overrides.task, multirun=True)
        if taken := [plan for plan in self.plans if restore_quoted(plan) is not None]:
            log.info("%d finished runs are taken from %s", len(taken), quoted(taken[0].study))
        if self.plans[0].config.dry_run:
            from abn_exp.training.estimate import dry_run

            for line in dry_run(self.plans):
                print(line, flush=True)
            raise SystemExit(0)
        pending = [plan for plan in self.plans if finished_result(plan) is None]
        self.complete = not pending
        if looks is not None:
            from abn_exp.report.looks import write_plan

            write_plan(self.plans[0].study, looks)
        for folder in {plan.study for plan in self.plans}:
            record_command(folder, command(config))
        self._write_configs(config.looks[0] if config.looks is not None else None)
        runs = f"{len(self.plans)} runs{' at most' if config.looks is not None else ''}"
        log.info("%s, %d of them finished, %d to do", runs, len(self.plans) - len(pending), len(pending))
        if pending:
            from abn_exp.training.estimate import disk_sentence

            count = pending[0].config.seeds_at_once
            log.info(disk_sentence(pending, cpu_count() if count == "auto" else int(count)))

    def _write_configs(self, seeds: int | None) -> None:
        """Write the configuration of each run that is not begun, so that a report knows what is missing; of runs that
        a later look may not need, of so many seeds."""
        for overrides, plan in self._planned.items():
            if seeds is not None and plan.config.seed >= seeds:
                continue
            if read_run_file(plan.directory, "config.yaml") is None:
                write_config(plan.directory, plan.config.model_dump(), _single_command(overrides, plan))

    def to_do(self, overrides: Sequence[str]) -> bool:
        """Return whether a run is not finished."""
        return finished_result(self._planned[tuple(overrides)]) is None

    def decided(self, looked: int) -> bool:
        """Return whether, after so many batches of runs, the primary comparison needs no more."""
        from abn_exp.training.looks import is_decided

        folder, looks = self.plans[0].study, self.plans[0].config.looks
        assert looks is not None
        try:
            if not is_decided(folder, looked):
                self._write_configs(looks[looked])
                return False
        except (ValueError, OSError) as error:
            self.no_look = f"NO LOOK at {looks[looked - 1]} seeds: {error}"
        self.plans = [plan for plan in self.plans if plan.config.seed < looks[looked - 1]]  # the others: not needed
        return True

    def cut_short(self, looked: int, error: str) -> None:
        """Note what has ended the launcher. Jobs that it has submitted may go on: there is no report that counts as a
        look at them."""
        self.launcher_error, looks = error, self.plans[0].config.looks
        if looks is not None:
            self.plans = [plan for plan in self.plans if plan.config.seed < looks[max(looked, 1) - 1]]

    def launch(self, config: DictConfig, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
        """Train what is not finished in worker processes, as many at a time as `seeds_at_once` says.

        Return for each job what `train.py` returns: the validation accuracy, or None.
        """
        plans = [self._planned[tuple(overrides)] for overrides in job_overrides]
        results = {plan.directory: finished_result(plan) for plan in plans}
        common = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
        pending: dict[Path, tuple[RunPlan, Sequence[str]]] = {}
        for plan, overrides in zip(plans, job_overrides, strict=True):
            if results[plan.directory] is None:
                pending.setdefault(plan.directory, (plan, overrides))
        jobs = []
        for number, (plan, overrides) in enumerate(pending.values(), 1):
            label, title = _label([override for override in overrides if override not in common]), ""
            if len(label) > LABEL:
                label, title = f"{number}/{len(pending)}", label
            jobs.append(Job(plan, label, _single_command(overrides, plan), title))
        if jobs:
            try:
                with closing(train(jobs, _number_at_once(jobs), config.hydra.job_logging)) as outcomes:
                    for job, outcome in outcomes:
                        results[job.plan.directory] = outcome.result
                        self.errors[job.plan.directory] = outcome.error
            except ConfigError as error:
                raise SystemExit(f"error: {error}") from None
            except Stopped as stopped:
                done = sum(result is not None for result in results.values())
                how = STOPPED.format(stopped.signal)
                if plans[0].config.force:
                    how += ", but with force=true it begins all of them again"
                print(f"{done} of {len(results)} runs are finished; {how}", file=sys.stderr)
                stopped.reported = True
                raise
        found = [results[plan.directory] for plan in plans]
        values = [None if result is None else result.val_acc_last for result in found]
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, value in zip(job_overrides, values, strict=True)
        ]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Drop the run's configuration, a thousand objects that Hydra would keep until the sweep ends."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write and print the report of each folder; list what failed, and exit with 1 if anything did."""
        from abn_exp.report.build import print_report, update_page, write_report

        if self.launcher_error:
            log.error(
                "%s; jobs that were submitted may go on, and the same command goes on later", self.launcher_error
            )
            for folder in {plan.study for plan in self.plans}:
                update_page(folder, first=0)
            for line in self._failed():
                log.error("%s", line)
            raise SystemExit(1)
        if self.plans[0].config.looks is None:  # a look asks for its runs by itself
            with suppress(OSError):  # a run that was refused at its start has left nothing, and would not be missed
                self._write_configs(None)
        failed = [self.no_look] if self.no_look else []
        for folder in sorted({plan.study for plan in self.plans}):
            try:
                report = write_report(folder)
            except (ValueError, OSError) as error:
                failed.append(f"NO REPORT of {folder}: {error}")
                continue
            print_report(report)
            log.info("%s", folder / "report.md")
            if not self.complete:
                self._log_report(report, folder)
        failed += self._failed()
        for line in failed:
            log.error("%s", line)
        if failed:
            raise SystemExit(1)

    def _failed(self) -> list[str]:
        """Return a line for each of this multirun's runs that has no result of its own, with the reason."""
        lines = []
        for plan in self.plans:
            run, error = find_run(plan.directory), self.errors.get(plan.directory) or "no reason recorded"
            if not has_begun(plan.directory):
                lines.append(f"NOT BEGUN {plan.directory}: {error}")
            elif run.result is None:
                lines.append(f"{run.status.upper()} {plan.directory}: {run.reason or error}")
            elif plan.config.force and modified(plan.directory / "result.json") == self.before[plan.directory]:
                lines.append(f"NOT REPLACED {plan.directory}: {error}")
            elif plan.differing(plan.directory):
                lines.append(f"REFUSED {plan.directory}: it holds the result of another configuration")
        return lines

    def _log_report(self, report: "Report", folder: Path) -> None:
        from abn_exp.training.wandb_run import Tracker, report_arguments

        settings = self.plans[0].config.wandb
        try:
            with Tracker(settings, folder, **report_arguments(report.name)) as tracker:
                tracker.log_report(folder)
        except ConfigError as error:
            log.error("error: %s", error)


def _check_devices(plans: list[RunPlan]) -> None:
    """Refuse what Lightning cannot do: to start a run's other processes, it repeats the whole command."""
    if any(plan.config.devices > 1 for plan in plans):
        raise ConfigError(
            "devices=1 is the only choice in a multirun: give each run a GPU (seeds_at_once=auto), or run one "
            "after another, without -m and seeds=."
        )


def check_looks(plans: Sequence[RunPlan], overrides: Iterable[str], *, multirun: bool) -> "Plan | None":
    """Check a command against the plan of the looks in its folder; return the plan that is to be written before the
    first run, if one is. Raises ConfigError for what contradicts a plan, DamagedFile where it cannot be read."""
    typed = {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}
    folders = {place for plan in plans for place in (plan.study, quoted(plan.study))}
    planned = any(read_study_file(folder, "plan.json") for folder in folders)
    if plans[0].config.looks is None and not planned and not typed & {"looks", "spending"}:
        return None
    from abn_exp.training.looks import check_command

    return check_command(plans, typed, multirun=multirun)


def _check_sweeper(config: DictConfig) -> None:
    """Refuse a sweeper that searches for the best run where the seed is part of the search: it finds a lucky seed."""
    sweeper = str(config.hydra.sweeper._target_).rpartition(".")[2]
    typed = OverridesParser.create().parse_overrides(typed_overrides(config))
    searched = {override.key_or_group for override in typed if override.is_sweep_override()}
    if sweeper not in ("BasicSweeper", "StudySweeper") and "seed" in searched.union(
        config.hydra.sweeper.params or {}
    ):
        raise ConfigError(
            f"hydra/sweeper is {sweeper}, which takes the best run for the best values, and seed is among what it "
            "searches: it would find a lucky seed; scripts/search.py takes the mean over seeds."
        )


def _check_launcher(plans: list[RunPlan], config: DictConfig) -> None:
    """Refuse `seeds_at_once` together with another launcher."""
    launcher = str(config.hydra.launcher._target_).rpartition(".")[2]
    if launcher != "WorkerLauncher" and any(plan.config.seeds_at_once != 1 for plan in plans):
        raise ConfigError(
            f"seeds_at_once is for hydra/launcher=workers, the default, but hydra/launcher is {launcher}; "
            "leave one of them out."
        )


def command(config: DictConfig) -> str:
    """Return what was typed to start a multirun; with -m, which a study or a list of seeds may have stood for."""
    words = [word for word in config.hydra.overrides.hydra if word != "hydra.mode=MULTIRUN"]
    return shlex.join(["python", "train.py", "-m", *typed_overrides(config), *words])


def typed_overrides(config: DictConfig) -> list[str]:
    """Return the overrides as they were typed: a ${seed} in them is each run's, and not the sweep's own."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return list(overrides)


def _single_command(overrides: Sequence[str], plan: RunPlan) -> str:
    """Return what would be typed to start one run of a multirun; its seed is given, so that no looks are."""
    words = filter_overrides(overrides)
    if plan.config.looks is not None:
        words = [word for word in words if word.split("=")[0] not in ("seeds", "looks", "spending")]
        words += ["seeds=one"] if any(word.startswith("study=") for word in words) else []  # not the study's own
    return shlex.join(["python", "train.py", *words])


def record_command(folder: Path, typed: str) -> None:
    """Add a command to those that made a folder, unless it is among them."""
    path = folder / "command.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if typed not in lines:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, "\n".join([*lines, typed]) + "\n")


def finished_result(plan: RunPlan) -> RunResult | None:
    """Return the result of a run that need not be trained; `run` deals with damage and other configurations."""
    if plan.config.force:
        return None
    try:
        result = read_result(plan.directory)
        same = result is not None and not plan.differing(plan.directory)
    except (ValueError, OSError):
        return None
    return result if same else None


def _number_at_once(jobs: list[Job]) -> int:
    count = jobs[0].plan.config.seeds_at_once
    if count != "auto":
        return int(count)
    from abn_exp.training.parallel import measure_best_count

    return measure_best_count([job.plan for job in jobs])


def _label(overrides: list[str]) -> str:
    """Return the overrides that tell a run from the others, short: "bn s0" of norm=bn and seed=0."""
    words = []
    for override in sorted(overrides, key=lambda override: override.startswith("seed=")):
        key, value = override.split("=", 1)
        words.append(f"s{value}" if key == "seed" else value if key in GROUPS else f"{key.split('.')[-1]}={value}")
    return " ".join(words)


def expand(config: DictConfig) -> dict[tuple[str, ...], RunPlan]:
    """Return the plan of every run of a multirun, in its order, by the run's overrides.

    A cell is composed and named once, and its seeds are set in what came of it: that takes a tenth of the time.
    Raises ConfigError where a run is not allowed.
    """
    plans: dict[tuple[str, ...], RunPlan] = {}
    cells: dict[tuple[str, ...], tuple[DictConfig, Config, RunPlan]] = {}
    parser = OverridesParser.create()
    for overrides in jobs(config):
        seeds = [override for override in overrides if override.startswith("seed=")]
        cell = tuple(override for override in overrides if override not in seeds)
        if len(seeds) != 1 or cell not in cells:
            cfg = compose("config", list(overrides), return_hydra_config=True)
            checked = read(cfg)
            plan = plan_of(checked, dict(cfg.hydra.runtime.choices), init_by_run(cfg))
            cells[cell] = cfg, checked, plan
        else:
            cfg, checked, first = cells[cell]
            cfg.seed = parser.parse_override(seeds[0]).value()
            other = read(cfg)
            if other.model_copy(update={"seed": checked.seed}) == checked:
                plan = replace(first, config=first.config.model_copy(update={"seed": other.seed}))
            else:  # something else follows from the seed
                plan = plan_of(other, first.choices, init_by_run(cfg))
        plans[tuple(overrides)] = plan
    return plans


def sweep_params(config: DictConfig) -> dict[str, str]:
    """Return what a sweep runs all combinations of; with looks, as many seeds as the last of them has. Raises
    ConfigError for looks that are no list of numbers."""
    params: dict[str, str] = {str(key): value for key, value in (config.hydra.sweeper.get("params") or {}).items()}
    looks = config.get("looks")
    if looks is None:
        return params
    if not OmegaConf.is_list(looks) or not looks or not all(type(number) is int for number in looks):
        raise ConfigError(
            f"looks={looks} is not allowed: it should be a list of numbers of seeds, such as [5,10,20]."
        )
    return {**params, "seed": f"range(0,{looks[-1]})"}


def jobs(config: DictConfig) -> list[list[str]]:
    """Return the overrides of every run of a multirun, in its order."""
    arguments = [f"{key}={value}" for key, value in sweep_params(config).items()]
    hydra = GlobalHydra.instance()
    loader = hydra.config_loader() if hydra.is_initialized() else None  # which knows what glob(...) stands for
    parsed = OverridesParser.create(loader).parse_overrides([*arguments, *typed_overrides(config)])
    return [job for batch in split_into_batches(config, parsed) for job in batch]


def split_into_batches(config: DictConfig, overrides: Sequence[Override]) -> list[list[list[str]]]:
    """Return the overrides of every run in batches: each of `hydra.sweeper.cases` with all combinations of what is
    swept over. Where there are looks, a batch a look, all cells of a seed together: they are of one machine, then."""
    cases = [list(case) for case in config.hydra.sweeper.get("cases") or [[]]]
    combinations = BasicSweeper.split_arguments(list(overrides), None)[0]
    runs = [[*case, *combination] for case in cases for combination in combinations]
    if config.get("looks") is not None:
        bounds = pairwise([0, *config.looks])
        runs.sort(key=_seed)
        return [[run for run in runs if first <= _seed(run) < end] for first, end in bounds]
    return [runs]


def _seed(run: Sequence[str]) -> int:
    """Return the seed among a run's overrides, the last one that is given. Raises ConfigError for no number."""
    seed = [override for override in run if override.startswith("seed=")][-1].removeprefix("seed=")
    if not seed.isdecimal():
        raise ConfigError(f"seed={seed} is not allowed: it should be a whole number, or a list of them.")
    return int(seed)
