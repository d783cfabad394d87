"""Measure trained networks: python scripts/analyze.py {activations,cam} RUN...

RUN is a run's folder (.../seed-0) or any folder above some: results/NAME. Norms are compared on the same images,
paired by seed. What is found is written into analysis/{activations,cam} beside the runs, and printed. What was
measured of a network is kept: an analysis that was stopped goes on when it is typed again.
"""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the CPU to others
sys.path.insert(0, str(Path(__file__).parents[1]))  # norms of one's own lie beside train.py

from abn_exp.commandline import positive_int, print_error
from abn_exp.errors import Stopped, stop_on_signals


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = main.add_subparsers(dest="kind", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one above some")
    shared.add_argument(
        "--out", type=Path, help="where to write (default: analysis/ in the folder that all RUNs share)"
    )
    shared.add_argument("--root", help="where the data, or a folder of images, are now (default: where they were)")
    shared.add_argument("--reference", default="bn", help="the norm that others are compared with (default: bn)")
    activations = kinds.add_parser("activations", parents=[shared], help="distributions before each sign (claim C5)")
    activations.add_argument("--images", type=positive_int, help="how many test images (default: all)")
    cam = kinds.add_parser("cam", parents=[shared], help="class-activation maps with scores (claim C4)")
    cam.add_argument("--images", type=positive_int, default=200, help="how many test images (default: 200)")
    cam.add_argument("--target", choices=["predicted", "label"], default="predicted", help="the class of a map")
    return main


def main() -> int:
    arguments = parser().parse_args()
    import torch  # seconds, which --help and a wrong option need not take

    from abn_exp.analysis.summary import command_line
    from abn_exp.analysis.trained import Opener, common_folder, find_trained
    from abn_exp.training.setup import cuda_works

    torch.set_num_threads(1)  # until there are processes to share the CPUs
    try:
        runs = find_trained(arguments.runs)
        beside = common_folder(arguments.runs) / "analysis" / arguments.kind
        out = beside if arguments.out is None else arguments.out
        device = torch.device("cuda" if cuda_works() else "cpu")
        opener = Opener(arguments.root, arguments.images, device)
        options = {
            "images": arguments.images,
            "reference": None if arguments.reference == "bn" else arguments.reference,
            "out": None if out.is_absolute() else out,
        }
        if arguments.kind == "cam":
            options |= {"target": "label" if arguments.target == "label" else None}
        command = command_line(arguments.kind, arguments.runs, options)
        if arguments.kind == "activations":
            from abn_exp.analysis import activation_report

            report = activation_report.write(runs, opener, out, command, reference=arguments.reference)
        else:
            from abn_exp.analysis import cam_report

            report = cam_report.write(
                runs, opener, out, command, reference=arguments.reference, target=arguments.target
            )
        report.log(runs[0], arguments.kind)
    except (ValueError, OSError) as error:
        return print_error(error)
    except BrokenProcessPool:
        print(
            "error: a process was killed that measured, for its memory perhaps; try fewer --images.", file=sys.stderr
        )
        return 1
    except Stopped as stopped:
        print(
            f"stopped by {stopped.signal}; what was measured is kept, and the same command goes on", file=sys.stderr
        )
        raise
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
