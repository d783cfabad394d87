"""The report of a folder of runs: what was found, how sure it is, and what is missing.

A report is a function of the records below its folder and of nothing else: written twice, it is byte for byte the
same.
"""

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abn_exp.files import write_text_atomic
from abn_exp.options import all_options
from abn_exp.records import RECORDS, read_command
from abn_exp.report import figures, stats
from abn_exp.report.checks import conditional_on, provenance_differences
from abn_exp.report.comparisons import (
    Cell,
    Key,
    collect_cells,
    compare_cells,
    group_cells,
    keys_of,
    learning_curves,
    pool,
)
from abn_exp.report.effects import effect_tables
from abn_exp.report.factors import find_factors, varying_options
from abn_exp.report.html import html_page
from abn_exp.report.looks import Primary, fixed_before, judge_planned, judge_primary, read_plan, record_look
from abn_exp.report.per_image import image_evidence
from abn_exp.report.spread import SpreadJudgement
from abn_exp.report.tables import Report, accuracy_table, missing, no_comparison
from abn_exp.report.verdicts import Judgement
from abn_exp.report.writers import cells_csv, effects_csv, latex, markdown, runs_csv
from abn_exp.results import Run, find_runs, has_begun
from abn_exp.trained_network import read_config

log = logging.getLogger(__name__)
PLANNED_ALONE = (
    "A primary comparison was fixed for one of these folders, and its verdict is in the report of that folder alone: "
    "runs added to it would be another look."
)
PACKED = "learning_curves"  # the figure of each packed report, beside that of what was asked
PAGE_SECONDS = 60  # between two pages that are written while runs are under way


def build_report(folder: Path, *others: Path, reference: str = "bn", interim: bool = False) -> Report:
    """Read every run below the folders, judge the study's primary comparison, and compare each norm with
    ``reference``. A plan is that of one folder: with others beside it, there is no verdict on its comparison.

    ``interim``: runs are under way, so that there is neither a verdict on the primary comparison nor its interval.
    Raises ValueError where there are no runs, where a record cannot be read, or where a run is there twice.
    """
    folder, *more = (Path(path).resolve() for path in (folder, *others))
    found = [run for path in (folder, *more) for run in _runs_below(path)]
    options = _options(found)
    # A cell of which no run has begun is no part of the report: a sweep that was stopped may never have been meant.
    planned = collect_cells(_unique_variants(found, options) if more else found, reference)
    cells = [cell for cell in planned if cell.begun]
    configs = [read_config(run.directory) for cell in cells for run in cell.runs if run.status != "damaged"]
    devices = {cell.key: cell.device for cell in cells if cell.device is not None}
    settings = {cell.key: _settings(cell, options) for cell in cells}
    factors = find_factors(settings, devices)
    cells.sort(key=lambda cell: (cell.dataset, cell.model, *(f.levels.index(f.level(cell)) for f in factors)))
    plans, fixed = [plan for path in (folder, *more) if (plan := read_plan(path)) is not None], fixed_before(configs)
    plan = plans[0] if plans and not more else None
    if more and (plans or fixed.question is not None):
        fixed = replace(fixed, question=None, note=PLANNED_ALONE)
    delta = fixed.delta if plan is None else plan.delta
    primary = judge_planned(cells, plan) if plan is not None else None
    if plan is None and fixed.question is not None:
        primary = judge_primary(cells, fixed.question, delta, interim, [c for c in planned if not c.begun])
    shown = _primary_against(primary, reference)
    # Cells that are not to be compared yet, whichever of the two is the reference, nor as a part of anything else.
    withheld = keys_of(primary.pairs) if primary is not None and primary.withheld else frozenset()
    if more:
        withheld |= keys_of(pair for plan in plans if not plan.decided for pair in plan.pairs(cells))
    judged = _judged_apart(primary)
    contrasted = frozenset() if primary is not None and primary.spreads else judged
    return Report(
        name=" and ".join(path.name for path in (folder, *more)),
        question=next((config["question"] for config in configs if "question" in config), None),
        command="\n".join(_command(path, cells) for path in (folder, *more)),
        reference=reference,
        delta=delta,
        fixed=fixed,
        primary=primary,
        plan=plan,
        cells=cells,
        comparisons=compare_cells(cells, reference, delta, *shown, withheld if any(shown) else withheld | judged),
        pooled=[] if withheld else pool(cells, reference, delta, _judged_together(primary, reference)),
        factors=factors,
        options=varying_options(settings),
        effects=[] if withheld else effect_tables(cells, factors, reference, delta, contrasted),
        images=image_evidence([] if withheld else cells, reference),
        conditional=conditional_on(configs),
        differing=provenance_differences(cells),
        withheld=bool(withheld),
    )


