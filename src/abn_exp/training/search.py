"""Search hyper-parameters on validation accuracy, with the same budget for each norm; Optuna proposes the values.

A trial is a set of values. It is judged by the mean over seeds of the last epoch's validation accuracy. Its runs are
ordinary runs in their own folders: a search that was stopped goes on with the same command, and a second process with
the same command shares the work. The test accuracies in their records are not used.
"""

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from abn_exp.errors import ConfigError, Diverged
from abn_exp.files import write_text_atomic
from abn_exp.identity import RunPlan, plan_run
from abn_exp.options import set_options
from abn_exp.report.formatting import csv_text
from abn_exp.seeding import derive_seed
from abn_exp.training.run import run

FIRST_SEED, SEEDS = 1000, 3  # seeds that only searches and pilots use


@dataclass(frozen=True)
class Space:
    """What a search varies, as typed: the options of the trials, the norms, the seeds; and what stays fixed."""

    fixed: list[str]  # overrides
    options: dict[str, BaseDistribution]
    norms: list[str]
    seeds: list[int]


def read_space(words: Sequence[str]) -> Space:
    """Read overrides in Hydra's own syntax for sweeps: interval(1e-4,1e-1), tag(log,interval(...)), choice, range.

    `norm=bn,abn` are searched each by itself, `seed=1000,1001` are a trial's seeds. Raises ConfigError where there is
    nothing to search.
    """
    fixed, options, norms, seeds = [], {}, [], [FIRST_SEED + i for i in range(SEEDS)]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which knows what glob(...) stands for
    for word, override in zip(words, parser.parse_overrides(list(words)), strict=True):
        key = override.get_key_element()
        if key in ("study", "seeds", "looks", "spending"):
            raise ConfigError(f"{word} is for a sweep; a search takes dataset=, model=, norm= and seed=1000,1001.")
        if key == "norm":
            norms = _values(override)
        elif key == "seed":
            values = _values(override)
            if not all(value.isdecimal() for value in values):
                raise ConfigError(f"{word} is not allowed: it should be a list of seeds, such as seed=1000,1001.")
            seeds = [int(value) for value in values]
        elif override.is_sweep_override():
            options[key] = _distribution(override)
        else:
            fixed.append(word)
    if not options:
        raise ConfigError(
            "there is nothing to search; give an option a range, such as 'recipe.optimizer.lr=tag(log,"
            "interval(1e-4,1e-1))' or 'recipe.batch_size=choice(32,64)'."
        )
    return Space(fixed, options, norms, seeds)


def _values(override: Override) -> list[str]:
    return [*override.sweep_string_iterator()] if override.is_sweep_override() else [override.get_value_string()]


def _distribution(override: Override) -> BaseDistribution:
    value = override.value()
    log_scale = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, IntervalSweep):
            start, end = value.start, value.end
            assert start is not None
            assert end is not None
            if isinstance(start, int) and isinstance(end, int):
                return IntDistribution(start, end, log=log_scale)
            return FloatDistribution(float(start), float(end), log=log_scale)
        if isinstance(value, RangeSweep) and isinstance(numbers := value.range(), range):
            return IntDistribution(numbers[0], numbers[-1], step=abs(numbers.step))
        return CategoricalDistribution([*override.sweep_string_iterator()])
    except (ValueError, TypeError, IndexError, HydraException) as error:
        raise ConfigError(f"{override.input_line} is not a range to search: {error}") from error


