"""Interactive figures of a report, drawn by Plotly for report.html. Accuracies are percent, differences points.

Each trace carries its norm as `meta`, by which the page switches norms on and off. Functions return None where there
is nothing to draw.
"""

import html
import math
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import plotly.graph_objects as go
from matplotlib.colors import to_hex
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from abn_exp.report.figures import DASH, DASH_DOT, DASH_DOT_DOT, DOT, MOST_BANDS, norm_styles
from abn_exp.report.formatting import number_text
from abn_exp.report.stats import Array, summarize

INK = "#1a1a1a"  # text and BN; the page's script swaps it for a light grey in the dark theme
FAINT = "rgba(128,128,128,0.35)"
ROW, PANEL = 34, 300  # pixels: a row of a forest plot, the height of a panel
MAX_COLUMNS = 2
TITLE_WIDTH = 50  # characters of a line above a panel
DASHES = {"-": "solid", DASH: "dash", DOT: "dot", DASH_DOT: "dashdot", DASH_DOT_DOT: "longdashdot"}
Seeds = TypeVar("Seeds", Mapping[int, Array], Mapping[int, float])
RATIOS = [0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10]  # ticks of a logarithmic axis


@dataclass(frozen=True)
class ForestRow:
    """One interval of a forest plot, in points. `pooled` rows are diamonds."""

    label: str
    norm: str
    estimate: float
    interval: tuple[float, float]
    note: str = ""  # shown when the pointer is over it: n, p, verdict
    pooled: bool = False


def colour(norm: str, norms: Iterable[str]) -> str:
    """Return a norm's colour as in the other figures; black is INK, which follows the theme."""
    found = norm_styles({norm, *norms})[norm].color
    return INK if found == "black" else to_hex(found).upper()


def dash(norm: str, norms: Iterable[str]) -> str:
    """Return a norm's kind of line as in the other figures: norms that share a colour differ in it."""
    return DASHES[norm_styles({norm, *norms})[norm].linestyle]


def forest(rows: Sequence[ForestRow], delta: float | None, reference: str, sign: str = "+") -> go.Figure | None:
    """Draw differences to the reference with their intervals, and the zone of +-delta behind them. ``sign``: of the
    numbers that are shown, "" for what is no difference."""
    rows = [row for row in rows if math.isfinite(row.estimate)]
    if not rows:
        return None
    figure = go.Figure()
    names = [row.norm for row in rows]
    if delta is not None:
        figure.add_vrect(-delta, delta, fillcolor="rgba(0,158,115,0.13)", line_width=0, layer="below")
    figure.add_vline(0, line_width=1, line_color=INK)
    labels = [f"<b>{_wrapped(row.label)}</b>" if row.pooled else _wrapped(row.label) for row in rows]
    for i, row in enumerate(rows):
        known = all(map(math.isfinite, row.interval))
        low, high = row.interval if known else (row.estimate, row.estimate)
        estimate, *ends = (number_text(value, 2, sign) for value in (row.estimate, low, high))
        hover = f"{estimate} ({' to '.join(ends)})" if known else f"{estimate}, no interval"
        style, common = colour(row.norm, names), {"name": row.norm, "meta": row.norm, "showlegend": False}
        bars = {"type": "data", "symmetric": False, "color": style, "thickness": 2, "width": 0}
        bars |= {"array": [high - row.estimate], "arrayminus": [row.estimate - low]}
        figure.add_scatter(
            x=[row.estimate],
            y=[i],
            error_x=None if row.pooled or not known else bars,
            mode="markers",
            marker={"color": style, "size": 10, "symbol": "square"},
            opacity=0 if row.pooled and known else 1,
            hovertemplate=f"{html.escape(row.label)}<br>{hover}<br>{html.escape(row.note)}<extra></extra>",
            **common,
        )
        if row.pooled and known:
            figure.add_scatter(
                x=[low, row.estimate, high, row.estimate, low],
                y=[i, i - 0.28, i, i + 0.28, i],
                fill="toself",
                mode="lines",
                line={"color": style},
                fillcolor=style,
                hoverinfo="skip",
                **common,
            )
    figure.update_yaxes(tickvals=[*range(len(rows))], ticktext=labels, range=[len(rows) - 0.4, -0.6], automargin=True)
    figure.update_xaxes(title=f"Test accuracy minus {reference}, points", zeroline=False)
    lines = max(label.count("<br>") for label in labels)
    figure.update_layout(height=110 + (ROW + 10 * lines) * len(rows), meta="rows")  # labels go above on a phone
    return figure