def _primary_against(
    primary: Primary | None, reference: str
) -> tuple[dict[Key, Judgement], dict[Key, SpreadJudgement]]:
    """Return what the table of differences to ``reference`` shows of the primary comparison, by cell."""
    if primary is None or primary.question.reference != reference:
        return {}, {}
    means, keys = primary.means, {cell.key for cell, _ in primary.pairs}
    if primary.pooled is not None and len(keys) == 1:
        means = dict.fromkeys(keys, primary.pooled)
    return means, primary.spreads


def _judged_apart(primary: Primary | None) -> frozenset[frozenset[Key]]:
    """Return the pairs of cells that were judged as primary one by one."""
    if primary is None or primary.withheld or (primary.pooled is not None and len(primary.pairs) > 1):
        return frozenset()
    return keys_of(primary.pairs)


def _judged_together(primary: Primary | None, reference: str) -> dict[frozenset[frozenset[Key]], Judgement | None]:
    """Return the primary comparison over several pairs of cells, where it is one; None for it where it has another
    reference, so that it is not shown as its opposite."""
    if primary is None or primary.pooled is None:
        return {}
    return {keys_of(primary.pairs): primary.pooled if primary.question.reference == reference else None}


def _runs_below(folder: Path) -> list[Run]:
    runs = find_runs(folder)
    if not any(has_begun(run.directory) for run in runs):
        raise ValueError(f"There are no runs below {folder}; give a folder that train.py wrote, results/NAME.")
    return runs


def _options(runs: Sequence[Run]) -> dict[Path, dict[str, Any]]:
    """Return the options that can change a run's result, flat, by its directory; nothing of damaged ones.

    An option of a network or a norm that only some runs have, because it was added later, is at its default in the
    others. That default is in a signature, which takes seconds to import and is read only where it is needed. Initial
    weights that each seed has of its own are named by what is the same for all seeds.
    """
    configs = {run.directory: read_config(run.directory) for run in runs if run.status != "damaged"}
    options = {directory: all_options(config, signatures=False) for directory, config in configs.items()}
    by_norm: dict[tuple[str, ...], set[frozenset[str]]] = {}
    for directory, own in options.items():
        by_norm.setdefault(directory.parts[-5:-2], set()).add(frozenset(own))
    if any(len(found) > 1 for found in by_norm.values()):
        options = {directory: all_options(config) for directory, config in configs.items()}
    named = {path: config["init_cell"] for path, config in configs.items() if config.get("init_cell") is not None}
    return options | {path: options[path] | {"init_digest": cell} for path, cell in named.items()}


def _unique_variants(runs: Sequence[Run], options: Mapping[Path, Mapping[str, Any]]) -> list[Run]:
    """Return the runs with variants that belong to one configuration each.

    Folders may hold one configuration under two names, given by earlier versions, or two under one name: a whole data
    set and a part of it.
    """
    names: dict[tuple[str, ...], str] = {}
    taken: dict[Key, tuple[str, ...]] = {}
    renamed = []
    recipes = {run.cell: run.result.recipe for run in runs if run.result is not None}
    for run in runs:
        if run.directory in options:
            text = json.dumps(options[run.directory], sort_keys=True)
            identity = (run.dataset, run.model, run.norm, recipes.get(run.cell, run.variant.split("_")[0]), text)
            if identity not in names:
                unique = taken.setdefault(run.cell, identity) == identity
                names[identity] = (
                    run.variant if unique else f"{run.variant}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
                )
            run = replace(run, variant=names[identity])
        renamed.append(run)
    return renamed


