"""Write a report as report.md, report.tex, report.csv, effects.csv and runs.csv."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from abn_exp.report import stats
from abn_exp.report.comparisons import (
    METRICS,
    group_cells,
    interval_text,
    number_text,
    p_text,
    signed_text,
    started_seeds,
    verdict_mean,
    verdict_spread,
)
from abn_exp.report.tables import (
    Report,
    accuracy_table,
    checkpoint_selection_tables,
    cost_table,
    csv_text,
    difference_table,
    effect_table,
    machine_notes,
    markdown_table,
    missing,
    no_comparison,
    spread_table,
)
from abn_exp.results import RunResult

FIGURES = {
    "learning_curves": "Learning curves",
    "seeds": "Test accuracy of every seed, and the mean with its 95 % interval",
    "differences": "Differences to the reference norm, and their mean with its 95 % interval",
    "spreads": "Standard deviation between seeds with its 95 % interval",
}
CELL_COLUMNS = ("dataset", "model", "norm", "variant")
RUN_COLUMNS = (
    *("test_acc", "test_acc_best_val", "test_acc_peak", "test_acc_top5", "test_loss", "val_acc_last"),
    *("val_acc_best", "best_epoch", "epochs", "train_seconds", "images_per_second", "device", "git_commit"),
    *("config_hash", "wandb_run_id"),
)
READINGS = """\
The peak is the best of as many evaluations of the test set as there are epochs. It cannot lie below the last epoch,
and it rewards noise; no verdict uses it. In brackets: the 95 % interval."""
COSTS_NOTE = "Element-wise work and running statistics of the norms are not counted; a MAC is one image's."
EFFECTS_NOTE = """\
- Effects and changes are taken within cells that are otherwise the same. A mean of several rows averages each seed
  over them first, so its n is seeds; a seed that one of the rows lacks is left out. effects.csv has these numbers."""
CONVENTIONS = """\
- Test accuracy is that of the last epoch's weights on the test set. n counts finished seeds: 4/5 means that of the
  five seeds started in that comparison one has no score here. It is left out, never filled in.
- ± is the standard deviation between seeds (ddof = 1). The 95 % interval of a mean is Student's, that of a standard
  deviation chi-square's, that of a ratio of two F's; all three take scores as normally distributed.