def learning_curves(
    panels: Mapping[str, Mapping[str, Mapping[int, Array]]], finished: Mapping[str, Mapping[str, Collection[int]]]
) -> go.Figure | None:
    """Draw each seed's accuracy in percent by epoch, the mean over finished ones and, from two on, a band of +-1 std.

    More than three norms in a panel are drawn without bands, which would hide each other.

    `panels`: title -> norm -> seed -> accuracy of epochs 1, 2, ...; `finished`: the seeds whose runs are.
    """
    drawn, names = _with_data(panels)
    if not drawn:
        return None
    figure, cells = _panels(list(drawn))
    for at, (title, norms) in zip(cells, drawn.items(), strict=True):
        for norm, seeds in norms.items():
            style = colour(norm, names)
            whole = [curve for seed, curve in seeds.items() if seed in finished[title][norm]]
            length = min(map(len, whole), default=0)
            epochs = np.arange(1, length + 1)
            curves = np.array([curve[:length] for curve in whole])
            common = {"meta": norm, "showlegend": False, **at}
            if len(curves) > 1 and len(norms) <= MOST_BANDS:
                mean, std = curves.mean(0), curves.std(0, ddof=1)
                figure.add_scatter(
                    x=[*epochs, *epochs[::-1]],
                    y=[*(mean + std), *(mean - std)[::-1]],
                    fill="toself",
                    mode="lines",
                    fillcolor="rgba({},{},{},0.18)".format(*hex_to_rgb(style)),
                    line={"width": 0},
                    hoverinfo="skip",
                    **common,
                )
            for seed, curve in seeds.items():
                figure.add_scatter(
                    x=np.arange(1, len(curve) + 1),
                    y=np.round(curve, 3),
                    mode="lines+markers" if len(curve) == 1 else "lines",
                    line={"color": style, "width": 0.8},
                    opacity=0.5 if len(norms) <= MOST_BANDS else 0.25,
                    hovertemplate=f"{norm}, seed {seed}<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
                    **common,
                )
            if whole:
                figure.add_scatter(
                    x=epochs,
                    y=np.round(curves.mean(0), 3),
                    mode="lines",
                    line={"color": style, "width": 2.5, "dash": dash(norm, names)},
                    hovertemplate=f"{norm}, mean of {len(whole)} seeds<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
                    **common,
                )
    figure.update_xaxes(title="Epoch")
    figure.update_yaxes(title="Accuracy (%)")
    return figure


def every_seed(panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> go.Figure | None:
    """Draw each seed's test accuracy in percent, and each norm's mean with its 95 % interval over seeds."""
    drawn, names = _with_data(panels)
    if not drawn:
        return None
    figure, cells = _panels(list(drawn), height=110 + 40 * max(map(len, drawn.values())))
    for at, norms in zip(cells, drawn.values(), strict=True):
        for i, (norm, seeds) in enumerate(norms.items()):
            style, summary = colour(norm, names), summarize(np.array(list(seeds.values())))
            common = {"meta": norm, "showlegend": False, **at}
            heights = i + 0.22 + (np.linspace(-0.1, 0.1, len(seeds)) if len(seeds) > 1 else np.zeros(1))
            figure.add_scatter(
                x=list(seeds.values()),
                y=heights,
                mode="markers",
                marker={"color": style, "size": 7, "opacity": 0.6},
                customdata=list(seeds),
                hovertemplate=f"{norm}, seed %{{customdata}}: %{{x:.2f}} %<extra></extra>",
                **common,
            )
            low, high = summary.mean_interval
            known = math.isfinite(low)
            between = f" ({low:.2f} to {high:.2f})" if known else ""
            figure.add_scatter(
                x=[summary.mean],
                y=[i - 0.15],
                mode="markers",
                marker={"color": style, "size": 9, "symbol": "square"},
                error_x={"type": "data", "array": [high - summary.mean if known else 0], "color": style, "width": 0},
                hovertemplate=f"{norm}: {summary.mean:.2f} %{between}, n = {summary.n}<extra></extra>",
                **common,
            )
        ticks = {"tickvals": [*range(len(norms))], "ticktext": list(norms), "range": [len(norms) - 0.5, -0.6]}
        figure.update_yaxes(**ticks, **at)
    figure.update_xaxes(title="Test accuracy (%)")
    return figure


def paired_slopes(panels: Mapping[str, Mapping[str, Mapping[int, float]]], reference: str) -> go.Figure | None:
    """Draw a line a seed from the reference's test accuracy to each other norm's, in percent."""
    drawn = {t: norms for t, norms in panels.items() if reference in norms and len(norms) > 1}
    if not drawn:
        return None
    figure, cells = _panels(list(drawn))
    names = {norm for norms in drawn.values() for norm in norms}
    for at, norms in zip(cells, drawn.values(), strict=True):
        base = norms[reference]
        others = [norm for norm in norms if norm != reference]
        for i, norm in enumerate(others):
            shared = sorted(base.keys() & norms[norm].keys())
            x = [value for _ in shared for value in (2 * i, 2 * i + 1, None)]
            y = [value for seed in shared for value in (base[seed], norms[norm][seed], None)]
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines+markers",
                line={"color": colour(norm, names), "width": 1.2},
                customdata=[seed for seed in shared for _ in range(3)],
                hovertemplate="seed %{customdata}: %{y:.2f} %<extra></extra>",
                meta=norm,
                showlegend=False,
                **at,
            )
        ticks = [name for norm in others for name in (reference, norm)]
        figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, **at)
    figure.update_yaxes(title="Test accuracy (%)")
    return figure


