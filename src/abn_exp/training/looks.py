"""seeds=until_decided: write the plan of the looks before the first run, take each look when its runs have ended."""

import logging
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

from abn_exp.config import PrimaryConfig
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan, quoted
from abn_exp.provenance import git_commit
from abn_exp.report.comparisons import collect_cells
from abn_exp.report.looks import PLAN, Plan, look, read_plan
from abn_exp.report.verdicts import sentence
from abn_exp.results import find_runs, has_begun

FORCED = "force=true would train again what {} has judged; use another name=."

log = logging.getLogger(__name__)


def check_command(runs: Sequence[RunPlan], typed: Collection[str], *, multirun: bool) -> Plan | None:
    """Refuse a command that contradicts the plan of its folder; return the plan that it makes, where there is none.

    ``typed`` are the keys that the command line sets. Raises ConfigError, or DamagedFile where a plan cannot be read.
    """
    looks, folders = runs[0].config.looks, list(dict.fromkeys(run.study for run in runs))
    if not multirun and looks is not None:
        raise ConfigError("looks= plans the seeds of a sweep, and this command is one run; use seeds=until_decided.")
    if looks is None and (idle := [key for key in ("looks", "spending") if key in typed]):
        raise ConfigError(f"{idle[0]}= is for seeds=until_decided, which this command lacks; leave it out.")
    if looks is not None:
        if len(folders) > 1:
            names = ",".join(folder.name for folder in folders)
            raise ConfigError(f"seeds=until_decided has one plan, and this command has name={names}; give one.")
        return _plan_looks(runs, typed)
    for folder in folders:
        if (plan := _existing(folder)) is not None:
            _check_without_looks([run for run in runs if run.study == folder and _in_cells(run.cell, plan)], plan)
    return None


def _existing(folder: Path) -> Plan | None:
    plan = read_plan(folder)
    return plan if plan is not None else read_plan(quoted(folder))


def _check_without_looks(runs: Sequence[RunPlan], plan: Plan) -> None:
    """Let runs of the comparison pass that the present look asks for, one seed at a time; refuse others."""
    if not runs:
        return
    path, seeds = runs[0].study / PLAN, {run.config.seed for run in runs}
    what = f"{path} plans the seeds of {plan.norm} against {plan.reference}"
    instead = "use seeds=until_decided as it was, or another name=."
    asked = plan.seeds_at(len(plan.entries) - 1 if plan.decided else len(plan.entries))
    if len(seeds) > 1:
        raise ConfigError(f"{what}, and this command adds runs to them in another way; {instead}")
    if outside := seeds - set(asked):
        raise ConfigError(f"{what}, and its looks have not asked for seed {min(outside)}; {instead}")
    if (delta := runs[0].config.delta) != plan.delta:
        raise ConfigError(f"{path}, written before the first run, has delta {plan.delta}, not {delta}; {instead}")
    if runs[0].config.force and plan.entries:
        raise ConfigError(FORCED.format(path))


def _plan_looks(runs: Sequence[RunPlan], typed: Collection[str]) -> Plan | None:
    config, folder = runs[0].config, runs[0].study
    existing = _existing(folder)
    if "seed" in typed:
        raise ConfigError("seeds=until_decided takes seeds 0, 1, 2, ... look by look; leave out seed=.")
    plan = make_plan(runs)
    if existing is None:
        there = [*find_runs(folder), *find_runs(quoted(folder))]  # a quoted run counts as finished
        if begun := [run for run in there if _in_cells(run.cell, plan) and has_begun(run.directory)]:
            raise ConfigError(
                f"{folder} holds {len(begun)} runs of this comparison that were begun without a plan; a plan made "
                "after them would not hold. Use another name=."
            )
        return plan
    if config.force and existing.entries:
        raise ConfigError(FORCED.format(folder / PLAN))
    if different := existing.contradictions(plan):
        raise ConfigError(
            f"This command contradicts {folder / PLAN}, written before the first run, which has "
            f"{'; '.join(different)}. Use another name=."
        )
    return None if (folder / PLAN).is_file() else existing