def _settings(cell: Cell, options: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options of a cell with its recipe's name; all its runs have the same."""
    whole = (options[run.directory] for run in cell.runs if run.directory in options)
    recipes = (run.result.recipe for run in cell.runs if run.result is not None)
    return {"recipe": next(recipes, cell.runs[0].variant.split("_")[0]), **next(whole, {})}


def _command(folder: Path, cells: list[Cell]) -> str:
    """Return the commands that a multirun recorded, or else one command for each cell."""
    if command := read_command(folder).strip():
        return command
    lines = []
    for cell in cells:
        runs = [run for run in cell.runs if run.directory.is_relative_to(folder)]
        if not runs:
            continue
        recipe = next((run.result.recipe for run in runs if run.result is not None), None)
        choices = {"dataset": cell.dataset, "model": cell.model, "norm": cell.norm}
        choices |= {"recipe": recipe} if recipe is not None else {}
        choices |= {"seed": ",".join(str(run.seed) for run in runs), "name": folder.name}
        line = shlex.join(["python", "train.py", "-m", *(f"{key}={value}" for key, value in choices.items())])
        lines.append(line if cell.variant == recipe else f"{line}  # {cell.variant}: see config.yaml of its runs")
    return "\n".join(lines)


def write_report(folder: Path, *others: Path, reference: str = "bn", out: Path | None = None) -> Report:
    """Write report.md, report.html, report.csv, runs.csv, report.tex and figures/ into ``folder``, or ``out``; see
    :func:`build_report`. Of a packed study, whose report is committed, two figures are drawn; the page has all."""
    folder = Path(folder)
    report = build_report(folder, *others, reference=reference)
    if report.plan is None and not others:
        report = replace(report, unplanned=record_look(folder, report.comparisons))
    out = folder if out is None else out
    (out / "figures").mkdir(exist_ok=True, parents=True)
    drawn, all_figures = [], draw(report)
    if out == folder and (folder / RECORDS).is_file():
        asked = "spreads" if report.primary is not None and report.primary.spreads else "differences"
        all_figures = {name: figure if name in (PACKED, asked) else None for name, figure in all_figures.items()}
    for name, figure in all_figures.items():
        if figure is not None:
            figures.save(figure, out / "figures", name)
            drawn.append(name)
        else:
            for suffix in ("png", "pdf"):
                (out / "figures" / f"{name}.{suffix}").unlink(missing_ok=True)
    write_text_atomic(out / "report.md", markdown(report, drawn))
    write_text_atomic(out / "report.html", html_page(report))
    write_text_atomic(out / "report.tex", latex(report))
    write_text_atomic(out / "report.csv", cells_csv(report))
    if effects := effects_csv(report):
        write_text_atomic(out / "effects.csv", effects)
    else:
        (out / "effects.csv").unlink(missing_ok=True)
    write_text_atomic(out / "runs.csv", runs_csv(report))
    return report


def page_of(folder: Path, reference: str = "bn") -> Path:
    """Return where the page of a folder is; a sweep writes that against BN."""
    return folder / ("report.html" if reference == "bn" else f"report-{reference}.html")


def update_page(folder: Path, *, reference: str = "bn", interim: bool = True, first: float = PAGE_SECONDS) -> None:
    """Write the page of a folder whose runs are under way: by one process at a time, at most once a minute.

    The first one is written when the sweep has taken `first` seconds. There is no verdict on the primary comparison,
    and no interval of it, before its runs are complete; `interim` says that they are not. A page that would not
    change is left as it is. One that cannot be written is a warning, since it can be written again from the records.
    """
    page = page_of(folder, reference)
    try:
        with FileLock(folder / ".report.lock", timeout=0):
            earlier = next(path for path in (page, folder / "command.txt", folder) if path.exists())
            if time.time() - earlier.stat().st_mtime < (PAGE_SECONDS if earlier == page else first):
                return
            report = build_report(folder, reference=reference, interim=interim)
            if not interim and report.plan is None:
                report = replace(report, unplanned=record_look(folder, report.comparisons))
            content = html_page(report)
            if not page.exists() or page.read_text(encoding="utf-8") != content:
                write_text_atomic(page, content)
    except Timeout:
        return
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or page.exists():  # else no run has ended yet
            log.warning("%s is not up to date: %s", page, error)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the verdicts, the accuracies and what is missing on a terminal."""
    console = Console() if console is None else console

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    header, rows = accuracy_table(report)
    first = header.index("norm")  # what stands before it goes above its rows: all fits into 80 columns
    table = Table(*header[first : first + 4], title=f"{report.name}: test accuracy (%)", box=SIMPLE, padding=0)
    for shared, group in groupby(rows, lambda row: row[:first]):
        table.add_section()
        table.add_row(escape(_row_heading(header, shared)))
        for row in group:
            table.add_row(*map(escape, [f"  {row[first]}", *row[first + 1 : first + 4]]))
    for line in [*report.answer(), *report.notes()]:
        say(line)
    console.print(table)
    for c in report.comparisons:
        if not c.primary:
            say(f"Exploratory: {report.mean_sentence(c.cell, c.mean, report.reference)}")
    for c in report.comparisons:
        if not c.primary_spread:
            say(f"Exploratory: {report.spread_sentence(c.cell, c.spread, report.reference)}")
    for effects in report.effects:
        say(f"{effects.title} (exploratory):")
        for sentence in effects.summary():
            say(f"  {sentence}")
    for line in no_comparison(report) + missing(report):
        say(line)


def _row_heading(header: list[str], shared: list[str]) -> str:
    """Return the heading of rows of the accuracy table: data set, network, and the factors with their names."""
    named = zip(header, shared, strict=False)
    return ", ".join(value if name in ("dataset", "model") else f"{name} {value}" for name, value in named)


def draw(report: Report) -> Mapping[str, Figure | None]:
    """Return every figure of a report by its file's name; None where there is nothing to draw."""
    groups = group_cells(report.cells)
    titles = {group: report.describe_group(group) for group in groups}
    samples: dict[str, dict[str, stats.Array]] = {}
    for cell in report.cells:
        if finished := cell.scores["test_acc"]:
            samples.setdefault(titles[cell.group], {})[cell.norm] = cell.sample("test_acc", finished)
    differences: dict[str, dict[str, stats.MeanComparison]] = {}
    for c in report.comparisons:
        mean = replace(c.mean.mean, interval=c.mean.interval)  # a look's, where there is a plan
        differences.setdefault(titles[c.cell.group], {})[c.cell.norm] = mean
    curves = {}
    for group, cells in groups.items():
        whole = [replace(c, runs=tuple(run for run in c.runs if run.status == "finished")) for c in cells]
        images, found = learning_curves(whole)
        curves[f"{titles[group]}: {images}"] = {norm: _stacked(series) for norm, series in found.items()}
    return {
        "learning_curves": figures.learning_curves(curves),
        "seeds": figures.seeds_and_means(samples),
        "differences": figures.paired_differences(differences, report.reference, report.sequential),
        "spreads": figures.spreads(samples),
    }


def _stacked(series: Mapping[int, stats.Array]) -> stats.Array:
    """Return the epochs that all seeds have, (num_seeds, num_epochs)."""
    epochs = min(map(len, series.values()), default=0)
    return np.array([curve[:epochs] for curve in series.values()]).reshape(len(series), epochs)
