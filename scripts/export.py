"""Export a trained network for other engines: python scripts/export.py RUN

RUN is a run's folder (.../seed-0). network.onnx holds a bit for each binary weight, and integer thresholds in place
of the norms that can be folded. Nothing is written unless every folded bit is torch's on the whole test set (QONNX:
on 500 of its images); signs of real values, and predictions that follow from them, may differ within rounding and
are counted.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # norms of one's own lie beside train.py

from abn_exp.commandline import print_error
from abn_exp.deploy.export import export, open_run
from abn_exp.report.progress import clock


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
    main.add_argument("--weights", choices=["last", "best"], default="last", help="of which epoch (default: last)")
    main.add_argument("--out", type=Path, help="where to write (default: export/ in the run's folder)")
    main.add_argument("--root", help="where the data, or a folder of images, are now (default: where they were)")
    main.add_argument(
        "--openvino", action="store_true", help="also write OpenVINO IR, whose CPU plug-in is the fastest"
    )
    main.add_argument("--qonnx", action="store_true", help="also write QONNX, for FPGA flows")
    main.add_argument("--strict", action="store_true", help="refuse a norm behind a binary layer that stays real")
    return main


@torch.no_grad()
def main() -> int:
    arguments = parser().parse_args()
    out = arguments.out if arguments.out is not None else arguments.run / "export"
    begun: dict[str, tuple[float, int]] = {}  # of each engine's comparison: when, with how many images done
    last = time.monotonic()

    def progress(engine: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        start, before = begun.setdefault(engine, (now, done))
        if now - last > 10 and done > before:
            last = now
            left = (now - start) / (done - before) * (total - done)
            print(f"{engine}: {done:,} of {total:,} test images agree, ETA {clock(left)}", flush=True)

    try:
        run = open_run(arguments.run, arguments.weights, arguments.root)
        options = {"qonnx": arguments.qonnx, "openvino": arguments.openvino, "strict": arguments.strict}
        summary = export(run, out, **options, progress=progress)
    except (ValueError, OSError) as error:
        return print_error(error)
    print((out / "summary.md").read_text(encoding="utf-8"))
    print(f"written to {out}")
    failed = [f"{name}: {why}" for name, why in summary["engines"].items() if isinstance(why, str)]
    print(*failed, sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
