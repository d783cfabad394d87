"""report.html: one self-contained page with interactive figures and sortable tables; it opens from disk, offline.

Plotly's script is in the file, so that nothing is requested from a network. Colours follow the reader's light or
dark theme; check boxes switch norms on and off in all figures at once.
"""

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from abn_exp.report import comparisons, tables
from abn_exp.report.comparisons import group_cells
from abn_exp.report.figures import MOST_BANDS
from abn_exp.report.formatting import Table, number_text, p_equation, p_text
from abn_exp.report.interactive import (
    FAINT,
    INK,
    ForestRow,
    colour,
    every_seed,
    forest,
    learning_curves,
    paired_slopes,
    power_curves,
    spread_ratios,
)
from abn_exp.report.stats import Array
from abn_exp.report.tables import Report
from abn_exp.report.verdicts import Judgement, count_text, power_of_difference, sentence

MOST_SEEDS = 40  # the power curves end here
# Nothing is loaded from anywhere; 'self' is for `scripts/report.py --watch`, which serves the page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'"
)


def html_page(report: Report) -> str:
    """Return report.html: the answer and what to know of it, then the figures, then the tables."""
    first, *more = report.answer()
    drawn = [(heading, figure) for heading, figure in _figures(report) if figure is not None]
    for _, figure in drawn:
        figure.update_layout(
            template="none",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            font={"color": INK, "family": "system-ui, sans-serif", "size": 13},
            margin={"l": 60, "r": 16, "t": 44, "b": 50},
            hovermode="closest",
            modebar={"bgcolor": "rgba(0,0,0,0)", "color": FAINT, "activecolor": INK},
        )
        figure.update_xaxes(gridcolor=FAINT, zeroline=False, automargin=True)
        figure.update_yaxes(gridcolor=FAINT, zeroline=False, automargin=True)
    data = [json.loads(figure.to_json()) for _, figure in drawn]
    norms = list(dict.fromkeys(cell.norm for cell in report.cells))
    boxes = "".join(
        f'<label style="--c:{colour(norm, norms)}"><input type="checkbox" checked value="{html.escape(norm)}">'
        f"<i></i>{html.escape(norm)}</label>"
        for norm in norms
    )
    body = [f"<h1>{html.escape(report.name)}</h1>"]
    if report.question is not None:
        body.append(f'<p class="question">{html.escape(report.question.strip())}</p>')
    body.append(f'<p class="answer">{html.escape(first)}</p>')
    body.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in _notes(report, more)) + "</ul>")
    if drawn:
        body.append(f'<fieldset id="norms"><legend>Norms shown</legend>{boxes}</fieldset>')
    for i, (heading, _) in enumerate(drawn):
        body.append(f'<section><h2>{html.escape(heading)}</h2><div class="figure" id="figure-{i}"></div></section>')
    body += [_table(heading, table) for heading, table in _tables(report)]
    return _file("page.html").format(
        title=html.escape(report.name),
        policy=POLICY,
        style=_file("page.css"),
        body="\n".join(body),
        plotly=get_plotlyjs(),
        figures=json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
        script=_file("page.js"),
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _figures(report: Report) -> list[tuple[str, go.Figure | None]]:
    """Return the figures with their headings; None where there is nothing to draw."""
    groups = group_cells(report.cells)
    titles = {group: report.describe_group(group) for group in groups}
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for cell in report.cells:
        found = {seed: 100 * score for seed, score in cell.scores["test_acc"].items()}
        scores.setdefault(titles[cell.group], {})[cell.norm] = found
    curves, finished = {}, {}
    for group, cells in groups.items():
        images, series = comparisons.learning_curves(cells)
        curves[f"{titles[group]}: {images}"] = series
        finished[f"{titles[group]}: {images}"] = {cell.norm: cell.scores["test_acc"].keys() for cell in cells}
    reference = report.reference
    labels = {c.cell.key: f"{c.cell.norm}, {titles[c.cell.group]}" for c in report.comparisons}
    rows = [_row(labels[c.cell.key], c.cell.norm, c.mean) for c in report.comparisons]
    rows += [
        _row(f"{p.norm}, one effect over {len(p.cells)} cells", p.norm, p.judgement, pooled=True)
        for p in report.pooled
    ]
    spreads = [(c.cell, c.spread.found, c.spread.verdict) for c in report.comparisons]
    ratios = [ForestRow(labels[cell.key], cell.norm, s.ratio, s.ratio_interval, v) for cell, s, v in spreads]
    n = np.arange(2.0, MOST_SEEDS + 1)
    power = {
        labels[c.cell.key]: (c.cell.norm, n, _power(c.mean, n), c.mean.mean.n[0])
        for c in report.comparisons
        if c.mean.std > 0
    }
    differences = (
        f"Differences to {reference}, with 95 % intervals (uncorrected{report.sequential}); shaded: less than delta, "
        f"{report.delta:g} points"
    )
    level = "at the level after correction" + (", the primary at its look's" if report.plan is not None else "")
    power_at = f"Power to find a difference of {report.delta:g} points, {level}"
    return [
        (differences, forest(rows, report.delta, reference)),
        (_curves_heading(curves), learning_curves(curves, finished)),
        ("Test accuracy of every seed, mean and its 95 % interval", every_seed(scores)),
        (f"Seeds in pairs: {reference} and each other norm", paired_slopes(scores, reference)),
        (f"Spread between seeds, as a ratio to {reference}'s", spread_ratios(ratios, reference)),
        (power_at, power_curves(power, report.delta)),
    ]


def _curves_heading(panels: Mapping[str, Mapping[str, Mapping[int, Array]]]) -> str:
    several = [norms for norms in panels.values() if any(len(seeds) > 1 for seeds in norms.values())]
    banded = [norms for norms in several if len(norms) <= MOST_BANDS]
    where = f", in panels of up to {MOST_BANDS} norms" if len(banded) < len(several) else ""
    band = f"; band: ±1 standard deviation{where}" if banded else ""
    return f"Learning curves: every seed, and the mean of finished ones{band}"


def _notes(report: Report, more: Sequence[str]) -> list[str]:
    where = "Over {} cells (exploratory), {} - {}"
    pooled = [
        sentence(p.judgement, where.format(len(p.cells), p.norm, p.reference), (p.norm, p.reference))
        for p in report.pooled
        if not p.primary
    ]
    conditional = report.conditional.replace("All of them", "All intervals", 1)
    gaps = [*tables.no_comparison(report), *tables.missing(report)]
    return [*more, *pooled, *report.notes(), *gaps, conditional]


def _row(label: str, norm: str, judgement: Judgement, pooled: bool = False) -> ForestRow:
    note = f"{count_text(judgement.mean)}, {p_equation(judgement.uncorrected.difference)}, after Holm's correction "
    note += f"{p_text(judgement.corrected.difference)}: {judgement.verdict}"
    return ForestRow(label, norm, judgement.mean.difference, judgement.interval, note, pooled)


def _power(judgement: Judgement, n: Array) -> Array:
    level = judgement.level / judgement.family
    return np.array([power_of_difference(judgement.delta / judgement.std, int(count), level) for count in n])


def _tables(report: Report) -> list[tuple[str, Table]]:
    reference = report.reference
    found: list[tuple[str, Table | None]] = [("Test accuracy (%)", tables.accuracy_table(report))]
    if report.comparisons:
        found.append((f"Differences to {reference}", tables.difference_table(report)))
    if report.pooled:
        found.append(("One effect over all cells", tables.pooled_table(report)))
    if report.comparisons:
        found.append((f"Spread between seeds, against {reference}", tables.spread_table(report)))
    found += [(f"{effects.title} (exploratory)", tables.effect_table(effects)) for effects in report.effects]
    if report.images.cells:
        found.append(("Single test images: cells", tables.cell_images_table(report)))
    if report.images.pairs:
        found.append(("Single test images: differences", tables.pair_images_table(report)))
    found += [("Which epoch is read", table) for table in tables.checkpoint_selection_tables(report)]
    found.append(("What it costs", tables.cost_table(report)))
    rows = []
    for cell in report.cells:
        where = report.describe_group(cell.group)
        accuracies = cell.sample("test_acc", [run.seed for run in cell.runs])
        for run, accuracy in zip(cell.runs, accuracies, strict=True):
            rows.append([where, cell.norm, str(run.seed), number_text(accuracy), run.status])
    found.append(("Every run", (["cell", "norm", "seed", "test accuracy (%)", "state"], rows)))
    return [(heading, table) for heading, table in found if table is not None]


def _table(heading: str, table: Table) -> str:
    header, rows = table
    head = "".join(f'<th tabindex="0">{html.escape(name)}</th>' for name in header)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<section><h2>{html.escape(heading)}</h2><div class="scroll">{inner}</div></section>'
