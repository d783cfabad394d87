"""List, clean, pack or upload runs: python scripts/runs.py results/NAME lists them with state and time to go."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from abn_exp.commandline import print_error
from abn_exp.errors import end_with_reader
from abn_exp.report.progress import clean, list_runs

sys.path.insert(0, str(Path(__file__).parents[1]))  # norms of one's own lie beside train.py


def main() -> int:
    parser = argparse.ArgumentParser(description="List runs with state, progress and time to go, or look after them.")
    parser.add_argument("folder", type=Path, help="a folder that train.py wrote: results, or results/NAME")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--clean",
        action="store_true",
        help="list what may go: what failed, is damaged, was stopped or has not begun; with --yes remove it",
    )
    action.add_argument(
        "--pack",
        action="store_true",
        help="write or extend results/quoted/NAME: the report, the figures, and the records of all runs in one file",
    )
    action.add_argument(
        "--upload",
        action="store_true",
        help="log to W&B what it lacks of runs that were offline, killed or cut off; as often as you like",
    )
    parser.add_argument("--yes", action="store_true", help="with --clean: remove what it lists")
    parser.add_argument(
        "--networks",
        action="store_true",
        help="with --pack: the trained networks, too, with the signs of their binary weights, in networks.tar.xz",
    )
    arguments = parser.parse_args()
    if arguments.yes and not arguments.clean:
        parser.error("--yes is for --clean")
    if arguments.networks and not arguments.pack:
        parser.error("--networks is for --pack")
    try:
        for line in _act(arguments):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


def _act(arguments: argparse.Namespace) -> Iterable[str]:
    if arguments.clean:
        lines = clean(arguments.folder, remove=arguments.yes)
        if not lines:
            return [f"Every run below {arguments.folder} is finished or being trained."]
        return lines if arguments.yes else [*lines, "Nothing was removed; --yes removes them."]
    if arguments.pack:
        from abn_exp.report.pack import pack

        done = pack(arguments.folder, networks=arguments.networks)
        return [*done.left_out, f"{done.folder}: {done.added} runs added, {done.present} were there."]
    if arguments.upload:
        from abn_exp.training.wandb_run import upload

        return upload(arguments.folder)
    end_with_reader()
    return list_runs(arguments.folder)


if __name__ == "__main__":
    sys.exit(main())
