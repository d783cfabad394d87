"""Write the table of docs/short-schedules.md from a study's records: python scripts/schedules.py [results/NAME]

A row is what was run with the same options for every norm; it is named by the options that most rows do not have. The
rows are sorted by validation accuracy, the mean over norms, with those in which a run failed at the end; n (2/3: one
of three runs failed), standard deviation (ddof = 1), interval and cost are of the seeds. Without an argument
the packed records, results/quoted/schedules, are read.
"""

import argparse
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from abn_exp.commandline import print_error
from abn_exp.files import write_text_atomic
from abn_exp.options import all_options
from abn_exp.report.formatting import Table, interval_text, markdown_table, number_text, replace_between, signed_text
from abn_exp.report.stats import NAN, Summary, summarize
from abn_exp.results import Run, find_runs
from abn_exp.trained_network import read_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/short-schedules.md"
BEGIN, END = "<!-- written by scripts/schedules.py -->", "<!-- end of what scripts/schedules.py writes -->"

Row = tuple[str, str]  # model, variant


def table(runs: Iterable[Run]) -> Table:
    """Return a line for each row and norm: what it changes, its cost, validation and test accuracy in percent."""
    rows = defaultdict[Row, dict[str, list[Run]]](lambda: defaultdict(list))
    for run in runs:
        if run.status in ("finished", "failed", "diverged"):
            rows[run.model, run.variant][run.norm].append(run)
    first = {row: next(iter(norms.values()))[0] for row, norms in rows.items()}
    names, lines = _names(first), []
    for row in sorted(rows, key=lambda row: (_failed(rows[row]), -_validation(rows[row]))):
        for norm, ended in sorted(rows[row].items(), key=lambda item: item[0] != "bn"):
            results = [run.result for run in ended if run.result is not None]
            found = summarize(_accuracies(ended))
            test = summarize([100 * result.test_acc for result in results])
            minutes = summarize([result.train_seconds * (result.threads or 1) / 60 for result in results])
            lines.append(
                [
                    names[row],
                    str(read_config(ended[0].directory)["recipe"]["epochs"]),
                    norm,
                    str(len(ended)) if len(results) == len(ended) else f"{len(results)}/{len(ended)}",
                    _accuracy(found),
                    _minus_bn(ended, rows[row].get("bn", [])) if norm != "bn" else "",
                    _accuracy(test),
                    number_text(minutes.mean, 0),
                ]
            )
    header = ["changed", "epochs", "norm", "n", "validation (95 % interval)", "minus bn (validation, points)"]
    return [*header, "test (95 % interval)", "core-minutes"], lines


def _minus_bn(runs: Sequence[Run], base: Sequence[Run]) -> str:
    """Return the mean difference in validation accuracy to the same seeds with BN, in points, with its interval."""
    with_bn = {run.seed: accuracy for run, accuracy in zip(base, _accuracies(base), strict=True)}
    found = summarize(
        [accuracy - with_bn.get(run.seed, NAN) for run, accuracy in zip(runs, _accuracies(runs), strict=True)]
    )
    return f"{signed_text(found.mean)} ({interval_text(found.mean_interval)})"


def _accuracy(found: Summary) -> str:
    return f"{number_text(found.mean)} ± {number_text(found.std)} ({interval_text(found.mean_interval)})"


def _accuracies(runs: Iterable[Run]) -> list[float]:
    """Return the validation accuracy of the last epoch in percent, NaN where there is none."""
    found = [run.result.val_acc_last if run.result is not None else None for run in runs]
    return [NAN if accuracy is None else 100 * accuracy for accuracy in found]


def _failed(norms: dict[str, list[Run]]) -> bool:
    return any(run.status != "finished" for runs in norms.values() for run in runs)


def _validation(norms: dict[str, list[Run]]) -> float:
    """Return the mean over norms of the mean validation accuracy, by which rows are sorted."""
    means = [summarize(_accuracies(runs)).mean for runs in norms.values()]
    return sum(0.0 if math.isnan(mean) else mean for mean in means) / len(means)


def _names(rows: dict[Row, Run]) -> dict[Row, str]:
    """Return what each row changes of the most frequent value of every option, the network first."""
    options = {}
    for row, run in rows.items():
        config = read_config(run.directory)
        found = all_options(config)
        found = {key: value for key, value in found.items() if not key.startswith(("norm.", "seed", "init_"))}
        if config.get("init_from") is not None:  # of each seed its own
            place = re.sub(r"seed-\d+/?$", "seed-${seed}", config["init_from"])
            found["init_from"] = place.replace(f"/{run.norm}/", "/NORM/")
        options[row] = {"model": run.model, **found}
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
        runs = find_runs(folder)
        if not (count := sum(run.status == "finished" for run in runs)):
            raise ValueError(f"{folder} has no finished runs; python train.py study=schedules makes them.")
        page = PAGE.read_text(encoding="utf-8")
        write_text_atomic(PAGE, replace_between(page, BEGIN, END, markdown_table(table(runs), 3)))
    except (ValueError, OSError) as error:
        return print_error(error)
    print(f"{count} runs; written to {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