def spread_ratios(rows: Sequence[ForestRow], reference: str) -> go.Figure | None:
    """Draw ratios of standard deviations between seeds with their intervals, on a logarithmic axis."""
    rows = [row for row in rows if 0 < row.estimate < math.inf and math.isfinite(row.interval[0])]
    figure = forest(rows, None, reference, sign="")
    if figure is None:
        return None
    figure.layout.shapes = ()
    figure.add_vline(1, line_width=1, line_color=INK)
    figure.update_xaxes(type="log", title=f"Standard deviation between seeds, ratio to {reference}", tickvals=RATIOS)
    return figure


def power_curves(curves: Mapping[str, tuple[str, Array, Array, int]], delta: float) -> go.Figure | None:
    """Draw the power to find a difference of delta against the number of seeds; the present n is marked.

    `curves`: label -> (norm, n, power in [0, 1], present n).
    """
    if not curves:
        return None
    figure = go.Figure()
    names = {norm for norm, *_ in curves.values()}
    for label, (norm, n, power, present) in curves.items():
        style, common = colour(norm, names), {"meta": norm, "showlegend": False}
        figure.add_scatter(
            x=n,
            y=np.round(100 * power, 2),
            mode="lines",
            line={"color": style, "dash": dash(norm, names)},
            hovertemplate=f"{html.escape(label)}<br>%{{x}} seeds: %{{y:.0f}} %<extra></extra>",
            **common,
        )
        if present in n:
            at = int(np.flatnonzero(n == present)[0])
            figure.add_scatter(
                x=[present],
                y=[100 * power[at]],
                mode="markers",
                marker={"color": style, "size": 9},
                hovertemplate=f"{html.escape(label)}<br>now: %{{x}} seeds, %{{y:.0f}} %<extra></extra>",
                **common,
            )
    figure.add_hline(80, line_width=1, line_dash="dot", line_color=INK)
    figure.update_xaxes(title="Seeds")
    figure.update_yaxes(title=f"Power to find {delta:g} points (%)", range=[0, 102])
    figure.update_layout(height=PANEL + 60)
    return figure


def _with_data(panels: Mapping[str, Mapping[str, Seeds]]) -> tuple[dict[str, dict[str, Seeds]], set[str]]:
    """Return the panels without norms that have no seeds, and the names of those that have."""
    drawn = {title: {norm: seeds for norm, seeds in norms.items() if seeds} for title, norms in panels.items()}
    return {title: norms for title, norms in drawn.items() if norms}, {n for norms in drawn.values() for n in norms}


def _wrapped(text: str) -> str:
    return "<br>".join(map(html.escape, textwrap.wrap(text, TITLE_WIDTH)))


def _panels(titles: Sequence[str], height: int = PANEL) -> tuple[go.Figure, list[dict[str, int]]]:
    """Return a figure of one panel a title, and each panel's row and column, as Plotly's functions take them."""
    columns = min(MAX_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    lines = max(_wrapped(title).count("<br>") for title in titles)
    height += 16 * lines
    gap = min(0.3, (100 + 16 * lines) / (rows * height)) if rows > 1 else 0.0
    figure = make_subplots(
        rows,
        columns,
        specs=[[{} if row * columns + i < len(titles) else None for i in range(columns)] for row in range(rows)],
        subplot_titles=[_wrapped(title) for title in titles],
        vertical_spacing=gap,
        horizontal_spacing=0.12,
    )
    figure.update_annotations(font_size=13)
    figure.update_layout(height=rows * (height + 60) + 40)
    return figure, [{"row": i // columns + 1, "col": i % columns + 1} for i in range(len(titles))]
