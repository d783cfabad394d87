"""Write the table of docs/short-schedules.md from a study's records: python scripts/schedules.py [results/NAME]

A row is what was run with the same options for every norm; it is named by the options that most rows do not have. The
rows are sorted by validation accuracy, the mean over norms; n, standard deviation (ddof = 1), interval and cost are
of the seeds. Without an argument the packed records, results/quoted/schedules, are read.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from abn_exp.commandline import print_error
from abn_exp.files import write_text_atomic
from abn_exp.options import all_options
from abn_exp.report.formatting import Table, interval_text, markdown_table, number_text, replace_between
from abn_exp.report.stats import summarize
from abn_exp.results import RunResult, load_runs
from abn_exp.trained_network import read_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/short-schedules.md"
BEGIN, END = "<!-- written by scripts/schedules.py -->", "<!-- end of what scripts/schedules.py writes -->"
NAN = float("nan")

Row = tuple[str, str]  # model, variant


def table(results: Sequence[RunResult]) -> Table:
    """Return a line for each row and norm: what it changes, its cost, validation and test accuracy in percent."""
    rows = defaultdict[Row, dict[str, list[RunResult]]](lambda: defaultdict(list))
    for result in results:
        rows[result.model, result.variant][result.norm].append(result)
    names = _names({row: next(iter(norms.values()))[0] for row, norms in rows.items()})
    lines = []
    for row in sorted(rows, key=lambda row: -_validation(rows[row])):
        for norm, runs in sorted(rows[row].items(), key=lambda item: item[0] != "bn"):
            found = summarize([100 * run.val_acc_last if run.val_acc_last is not None else NAN for run in runs])
            test = summarize([100 * run.test_acc for run in runs])
            minutes = summarize([run.train_seconds * (run.threads or 1) / 60 for run in runs])
            lines.append(
                [
                    names[row],
                    str(runs[0].epochs),
                    norm,
                    str(found.n),
                    f"{number_text(found.mean)} ± {number_text(found.std)}",
                    interval_text(found.mean_interval),
                    f"{number_text(test.mean)} ± {number_text(test.std)}",
                    number_text(minutes.mean, 0),
                ]
            )
    header = ["changed", "epochs", "norm", "n", "validation, mean ± std", "95 % interval", "test", "core-minutes"]
    return header, lines


def _validation(norms: dict[str, list[RunResult]]) -> float:
    """Return the mean over norms of the mean validation accuracy of the last epoch, by which rows are sorted."""
    means = [summarize([run.val_acc_last or 0.0 for run in runs]).mean for runs in norms.values()]
    return sum(means) / len(means)


def _names(rows: dict[Row, RunResult]) -> dict[Row, str]:
    """Return what each row changes of the most frequent value of every option, the network first."""
    options = {}
    for row, result in rows.items():
        assert result.directory is not None
        found = all_options(read_config(result.directory))
        found = {key: value for key, value in found.items() if not key.startswith(("norm.", "seed"))}
        options[row] = {"model": result.model, **found}
    keys = list(dict.fromkeys(key for one in options.values() for key in one if key != "recipe.epochs"))
    usual = {key: Counter(str(one.get(key)) for one in options.values()).most_common(1)[0][0] for key in keys}
    names = {}
    for row, one in options.items():
        if one["model"] != usual["model"]:  # its other options follow from that
            names[row] = f"model={one['model']}"
            continue
        changed = [key for key in keys if str(one.get(key)) != usual[key]]
        names[row] = " ".join(f"{key}={one.get(key)}".replace(" ", "") for key in changed) or "-"
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "results/quoted/schedules", metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        if not (results := load_runs(folder)):
            raise ValueError(f"{folder} has no finished runs; python train.py study=schedules makes them.")
        page = PAGE.read_text(encoding="utf-8")
        write_text_atomic(PAGE, replace_between(page, BEGIN, END, markdown_table(table(results), 3)))
    except (ValueError, OSError) as error:
        return print_error(error)
    print(f"{len(results)} runs; written to {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
