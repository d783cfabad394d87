"""Tables and sentences of a report. Accuracies are percent, differences and stds percentage points."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from abn_exp.report import stats
from abn_exp.report.comparisons import (
    METRICS,
    Cell,
    Comparison,
    Group,
    Key,
    Pooled,
    group_cells,
    started_seeds,
)
from abn_exp.report.effects import EffectTable
from abn_exp.report.factors import Factor, describe_group
from abn_exp.report.formatting import Table, interval_text, number_text, p_text, percent_text, signed_text
from abn_exp.report.looks import Fixed, Plan, Primary
from abn_exp.report.per_image import ImageEvidence
from abn_exp.report.spread import MIN_PAIRS, SpreadJudgement, spread_level, spread_sentence
from abn_exp.report.verdicts import Judgement, sentence
from abn_exp.results import RunResult

COSTS = {
    "total": "parameters",
    "bytes_packed": "bytes packed",
    "binary_macs": "binary MACs",
    "real_macs": "real MACs",
}
UNPLANNED = """\
Seeds were added without a plan: reports were written at {} seeds before this one. Each look at the same comparison is
another chance to err; at 3, 5, 10 and 20 seeds they find a difference that is not there in 15 % of cases, not in 5 %.
`seeds=until_decided` plans its looks."""

WITHHELD = """\
Until it is judged, its row is left out, and so are all tables that would have it as a part: one effect over all
cells, effects of norms and of other factors, single test images."""

SEQUENTIAL = """\
The interval of the primary comparison is sequential, so that it covers at all looks together, and its tests have to
pass the levels of this look, not 5 %. All other intervals take the number of seeds as fixed before the runs, which it
was not."""


@dataclass(frozen=True)
class Report:
    name: str
    question: str | None
    command: str
    reference: str
    delta: float
    fixed: Fixed  # what was fixed before the runs
    primary: Primary | None
    plan: Plan | None
    cells: list[Cell]
    comparisons: list[Comparison]
    pooled: list[Pooled]
    factors: list[Factor]  # what varies besides data set, network and norm
    effects: list[EffectTable]
    images: ImageEvidence
    conditional: str  # on what all intervals are conditional
    options: dict[str, dict[Key, str]] = field(default_factory=dict)  # those that vary, each one's values by cell
    differing: list[str] = field(default_factory=list)  # where compared runs differ in how they were made
    unplanned: list[int] = field(default_factory=list)  # numbers of seeds at which there were reports without a plan
    withheld: bool = False  # is there a comparison that is not to be seen yet?

    @property
    def results(self) -> list[RunResult]:
        return [run.result for cell in self.cells for run in cell.runs if run.result is not None]

    @property
    def sequential(self) -> str:
        """What is to be said of intervals of differences besides that they are not corrected."""
        return "" if self.plan is None else ", primary: sequential"

    def describe_group(self, group: Group) -> str:
        """Return a group in words."""
        return describe_group([cell for cell in self.cells if cell.group == group], self.factors)

    def answer(self) -> list[str]:
        """Return the verdict on the primary comparison in sentences, or why there is none."""
        if self.primary is None:
            return [f"Exploratory throughout. {self.fixed.note}"]
        p, q = self.primary, self.primary.question
        head = f"Primary comparison: {q.norm} against {q.reference}"
        if p.withheld:
            return [f"{head}. {p.withheld}"]
        if p.pooled is not None:
            several = len(p.pairs) > 1
            where = f"Over {len(p.pairs)} cells" if several else f"On {self.describe_group(p.pairs[0][0].group)}"
            head += f" ({p.look})" if p.look else ""
            return [f"{head}. {sentence(p.pooled, f'{where}, {q.norm} - {q.reference}', (q.norm, q.reference))}"]
        lines = [self.mean_sentence(cell, p.means[cell.key], q.reference) for cell, _ in p.pairs if p.means]
        lines += [self.spread_sentence(cell, p.spreads[cell.key], q.reference) for cell, _ in p.pairs if p.spreads]
        return [f"{head}. {lines[0]}", *lines[1:]]

    def mean_sentence(self, cell: Cell, judgement: Judgement, reference: str) -> str:
        what = f"On {self.describe_group(cell.group)}, {cell.norm} - {reference}"
        return sentence(judgement, what, (cell.norm, reference))

    def spread_sentence(self, cell: Cell, judgement: SpreadJudgement, reference: str) -> str:
        return spread_sentence(judgement, f"On {self.describe_group(cell.group)}", cell.norm, reference)

    def notes(self) -> list[str]:
        """Return notes to read before any number: what was fixed, looks without a plan, runs made differently."""
        lines = [self.fixed.note] if self.primary is not None and self.plan is None else []
        lines += [SEQUENTIAL] if self.plan is not None else []
        lines += [WITHHELD] if self.withheld else []
        lines += [UNPLANNED.format(", ".join(map(str, self.unplanned)))] if self.unplanned else []
        return [" ".join(line.split()) for line in [*lines, *self.differing]]


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


def _pairs(n: int) -> str:
    return f"{n} pair{'s' * (n != 1)}"


def _judged(j: Judgement) -> list[str]:
    """Return the columns of JUDGED for a difference."""
    m = j.mean
    n = _pairs(m.n[0]) if m.method == "paired" else f"{m.n[0]}, {m.n[1]} unpaired"
    numbers = [signed_text(m.difference), interval_text(j.interval), p_text(j.uncorrected.difference)]
    return [n, *numbers, p_text(j.corrected.difference), p_text(j.corrected.equivalent), j.verdict]


def _family(size: int, primary: bool) -> str:
    return f"{'primary' if primary else 'exploratory'} ({size})"


def _judged_header(report: Report) -> list[str]:
    return [f"{name}{report.sequential}" if name.startswith("95 %") else name for name in JUDGED]


JUDGED = ["n", "difference (points)", "95 % interval, uncorrected", "p", "p (Holm)", "p (TOST, Holm)", "verdict"]


def difference_table(report: Report) -> Table:
    """One row a comparison, for the means."""
    header = [*_judged_header(report), "p (sign flips)", "effect", "detectable", "seeds for delta"]
    header += ["seeds for equivalence", "family"]
    rows = []
    for c in report.comparisons:
        m = c.mean.mean
        effect = "-" if math.isnan(m.effect) else f"{signed_text(m.effect)} ({m.effect_name})"
        too_many = "> 10,000" if c.mean.std > 0 else "-"
        seeds = [too_many if n is None else f"{n:,}" for n in (c.mean.seeds_for_delta, c.mean.seeds_for_equivalence)]
        more = [p_text(m.p_sign_flip), effect, number_text(c.mean.detectable), *seeds]
        more.append(_family(c.mean.family, c.primary))
        rows.append([*_where(report, c.cell), *_judged(c.mean), *more])
    return _table(report, header, rows)


def pooled_table(report: Report) -> Table:
    """One row a norm: the difference to the reference over all cells that have both, in two ways."""
    header = ["norm", "cells", *_judged_header(report)]
    header += ["random-effects mean", "95 % (DerSimonian-Laird)", "95 % (Hartung-Knapp)"]
    rows = []
    for p in report.pooled:
        row = [p.norm, str(len(p.cells)), *_judged(p.judgement)]
        if (r := p.random_effects) is None:
            rows.append([*row, *["-"] * 7, _family(p.judgement.family, p.primary)])
            continue
        mean = signed_text(r.mean) + (f" ({r.k} cells)" if r.k < len(p.cells) else "")  # one seed has no error
        row += [mean, interval_text(r.interval), interval_text(r.interval_hartung_knapp)]
        row += [number_text(r.tau), number_text(r.q), p_text(r.p_q), percent_text(r.i_squared)]
        rows.append([*row, _family(p.judgement.family, p.primary)])
    return [*header, "tau", "Q", "p (Q)", "I²", "family"], rows


def spread_table(report: Report) -> Table:
    """One row a comparison, for the stds."""
    header = ["n", "std (points)", "95 % interval", f"std of {report.reference}", "ratio", "95 % interval of ratio"]
    header += ["p (swaps)", "p (Holm)", "level kept, normal and t (3 df)", "power at ratio 2", "less spread?"]
    header += ["family"]
    rows = []
    for c in report.comparisons:
        s = c.spread.found
        paired = c.cell.scores["test_acc"].keys() & c.base.scores["test_acc"].keys()
        own = stats.std_interval(c.cell.sample("test_acc", sorted(paired)))
        row = [_pairs(s.n), number_text(s.std[0]), interval_text(own), number_text(s.std[1])]
        row += [number_text(s.ratio), interval_text(s.ratio_interval), p_text(s.p), p_text(c.spread.p_holm)]
        level = " and ".join(f"{level} %" for level in spread_level(s.n)) if s.n >= MIN_PAIRS else "-"
        row += [level, percent_text(c.spread.power), c.spread.verdict, _family(c.spread.family, c.primary_spread)]
        rows.append([*_where(report, c.cell), *row])
    return _table(report, header, rows)


def effect_table(table: EffectTable) -> Table:
    """One row a difference."""
    return [*table.header, *JUDGED], [[*effect.labels, *_judged(effect.judgement)] for effect in table.effects]


def cell_images_table(report: Report) -> Table:
    """One row a cell whose runs have kept their predictions."""
    header = ["n", "accuracy (%)", "95 % over seeds", "95 % over seeds and images", "std between seeds"]
    header += ["expected of so few images", "beyond that", "95 % interval", "agreement of two seeds"]
    rows = []
    for c in report.images.cells:
        scores = c.cell.sample("test_acc", c.seeds)
        intervals = stats.t_interval(scores), c.accuracy.interval, c.split.interval_of_networks
        varies = stats.has_spread(stats.present(scores))  # else no interval is known
        seeds, images, networks = (interval_text(i) if varies else "-" for i in intervals)
        row = [str(len(c.seeds)), number_text(c.accuracy.mean), seeds, images]
        row += [number_text(c.split.std), number_text(c.split.std_of_test_set)]
        row += [number_text(c.split.std_of_networks), networks]
        rows.append([*_where(report, c.cell), *row, percent_text(c.agreement)])
    return _table(report, header, rows)


def pair_images_table(report: Report) -> Table:
    """One row a comparison whose runs have kept their predictions."""
    header = ["n", f"minus {report.reference} (points)", "95 % over seeds", "95 % over seeds and images"]
    header += ["SE of seeds", "SE of images", "images that one alone has right: norm, reference"]
    header += ["McNemar p < 0.05", "agreement"]
    rows = []
    for p in report.images.pairs:
        d, seeds = p.difference, len(p.seeds)
        own = p.cell.sample("test_acc", p.seeds) - p.base.sample("test_acc", p.seeds)
        intervals = stats.t_interval(own), d.interval
        varies = stats.has_spread(stats.present(own), 100.0)  # else there is none, as in the table of differences
        row = [_pairs(seeds), signed_text(d.mean), *(interval_text(i) if varies else "-" for i in intervals)]
        row += [number_text(d.from_seeds), number_text(d.from_images)]
        alone = (sum(getattr(m, side) for m in p.mcnemar) / seeds for side in ("candidate_alone", "reference_alone"))
        row += [", ".join(f"{count:.0f}" for count in alone)]
        row += [f"{sum(m.p < stats.ALPHA for m in p.mcnemar)} of {seeds} seeds", percent_text(p.agreement)]
        rows.append([*_where(report, p.cell), *row])
    return _table(report, header, rows)


def checkpoint_selection_tables(report: Report) -> list[Table]:
    """What the choice of the epoch does: to each cell, and to each difference; none where no peak was recorded."""
    if not any(cell.scores["test_acc_peak"] for cell in report.cells):
        return []
    own, differences = [], []
    bases = {c.cell.key: c.base for c in report.comparisons}  # without what is withheld
    for group in group_cells(report.cells).values():
        seeds = started_seeds(group)
        for cell in group:
            last, best, peak = (cell.sample(metric, seeds) for metric in METRICS)
            gains = [stats.summarize(other - last) for other in (best, peak)]
            whole = stats.summarize(last)
            own.append([*_where(report, cell), str(whole.n), number_text(whole.mean), *map(_signed, gains)])
            if (base := bases.get(cell.key)) is not None:
                pairs = [stats.summarize(cell.sample(m, seeds) - base.sample(m, seeds)) for m in METRICS]
                differences.append([*_where(report, cell), _pairs(pairs[0].n), *map(_signed, pairs)])
    header = ["n", "last epoch (%)", "best val epoch - last", "peak on the test set - last"]
    tables = [_table(report, header, own)]
    if differences:
        minus = f"minus {report.reference}, "
        header = ["n", minus + "last epoch", minus + "best val epoch", minus + "peak on the test set"]
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
            scores = stats.summarize(cell.sample("test_acc", started_seeds(group)))
            values = [totals[cell.key].get(k) for k in differing]
            own = [str(scores.n), _plus_minus(scores), *("-" if v is None else f"{v:,}" for v in values)]
            rows.append([*_where(report, cell), *own])
    return _table(report, ["n", "accuracy (%)", *(COSTS[k] for k in differing)], rows)


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


def missing(report: Report) -> list[str]:
    """Say of each seed without a score why it has none."""
    lines = []
    for group, cells in group_cells(report.cells).items():
        for cell in cells:
            head = f"{report.describe_group(group)}, {cell.norm}, seed"
            for seed in started_seeds(cells):
                if seed in cell.unscored:
                    lines.append(f"{head} {seed}: {' '.join(cell.unscored[seed].split())}")
                elif all(run.seed != seed for run in cell.runs):
                    lines.append(f"{head} {seed}: not started")
    return lines
