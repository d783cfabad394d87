"""Look after runs: python scripts/runs.py --pack results/NAME writes results/quoted/NAME, to be committed."""

import argparse
import sys
from pathlib import Path

from abn_exp.report.pack import pack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--pack",
        type=Path,
        metavar="results/NAME",
        help="write or extend results/quoted/NAME: the report, the figures, and the records of all runs in one file",
    )
    arguments = parser.parse_args()
    try:
        done = pack(arguments.pack)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for line in done.left_out:
        print(line)
    print(f"{done.folder}: {done.added} runs added, {done.present} were there.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
