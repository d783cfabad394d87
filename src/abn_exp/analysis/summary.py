"""The report of an analysis: norms compared over runs, paired by seed, judged, and written down.

A number is measured once for each run. The same runs give the same bytes.
"""

import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import rich.table
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape

from abn_exp.analysis.trained import common_folder
from abn_exp.config import parse
from abn_exp.files import write_text_atomic
from abn_exp.report import figures, stats
from abn_exp.report.comparisons import Cell, Group, group_cells, pairs_of
from abn_exp.report.formatting import (
    Table,
    csv_text,
    document,
    interval_text,
    markdown_list,
    markdown_table,
    number_text,
    p_equation,
    p_text,
    signed_text,
)
from abn_exp.report.writers import made_with
from abn_exp.results import Run
from abn_exp.trained_network import read_config
from abn_exp.training.wandb_run import Tracker, as_table

Scores = Mapping[Path, Mapping[str, float]]  # by run directory: measure -> value
Decision = Literal["higher", "lower", "undecided"]
DIGITS = 3  # measures are shares and bits


@dataclass(frozen=True)
class Contrast:
    """One measure of one norm against the reference, over the seeds that both have."""

    where: str
    group: Group
    norm: str
    reference: str
    measure: str
    own: float
    base: float
    paired: stats.MeanComparison
    p_holm: float = stats.NAN


def paired_runs(cells: Sequence[Cell], reference: str) -> Iterator[tuple[Cell, list[tuple[Run, Run]]]]:
    """Yield each cell that has the reference beside it, with the pairs of their runs that share a seed.

    Raises ValueError where there is no such pair.
    """
    for cell, base in pairs_of(cells, None, reference):
        pairs = [(x, y) for x in cell.runs for y in base.runs if x.seed == y.seed]
        if not pairs:
            where = group_title(cells, cell.group)
            raise ValueError(f"On {where}, {cell.norm} and {reference} have no seed in common.")
        yield cell, pairs


def check_pairs(cells: Sequence[Cell], reference: str) -> None:
    """Raise ValueError for what `contrast` could not compare, before anything is measured."""
    norms = sorted({cell.norm for cell in cells})
    if reference not in norms and reference != "bn":
        raise ValueError(f"--reference {reference} is not among the norms of these runs: {', '.join(norms)}.")
    list(paired_runs(cells, reference))


def contrast(cells: Sequence[Cell], scores: Scores, measures: Iterable[str], reference: str) -> list[Contrast]:
    """Compare each norm with the reference of its group in every measure; Holm's correction is over them all."""
    found = []
    for cell, pairs in paired_runs(cells, reference):
        title = group_title(cells, cell.group)
        for measure in measures:
            values = np.array([[scores[run.directory][measure] for run in pair] for pair in pairs])
            a, b = values[~np.isnan(values).any(1)].T
            paired = stats.compare_means(a, b, np.random.default_rng(0))
            own, ref = (float(x.mean()) if x.size else stats.NAN for x in (a, b))
            found.append(Contrast(title, cell.group, cell.norm, reference, measure, own, ref, paired))
    adjusted = stats.holm([c.paired.p for c in found])
    return [replace(c, p_holm=p) for c, p in zip(found, adjusted, strict=True)]


def group_title(cells: Sequence[Cell], group: Group) -> str:
    """Return a group in words; its variant only where there are several."""
    return f"{group[0]} with {group[1]}" + (f" ({group[2]})" if len({cell.variant for cell in cells}) > 1 else "")


def group_names(cells: Sequence[Cell]) -> dict[Group, str]:
    """Return a short name for each group's files; variants of one network are numbered, their names are long."""
    names: dict[Group, str] = {}
    for group in group_cells(cells):
        variants = sorted({cell.variant for cell in cells if cell.group[:2] == group[:2]})
        number = f"_{variants.index(group[2]) + 1}" if len(variants) > 1 else ""
        names[group] = "_".join(group[:2]) + number
    return names


