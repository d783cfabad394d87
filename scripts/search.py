#!/usr/bin/env python
r"""Search hyper-parameters with the same budget for each norm, judged by validation accuracy over seeds.

    python scripts/search.py --trials 20 norm=bn,abn dataset=cifar10 recipe=short \
        'recipe.optimizer.lr=tag(log,interval(1e-4,1e-1))' 'recipe.batch_size=choice(64,128)' name=my-search

The words are those of train.py. An option that is given a range is searched: interval(a,b), tag(log,interval(a,b)),
int(interval(a,b)), range(...), choice(...) or a,b,c. seed=1000,1001,1002 (the default) are a trial's seeds; what
counts is the mean of their validation accuracies, never the test set. The runs, a table and Optuna's journal are in
results/<name>. The same command goes on with a search that was stopped; given in a second terminal, it shares the
work. Needs pip install --editable ".[search]".
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from hydra import initialize_config_dir

from abn_exp.commandline import HYDRA_ERRORS, check_groups, positive_int, print_error
from abn_exp.errors import Stopped, stop_on_signals

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # norms and optimizers of one's own lie beside train.py


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as for train.py; ranges are searched")
    parser.add_argument("--trials", type=positive_int, default=20, help="of each norm (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        from abn_exp.training.search import Search, read_space
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        print('error: a search needs Optuna: pip install --editable ".[search]".', file=sys.stderr)
        return 1
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.WARNING)  # a line a trial is printed; what a run says is in its train.log
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console])
    try:
        check_groups(arguments.overrides, REPOSITORY / "conf")
        with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
            search = Search(read_space(arguments.overrides))
            search.run(arguments.trials)
        path = search.write()
    except (*HYDRA_ERRORS, ValueError, OSError) as error:
        return print_error(error, REPOSITORY / "conf")
    except Stopped as stopped:
        print(f"stopped by {stopped.signal}; the same command goes on with this search", file=sys.stderr)
        raise
    print_table(search.table())
    for norm, values in search.best().items():
        print(f"best with norm={norm}: {shlex.join(values)}")
    print(f"written to {path}")
    return 0


def print_table(rows: list[dict[str, str]]) -> None:
    """Print the trials in the width of the terminal; options by the last part of their names."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for key in rows[0] if rows else []:
        table.add_column(key if " " in key else key.rpartition(".")[2], justify="left" if key == "norm" else "right")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
