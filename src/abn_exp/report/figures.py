"""Figures of a report, one message each.

Every function that draws takes ``panels``, one entry a panel: its title -> {norm: data}, in the order to draw them,
and returns a matplotlib Figure, or None where there is nothing to draw. Accuracies are in percent. The files
that :func:`save` writes depend on the data alone: no dates, no program versions.
"""

import hashlib
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from abn_exp.files import writing
from abn_exp.report.stats import Array, MeanComparison, summarize

Panels = Mapping[str, Mapping[str, Any]]

TITLE_WIDTH = 48  # characters; a panel has no room for more
PANEL_WIDTH = 3.5  # inches: one column of a paper; two panels fill a page or a README
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # outlines that publishers take, and text that can be searched
}
MOST_BANDS = 3  # more bands in one panel hide each other
TICKS: Any = {"nbins": 6, "steps": [1, 2, 2.5, 5, 10]}


class NormStyle(NamedTuple):
    color: str
    marker: str
    linestyle: Any


# Okabe and Ito's colours, without the yellow that vanishes on white; each norm has its own marker, and norms
# that share a colour differ in linestyle.
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
DASH, DOT = (0, (5, 2)), (0, (1.2, 1.4))
DASH_DOT, DASH_DOT_DOT = (0, (5, 1.5, 1.2, 1.5)), (0, (5, 1.2, 1, 1.2, 1, 1.2))
NORM_STYLES = {
    "bn": NormStyle("black", "o", "-"),
    "abn": NormStyle(VERMILLION, "s", "-"),
    "bn_noscale": NormStyle("0.5", "D", DASH),
    "abn_paper": NormStyle(BLUE, "^", DASH),
    "abn_scale": NormStyle(ORANGE, "v", DASH_DOT),
    "abn_gate": NormStyle(GREEN, "P", DOT),
    "abn_noshift": NormStyle(PURPLE, "X", DASH),
    "abn_forward": NormStyle(SKY, ">", "-"),
    "abn_backward": NormStyle(BLUE, "<", DOT),
    "iebn": NormStyle(GREEN, "p", DASH_DOT_DOT),
}
# Other norms: lists of coprime lengths, so that neighbours differ in everything and 210 styles are distinct.
OTHER_COLORS = (ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE)
OTHER_MARKERS = ("h", "*", "d", "8", "H", "|", "x")
OTHER_LINES = (DASH, DOT, DASH_DOT, DASH_DOT_DOT, "-")


def norm_styles(norms: Iterable[str]) -> dict[str, NormStyle]:
    """Return a style for each norm, no two the same: the fixed one, or one that follows from the name."""
    styles, taken = {}, set()
    for norm in sorted(set(norms)):
        if norm in NORM_STYLES:
            styles[norm] = NORM_STYLES[norm]
            continue
        slot = int.from_bytes(hashlib.sha1(norm.encode()).digest()[:4], "big") % 210
        while slot in taken:
            slot = (slot + 1) % 210
        taken.add(slot)
        styles[norm] = NormStyle(OTHER_COLORS[slot % 6], OTHER_MARKERS[slot % 7], OTHER_LINES[slot % 5])
    return styles


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name``.png and ``name``.pdf, byte for byte the same for the same data."""
    with matplotlib.rc_context(STYLE):  # ticks are made, with the style of that moment, when they are drawn
        with writing(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", metadata={"Software": None})
        figure.set_layout_engine(None)  # the layout is found, and costs more than the drawing
        unknown = {"CreationDate": None, "Creator": None, "Producer": None}
        with writing(folder / f"{name}.pdf") as file:
            figure.savefig(file, format="pdf", metadata=unknown)


def learning_curves(panels: Panels) -> Figure | None:
    """Draw the mean accuracy over epochs; data: (num_seeds, num_epochs) in percent.

    Up to three norms: half a page wide, with +-1 std as a band where there are two seeds or more. More: a full page
    wide, without bands and without the first quarter of the epochs, for readability; the title says so.
    """
    drawn = {title: {k: v for k, v in norms.items() if v.size} for title, norms in panels.items()}
    drawn = {title: norms for title, norms in drawn.items() if norms}
    if not drawn:
        return None
    few = max(map(len, drawn.values())) <= MOST_BANDS
    styles = norm_styles(norm for norms in drawn.values() for norm in norms)
    handles: dict[str, Any] = {}
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(drawn, 2.1) if few else _grid(drawn, 3.2, 1, 2 * PANEL_WIDTH)
        for ax, (title, norms) in zip(axes, drawn.items(), strict=True):
            for i, (norm, curves) in enumerate(norms.items()):
                color, marker, line = styles[norm]
                epochs, mean = np.arange(1, curves.shape[1] + 1), curves.mean(axis=0)
                every = max(1, len(epochs) // 8)
                marks = slice(i * every // len(norms), None, every)  # staggered, so that none hides another
                (handle,) = ax.plot(epochs, mean, color=color, marker=marker, linestyle=line, markevery=marks)
                handles.setdefault(norm, handle)
                if few and len(curves) > 1:
                    std = curves.std(axis=0, ddof=1)
                    ax.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
            if not few:
                skipped = max(curves.shape[1] for curves in norms.values()) // 4
                title += f", from epoch {skipped + 1} on" if skipped else ""
                shown = [curves.mean(axis=0)[skipped:] for curves in norms.values() if curves.shape[1] > skipped]
                ax.set(xlim=(skipped + 0.5, None), ylim=(min(map(np.min, shown)) - 0.5, None))
            ax.set_title(textwrap.fill(title, TITLE_WIDTH))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, **TICKS))
        banded = few and any(len(curves) > 1 for norms in drawn.values() for curves in norms.values())
        several = max(len(curves) for norms in drawn.values() for curves in norms.values()) > 1
        title = "Learning curves" + (": mean over seeds" if several else "") + (", band ±1 std" if banded else "")
        _title(figure, title)
        where = {"loc": "outside lower center", "ncols": len(handles)} if few else {"loc": "outside right upper"}
        figure.legend(handles.values(), handles.keys(), **where)
        label_outer(axes, "Epoch", "Accuracy (%)")
    return figure


def seeds_and_means(panels: Panels) -> Figure | None:
    """Draw every seed, and each norm's mean with its 95 % t interval; data: (num_seeds,) in percent."""

    def draw(ax: Axes, row: int, sample: Array, style: NormStyle) -> None:
        summary = summarize(sample)
        if not summary.n:
            return
        _dots(ax, row, sample, style)
        _interval(ax, row + 0.14, summary.mean, summary.mean_interval, style)

    return _rows(panels, draw, "Test accuracy (%)", "Seeds (dots), mean and its 95 % interval")