def verdict(c: Contrast) -> tuple[Decision, str]:
    """Tell whether the norm's measure is higher or lower than the reference's: a t test, with Holm's correction."""
    p, n = c.paired, c.paired.n[0]
    head = (
        f"On {c.where}, {c.measure} is {number_text(c.own, DIGITS)} with {c.norm} and {number_text(c.base, DIGITS)} "
        f"with {c.reference}, difference {signed_text(p.difference, DIGITS)}"
    )
    if math.isnan(p.p):
        why = "one seed has no interval" if n == 1 else "the differences do not vary" if n else "no seed has both"
        return "undecided", f"{head} (n = {n} paired seeds): undecided, {why}."
    interval = interval_text(p.interval, DIGITS)
    numbers = f"95 % interval {interval}, n = {n} paired seeds, {p_equation(p.p)}, Holm {p_text(c.p_holm)}"
    if c.p_holm < stats.ALPHA:
        return ("higher" if p.difference > 0 else "lower"), f"{head} ({numbers})."
    why = "the interval holds zero" if p.p >= stats.ALPHA else "not significant after Holm's correction"
    return "undecided", f"{head} ({numbers}): undecided at this n, {why}."


def mean_text(values: ArrayLike) -> str:
    """Return a mean over seeds with its 95 % t interval, and of how many it is where some have no value."""
    s = stats.summarize(values)
    interval = "" if math.isnan(s.mean_interval[0]) else f" [{interval_text(s.mean_interval, DIGITS)}]"
    return number_text(s.mean, DIGITS) + interval + (f" (n = {s.n})" if 0 < s.n < np.size(values) else "")


def means_table(cells: Sequence[Cell], scores: Scores, measures: Sequence[str]) -> Table:
    """One row a cell: each measure's mean over seeds and its interval."""
    rows = []
    for cell in cells:
        values = [[scores[run.directory][measure] for run in cell.runs] for measure in measures]
        rows.append([group_title(cells, cell.group), cell.norm, str(len(cell.runs)), *map(mean_text, values)])
    return ["where", "norm", "n", *measures], rows


def contrast_table(contrasts: Iterable[Contrast]) -> Table:
    """One row a contrast."""
    rows = []
    for c in contrasts:
        row = [c.where, f"{c.norm} - {c.reference}", c.measure, str(c.paired.n[0])]
        row += [number_text(c.own, DIGITS), number_text(c.base, DIGITS), signed_text(c.paired.difference, DIGITS)]
        rows.append([*row, interval_text(c.paired.interval, DIGITS), p_text(c.paired.p), p_text(c.p_holm)])
    header = ["where", "norms", "measure", "n", "mean", "reference", "difference", "95 % interval", "p", "p (Holm)"]
    return header, rows


def contrast_rows(contrasts: Iterable[Contrast], judged: bool) -> list[dict[str, object]]:
    """Return the contrasts as rows of a CSV file."""
    rows = []
    for c in contrasts:
        row: dict[str, object] = dict(zip(("dataset", "model", "variant"), c.group, strict=True))
        row |= {"norm": c.norm, "reference": c.reference, "measure": c.measure, "n": c.paired.n[0]}
        row |= {"mean": c.own, "reference_mean": c.base, "difference": c.paired.difference}
        row |= {"difference_low": c.paired.interval[0], "difference_high": c.paired.interval[1]}
        row |= {"p": c.paired.p, "p_holm": c.p_holm, "verdict": verdict(c)[0] if judged else ""}
        rows.append(row)
    return rows


def counts_text(counts: Mapping[str, int]) -> str:
    """Return the number of images by data set: one number where all agree, else 10000 (cifar10), 2000 (digits)."""
    if len(set(counts.values())) == 1:
        return str(next(iter(counts.values())))
    return ", ".join(f"{count} ({dataset})" for dataset, count in counts.items())


def command_line(kind: str, folders: Sequence[str | Path], options: Mapping[str, object]) -> str:
    """Return what to type, without this machine's paths: absolute ones begin at the folder they share."""
    above = common_folder(folders).parent
    names = [str(f.resolve().relative_to(above)) if f.is_absolute() else str(f) for f in map(Path, folders)]
    given = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
    return shlex.join(["python", "scripts/analyze.py", kind, *names, *given])


