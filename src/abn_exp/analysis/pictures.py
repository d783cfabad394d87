"""Figures of the analyses of trained networks, in the style of the reports' figures.

``panels`` maps a panel's title to {norm: data}. Every function returns a matplotlib Figure.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from abn_exp.report.figures import PANEL_WIDTH, SKY, STYLE, VERMILLION, label_outer, norm_styles
from abn_exp.report.stats import Array, t_interval

PAGE = 2 * PANEL_WIDTH  # inches
BAND_COLORS = ("0.75", SKY, VERMILLION, "black")


@contextmanager
def _panels(
    panels: Collection[str], columns: int, height: float, title: str, xlabel: str, ylabel: str
) -> Iterator[tuple[Figure, list[Axes], dict[str, Any]]]:
    """Yield a figure, its panels, and a dictionary for the legend, label -> handle, which is drawn at the end."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    handles: dict[str, Any] = {}
    with matplotlib.rc_context(STYLE):
        width = PANEL_WIDTH if columns == 1 else PAGE
        figure = Figure(figsize=(width, height * rows + 0.6), layout="constrained")
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
        for ax, panel in zip(axes, panels, strict=True):
            ax.set_title(panel)
        yield figure, axes, handles
        label_outer(axes, xlabel, ylabel)
        figure.suptitle(title, fontsize=8.5)
        most = 6 if width == PAGE else 2
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(most, len(handles)))


def curves(
    panels: Mapping[str, Mapping[str, Array]],
    x: Array,
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    log: bool = False,
    whole: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw each norm's mean over seeds with its 95 % t interval as a band; data: (num_seeds, len(x)).

    `log`: a logarithmic y axis. `whole`: x are whole numbers.
    """
    styles = norm_styles(norm for norms in panels.values() for norm in norms)
    columns, title = min(3, len(panels)), f"{title}: mean over seeds, band 95 % interval"
    with _panels(panels, columns, 1.7, title, xlabel, ylabel) as (figure, axes, handles):
        for ax, norms in zip(axes, panels.values(), strict=True):
            for i, (norm, values) in enumerate(norms.items()):
                color, marker, line = styles[norm]
                every = max(1, len(x) // 6)
                marks = slice(i * every // len(norms), None, every)
                drawn: dict[str, Any] = {"color": color, "linestyle": line, "marker": marker, "markevery": marks}
                (handle,) = ax.plot(x[: values.shape[1]], values.mean(0), linewidth=1.2, markersize=3.5, **drawn)
                handles.setdefault(norm, handle)
                low, high = np.array([t_interval(column) for column in values.T]).T
                ax.fill_between(x[: values.shape[1]], low, high, color=color, alpha=0.2, linewidth=0)
            if log:
                ax.set_yscale("log")
                ax.yaxis.set_minor_formatter(NullFormatter())
            if limits is not None:
                ax.set_ylim(*limits)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole))
    return figure


def layer_means(panels: Mapping[str, Mapping[str, Array]], layers: Sequence[str], title: str, ylabel: str) -> Figure:
    """Draw, layer by layer, each norm's mean over seeds with its 95 % t interval; data: (num_seeds, num_layers)."""
    styles = norm_styles(norm for norms in panels.values() for norm in norms)
    title, xlabel = f"{title}:\nmean over seeds and 95 % interval", "Input of the binary layer"
    with _panels(panels, 2, 2.6, title, xlabel, ylabel) as (figure, axes, handles):
        for ax, norms in zip(axes, panels.values(), strict=True):
            for i, (norm, values) in enumerate(norms.items()):
                at = np.arange(len(layers)) + 0.5 * ((i + 0.5) / len(norms) - 0.5)
                bounds = np.array([t_interval(column) for column in values.T]).T
                mean = values.mean(0)
                error = np.nan_to_num(np.abs(bounds - mean))  # a single seed has no interval
                style = styles[norm]
                handles[norm] = ax.errorbar(
                    at, mean, error, color=style.color, marker=style.marker, linestyle="none", markersize=4
                )
            ax.set_xticks(range(len(layers)), layers, rotation=35 if len(layers) < 10 else 90, ha="right")
            ax.set_ylim(bottom=0)
    return figure


def scatter(panels: Mapping[str, Mapping[str, Array]], title: str, xlabel: str, ylabel: str) -> Figure:
    """Draw each network as a point; data: (num_seeds, 2), x and y."""
    styles = norm_styles(norm for norms in panels.values() for norm in norms)
    with _panels(panels, 2, 2.2, f"{title}:\neach network a point", xlabel, ylabel) as (figure, axes, handles):
        for ax, norms in zip(axes, panels.values(), strict=True):
            for norm, points in norms.items():
                color, marker, _ = styles[norm]
                drawn = ax.scatter(
                    points[:, 0], points[:, 1], s=14, color=color, marker=marker, alpha=0.6, linewidths=0
                )
                handles.setdefault(norm, drawn)
    return figure


def channel_spread(panels: Mapping[str, Mapping[str, Array]], xlabel: str, title: str) -> Figure:
    """Draw how a number in [0, 1] is distributed over channels, in 20 bins; data: (num_channels,)."""
    edges = np.linspace(0, 1, 21)
    styles = norm_styles(norm for norms in panels.values() for norm in norms)
    with _panels(panels, 3, 1.7, title, xlabel, "Channels (%)") as (figure, axes, handles):
        for ax, norms in zip(axes, panels.values(), strict=True):
            for norm, values in norms.items():
                color, _, line = styles[norm]
                shares = 100 * np.histogram(values, edges)[0] / len(values)
                handles.setdefault(norm, ax.stairs(shares, edges, color=color, linestyle=line, linewidth=1.3))
    return figure


def responses(panels: Mapping[str, Mapping[str, Array]], x: Array, title: str) -> Figure:
    """Draw learned responses, one row a norm and one column a layer; data: (num_channels, len(x)).

    Solid where the sign is +1, pale and dashed where it is -1.
    """
    names = list(dict.fromkeys(norm for norms in panels.values() for norm in norms))
    with matplotlib.rc_context(STYLE):
        columns = len(panels)
        figure = Figure(figsize=(max(PAGE, 1.25 * columns), 1.6 * len(names) + 0.6), layout="constrained")
        axes = figure.subplots(len(names), columns, squeeze=False, sharex=True, sharey=True)
        for column, (layer, norms) in enumerate(panels.items()):
            axes[0, column].set_title(layer)
            for row, norm in enumerate(names):
                ax = axes[row, column]
                ax.axhline(0, color="black", linewidth=0.8)
                if norm not in norms:
                    continue
                colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(norms[norm])))
                for y, color in zip(norms[norm], colors, strict=True):
                    ax.plot(x, y, color=color, alpha=0.45, linewidth=0.8, linestyle=(0, (2, 1.5)))
                    ax.plot(x, np.where(y >= 0, y, np.nan), color=color, linewidth=1.3)
        for row, norm in enumerate(names):
            axes[row, 0].set(ylabel=f"{norm}: y", ylim=(-2.5, 4))
        for ax in axes[-1]:
            ax.set_xlabel("Standardised input")
        figure.suptitle(title, fontsize=8.5)
    return figure