- Differences are paired by seed where the seeds match (t test; dz is Cohen's with Hedges' correction), else unpaired
  (Welch; g is Hedges'). The p of sign flips assumes no distribution, but cannot fall below 2 / 2^n, 0.0625 at n = 5.
- Spreads are compared by Brown and Forsythe's test, which takes the two samples as independent, and by permuting the
  log variance ratio. Power is simulated: how often the former finds p < 0.05 at this n if the true ratio is 2.
- A verdict asks for p < 0.05 after Holm's correction over all comparisons of its table. "Not decided" is no evidence
  that two norms are equal.
- report.csv has these numbers, in percent and points, and runs.csv every run as recorded, accuracies as fractions."""


def markdown(report: Report, drawn: Sequence[str]) -> str:
    """Return report.md; ``drawn`` are the names of the figures that there are."""
    ref = report.reference
    parts = [f"# {report.name}", *([report.question.strip()] if report.question is not None else [])]
    for (claim, decisions), summary in zip(report.verdicts().items(), report.overall(), strict=True):
        parts.append(f"## {claim}?")
        parts += [f"**Overall**: {summary}"] * bool(summary)
        parts += ["\n".join(f"- **{decision}**: {sentence}" for decision, sentence in decisions)] * bool(decisions)
        parts += ["\n".join(f"- {line}" for line in no_comparison(report))] * bool(no_comparison(report))
    for table in report.effects:
        sentences = "\n".join(f"- {sentence}" for sentence in table.summary())
        parts += [f"## {table.title}", *([sentences] if table.averages else []), markdown_table(effect_table(table))]
    parts += ["## Test accuracy (%)", markdown_table(accuracy_table(report))]
    parts += ["\n".join(f"- {line}" for line in machine_notes(report))] * bool(machine_notes(report))
    if report.comparisons:
        parts += [f"## Differences to {ref}", markdown_table(difference_table(report))]
        parts += [f"## Spread between seeds, against {ref}", markdown_table(spread_table(report))]
    if readings := checkpoint_selection_tables(report):
        parts += ["## Which epoch is read", READINGS, *map(markdown_table, readings)]
    if (costs := cost_table(report)) is not None:
        parts += ["## What it costs", COSTS_NOTE, markdown_table(costs)]
    if missing(report):
        parts += ["## Runs without a result", "\n".join(f"- {line}" for line in missing(report))]
    for name in drawn:
        parts.append(f"![{FIGURES[name]}](figures/{name}.png)")
    notes = f"{CONVENTIONS}\n{EFFECTS_NOTE}" if report.effects else CONVENTIONS
    parts += ["## How to read this", notes, "## Test accuracy (%) of every seed"]
    for group, cells in group_cells(report.cells).items():
        seeds = started_seeds(cells)
        rows = [[cell.norm, *map(number_text, cell.sample("test_acc", seeds))] for cell in cells]
        header = ["norm", *(f"seed {seed}" for seed in seeds)]
        parts += [f"{report.describe_group(group)}:", markdown_table((header, rows))]
    parts += ["## How it was run", f"```\n{report.command}\n```", "\n".join(_how_it_was_run(report))]
    return "\n\n".join(parts) + "\n"


def made_with(results: Sequence[RunResult]) -> list[str]:
    """Return what runs were made with, a line each; counts of runs where it was not the same in all of them."""

    def values(found: Iterable[str | None]) -> str:
        counts = Counter("unknown" if value is None else value for value in found)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{value} ({count} runs)" for value, count in sorted(counts.items()))

    lines = []
    for package in sorted({package for r in results for package in r.versions}):
        lines.append(f"- {package}: {values(r.versions.get(package) for r in results)}")
    lines.append(f"- git commit: {values(r.git_commit for r in results)}")
    lines.append(f"- device: {values(r.device for r in results)}")
    lines.append(f"- epochs: {values(str(r.epochs) for r in results)}")
    hours = sum(r.train_seconds for r in results) / 3600
    lines.append(f"- training time: {hours:.2f} hours, summed over runs")
    return lines


def _how_it_was_run(report: Report) -> list[str]:
    if not report.results:
        return ["- No run has finished."]
    started = sum(len(cell.runs) for cell in report.cells)
    return [f"- runs: {len(report.results)} finished of {started} started", *made_with(report.results)]


def latex(report: Report) -> str:
    """Return report.tex, the accuracies with the differences to the reference; it needs the package booktabs."""
    header, rows = accuracy_table(report)
    differences = {c.cell.key: c for c in report.comparisons}
    first = header.index("n")
    header = [*header[: first + 3], f"minus {report.reference} (points)", "p (Holm)"]
    cells = [cell for group in group_cells(report.cells).values() for cell in group]
    lines = []
    for cell, row in zip(cells, rows, strict=True):
        c, extra = differences.get(cell.key), ["-", "-"]
        if c is not None and not math.isnan(c.mean.difference):
            extra = [f"{signed_text(c.mean.difference)} [{interval_text(c.mean.interval)}]", p_text(c.mean_p_holm)]
        lines.append([*row[: first + 3], *extra])
    body = [" & ".join(map(_escape, line)) + r" \\" for line in lines]
    columns = "l" * first + "r" * (len(header) - first)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_escape, header)) + r" \\", r"\midrule"]
    return "\n".join([*top, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    text = re.sub(r"([_%&#$])", r"\\\1", text)
    text = re.sub(r"(?<![\w.])([-+<]) ?(?=\d)", r"$\1$", text)
    return "--" if text == "-" else text.replace("±", r"$\pm$")


def effects_csv(report: Report) -> str:
    """Return effects.csv: one row a difference of the effect tables, in points; "" where there is none."""
    rows: list[dict[str, object]] = []
    for table in report.effects:
        for e in table.effects:
            m = e.mean
            row: dict[str, object] = {"table": table.title, "difference_of": e.what, "contexts": e.contexts}
            row |= {"where": "; ".join(f"{k} {v}" for k, v in zip(table.header, e.labels, strict=True) if v)}
            row |= {"method": m.method, "n": m.n[0], "n_other": m.n[1], "difference": m.difference}
            rows.append(row | _pair("difference", m.interval) | {"p": m.p, "p_holm": e.p_holm})
    return csv_text(rows) if rows else ""


def cells_csv(report: Report) -> str:
    """Return report.csv: one row a cell, in percent and points, with all digits that matter."""
    rows = []
    compared = {c.cell.key: c for c in report.comparisons}
    for group in group_cells(report.cells).values():
        seeds = started_seeds(group)
        for cell in group:
            row: dict[str, object] = dict(zip(CELL_COLUMNS, cell.key, strict=True))
            row |= {"seeds_started": len(seeds)}
            for metric in METRICS:
                s = stats.summarize(cell.sample(metric, seeds))
                row |= {f"{metric}_n": s.n, f"{metric}_mean": s.mean, f"{metric}_std": s.std}
                row |= _pair(f"{metric}_mean", s.mean_interval) | _pair(f"{metric}_std", s.std_interval)
                row |= {f"{metric}_min": s.minimum, f"{metric}_max": s.maximum}
            if (c := compared.get(cell.key)) is not None:
                m, s2 = c.mean, c.spread
                row |= {"reference": c.reference, "method": m.method, "difference": m.difference}
                row |= _pair("difference", m.interval) | {"p": m.p, "p_holm": c.mean_p_holm}
                row |= {"p_sign_flip": m.p_sign_flip, "effect": m.effect, "effect_name": m.effect_name}
                row |= {"std_ratio": s2.ratio} | _pair("std_ratio", s2.ratio_interval)
                row |= {"p_brown_forsythe": s2.p, "p_brown_forsythe_holm": c.spread_p_holm}
                row |= {"p_permutation_spread": s2.p_permutation, "power_ratio_2": s2.power}
                row |= {"higher": verdict_mean(c)[0], "less_spread": verdict_spread(c)[0]}
            rows.append(row)
    return csv_text(rows)


def runs_csv(report: Report) -> str:
    """Return runs.csv: one row a started run, as recorded: accuracies are fractions, times seconds."""
    rows = []
    for cell in report.cells:
        for run in cell.runs:
            row: dict[str, object] = dict(zip(CELL_COLUMNS, cell.key, strict=True))
            row |= {"seed": run.seed, "status": run.status, "reason": " ".join(cell.failed.get(run.seed, "").split())}
            if run.result is not None:
                row |= {name: getattr(run.result, name) for name in RUN_COLUMNS} | run.result.parameters
            rows.append(row)
    return csv_text(rows)


def _pair(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}
