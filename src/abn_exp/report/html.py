"""report.html: one self-contained page with interactive figures and sortable tables; it opens from disk, offline.

Plotly's script is in the file, so that nothing is requested from a network. Colours follow the reader's light or
dark theme; check boxes switch norms on and off in all figures at once.
"""

import html
import json
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from abn_exp.report import comparisons, tables
from abn_exp.report.comparisons import group_cells
from abn_exp.report.figures import MOST_BANDS
from abn_exp.report.formatting import Table, number_text, p_text
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
from abn_exp.report.verdicts import Judgement, power_of_difference, sentence

MOST_SEEDS = 40  # the power curves end here


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
    return PAGE.format(
        title=html.escape(report.name),
        policy=POLICY,
        style=STYLE,
        body="\n".join(body),
        plotly=get_plotlyjs(),
        figures=json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
        script=SCRIPT,
    )


def _figures(report: Report) -> list[tuple[str, go.Figure | None]]:
    """Return the figures with their headings; None where there is nothing to draw."""
    groups = group_cells(report.cells)
    titles = {group: report.describe_group(group) for group in groups}
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for cell in report.cells:
        found = {seed: 100 * score for seed, score in cell.scores["test_acc"].items()}
        scores.setdefault(titles[cell.group], {})[cell.norm] = found
    curves = {}
    for group, cells in groups.items():
        images, series = comparisons.learning_curves(cells)
        curves[f"{titles[group]}: {images}"] = series
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
    power_at = f"Power to find a difference of {report.delta:g} points, at the level after correction"
    return [
        (differences, forest(rows, report.delta, reference)),
        (_curves_heading(curves), learning_curves(curves)),
        ("Test accuracy of every seed, mean and its 95 % interval", every_seed(scores)),
        (f"Seeds in pairs: {reference} and each other norm", paired_slopes(scores, reference)),
        (f"Spread between seeds, as a ratio to {reference}'s", spread_ratios(ratios, reference)),
        (power_at, power_curves(power, report.delta)),
    ]


def _curves_heading(panels: Mapping[str, Mapping[str, Mapping[int, Array]]]) -> str:
    several = [norms for norms in panels.values() if any(len(seeds) > 1 for seeds in norms.values())]
    banded = [norms for norms in several if len(norms) <= MOST_BANDS]
    where = f", in panels of up to {MOST_BANDS} norms" if len(banded) < len(several) else ""
    return "Learning curves: every seed, and their mean" + (f"; band: ±1 standard deviation{where}" if banded else "")


def _notes(report: Report, more: Sequence[str]) -> list[str]:
    where = "Over {} cells (exploratory), {} - {}"
    pooled = [
        sentence(p.judgement, where.format(len(p.cells), p.norm, p.reference), (p.norm, p.reference))
        for p in report.pooled
    ]
    conditional = report.conditional.replace("All of them", "All intervals", 1)
    gaps = [*tables.no_comparison(report), *tables.missing(report)]
    return [*more, *pooled, *report.notes(), *gaps, conditional]


