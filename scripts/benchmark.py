"""Measure training beside a conventional loop, on one device, in one process: python scripts/benchmark.py --quick

The tables, the figure, the machine and the versions go to results/benchmark/DEVICE/. The last line printed is the
ratio of the two loops' speed: a whole step with its data, the paper's ResNet at the paper's width.
"""

import argparse
import logging
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the package
from abn_exp import provenance
from abn_exp.commandline import positive_int, print_error
from abn_exp.machine import cpu_count
from abn_exp.training.setup import cuda_works, device_errors_explained
from benchmarks import inference, report, time_to_accuracy
from benchmarks.configurations import CPU, GPU, HEADLINES, QUICK, QUICK_GPU
from benchmarks.run import Benchmark


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("--quick", action="store_true", help="fewer sizes and repetitions: minutes on two CPU cores")
    main.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    main.add_argument("--repetitions", type=positive_int, help="of everything timed (default: 3 quick, 7 GPU, 9 CPU)")
    main.add_argument("--threads", type=positive_int, default=cpu_count(), help="CPU threads (default: all)")
    main.add_argument(
        "--workers",
        type=positive_int,
        default=min(8, cpu_count()),
        help="processes of the conventional loader (default: %(default)s)",
    )
    main.add_argument(
        "--budget",
        type=Path,
        metavar="RUNS",
        help="instead: the time to accuracy of the runs of study=budget in this folder",
    )
    main.add_argument(
        "--inference",
        action="store_true",
        help="instead: trained networks in torch, ONNX Runtime and OpenVINO, one thread",
    )
    main.add_argument("--out", type=Path, default=Path("results/benchmark"), help="(default: %(default)s)")
    return main


def main() -> int:
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    for name in ("fontTools", "onnx_ir", "onnxscript"):  # what they leave out of a PDF, or of a graph
        logging.getLogger(name).setLevel(logging.WARNING)
    cuda = cuda_works()
    if arguments.device == "cuda" and not cuda:
        print("--device cuda, but torch sees no CUDA device; use --device cpu.", file=sys.stderr)
        return 1
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products; read at the first one
    device = torch.device("cuda", 0) if cuda and arguments.device != "cpu" else torch.device("cpu")
    torch.set_num_threads(arguments.threads)
    whole, quick = (GPU, QUICK_GPU) if device.type == "cuda" else (CPU, QUICK)
    effort = quick if arguments.quick else whole
    if arguments.repetitions is not None:
        effort = replace(effort, repetitions=arguments.repetitions)
    name = provenance.device_name(device, arguments.threads)
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    try:
        if arguments.inference:
            torch.set_num_threads(1)
            repetitions = arguments.repetitions or (3 if arguments.quick else 7)
            if repetitions < 2:
                raise ValueError("--inference needs two repetitions or more: one has no interval.")
            width = 0.25 if arguments.quick else None
            with device_errors_explained(device):
                measured = inference.measure(repetitions, width, peaks=not arguments.quick)
            folder = inference.write(measured, repetitions, width, command, arguments.out)
            print((folder / "inference.md").read_text(encoding="utf-8"))
            return 0
        if arguments.budget is not None:
            budget = time_to_accuracy.measure_budgets(arguments.budget, device, arguments.workers, effort.repetitions)
            name = provenance.device_name(device, budget.config.threads)
            path = time_to_accuracy.write(budget, name, command, arguments.out)
            print(path.read_text(encoding="utf-8"))
            return 0
        with device_errors_explained(device):
            found = Benchmark(device, effort, arguments.workers).run()
        folder = report.write(found, effort, name, command, arguments.out)
    except (ValueError, OSError) as error:
        return print_error(error)
    print((folder / "benchmark.md").read_text(encoding="utf-8"))
    row = next(name for name in HEADLINES if ("resnet18_paper", name) in found.ratios)
    print(f"written to {folder}; {row} beside the conventional loop, whole step with data, ResNet:")
    print(f"ratio: {found.ratios['resnet18_paper', row].median:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
