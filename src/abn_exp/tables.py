"""What a report says: its tables, and the whole of it as Markdown, LaTeX and CSV.

Accuracies are percent, differences and stds percentage points; runs.csv keeps the fractions of the records.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abn_exp import stats
from abn_exp.compare import (
    METRICS,
    Cell,
    Comparison,
    Decision,
    Group,
    group_cells,
    interval_text,
    number_text,
    p_text,
    started_seeds,
    verdict_mean,
    verdict_spread,
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

Table = tuple[list[str], list[list[str]]]  # header, rows


@dataclass(frozen=True)
class Report:
    name: str
    question: str | None
    command: str
    reference: str
    cells: list[Cell]
    comparisons: list[Comparison]

    @property
    def results(self) -> list[RunResult]:
        return [run.result for cell in self.cells for run in cell.runs if run.result is not None]

    @property
    def variants(self) -> bool:
        """Whether there are several variants, so that they need naming."""
        return len({cell.variant for cell in self.cells}) > 1

    def place(self, group: Group) -> str:
        """Return a group in words; its variant only where there are several."""
        return f"{group[0]} with {group[1]}" + (f" ({group[2]})" if self.variants else "")

    def verdicts(self) -> dict[str, list[tuple[Decision, str]]]:
        """Return the (decision, sentence) of every comparison, by the claim that is judged."""
        places = [(c, self.place(c.cell.group)) for c in self.comparisons]
        return {
            f"Is accuracy higher than {self.reference}'s": [verdict_mean(c, place) for c, place in places],
            f"Is spread between seeds smaller than {self.reference}'s": [verdict_spread(c, p) for c, p in places],
        }


def _where(report: Report, cell: Cell) -> list[str]:
    return [cell.dataset, cell.model, *([cell.variant] if report.variants else []), cell.norm]


def _table(report: Report, header: list[str], rows: Iterable[list[str]]) -> Table:
    return ["dataset", "model", *(["variant"] if report.variants else []), "norm", *header], list(rows)


def _plus_minus(summary: stats.Summary) -> str:
    return number_text(summary.mean) + (f" ± {summary.std:.2f}" if summary.n > 1 else "")


def accuracy_table(report: Report) -> Table:
    """One row a cell."""
    header = ["n", "mean ± std", "95 % interval", "min to max", "best val epoch"]
    peeked = any(cell.scores["test_acc_peak"] for cell in report.cells)
    rows = []
    for group in group_cells(report.cells).values():
        seeds = started_seeds(group)
        for cell in group:
            last, best, peak = (stats.summarize(cell.sample(metric, seeds)) for metric in METRICS)
            n = f"{last.n}" if last.n == len(seeds) else f"{last.n}/{len(seeds)}"
            row = [n, _plus_minus(last), interval_text(last.mean_interval)]
            row += [interval_text((last.minimum, last.maximum)), _plus_minus(best)]
            rows.append(_where(report, cell) + row + ([_plus_minus(peak)] if peeked else []))
    return _table(report, header + (["best test epoch (peeking)"] if peeked else []), rows)


def difference_table(report: Report) -> Table:
    """One row a comparison, for the means."""
    header = ["n", f"minus {report.reference} (points)", "95 % interval", "p", "p (Holm)", "p (sign flips)"]
    rows = []
    for c in report.comparisons:
        m = c.mean
        n = f"{m.n[0]} pairs" if m.method == "paired" else f"{m.n[0]}, {m.n[1]} unpaired"
        difference = "-" if math.isnan(m.difference) else f"{m.difference:+.2f}"
        p_values = [p_text(m.p), p_text(c.mean_p_holm), p_text(m.p_sign_flip)]
        effect = "-" if math.isnan(m.effect) else f"{m.effect:+.2f} ({m.effect_name})"
        row = [n, difference, interval_text(m.interval), *p_values, effect, verdict_mean(c)[0]]
        rows.append(_where(report, c.cell) + row)
    return _table(report, [*header, "effect", "higher?"], rows)


def spread_table(report: Report) -> Table:
    """One row a comparison, for the stds."""
    header = ["n", "std (points)", "95 % interval", f"std of {report.reference}", "ratio", "95 % interval of ratio"]
    header += ["p (Brown-Forsythe)", "p (Holm)", "p (permutation)", "power at ratio 2", "smaller?"]
    rows = []
    for c in report.comparisons:
        s = c.spread
        own = stats.std_interval(c.cell.sample("test_acc", started_seeds([c.cell])))
        row = [f"{s.n[0]}, {s.n[1]}", number_text(s.std[0]), interval_text(own), number_text(s.std[1])]
        row += [number_text(s.ratio), interval_text(s.ratio_interval), p_text(s.p), p_text(c.spread_p_holm)]
        row += [p_text(s.p_permutation), "-" if math.isnan(s.power) else f"{100 * s.power:.0f} %"]
        rows.append([*_where(report, c.cell), *row, verdict_spread(c)[0]])
    return _table(report, header, rows)


def no_comparison(report: Report) -> list[str]:
    """Say for which groups there is nothing to compare with."""
    return [
        f"No comparison on {report.place(group)}: the reference norm {report.reference} was not run there."
        for group, cells in group_cells(report.cells).items()
        if all(cell.norm != report.reference for cell in cells)
    ]


def missing(report: Report) -> list[str]:
    """Say of each seed without a score why it has none."""
    lines = []
    for group, cells in group_cells(report.cells).items():
        for cell in cells:
            head = f"{report.place(group)}, {cell.norm}, seed"
            for seed in started_seeds(cells):
                if seed in cell.failed:
                    lines.append(f"{head} {seed}: {' '.join(cell.failed[seed].split())}")
                elif all(run.seed != seed for run in cell.runs):
                    lines.append(f"{head} {seed}: not started")
    return lines


def markdown(report: Report, drawn: Sequence[str]) -> str:
    """Return report.md; ``drawn`` are the names of the figures that there are."""
    ref = report.reference
    parts = [f"# {report.name}", *([report.question.strip()] if report.question is not None else [])]
    for claim, decisions in report.verdicts().items():
        parts.append(f"## {claim}?")
        parts += ["\n".join(f"- **{decision}**: {sentence}" for decision, sentence in decisions)] * bool(decisions)
        parts += ["\n".join(f"- {line}" for line in no_comparison(report))] * bool(no_comparison(report))
    parts += ["## Test accuracy (%)", _markdown_table(accuracy_table(report))]
    if report.comparisons:
        parts += [f"## Differences to {ref}", _markdown_table(difference_table(report))]
        parts += [f"## Spread between seeds, against {ref}", _markdown_table(spread_table(report))]
    if missing(report):
        parts += ["## Runs without a result", "\n".join(f"- {line}" for line in missing(report))]
    for name in drawn:
        parts.append(f"![{FIGURES[name]}](figures/{name}.png)")
    parts += ["## How to read this", CONVENTIONS, "## Test accuracy (%) of every seed"]
    for group, cells in group_cells(report.cells).items():
        seeds = started_seeds(cells)
        rows = [[cell.norm, *map(number_text, cell.sample("test_acc", seeds))] for cell in cells]
        header = ["norm", *(f"seed {seed}" for seed in seeds)]
        parts += [f"{report.place(group)}:", _markdown_table((header, rows))]
    parts += ["## How it was run", f"```\n{report.command}\n```", "\n".join(_provenance(report))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _provenance(report: Report) -> list[str]:
    """Return what the runs were made with; counts of runs where it was not the same in all of them."""

    def values(found: Iterable[str | None]) -> str:
        counts = Counter("unknown" if value is None else value for value in found)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{value} ({count} runs)" for value, count in sorted(counts.items()))

    results = report.results
    if not results:
        return ["- No run has finished."]
    lines = [f"- runs: {len(results)} finished of {sum(len(cell.runs) for cell in report.cells)} started"]
    for package in sorted({package for r in results for package in r.versions}):
        lines.append(f"- {package}: {values(r.versions.get(package) for r in results)}")
    lines.append(f"- git commit: {values(r.git_commit for r in results)}")
    lines.append(f"- device: {values(r.device for r in results)}")
    lines.append(f"- epochs: {values(str(r.epochs) for r in results)}")
    hours = sum(r.train_seconds for r in results) / 3600
    lines.append(f"- training time: {hours:.2f} hours, summed over runs")
    return lines


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
            extra = [f"{c.mean.difference:+.2f} [{interval_text(c.mean.interval)}]", p_text(c.mean_p_holm)]
        lines.append([*row[: first + 3], *extra])
    body = [" & ".join(map(_escape, line)) + r" \\" for line in lines]
    columns = "l" * first + "r" * (len(header) - first)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_escape, header)) + r" \\", r"\midrule"]
    return "\n".join([*top, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    text = re.sub(r"([_%&#$])", r"\\\1", text)
    text = re.sub(r"(?<![\w.])([-+<]) ?(?=\d)", r"$\1$", text)
    return "--" if text == "-" else text.replace("±", r"$\pm$")


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
    return _csv(rows)


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
    return _csv(rows)


def _pair(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _csv(rows: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({k: "" if v in ("nan", None) else v for k, v in values.items()})
    return text.getvalue()
