"""Write the report of a folder of runs into that folder, and print it: python scripts/report.py results/NAME"""

import argparse
import sys
from pathlib import Path

from abn_exp.report.build import print_report, write_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Write report.md, report.csv, runs.csv, report.tex and figures.")
    parser.add_argument("folder", type=Path, help="a folder that train.py wrote: results/NAME")
    parser.add_argument("--reference", default="bn", help="the norm that others are compared with (default: bn)")
    arguments = parser.parse_args()
    try:
        report = write_report(arguments.folder, reference=arguments.reference)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
