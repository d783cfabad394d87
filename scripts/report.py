"""Write the report of a folder of runs into that folder, and print it: python scripts/report.py results/NAME

With --watch the page is served on this machine instead, and written again while runs go on.
"""

import argparse
import sys
import time
from pathlib import Path

from abn_exp.report.build import PAGE_SECONDS, print_report, update_page, write_report
from abn_exp.report.watch import serve


def watch(folder: Path, reference: str, port: int) -> None:
    """Serve report.html until Ctrl-C; it is written again at most once a minute, and only while somebody looks."""
    checked = 0.0

    def refresh() -> None:
        nonlocal checked
        if time.monotonic() - checked > PAGE_SECONDS / 4:
            checked = time.monotonic()
            update_page(folder, reference=reference)

    server = serve(folder / "report.html", refresh, port)
    print(f"http://127.0.0.1:{server.server_address[1]} shows {folder}; Ctrl-C ends it.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


def main() -> int:
    parser = argparse.ArgumentParser(description="Write report.md, report.html, report.csv, runs.csv and figures.")
    parser.add_argument("folder", type=Path, help="a folder that train.py wrote: results/NAME")
    parser.add_argument("--reference", default="bn", help="the norm that others are compared with (default: bn)")
    parser.add_argument("--out", type=Path, help="write into this folder instead, e.g. where the first is read-only")
    parser.add_argument("--watch", action="store_true", help="serve report.html on this machine while runs go on")
    parser.add_argument("--port", type=int, default=0, help="of --watch (default: a free one)")
    arguments = parser.parse_args()
    try:
        if arguments.watch:
            watch(arguments.folder, arguments.reference, arguments.port)
            return 0
        report = write_report(arguments.folder, reference=arguments.reference, out=arguments.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