@dataclass
class AnalysisWriter:
    """Collects an analysis and writes it into a folder: tables and figures as files, all of it as summary.md."""

    out: Path
    title: str
    command: str
    runs: Sequence[Run]
    parts: list[str] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    drawn: dict[str, str] = field(default_factory=dict)  # file name -> what it shows

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    def verdicts(self, claim: str, contrasts: Sequence[Contrast], cells: Sequence[Cell], reference: str) -> None:
        """Write the verdict on each contrast, and where there is nothing to compare with."""
        judged = list(map(verdict, contrasts))
        lines = [f"**{decision}**: {sentence}" for decision, sentence in judged]
        self.sentences += [f"{decision.capitalize()}. {sentence}" for decision, sentence in judged]
        for group, members in group_cells(cells).items():
            if len(members) == 1 or all(cell.norm != reference for cell in members):
                norms = ", ".join(cell.norm for cell in members)
                lines.append(f"No comparison on {group_title(cells, group)}: there is {norms} alone.")
                self.sentences.append(lines[-1])
        self.parts += [f"## {claim}", markdown_list(lines)]

    def table(self, name: str, title: str, table: Table) -> None:
        self.tables[name] = table
        self.parts += [f"## {title}", markdown_table(table)] if table[1] else []

    def csv(self, name: str, rows: list[dict[str, object]]) -> None:
        write_text_atomic(self.out / f"{name}.csv", csv_text(rows))

    def figure(self, name: str, figure: Figure | None, caption: str) -> None:
        if figure is not None:
            figures.save(figure, self.out, name)
            self.drawn[name] = caption

    def finish(self, notes: str, measured_on: Mapping[str, int]) -> None:
        """Write summary.md: the figures, how to read it all, and how it was made, after what there is already.

        `measured_on`: on what how many networks were measured, which need not be what they were trained on.
        """
        shown = [f"![{caption}]({name}.png)" for name, caption in self.drawn.items()]
        made = [f"- measured on {where}: {count} networks" for where, count in sorted(measured_on.items())]
        made += [f"- networks: {len(self.runs)}, trained with", *made_with([r.result for r in self.runs if r.result])]
        end = [*shown, "## How to read this", notes, "## How it was made", f"```\n{self.command}\n```"]
        end.append("\n".join(made))
        write_text_atomic(self.out / "summary.md", document(self.title, [*self.parts, *end]))

    def show(self, name: str) -> None:
        """Print one of the tables, without its intervals, and the verdicts on a terminal."""
        console = Console()
        header, rows = self.tables[name]
        first = int(len({row[0] for row in rows}) == 1)  # a column that says the same everywhere
        table = rich.table.Table(*map(escape, header[first:]), title=self.title, box=SIMPLE, padding=(0, 1, 0, 0))
        for row in rows:
            table.add_row(*(escape(cell.split(" [")[0]) for cell in row[first:]))
        console.print(table)
        for sentence in self.sentences:
            console.print(sentence, markup=False, highlight=False)

    def log(self, run: Run, kind: str) -> None:
        """Log the tables and figures as a W&B run of their own, where `run` has W&B on."""
        settings = parse(read_config(run.directory)).wandb
        if settings.mode == "online":  # where it was trained; here there may be no key
            settings = settings.model_copy(update={"mode": "auto"})
        settings = settings.model_copy(update={"dir": os.environ.get("WANDB_DIR") or "."})  # of this machine
        study = run.directory.parents[4]
        with Tracker(settings, study, group=study.name, name=self.title, tags=[kind], job_type="analysis") as tracker:
            if tracker.run is None:
                return
            import wandb

            for name, (header, rows) in self.tables.items():
                tracker.log({f"{kind}/{name}": as_table(header, rows)})
            for name in self.drawn:
                tracker.log({f"{kind}/{name}": wandb.Image(str(self.out / f"{name}.png"))})