def _row(label: str, norm: str, judgement: Judgement, pooled: bool = False) -> ForestRow:
    n = judgement.mean.n[0]
    note = f"n = {n}, p = {p_text(judgement.uncorrected.difference)}, after Holm's correction "
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
    found += [(effects.title, tables.effect_table(effects)) for effects in report.effects]
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


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{plotly}</script>
<script>
const FIGURES = {figures};
{script}
</script>
</body>
</html>
"""

# Nothing is loaded from anywhere; 'self' is for `scripts/report.py --watch`, which serves the page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'"
)

STYLE = """
:root { --ink: #1a1a1a; --paper: #fff; --soft: #f3f3f1; --line: #d8d8d4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #17181a; --soft: #232529; --line: #3a3d42; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.question { opacity: .8; }
.answer { font-size: 1.15rem; font-weight: 600; background: var(--soft); padding: .8rem 1rem; border-radius: 6px; }
.figure { width: 100%; }
fieldset { border: 1px solid var(--line); border-radius: 6px; position: sticky; top: 0; z-index: 2;
  background: var(--paper); }
fieldset label { margin-right: 1rem; white-space: nowrap; }
fieldset i { display: inline-block; width: .8em; height: .8em; background: var(--c); margin: 0 .3em; }
fieldset label[style*="#1a1a1a"] i { background: var(--ink); }
@media (max-width: 640px) { fieldset { position: static; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td { max-width: 36em; overflow: hidden; text-overflow: ellipsis; }
th { cursor: pointer; background: var(--soft); }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
"""

SCRIPT = """
const dark = window.matchMedia('(prefers-color-scheme: dark)');
const narrow = window.matchMedia('(max-width: 640px)');
function themed(figure) {
  const text = JSON.stringify(figure);
  const light = text.replaceAll('#1a1a1a', '#e6e6e6').replaceAll('rgba(26,26,26', 'rgba(230,230,230');
  return JSON.parse(dark.matches ? light : text);
}
function oneColumn(layout) {  // panels below each other on a phone
  const axes = Object.keys(layout).filter(key => /^xaxis/.test(key) && layout[key].domain);
  if (!narrow.matches || axes.length < 2) return;
  const titles = (layout.annotations || []).filter(note => note.yref === 'paper' && note.showarrow === false);
  const perPanel = layout.height / Math.ceil(axes.length / 2);
  const gap = 90 / (perPanel * axes.length - 94), height = (1 - gap * (axes.length - 1)) / axes.length;
  axes.forEach((key, i) => {
    const top = 1 - i * (height + gap);
    layout[key].domain = [0, 1];
    layout['y' + key.slice(1)].domain = [Math.max(0, top - height), top];
    if (titles.length === axes.length) { titles[i].x = 0.5; titles[i].y = top; titles[i].font = {size: 11}; }
  });
  layout.height = perPanel * axes.length;
}
function labelsAbove(layout) {  // a row's label above it on a phone, where there is no room beside it
  if (!narrow.matches || layout.meta !== 'rows') return;
  const axis = layout.yaxis, texts = axis.ticktext, lines = Math.max(...texts.map(t => t.split('<br>').length));
  axis.showticklabels = false;
  axis.range = [axis.range[0], axis.range[1] - 0.4];
  layout.height += (10 + 6 * lines) * texts.length;
  layout.annotations = (layout.annotations || []).concat(texts.map((text, i) => ({text: text, showarrow: false,
    xref: 'paper', x: 0, xanchor: 'left', yref: 'y', y: axis.tickvals[i] - 0.12, yanchor: 'bottom', font: {size: 11},
    align: 'left'})));
  layout.margin = {...layout.margin, l: 16};
}
function draw() {
  const hidden = new Set([...document.querySelectorAll('#norms input:not(:checked)')].map(box => box.value));
  FIGURES.forEach((figure, i) => {
    const copy = themed(figure);
    copy.data.forEach(trace => { trace.visible = !hidden.has(trace.meta); });
    oneColumn(copy.layout);
    labelsAbove(copy.layout);
    const options = {responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : 'hover'};
    Plotly.react('figure-' + i, copy.data, copy.layout, options);
  });
}
draw();
dark.addEventListener('change', draw);
narrow.addEventListener('change', draw);
document.querySelectorAll('#norms input').forEach(box => box.addEventListener('change', draw));
function value(cell) {
  const number = parseFloat(cell.textContent.replace(/^[<>]\\s*/, '').replace(/,/g, ''));
  return Number.isNaN(number) ? null : number;
}
function sort(heading) {
  const column = heading.cellIndex, body = heading.closest('table').tBodies[0];
  const down = heading.getAttribute('aria-sort') === 'ascending';
  heading.parentNode.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const rows = [...body.rows];
  rows.sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]], [p, q] = [value(x), value(y)];
    const order = p !== null && q !== null ? p - q : x.textContent.localeCompare(y.textContent);
    return down ? -order : order;
  });
  rows.forEach(row => body.appendChild(row));
}
document.querySelectorAll('th').forEach(heading => {
  heading.addEventListener('click', () => sort(heading));
  heading.addEventListener('keydown', event => { if (event.key === 'Enter') sort(heading); });
});
"""
