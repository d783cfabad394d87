"""Write the report of a folder of runs into that folder, and print it: python scripts/report.py results/NAME

Several folders are compared in one report, which is printed, and written with --out.

With --watch the page is served on this machine instead, and written again while runs go on.
"""

import argparse
import sys
import time
from pathlib import Path

from abn_exp.commandline import print_error
from abn_exp.errors import end_with_reader
from abn_exp.report.build import PAGE_SECONDS, build_report, page_of, print_report, update_page, write_report
from abn_exp.report.serve import serve
from abn_exp.results import find_runs


def watch(folder: Path, reference: str, port: int) -> None:
    """Serve report.html until Ctrl-C; it is written again at most once a minute, and only while it is requested."""
    checked = 0.0

    def refresh() -> None:
        nonlocal checked
        if not checked or time.monotonic() - checked > PAGE_SECONDS:
            update_page(folder, reference=reference, interim=False, first=0)
            checked = time.monotonic()

    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give one that train.py writes: results/NAME.")
    server = serve(page_of(folder, reference), refresh, port)
    print(f"http://127.0.0.1:{server.server_address[1]} shows {folder}; Ctrl-C ends it.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


def a_folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a folder that train.py wrote: results/NAME")
    return Path(text)


def check_reference(folders: list[Path], reference: str) -> None:
    """Raise ValueError where no run has this norm."""
    norms = sorted({run.norm for folder in folders for run in find_runs(folder)})
    if norms and reference not in norms:
        where = " and ".join(map(str, folders))
        raise ValueError(f"--reference={reference} is not allowed: the runs below {where} have {', '.join(norms)}.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write report.md, report.html, report.csv, runs.csv and figures.")
    parser.add_argument("folders", type=a_folder, nargs="+", metavar="FOLDER", help="train.py wrote it: results/NAME")
    parser.add_argument("--reference", help="the norm that others are compared with (default: bn)")
    parser.add_argument("--out", type=Path, help="write into this folder instead, e.g. where the first is read-only")
    parser.add_argument("--watch", action="store_true", help="serve report.html on this machine while runs go on")
    parser.add_argument("--port", type=int, default=0, help="of --watch (default: a free one)")
    arguments = parser.parse_args()
    reference = arguments.reference or "bn"
    try:
        if arguments.reference is not None:
            check_reference(arguments.folders, reference)
        if arguments.watch:
            if len(arguments.folders) > 1:
                raise ValueError("--watch is for one folder.")
            watch(arguments.folders[0], reference, arguments.port)
            return 0
        if len(arguments.folders) > 1 and arguments.out is None:
            report = build_report(*arguments.folders, reference=reference)
        else:
            report = write_report(*arguments.folders, reference=reference, out=arguments.out)
    except OSError as error:
        path = error.filename or arguments.folders[0]
        print(f"error: {path}: {error.strerror}; --out=FOLDER writes elsewhere.", file=sys.stderr)
        return 1
    except ValueError as error:
        return print_error(error)
    end_with_reader()
    print_report(report)
    if all(run.result is None for cell in report.cells for run in cell.runs):
        print(f"error: no run below {' and '.join(map(str, arguments.folders))} is finished.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
