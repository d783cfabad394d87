"""Tables and sentences of a report. Accuracies are percent, differences and stds percentage points."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

from abn_exp.report import stats
from abn_exp.report.comparisons import (
    METRICS,
    Cell,
    Comparison,
    Decision,
    Group,
    group_cells,
    interval_text,
    number_text,
    overall,
    p_text,
    signed_text,
    started_seeds,
    verdict_mean,
    verdict_spread,
)
from abn_exp.report.effects import EffectTable
from abn_exp.report.factors import Factor, describe_group
from abn_exp.results import RunResult

Table = tuple[list[str], list[list[str]]]  # header, rows
CPU = "cpu capability"  # of a run's versions
COSTS = {
    "total": "parameters",
    "bytes_packed": "bytes packed",
    "binary_macs": "binary MACs",
    "real_macs": "real MACs",
}


@dataclass(frozen=True)
class Report:
    name: str
    question: str | None
    command: str
    reference: str
    cells: list[Cell]
    comparisons: list[Comparison]
    factors: list[Factor]  # what varies besides data set, network and norm
    effects: list[EffectTable]

    @property
    def results(self) -> list[RunResult]:
        return [run.result for cell in self.cells for run in cell.runs if run.result is not None]

    def describe_group(self, group: Group) -> str:
        """Return a group in words."""
        return describe_group(next(cell for cell in self.cells if cell.group == group), self.factors)

    def verdicts(self) -> dict[str, list[tuple[Decision, str]]]:
        """Return the (decision, sentence) of every comparison, by the claim that is judged."""
        places = [(c, self.describe_group(c.cell.group)) for c in self.comparisons]
        return {
            f"Is accuracy higher than {self.reference}'s": [verdict_mean(c, place) for c, place in places],
            f"Is spread between seeds smaller than {self.reference}'s": [verdict_spread(c, p) for c, p in places],
        }

    def overall(self) -> list[str]:
        """Return one sentence for each claim as a whole, in the order of :meth:`verdicts`; "" where it would say
        nothing that the only comparison does not."""
        several = len(self.comparisons) > 1
        return [overall(self.comparisons, "mean"), overall(self.comparisons, "spread")] if several else ["", ""]


def _where(report: Report, cell: Cell) -> list[str]:
    return [cell.dataset, cell.model, *(factor.level(cell) for factor in report.factors), cell.norm]


def _table(report: Report, header: list[str], rows: Iterable[list[str]]) -> Table:
    return ["dataset", "model", *(factor.name for factor in report.factors), "norm", *header], list(rows)


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
        difference = signed_text(m.difference)
        p_values = [p_text(m.p), p_text(c.mean_p_holm), p_text(m.p_sign_flip)]
        effect = "-" if math.isnan(m.effect) else f"{signed_text(m.effect)} ({m.effect_name})"
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


def effect_table(table: EffectTable) -> Table:
    """One row a difference."""
    rows = []
    for effect in table.effects:
        m = effect.mean
        n = f"{m.n[0]} pairs" if m.method == "paired" else f"{m.n[0]}, {m.n[1]} unpaired"
        numbers = [signed_text(m.difference), interval_text(m.interval)]
        rows.append([*effect.labels, n, *numbers, p_text(m.p), p_text(effect.p_holm), effect.decision])
    return [*table.header, "n", table.measure, "95 % interval", "p", "p (Holm)", "verdict"], rows


def checkpoint_selection_tables(report: Report) -> list[Table]:
    """What the choice of the epoch does: to each cell, and to each difference; none where no peak was recorded."""
    if not any(cell.scores["test_acc_peak"] for cell in report.cells):
        return []
    own, differences = [], []
    for group in group_cells(report.cells).values():
        seeds = started_seeds(group)
        base = next((cell for cell in group if cell.norm == report.reference), None)
        for cell in group:
            last, best, peak = (cell.sample(metric, seeds) for metric in METRICS)
            gains = [_signed(stats.summarize(other - last)) for other in (best, peak)]
            own.append([*_where(report, cell), number_text(stats.summarize(last).mean), *gains])
            if base is not None and cell is not base:
                pairs = (cell.sample(metric, seeds) - base.sample(metric, seeds) for metric in METRICS)
                differences.append([*_where(report, cell), *(_signed(stats.summarize(pair)) for pair in pairs)])
    header = ["last epoch (%)", "best val epoch - last", "peak on the test set - last"]
    tables = [_table(report, header, own)]
    if differences:
        minus = f"minus {report.reference}, "
        header = [minus + "last epoch", minus + "best val epoch", minus + "peak on the test set"]
        tables.append(_table(report, header, differences))
    return tables


def _signed(summary: stats.Summary) -> str:
    if not summary.n:
        return "-"
    interval = "" if math.isnan(summary.mean_interval[0]) else f" [{interval_text(summary.mean_interval)}]"
    return f"{signed_text(summary.mean)}{interval}"


def cost_table(report: Report) -> Table | None:
    """One row a cell: the parameters and operations in which norms of one group differ; None where they do not."""
    totals = {cell.key: run.result.parameters for cell in report.cells for run in cell.runs if run.result is not None}
    groups = [[cell for cell in group if cell.key in totals] for group in group_cells(report.cells).values()]
    differing = [k for k in COSTS if any(len({totals[c.key].get(k) for c in group}) > 1 for group in groups)]
    if not differing:
        return None
    rows = []
    for group in groups:
        for cell in group:
            mean = number_text(stats.summarize(cell.sample("test_acc", started_seeds(group))).mean)
            values = [totals[cell.key].get(k) for k in differing]
            rows.append([*_where(report, cell), mean, *("-" if v is None else f"{v:,}" for v in values)])
    return _table(report, ["mean accuracy (%)", *(COSTS[k] for k in differing)], rows)


def no_comparison(report: Report) -> list[str]:
    """Say for which groups there is nothing to compare with."""
    groups = group_cells(report.cells)
    without = [group for group, cells in groups.items() if all(cell.norm != report.reference for cell in cells)]
    if len(without) == len(groups) > 1:
        return [f"No comparison of norms: the reference norm {report.reference} was not run."]
    return [
        f"No comparison on {report.describe_group(group)}: the reference norm {report.reference} was not run there."
        for group in without
    ]


def machine_notes(report: Report) -> list[str]:
    """Say where runs are kept apart, or are not quite alike, because of the machines on which they were trained."""
    lines = []
    if devices := sorted({cell.device for cell in report.cells if cell.device is not None}):
        lines.append(
            f"Trained on several kinds of device ({', '.join(devices)}), whose arithmetic is not the same: each kind "
            "has its own cells, and norms are compared on the same kind alone."
        )
    for group, cells in group_cells(report.cells).items():
        by_seed: dict[int, set[str]] = {}
        for cell in cells:
            for run in cell.runs:
                if run.result is not None and run.result.device_kind == "cpu" and CPU in run.result.versions:
                    by_seed.setdefault(run.seed, set()).add(run.result.versions[CPU])
        if mixed := {seed: found for seed, found in by_seed.items() if len(found) > 1}:
            seeds, found = ", ".join(map(str, sorted(mixed))), "; ".join(sorted(set.union(*mixed.values())))
            lines.append(
                f"{report.describe_group(group)}: norms of one seed ({seeds}) were trained on CPUs of different "
                f"capability ({found}), where last bits differ."
            )
    return lines


def missing(report: Report) -> list[str]:
    """Say of each seed without a score why it has none."""
    lines = []
    for group, cells in group_cells(report.cells).items():
        for cell in cells:
            head = f"{report.describe_group(group)}, {cell.norm}, seed"
            for seed in started_seeds(cells):
                if seed in cell.failed:
                    lines.append(f"{head} {seed}: {' '.join(cell.failed[seed].split())}")
                elif all(run.seed != seed for run in cell.runs):
                    lines.append(f"{head} {seed}: not started")
    return lines


def markdown_table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def csv_text(rows: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({k: "" if v in ("nan", None) else v for k, v in values.items()})
    return text.getvalue()
