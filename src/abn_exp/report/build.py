"""The report of a folder of runs: what was found, how sure it is, and what is missing.

A report is a function of the records below its folder and of nothing else: written twice, it is byte for byte the
same.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abn_exp.config import result_affecting_options
from abn_exp.files import write_text_atomic
from abn_exp.records import read_command
from abn_exp.report import figures, stats
from abn_exp.report.comparisons import Cell, collect_cells, compare_cells, group_cells
from abn_exp.report.effects import effect_tables
from abn_exp.report.factors import find_factors
from abn_exp.report.tables import Report, accuracy_table, machine_notes, missing, no_comparison
from abn_exp.report.writers import cells_csv, effects_csv, latex, markdown, runs_csv
from abn_exp.results import find_runs, read_config, read_metrics


def build_report(folder: Path, *, reference: str = "bn") -> Report:
    """Read every run below ``folder`` and compare each norm with ``reference``.

    Raises ValueError where there are no runs, or where a record cannot be read.
    """
    folder = Path(folder).resolve()
    cells = collect_cells(find_runs(folder), reference)
    if not cells:
        raise ValueError(f"There are no runs below {folder}; give a folder that train.py wrote, results/NAME.")
    questions = (config["question"] for cell in cells if "question" in (config := _config(cell)))
    devices = {cell.key: cell.device for cell in cells if cell.device is not None}
    factors = find_factors({cell.key: _settings(cell) for cell in cells}, devices)
    cells.sort(key=lambda cell: (cell.dataset, cell.model, *(f.levels.index(f.level(cell)) for f in factors)))
    return Report(
        name=folder.name,
        question=next(questions, None),
        command=_command(folder, cells),
        reference=reference,
        cells=cells,
        comparisons=compare_cells(cells, reference),
        factors=factors,
        effects=effect_tables(cells, factors, reference),
    )


def _settings(cell: Cell) -> dict[str, Any]:
    """Return the flat configuration of a cell, with its recipe's name."""
    sections: dict[str, Any] = {key: {} for key in ("dataset", "model", "norm", "recipe", "precision")}
    recipes = (run.result.recipe for run in cell.runs if run.result is not None)
    recipe = next(recipes, cell.runs[0].variant.split("_")[0])
    return {"recipe": recipe, **result_affecting_options(sections | _config(cell))}


def _config(cell: Cell) -> dict[str, Any]:
    """Return the configuration of a cell's first run that is whole; all its runs have the same but for the seed."""
    whole = (run.directory for run in cell.runs if run.status != "damaged")
    return next(map(read_config, whole), {})


def _command(folder: Path, cells: list[Cell]) -> str:
    """Return what was typed, as a multirun recorded it, or else one command a cell."""
    if command := read_command(folder).strip():
        return command
    lines = []
    for cell in cells:
        recipe = next((run.result.recipe for run in cell.runs if run.result is not None), None)
        choices = {"dataset": cell.dataset, "model": cell.model, "norm": cell.norm}
        choices |= {"recipe": recipe} if recipe is not None else {}
        choices |= {"seed": ",".join(str(run.seed) for run in cell.runs), "name": folder.name}
        line = shlex.join(["python", "train.py", "-m", *(f"{key}={value}" for key, value in choices.items())])
        lines.append(line if cell.variant == recipe else f"{line}  # {cell.variant}: see config.yaml of its runs")
    return "\n".join(lines)


def write_report(folder: Path, *, reference: str = "bn") -> Report:
    """Write report.md, report.csv, runs.csv, report.tex and figures/ into ``folder``; see :func:`build_report`."""
    folder = Path(folder)
    report = build_report(folder, reference=reference)
    (folder / "figures").mkdir(exist_ok=True)
    drawn = []
    for name, figure in draw(report).items():
        if figure is not None:
            figures.save(figure, folder / "figures", name)
            drawn.append(name)
        else:
            for suffix in ("png", "pdf"):
                (folder / "figures" / f"{name}.{suffix}").unlink(missing_ok=True)
    write_text_atomic(folder / "report.md", markdown(report, drawn))
    write_text_atomic(folder / "report.tex", latex(report))
    write_text_atomic(folder / "report.csv", cells_csv(report))
    if effects := effects_csv(report):
        write_text_atomic(folder / "effects.csv", effects)
    else:
        (folder / "effects.csv").unlink(missing_ok=True)
    write_text_atomic(folder / "runs.csv", runs_csv(report))
    return report


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the accuracies, the verdicts and what is missing on a terminal."""
    console = Console() if console is None else console
    header, rows = accuracy_table(report)
    shown = header.index("n") + 3  # what fits into 80 columns; the rest is in report.md
    table = Table(*header[:shown], title=f"{report.name}: test accuracy (%)", box=SIMPLE, padding=0)
    for row in rows:
        table.add_row(*map(escape, row[:shown]))
    console.print(table)
    for (claim, decisions), summary in zip(report.verdicts().items(), report.overall(), strict=True):
        if summary:
            console.print(f"{claim}? Overall: {summary}", markup=False, highlight=False)
        for decision, sentence in decisions:
            console.print(f"{claim}? {decision.capitalize()}. {sentence}", markup=False, highlight=False)
    for effects in report.effects:
        console.print(f"{effects.title}:", markup=False, highlight=False)
        for sentence in effects.summary():
            console.print(f"  {sentence}", markup=False, highlight=False)
    for line in machine_notes(report) + no_comparison(report) + missing(report):
        console.print(line, markup=False, highlight=False)


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
        differences.setdefault(titles[c.cell.group], {})[c.cell.norm] = c.mean
    validated = any(result.val_acc_last is not None for result in report.results)
    key, label = ("val/acc", "Validation") if validated else ("test/acc", "Test")
    curves = {titles[group]: {c.norm: _curves(c, key) for c in cells} for group, cells in groups.items()}
    return {
        "learning_curves": figures.learning_curves(curves, f"{label} accuracy (%)"),
        "seeds": figures.seeds_and_means(samples),
        "differences": figures.paired_differences(differences, report.reference),
        "spreads": figures.spreads(samples),
    }


def _curves(cell: Cell, key: str) -> stats.Array:
    """Return ``key`` in percent over the epochs that all finished runs have, (num_seeds, num_epochs)."""
    runs = [read_metrics(run.directory) for run in cell.runs if run.status == "finished"]
    series = [{line["epoch"]: line[key] for line in lines if key in line} for lines in runs]
    epochs = sorted(set.intersection(*(set(one) for one in series))) if series else []
    return 100 * np.array([[one[epoch] for epoch in epochs] for one in series]).reshape(len(series), len(epochs))
