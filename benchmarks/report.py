"""Write a benchmark as CSV, a Markdown summary and a figure."""

import re
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from abn_exp import provenance
from abn_exp.files import write_text_atomic
from abn_exp.report import figures
from abn_exp.report.formatting import csv_text, markdown_table, significant_text
from benchmarks.configurations import BASE, WIDTHS, Effort
from benchmarks.measure import Quartiles
from benchmarks.run import Findings

UNITS = {"images": "s of an epoch", "width": "s of a step", "batch": "s of a step", "seeds": "s of an epoch of all"}


def write(found: Findings, effort: Effort, device_name: str, command: str, folder: Path) -> Path:
    """Write the files into a folder of the device's name; return it."""
    folder = device_folder(folder, device_name)
    write_text_atomic(folder / "benchmark.csv", _csv(found))
    write_text_atomic(folder / "benchmark.md", _markdown(found, effort, device_name, command))
    figures.save(_figure(found), folder, "growth")
    return folder


def device_folder(folder: Path, device_name: str) -> Path:
    folder = folder / re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _csv(found: Findings) -> str:
    ratios = {(place, row, "ratio to conventional"): q for (place, row), q in found.ratios.items()}
    rows = [[*key, *(f"{value:.6g}" for value in q)] for key, q in (found.columns | ratios).items()]
    for (axis, row), (sizes, values, slope) in found.growth.items():
        for size, q in zip(sizes, values, strict=True):
            rows.append([f"growth: {axis}", row, f"{axis}={size:g}, s", *(f"{value:.6g}" for value in q)])
        rows.append([f"growth: {axis}", row, "exponent", "", f"{slope:.4g}", ""])
    header = ("place", "row", "column", "q1", "median", "q3")
    return csv_text([dict(zip(header, row, strict=True)) for row in rows])


def cell(q: Quartiles | None) -> str:
    if q is None:
        return ""
    if q.low == q.high:
        return significant_text(q.median)
    return f"{significant_text(q.median)} ({significant_text(q.low)} to {significant_text(q.high)})"


def table(header: list[str], rows: list[list[str]]) -> str:
    return markdown_table((header, rows), numbers_from=1) + "\n"


def _describe_device(found: Findings, place: str, first: str) -> str:
    columns = list(dict.fromkeys(column for at, _, column in found.columns if at == place))
    rows = list(dict.fromkeys(row for at, row, _ in found.columns if at == place))
    cells = [[row, *(cell(found.columns.get((place, row, column))) for column in columns)] for row in rows]
    if any(at == place for at, _ in found.ratios):
        columns = ["times conventional", *columns]
        for line in cells:
            line.insert(1, cell(found.ratios.get((place, line[0]))))
    return table([first, *columns], cells)


def _markdown(found: Findings, effort: Effort, device_name: str, command: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    assert found.ceilings is not None
    peaks = [
        f"{str(t).removeprefix('torch.')} {rate / 1e12:.3g} TFLOP/s" for t, rate in found.ceilings.products.items()
    ]
    sections = [
        f"# Speed on {device_name}\n",
        f"Made by `{command}` on {datetime.now(UTC):%Y-%m-%d} at commit {provenance.git_commit()}; {versions}. "
        f"Median (quartiles) of {effort.repetitions} interleaved repetitions of {effort.steps} timed steps after "
        f"{effort.warm} others. Images are random, 32 x 32. Ceilings measured in the same run: products "
        f"{', '.join(peaks)}; copy {found.ceilings.copy / 1e9:.3g} GB/s (read and written).\n",
    ]
    for model, width in WIDTHS.items():
        size = effort.batch_size[model]
        sections += [
            f"## {model} at width {width:g}, batches of {size}\n",
            _describe_device(found, model, "loop"),
            f"s/epoch: 50,000 training and 10,000 test images, data included, extrapolated from {effort.steps} steps "
            f"of training and {(effort.steps + 1) * size} evaluated images. Step with data: ours by Lightning. "
            "Saved for backward: each storage once, without parameters and binarised weights. Peak: above what was "
            "in use before the step. exact16's ceiling is bfloat16's, which its 8-bit products on a CPU can pass.\n",
        ]
    loader_ratios = "; ".join(f"{at}: {cell(q)} times" for (at, _), q in found.ratios.items() if "loader" in at)
    growth = []
    for (axis, row), (sizes, values, slope) in found.growth.items():
        seconds = ", ".join(significant_text(q.median) for q in values)
        growth.append([axis, row, ", ".join(f"{size:g}" for size in sizes), seconds, f"{slope:.2f}"])
    sections += [
        "## Norm chain alone, forward and backward\n",
        _describe_device(found, "chain", "loop"),
        "## Loader alone\n",
        _describe_device(found, "loader", "loader") + f"\nRatios: {loader_ratios}.\n",
        "## Host memory\n",
        _describe_device(found, "host", "loop"),
        "## Growth\n",
        table(["axis", "loop", "sizes", "median seconds", "exponent"], growth),
        f"resnet18_paper; images and batch at width {effort.growth_width:g}, images and width with batches of "
        f"{effort.growth_batch}. Images: a whole epoch of training, its start included. Seeds, where measured: an "
        f"epoch of {effort.images[-1]:,} images of each, at once in a process with one thread each; one after "
        "another, as in the conventional loop, their exponent is 1.\n\n![Growth](growth.png)\n",
    ]
    return "\n".join(sections)


def _figure(found: Findings) -> Figure:
    styles = {BASE: ("black", "o", "-"), found.ours: (figures.VERMILLION, "s", figures.DASH)}
    with matplotlib.rc_context(figures.STYLE):
        shown = {axis: unit for axis, unit in UNITS.items() if (axis, found.ours) in found.growth}
        figure = Figure(figsize=(2.3 * len(shown), 2.5), layout="constrained")
        for i, (axis, unit) in enumerate(shown.items()):
            ax = figure.add_subplot(1, len(shown), i + 1)
            for row, (color, marker, line) in styles.items():
                if (axis, row) not in found.growth:
                    continue
                sizes, values, slope = found.growth[axis, row]
                middle = [q.median for q in values]
                spread = [[q.median - q.low for q in values], [q.high - q.median for q in values]]
                label = f"{row}: {axis}$^{{{slope:.2f}}}$"
                ax.errorbar(sizes, middle, spread, color=color, marker=marker, linestyle=line, label=label, capsize=2)
            ax.set(xscale="log", yscale="log", xlabel=axis.capitalize(), ylabel=unit)
            ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
            ax.xaxis.set_minor_formatter(NullFormatter())
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.legend(loc="upper left", handlelength=2)
        figure.suptitle("How the time grows, and the exponent of a power law through it", fontsize=8.5)
    return figure
