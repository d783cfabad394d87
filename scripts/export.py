"""Export a trained network for other engines: python scripts/export.py RUN

RUN is a run's folder (.../seed-0). network.onnx holds a bit for each binary weight, and integer thresholds in place
of the norms that can be folded. Nothing is written that does not decide the whole test set as torch does.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from abn_exp.deploy.export import export, open_run


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
    main.add_argument("--weights", choices=["last", "best"], default="last", help="of which epoch (default: last)")
    main.add_argument("--out", type=Path, help="where to write (default: export/ in the run's folder)")
    main.add_argument("--root", help="where the data are now (default: where the run found them)")
    main.add_argument("--strict", action="store_true", help="refuse a norm behind a binary layer that stays real")
    return main


def main() -> int:
    arguments = parser().parse_args()
    torch.set_grad_enabled(False)
    out = arguments.out if arguments.out is not None else arguments.run / "export"
    last = time.monotonic()

    def progress(engine: str, done: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{engine}: {done:,} test images agree so far", flush=True)

    try:
        subject = open_run(arguments.run, arguments.weights, arguments.root)
        export(subject, out, strict=arguments.strict, progress=progress)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print((out / "summary.md").read_text(encoding="utf-8"))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