def bands(norms: Mapping[str, Array], layers: Sequence[str], names: Sequence[str], title: str) -> Figure:
    """Draw the shares of channels in each band as stacked bars, one panel a norm; data: (num_bands, num_layers)."""
    with _panels(norms, 2, 2.2, title, "Norm", "Channels (%)") as (figure, axes, handles):
        for ax, shares in zip(axes, norms.values(), strict=True):
            bottom = np.zeros(shares.shape[1])
            for name, share, color in zip(names, 100 * shares, BAND_COLORS, strict=True):
                handles.setdefault(name, ax.bar(range(len(layers)), share, bottom=bottom, color=color, width=0.7))
                bottom += share
            ax.set_xticks(range(len(layers)), layers, rotation=35 if len(layers) < 10 else 90, ha="right")
            ax.grid(False, axis="x")
    return figure


def overlays(
    images: Array, rows: Sequence[str], maps: Mapping[str, Array], titles: Mapping[str, Sequence[str]]
) -> Figure:
    """Draw images (N, S, S, 3) in [0, 1] and, beside each, every norm's map (N, S, S) over it; N titles a norm."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 7.5}):
        count, columns = len(images), 1 + len(maps)
        figure = Figure(figsize=(1.75 * columns, 1.75 * count + 0.5), layout="constrained")
        axes = figure.subplots(count, columns, squeeze=False)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for row in range(count):
            axes[row, 0].imshow(images[row], interpolation="nearest")
            axes[row, 0].set_title(rows[row])
            for column, (norm, drawn) in enumerate(maps.items(), 1):
                ax, heat = axes[row, column], drawn[row]
                ax.imshow(images[row].mean(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                shown = heat / heat.max() if heat.max() > 0 else heat
                ax.imshow(shown, cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="bilinear")
                ax.set_title(titles[norm][row])
        figure.suptitle("Grad-CAM: bright is what speaks for the class in the title", fontsize=8.5)
    return figure
