"""Write a report as report.md, report.tex, report.csv, effects.csv and runs.csv."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from abn_exp.report import stats
from abn_exp.report.comparisons import METRICS, group_cells, started_seeds
from abn_exp.report.formatting import (
    csv_text,
    document,
    interval_text,
    markdown_list,
    markdown_table,
    number_text,
    p_text,
    signed_text,
)
from abn_exp.report.tables import (
    Report,
    accuracy_table,
    cell_images_table,
    checkpoint_selection_tables,
    cost_table,
    difference_table,
    effect_table,
    missing,
    no_comparison,
    pair_images_table,
    pooled_table,
    spread_table,
)
from abn_exp.report.verdicts import Judgement
from abn_exp.results import RunResult

FIGURES = {
    "learning_curves": "Learning curves",
    "seeds": "Test accuracy of every seed, and the mean with its 95 % interval",
    "differences": "Differences to the reference norm, and their mean with its 95 % interval",
    "spreads": "Standard deviation between seeds with its 95 % interval",
}
RUN_COLUMNS = (
    *("test_acc", "test_acc_best_val", "test_acc_peak", "test_acc_top5", "test_loss", "val_acc_last"),
    *("val_acc_best", "best_epoch", "epochs", "train_seconds", "images_per_second", "device", "git_commit"),
    *("config_hash", "wandb_run_id"),
)
READINGS = """\
The peak is the best of as many evaluations of the test set as there are epochs. It cannot lie below the last epoch,
and it rewards noise; no verdict uses it. In brackets: the 95 % interval."""
COSTS_NOTE = "Element-wise work and running statistics of the norms are not counted; a MAC is one image's."
POOLED_NOTE = """\
Each seed is averaged over the cells first, and these averages are compared: that is the verdict. Beside it the
random-effects mean of the cells' differences with its heterogeneity; its intervals take the cells as independent,
which they are not where they share seeds, and are then too narrow."""
IMAGES_NOTE = """\
The intervals over seeds and images cover a new test set as well as new seeds. "Expected of so few images" is the
standard deviation between seeds that equally good networks would show on this test set, "beyond that" what is left
without it, 0 where the seeds vary less. McNemar's test is on the two runs of one seed: images that one of them alone
classifies rightly, exact two-sided p."""
EFFECTS_NOTE = """\
- Effects and changes are taken within cells that are otherwise the same. A mean of several rows averages each seed
  over them first, so its n is seeds; a seed that one of the rows lacks is left out. effects.csv has these numbers. A
  pair that is also among the differences to {reference} has its verdict there; here its family is another."""
CONVENTIONS = """\
- Test accuracy is that of the last epoch's weights on the test set. n counts finished seeds: 4/5 means that of the
  five seeds started in that comparison one has no score here. It is left out, never filled in.
- ± is the standard deviation between seeds (ddof = 1). The 95 % interval of a mean is Student's, that of a standard
  deviation chi-square's; both take scores as normally distributed. {conditional}