def paired_differences(panels: Panels, reference: str, kind: str = "") -> Figure | None:
    """Draw norm minus reference, each pair and the mean with its interval; data: MeanComparison in points.

    ``kind`` is what is to be said of the intervals besides that they are not corrected."""

    def draw(ax: Axes, row: int, comparison: MeanComparison, style: NormStyle) -> None:
        _dots(ax, row, np.array(comparison.differences), style)
        _interval(ax, row + 0.14, comparison.difference, comparison.interval, style)

    title = f"Difference to {reference}: mean and its 95 % interval, uncorrected{kind}"
    figure = _rows(panels, draw, f"Test accuracy, difference to {reference} (points)", title)
    if figure is not None:
        for ax in figure.axes:
            ax.axvline(0, color="black", linewidth=0.9, zorder=1)
        _share_x(figure)
    return figure


def spreads(panels: Panels) -> Figure | None:
    """Draw the std over seeds with its chi-square interval; data: (num_seeds,) in percent.

    The axis is logarithmic, so equal ratios are equal lengths; a std of zero has no place on it."""

    def draw(ax: Axes, row: int, sample: Array, style: NormStyle) -> None:
        summary = summarize(sample)
        if summary.std > 0 and not np.isnan(summary.std_interval[0]):
            _interval(ax, row, summary.std, summary.std_interval, style)

    title = "Spread between seeds: std and its 95 % interval"
    figure = _rows(panels, draw, "Std of test accuracy between seeds (points)", title)
    if figure is not None:
        for ax in figure.axes:
            ax.set_xscale("log")
        low, high = _share_x(figure)
        for ax in figure.axes:
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _grid(
    titles: Collection[str], height: float, columns: int = 2, width: float = PANEL_WIDTH
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels in up to ``columns`` columns, each of ``width`` x ``height`` inches, and higher where
    titles have several lines."""
    panels, lines = len(titles), max(len(textwrap.wrap(title, TITLE_WIDTH)) for title in titles)
    columns = min(panels, columns)
    rows, height = -(-panels // columns), height + 0.14 * (lines - 1)
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def label_outer(axes: Sequence[Axes], xlabel: str, ylabel: str) -> None:
    """Label the axes at the figure's left and lower edge only; they are the same in all panels."""
    for i, ax in enumerate(axes):
        spec = ax.get_subplotspec()
        assert spec is not None
        if spec.is_first_col():
            ax.set_ylabel(ylabel)
        if i + spec.get_gridspec().ncols >= len(axes):
            ax.set_xlabel(xlabel)


def _share_x(figure: Figure) -> tuple[float, float]:
    """Give all panels the same limits, so that their lengths can be compared."""
    limits = [ax.get_xlim() for ax in figure.axes if ax.has_data()]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for ax in figure.axes:
        ax.set_xlim(low, high)
    return low, high


def _dots(ax: Axes, row: int, values: Array, style: NormStyle) -> None:
    heights = row - 0.22 + np.linspace(-0.1, 0.1, len(values))
    ax.plot(values, heights, ".", color=style.color, alpha=0.6, markersize=6, markeredgewidth=0)


def _title(figure: Figure, title: str) -> None:
    """Write a title above all axes, in lines that a narrow figure has room for."""
    figure.suptitle(textwrap.fill(title, int(15 * figure.get_figwidth())), fontsize=8.5)


def _interval(ax: Axes, height: float, middle: float, interval: tuple[float, float], style: NormStyle) -> None:
    ax.plot(interval, (height, height), color=style.color, linewidth=1.6, solid_capstyle="butt")
    ax.plot(middle, height, color=style.color, marker=style.marker, markersize=5)


def _rows(panels: Panels, draw: Any, xlabel: str, title: str) -> Figure | None:
    """Draw one row a norm in each panel, the same rows in all of them."""
    names = list(dict.fromkeys(norm for norms in panels.values() for norm in norms))
    if not names:
        return None
    styles = norm_styles(names)
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(panels, 0.55 + 0.3 * len(names))
        for ax, (panel, norms) in zip(axes, panels.items(), strict=True):
            for row, norm in enumerate(names):
                if norm in norms:
                    draw(ax, row, norms[norm], styles[norm])
            ax.set(title=textwrap.fill(panel, TITLE_WIDTH), ylim=(len(names) - 0.5, -0.5))
            ax.set_yticks(range(len(names)), names)
            ax.grid(False, axis="y")
            ax.xaxis.set_major_locator(MaxNLocator(**TICKS))
        _title(figure, title)
        label_outer(axes, xlabel, "")
    return figure if any(ax.has_data() for ax in axes) else None