class Search:
    """A search in its folder, `results/<name>`; several processes may work on it."""

    def __init__(self, space: Space) -> None:
        """Raises ConfigError where a run of the search is not allowed, or where the folder holds another search."""
        self.space = space
        chosen = [[f"norm={norm}"] for norm in space.norms] or [[]]  # none: the configuration's own
        first = self.values({key: _first(options) for key, options in space.options.items()})
        plans = [self._plan(self._words([*norm, *first], space.seeds[0])) for norm in chosen]
        if any(plan.config.devices > 1 for plan in plans):  # Lightning would repeat the command, with another trial
            raise ConfigError(
                "devices=1 is the only choice in a search; to use several GPUs, start the command for each, with "
                "CUDA_VISIBLE_DEVICES=0, 1, ..."
            )
        if any(plan.config.dry_run for plan in plans):
            raise ConfigError("dry_run=true is not for a search: give it to train.py, with the overrides of a trial.")
        if any(plan.config.recipe.val_fraction == 0 for plan in plans):
            raise ConfigError("recipe.val_fraction=0, but a search is judged by validation accuracy; use 0.1, say.")
        self.folder = plans[0].study
        self.folder.mkdir(parents=True, exist_ok=True)
        self.locks = self.folder / ".search"
        self.locks.mkdir(exist_ok=True)
        journal = str(self.folder / "search.journal")
        storage = JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal)))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.studies = {}
        with FileLock(self.locks / "lock"):
            for plan in plans:
                study = optuna.create_study(
                    storage=storage, study_name=plan.choices["norm"], direction="maximize", load_if_exists=True
                )
                self._check_same_search(study, plan)
                self.studies[study.study_name] = study

    def _words(self, values: list[str], seed: int) -> list[str]:
        """Return the overrides of a run, those of train.py."""
        name = [] if any(word.startswith("name=") for word in self.space.fixed) else ["name=search"]
        return [*name, *self.space.fixed, *values, f"seed={seed}"]

    def _plan(self, words: list[str]) -> RunPlan:
        cfg = compose("config", words, return_hydra_config=True)
        return plan_run(cfg, dict(cfg.hydra.runtime.choices))

    def _check_same_search(self, study: optuna.Study, plan: RunPlan) -> None:
        ours = {
            "options": set_options(plan.config.model_dump()),
            "space": {key: repr(distribution) for key, distribution in self.space.options.items()},
            "seeds": self.space.seeds,
        }
        for key in ours.keys() - study.user_attrs.keys():  # of a new one, or of one that was killed here
            study.set_user_attr(key, ours[key])
        if different := [key for key, value in ours.items() if study.user_attrs[key] != value]:
            raise ConfigError(
                f"{self.folder} holds another search (other {', '.join(different)}); choose another name=."
            )

    def run(self, count: int, say: Callable[[str], None] = print) -> None:
        """Train trials, the norms in turns, until each has `count`. Raises ConfigError where a run is refused."""
        while (claim := self._claim(count)) is not None:
            study, trial, lock = claim
            values = self.values(trial.params)
            try:
                accuracies = self._train(study.study_name, values)
                trial.set_user_attr("accuracies", accuracies)
                study.tell(trial, statistics.mean(accuracies))
                came = f"{100 * statistics.mean(accuracies):.2f} % on validation"
            except Diverged as error:
                trial.set_user_attr("diverged", str(error))
                study.tell(trial, state=TrialState.PRUNED)
                came = str(error)
            except ConfigError as error:
                study.tell(trial, state=TrialState.FAIL)
                raise ConfigError(f"{' '.join(values)}: {error}") from error
            finally:
                lock.release()
            say(f"{study.study_name} {' '.join(values)}: {came}")

    def _claim(self, count: int) -> tuple[optuna.Study, optuna.Trial, FileLock] | None:
        """Return a trial to train and its lock: one that a stopped process left, else a new one, else None."""
        with FileLock(self.locks / "lock"):
            for study in sorted(self.studies.values(), key=lambda study: len(_begun(study))):
                for trial in _begun(study):
                    if trial.state == TrialState.RUNNING and (lock := self._lock(study, trial.number)) is not None:
                        lock.release()  # its process has ended: the values are tried again, its runs go on
                        study.tell(trial.number, state=TrialState.FAIL)
                        study.enqueue_trial(trial.params)
                begun = _begun(study)
                number = sum(trial.state != TrialState.WAITING for trial in begun)
                if number < count:
                    # What is proposed depends on the trial's number and on what is known by then, not on the process
                    # that asks; the first proposals, which are random, are the same for each norm.
                    study.sampler = optuna.samplers.TPESampler(seed=derive_seed(0, "search", number) % 2**32)
                    asked = study.ask(self.space.options)
                    lock = self._lock(study, asked.number)
                    assert lock is not None
                    return study, asked, lock
        return None

    def _lock(self, study: optuna.Study, number: int) -> FileLock | None:
        """Return a lock on a trial for as long as it is trained, or None where another process has it."""
        lock = FileLock(self.locks / f"{study.study_name}-{number}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def values(self, parameters: dict[str, Any]) -> list[str]:
        """Return a trial's values as the overrides that its runs are given; numbers with four digits."""
        texts = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in parameters.items()}
        return [f"{key}={texts[key]}" for key in self.space.options]

    def _train(self, norm: str, values: list[str]) -> list[float]:
        """Return the validation accuracy of each seed."""
        accuracies = []
        for seed in self.space.seeds:
            words = self._words([f"norm={norm}", *values], seed)
            command = shlex.join(["python", "train.py", *words])
            accuracy = run(self._plan(words), command, patience=-1).val_acc_last  # another process may train the same
            assert accuracy is not None
            accuracies.append(accuracy)
        return accuracies

    def table(self) -> list[dict[str, str]]:
        """Return a row for each finished trial, the best of each norm first."""
        rows = []
        for norm, study in self.studies.items():
            trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            for trial in sorted(trials, key=lambda trial: -1.0 if trial.value is None else trial.value, reverse=True):
                accuracies = [100 * value for value in trial.user_attrs.get("accuracies", [])]
                row = {"norm": norm} | dict(value.split("=", 1) for value in self.values(trial.params))
                row["val acc %"] = f"{statistics.mean(accuracies):.2f}" if accuracies else "diverged"
                row["std"] = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
                rows.append(row | {"seeds": str(len(accuracies))})
        return rows

    def best(self) -> dict[str, list[str]]:
        """Return the overrides of each norm's best trial; a norm without a finished one is left out."""
        found = {}
        for norm, study in self.studies.items():
            if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                found[norm] = self.values(study.best_params)
        return found

    def write(self) -> Path:
        """Write `search.csv`, a line for each finished trial, and return its path."""
        path, rows = self.folder / "search.csv", self.table()
        write_text_atomic(path, csv_text(rows) if rows else "norm\n")
        return path


def _first(options: BaseDistribution) -> Any:
    """Return one value of a range."""
    return options.choices[0] if isinstance(options, CategoricalDistribution) else options.low  # type: ignore[attr-defined]


def _begun(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were not given up."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