- Differences are paired by seed where the seeds match (t test; dz is Cohen's with Hedges' correction), else
  unpaired (Welch; g is Hedges'). The p of sign flips assumes no distribution, but cannot fall below 2 / 2^n, 0.0625
  at n = 5.
- Verdicts, the first that holds: equivalent (two one-sided tests, TOST, inside ±delta = {delta:g} points, 5 %
  each); better or worse (two-sided test of no difference, 5 %); not better or not worse by delta (one-sided, 5 %);
  undecided. Undecided is no evidence that two norms are equal.
- Holm's correction is over the primary comparisons alone; everything else is exploratory, each table with a family
  of its own, whose size stands beside it or in effects.csv, and averages apart from their parts. Intervals are not
  corrected.
- "Detectable" is the difference that would be detected with 80 % power at this n, standard deviation and corrected
  level; "seeds for delta" is how many detect delta, "seeds for equivalence" how many show it where there is none.
- If one side failed or diverged more often, what speaks for it holds only if it also holds with failures at chance.
- Spreads are compared by swapping the two centred scores within seeds, from ten pairs on. The test is approximate:
  the level that it keeps, and its power at a true ratio of 2 after correction, are simulated.
- report.csv has these numbers, in percent and points, and runs.csv every run as recorded, accuracies as fractions."""


def markdown(report: Report, drawn: Sequence[str]) -> str:
    """Return report.md; ``drawn`` are the names of the figures that there are."""
    ref, (first, *more) = report.reference, report.answer()
    parts = [f"**{first}**", markdown_list(more), report.question.strip() if report.question is not None else ""]
    parts += [markdown_list(report.notes())]
    parts += ["## Test accuracy (%)", markdown_table(accuracy_table(report))]
    parts += [markdown_list(no_comparison(report))]
    if report.comparisons:
        exploratory = "" if any(c.primary for c in report.comparisons) else " (exploratory)"
        parts += [f"## Differences to {ref}{exploratory}"]
        parts += [markdown_list(report.mean_sentence(c.cell, c.mean, ref) for c in report.comparisons)]
        parts += [markdown_table(difference_table(report))]
    if report.pooled:
        exploratory = "" if any(p.primary for p in report.pooled) else " (exploratory)"
        parts += [f"## One effect over all cells{exploratory}", POOLED_NOTE, markdown_table(pooled_table(report))]
    if report.comparisons:
        exploratory = "" if any(c.primary_spread for c in report.comparisons) else " (exploratory)"
        parts += [f"## Spread between seeds, against {ref}{exploratory}"]
        parts += [markdown_list(report.spread_sentence(c.cell, c.spread, ref) for c in report.comparisons)]
        parts += [markdown_table(spread_table(report))]
    for table in report.effects:
        sentences = markdown_list(table.summary()) if table.averages else ""
        parts += [f"## {table.title} (exploratory)", sentences, markdown_table(effect_table(table))]
    if report.images.cells:
        parts += ["## Single test images", IMAGES_NOTE, markdown_table(cell_images_table(report))]
        parts += [markdown_table(pair_images_table(report))] if report.images.pairs else []
    parts += [markdown_list(report.images.left_out)]
    if readings := checkpoint_selection_tables(report):
        parts += ["## Which epoch is read", READINGS, *map(markdown_table, readings)]
    if (costs := cost_table(report)) is not None:
        parts += ["## What it costs", COSTS_NOTE, markdown_table(costs)]
    if missing(report):
        parts += ["## Runs without a result", markdown_list(missing(report))]
    parts += [f"![{FIGURES[name]}](figures/{name}.png)" for name in drawn]
    notes = CONVENTIONS.format(delta=report.delta, conditional=report.conditional)
    parts += [
        "## How to read this",
        f"{notes}\n{EFFECTS_NOTE.format(reference=report.reference)}" if report.effects else notes,
    ]
    parts += ["## Test accuracy (%) of every seed"]
    for group, cells in group_cells(report.cells).items():
        seeds = started_seeds(cells)
        rows = [[cell.norm, *map(number_text, cell.sample("test_acc", seeds))] for cell in cells]
        header = ["norm", *(f"seed {seed}" for seed in seeds)]
        parts += [f"{report.describe_group(group)}:", markdown_table((header, rows))]
    parts += ["## How it was run", f"```\n{report.command}\n```", "\n".join(_how_it_was_run(report))]
    return document(report.name, parts)


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
    differences = {c.cell.key: c.mean for c in report.comparisons}
    first = header.index("n")
    minus = f"minus {report.reference} (points) [95 %, uncorrected{report.sequential}]"
    header = [*header[: first + 3], minus, "p (Holm)", "verdict"]
    cells = [cell for group in group_cells(report.cells).values() for cell in group]
    lines = []
    for cell, row in zip(cells, rows, strict=True):
        j, extra = differences.get(cell.key), ["-", "-", "-"]
        if j is not None and not math.isnan(j.mean.difference):
            difference = f"{signed_text(j.mean.difference)} [{interval_text(j.interval)}]"
            extra = [difference, p_text(j.corrected.difference), j.verdict]
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
    """Return effects.csv: one row a difference of the pooled and the effect tables, in points; "" where there is
    none."""
    rows: list[dict[str, object]] = []
    for p in report.pooled:
        row: dict[str, object] = {"table": "One effect over all cells", "contexts": len(p.cells)}
        row |= {"primary": True} if p.primary else {}
        row |= {"difference_of": f"{p.norm} - {p.reference}"} | _judgement(p.judgement)
        if (r := p.random_effects) is not None:
            row |= {"random_effects_mean": r.mean} | _pair("random_effects", r.interval)
            row |= _pair("hartung_knapp", r.interval_hartung_knapp)
            row |= {"tau": r.tau, "q": r.q, "p_q": r.p_q, "i_squared": r.i_squared}
        rows.append(row)
    for table in report.effects:
        for e in table.effects:
            row = {"table": table.title, "difference_of": e.what, "contexts": e.contexts}
            row |= {"where": "; ".join(f"{k} {v}" for k, v in zip(table.header, e.labels, strict=True) if v)}
            rows.append(row | _judgement(e.judgement))
    return csv_text(rows) if rows else ""


def _judgement(j: Judgement) -> dict[str, object]:
    """Return a difference and its tests as columns; p values with failures counted in, as the verdict takes them."""
    m, p, q = j.mean, j.uncorrected, j.corrected
    row: dict[str, object] = {"method": m.method, "n": m.n[0], "n_other": m.n[1], "difference": m.difference}
    row |= _pair("difference", j.interval) | _pair("difference_90", j.interval_delta)
    row |= {"delta": j.delta, "level": j.level, "level_delta": j.level_delta, "family": j.family}
    row |= {"p": p.difference, "p_holm": q.difference}
    row |= {"p_not_better": p.not_better, "p_not_better_holm": q.not_better}
    row |= {"p_not_worse": p.not_worse, "p_not_worse_holm": q.not_worse, "verdict": j.verdict}
    row |= {"std_of_differences": j.std, "detectable": j.detectable}
    return row | {"seeds_for_delta": j.seeds_for_delta, "seeds_for_equivalence": j.seeds_for_equivalence}


def cells_csv(report: Report) -> str:
    """Return report.csv: one row a cell, in percent and points, with all digits that matter."""
    rows = []
    compared = {c.cell.key: c for c in report.comparisons}
    for group in group_cells(report.cells).values():
        seeds = started_seeds(group)
        for cell in group:
            row = cell.columns | {"seeds_started": len(seeds), "failed": len(cell.failed)}
            for metric in METRICS:
                s = stats.summarize(cell.sample(metric, seeds))
                row |= {f"{metric}_n": s.n, f"{metric}_mean": s.mean, f"{metric}_std": s.std}
                row |= _pair(f"{metric}_mean", s.mean_interval) | _pair(f"{metric}_std", s.std_interval)
                row |= {f"{metric}_min": s.minimum, f"{metric}_max": s.maximum}
            if (c := compared.get(cell.key)) is not None:
                m, s2 = c.mean.mean, c.spread.found
                row |= {"reference": c.base.norm, "primary": c.primary} | _judgement(c.mean)
                row |= {"p_sign_flip": m.p_sign_flip, "effect": m.effect, "effect_name": m.effect_name}
                row |= {"std_ratio": s2.ratio} | _pair("std_ratio", s2.ratio_interval)
                row |= {"spread_pairs": s2.n, "p_spread": s2.p, "p_spread_holm": c.spread.p_holm}
                row |= {"spread_family": c.spread.family, "power_ratio_2": c.spread.power}
                row |= {"spread_verdict": c.spread.verdict, "primary_spread": c.primary_spread}
            rows.append(row)
    return csv_text(rows)


def runs_csv(report: Report) -> str:
    """Return runs.csv: one row a started run with the options that vary, as recorded: accuracies are fractions, times
    seconds."""
    rows = []
    for cell in report.cells:
        for run in cell.runs:
            row = cell.columns | {option: by_cell[cell.key] for option, by_cell in report.options.items()}
            reason = " ".join(cell.unscored.get(run.seed, "").split())
            row |= {"seed": run.seed, "status": run.status, "reason": reason}
            if run.result is not None:
                row |= {name: getattr(run.result, name) for name in RUN_COLUMNS} | run.result.parameters
            rows.append(row)
    return csv_text(rows)


def _pair(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}