def make_plan(runs: Sequence[RunPlan]) -> Plan:
    """Return the plan of a multirun. Raises ConfigError where it has no primary comparison with one number."""
    config = runs[0].config
    assert config.looks is not None
    norms = dict.fromkeys(run.choices["norm"] for run in runs)
    primary = config.primary
    if primary is None:
        others = [norm for norm in norms if norm != "bn"]
        if len(others) != 1 or "bn" not in norms:
            raise ConfigError(
                "seeds=until_decided needs one primary comparison: norm=bn,OTHER, or a study that names its own; "
                f"this command has norm={','.join(norms)}."
            )
        primary = PrimaryConfig(norm=others[0], statistic="pooled")
    if primary.statistic == "spread":
        raise ConfigError(
            "seeds=until_decided decides on a difference of means, and the primary comparison of this study is one "
            "of spreads; use a number of seeds, or primary.statistic=pooled."
        )
    groups: dict[tuple[str, str, str], set[str]] = {}
    for run in runs:
        dataset, model, norm, variant = run.cell
        if dataset in (primary.datasets or [dataset]) and model in (primary.models or [model]):
            groups.setdefault((dataset, model, variant), set()).add(norm)
    compared = tuple(group for group, found in groups.items() if {primary.norm, primary.reference} <= found)
    if not compared:
        raise ConfigError(
            f"seeds=until_decided compares {primary.norm} with {primary.reference}{_where(primary)}, and this "
            f"command runs norm={','.join(norms)}, not both of them in one cell there."
        )
    if len(compared) > 1 and primary.statistic == "mean":
        raise ConfigError(
            f"seeds=until_decided needs one number, and the primary comparison has {len(compared)}, one a cell; use "
            "primary.statistic=pooled, or dataset= and model= for one cell."
        )
    plan = Plan(
        norm=primary.norm,
        reference=primary.reference,
        groups=compared,
        delta=config.delta,
        looks=tuple(config.looks),
        seeds=tuple(range(config.looks[-1])),
        spending=config.spending,
        commit=git_commit(),
        written=_now(),
    )
    try:
        plan.levels(0)
    except ValueError as error:
        raise ConfigError(f"looks={list(plan.looks)}: {error}") from error
    return plan


def _where(primary: PrimaryConfig) -> str:
    chosen = (("dataset", primary.datasets), ("model", primary.models))
    words = [f"{key}={','.join(names)}" for key, names in chosen if names is not None]
    return f" on {' and '.join(words)}" if words else ""


def is_decided(folder: Path, looked: int) -> bool:
    """Take the look after so many batches of runs, unless it was taken before, and tell whether no more are needed.

    A run that failed or diverged counts as such; where one is unfinished, there is no look, and nothing more to run.
    """
    plan = read_plan(folder)
    assert plan is not None
    if len(plan.entries) < looked:
        runs, seeds = find_runs(folder), plan.seeds_at(looked - 1)
        ended = {(run.cell, run.seed) for run in runs if run.status in ("finished", "failed", "diverged")}
        cells = [(d, m, norm, v) for d, m, v in plan.groups for norm in (plan.norm, plan.reference)]
        if missing := [(cell, seed) for cell in cells for seed in seeds if (cell, seed) not in ended]:
            log.error("No look at %d seeds: %d of its runs have not come to their end.", len(seeds), len(missing))
            return True
        judged = look(folder, plan, collect_cells(runs, plan.reference), _now())
        what = sentence(judged, f"{plan.norm} - {plan.reference}", (plan.norm, plan.reference))
        log.info("Look %d of %d, at %d seeds: %s", looked, len(plan.looks), len(seeds), what)
    return plan.entries[looked - 1]["verdict"] != "undecided" or looked == len(plan.looks)


def _in_cells(cell: tuple[str, str, str, str], plan: Plan) -> bool:
    dataset, model, norm, variant = cell
    return (dataset, model, variant) in plan.groups and norm in (plan.norm, plan.reference)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
