"""Write the time to accuracy as CSV, a Markdown summary and a figure."""

from datetime import UTC, datetime
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from abn_exp import provenance
from abn_exp.files import write_text_atomic
from abn_exp.report import figures
from abn_exp.report.formatting import interval_text, number_text, p_text, signed_text
from abn_exp.report.stats import summarize
from benchmarks.report import cell, device_folder, table
from benchmarks.time_to_accuracy import REFERENCE, Row, TimeToAccuracy

# (loop, rate): colour, marker
STYLES = {
    ("conventional", REFERENCE): ("black", "o"),
    ("ours", REFERENCE): ("0.5", "^"),
    ("ours", "cosine"): (figures.VERMILLION, "s"),
    ("ours", "linear"): (figures.BLUE, "D"),
}


def write(found: TimeToAccuracy, device_name: str, command: str, folder: Path) -> Path:
    """Write the files beside the device's other ones; return the summary's path."""
    folder = device_folder(folder, device_name)
    lines = ["loop,schedule,epochs,hours,seed,test_acc_percent"]
    for row in found.rows:
        start = f"{row.loop},{row.budget.schedule},{row.budget.epochs},{row.hours:.6g}"
        lines += [f"{start},{seed},{accuracy:.6g}" for seed, accuracy in sorted(row.budget.by_seed.items())]
    write_text_atomic(folder / "time_to_accuracy.csv", "\n".join(lines) + "\n")
    write_text_atomic(folder / "time_to_accuracy.md", _markdown(found, device_name, command))
    figures.save(_figure(found), folder, "time_to_accuracy")
    return folder / "time_to_accuracy.md"


def _markdown(found: TimeToAccuracy, device_name: str, command: str) -> str:
    dataset, model, norm = found.cell
    config, epoch = found.config, found.epoch
    width = f" at width {config.model['width']:g}" if "width" in config.model else ""
    header = ["loop", "rate", "epochs", "n", "test accuracy, %", "minus the constant rate at its end", "p", "hours"]
    verdict = "No decayed budget that was run is as accurate, in the mean, as the constant rate at its end."
    if found.soonest is not None:
        verdict = (
            f"As accurate, in the mean, as the constant rate at its end: {found.soonest.budget.epochs} epochs of a "
            f"{found.soonest.budget.schedule} rate, {found.soonest.hours:.3g} hours instead of "
            f"{found.rows[0].hours:.3g}, {found.ratio:.1f} times sooner."
        )
    return "\n".join(
        [
            f"# Time to accuracy on {device_name}\n",
            f"Made by `{command}` on {datetime.now(UTC):%Y-%m-%d} at commit {provenance.git_commit()}. {dataset}, "
            f"{model}{width}, {norm}; {found.images:,} images an epoch, batches of {config.recipe.batch_size}, "
            f"precision {config.precision}. An epoch takes {cell(epoch['conventional'])} s in the conventional loop, "
            f"{cell(epoch['ours'])} s in ours: medians (quartiles) of interleaved repetitions, evaluations left out. "
            "What the conventional loop computes is what ours computes with a constant rate; the accuracies are of "
            "our runs.\n",
            f"**{verdict}**\n",
            table([*header, "conventional hours / these"], [_line(row, found) for row in found.rows]),
            "Accuracies: mean ± standard deviation between seeds; differences paired by seed, with 95 % intervals.\n",
            "![Accuracy against hours](time_to_accuracy.png)\n",
        ]
    )


def _line(row: Row, found: TimeToAccuracy) -> list[str]:
    summary, against = summarize(row.budget.accuracies), row.against
    accuracy = f"{number_text(summary.mean)} ± {number_text(summary.std)}"
    own = [row.loop, row.budget.schedule, f"{row.budget.epochs}", f"{summary.n}", accuracy, "", ""]
    if against is not None:
        own[-2:] = [f"{signed_text(against.difference)} ({interval_text(against.interval)})", p_text(against.p)]
    return [*own, f"{row.hours:.3g}", f"{found.rows[0].hours / row.hours:.1f}"]


def _figure(found: TimeToAccuracy) -> Figure:
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(4.5, 3), layout="constrained")
        ax = figure.add_subplot()
        for (loop, schedule), (color, marker) in STYLES.items():
            rows = [row for row in found.rows if (row.loop, row.budget.schedule) == (loop, schedule)]
            if not rows:
                continue
            summaries = [summarize(row.budget.accuracies) for row in rows]
            spread = [
                [s.mean - s.mean_interval[0] for s in summaries],
                [s.mean_interval[1] - s.mean for s in summaries],
            ]
            hours, means = [row.hours for row in rows], [s.mean for s in summaries]
            ax.errorbar(hours, means, spread, color=color, marker=marker, capsize=2, label=f"{loop}, {schedule} rate")
        ax.axhline(found.rows[0].budget.mean, color="black", linewidth=0.6, linestyle=":")
        ax.set(xscale="log", xlabel="Hours of training", ylabel="Test accuracy (%)")
        hours = sorted({row.hours for row in found.rows})
        ax.set_xticks(hours, [f"{h:.2g}" for h in hours])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.legend(loc="lower right")
        figure.suptitle("Accuracy against time: mean and 95 % interval over seeds", fontsize=8.5)
    return figure
