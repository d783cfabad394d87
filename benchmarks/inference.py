"""Inference of the paper's networks, side by side in one run: torch, ONNX Runtime, the exported file, OpenVINO.

Weights and statistics are random, for time does not depend on them; the shifts of ABN are not: they decide how many
channels have two thresholds, and so which operations a folded norm costs.
"""

import logging
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from abn_exp import provenance
from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.deploy.export import require_extra
from abn_exp.deploy.graph import Graph, trace
from abn_exp.files import write_text_atomic
from abn_exp.models import binarynet, resnet18_paper
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.report.formatting import csv_text
from abn_exp.trained_network import InputFormat
from benchmarks.measure import interleaved, peak_bytes, quartiles, seconds
from benchmarks.report import cell, device_folder, table

log = logging.getLogger(__name__)

NETWORKS = {"BinaryNet": (binarynet, 3.0), "ResNet": (resnet18_paper, 5.0)}
TWO_THRESHOLDS = {"bn": 0.0, "abn, 18 %": 0.18, "abn, all": 1.0}  # share of channels; 18 % after six epochs
BATCHES = (1, 64)
FOLDED = ("network.onnx", "OpenVINO")
ENGINES = ("torch", "torch, compiled", "ONNX Runtime, float32", *FOLDED)
INPUT = InputFormat(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), None)


def make_network(model: str, norm: str, width: float | None = None) -> nn.Module:
    """Return a network for 32 x 32 images whose channels have two thresholds in the share that `norm` names."""
    build, full = NETWORKS[model]
    torch.manual_seed(0)
    layer = nn.BatchNorm2d if norm == "bn" else AttentionBatchNorm2d
    network = build(10, 32, layer, full if width is None else width)
    random = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            chosen = torch.rand(module.num_features, generator=random) < TWO_THRESHOLDS[norm]
            assert module.bias is not None
            # One threshold below 0, two between 0 and 0.278. Standardised sums are about normal; of them, 0.1 puts
            # the thresholds at -3.6 and -0.11.
            module.bias.data = torch.where(chosen, 0.1, -0.1)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 32, 32, generator=random))  # statistics of the right size
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_var.clamp_(min=1.0)
    return network.eval().requires_grad_(False)


def binarize_once_(network: nn.Module) -> nn.Module:
    """Replace the latent weights by the binary ones, in place, so that no pass binarizes them again."""
    for layer in network.modules():
        if isinstance(layer, BinaryConv2d | BinaryLinear):
            layer.weight.data = layer.binarization.weights(layer.weight)
            layer.product = _product
    return network


def _product(layer: BinaryConv2d | BinaryLinear, x: Tensor, weight: Tensor) -> Tensor:
    x = layer.binarization.activations(x)
    if isinstance(layer, BinaryLinear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding)


@dataclass
class Engine:
    """A network in one engine, from uint8 images to logits on one thread; ``bytes`` are those of its file."""

    run: Callable[[Tensor], object]
    bytes: int


def make_engine(name: str, network: nn.Module, batch: int) -> Engine:
    """Return a network in an engine, ready for batches of a size."""
    if name == "torch" or name == "torch, compiled":
        plain = binarize_once_(network)
        call = torch.compile(plain) if name != "torch" else plain
        size = 4 * sum(parameter.numel() for parameter in network.parameters())
        return Engine(lambda images: call(INPUT.normalize(images)), size)
    if name == "OpenVINO":
        return _openvino(trace(network, 32), batch)
    if name == "network.onnx":
        from abn_exp.deploy.onnx import Writer, with_digest

        return _onnx_runtime(with_digest(Writer(trace(network, 32)).model(INPUT, {})))
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "float32.onnx"
        whole = nn.Sequential(_Normalized(), binarize_once_(network))
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            whole, (images,), path, input_names=["images"], dynamic_shapes=dynamic, external_data=False, verbose=False
        )
        return _onnx_runtime(path.read_bytes())


class _Normalized(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return INPUT.normalize(images)


def _onnx_runtime(content: bytes) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(content, options)
    return Engine(lambda images: session.run(None, {"images": images.numpy()}), len(content))


@cache
def _openvino_core() -> Any:
    """Return OpenVINO, one for the whole process.

    It sets the stack on which signals are handled. Where two of them end in the order in which they began, the one
    that is left is unmapped, and the next signal kills the process.
    """
    import openvino as ov

    return ov.Core()


def _openvino(graph: Graph, batch: int) -> Engine:
    from abn_exp.deploy.openvino import Writer, serialized

    writer = Writer(graph)
    model = writer.model(INPUT)
    files = serialized(model)
    model.reshape([batch, 3, 32, 32])
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = _openvino_core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def run(images: Tensor) -> object:
        assert writer.buffers  # the model's bits, which live as long as this function
        return request.infer([images.numpy()])

    return Engine(run, sum(map(len, files)))


@dataclass(frozen=True)
class Findings:
    """Seconds of a batch by (network, norm, engine, batch), and bytes of files and of memory at its peak."""

    seconds: dict[tuple[str, str, str, int], list[float]]
    files: dict[tuple[str, str, str], int]
    peaks: dict[tuple[str, str], float]


def measure(repetitions: int, width: float | None, peaks: bool) -> Findings:
    """Measure everything in turn, so that a disturbance of the machine affects all alike."""
    require_extra("onnx", "onnxscript", "onnxruntime", "openvino")  # torch.onnx.export needs the second
    found = Findings({}, {}, {})
    device = torch.device("cpu")
    for model in NETWORKS:
        for batch in BATCHES:
            images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
            calls: dict[tuple[str, str, str, int], Callable[[], float]] = {}
            for norm in TWO_THRESHOLDS:
                for name in ENGINES:
                    if norm == "abn, all" and name not in FOLDED:
                        continue  # what a float32 engine does with beta does not depend on it
                    log.info("%s, %s, %s, batch %d", model, norm, name, batch)
                    engine = make_engine(name, make_network(model, norm, width), batch)
                    engine.run(images)
                    found.files[model, norm, name] = engine.bytes
                    calls[model, norm, name, batch] = partial(seconds, partial(engine.run, images), device)
            found.seconds.update(interleaved(calls, repetitions))
        for name in ENGINES if peaks else ():
            found.peaks[model, name] = _peak_of_process(model, name, width)
    return found


def _peak_of_process(model: str, engine: str, width: float | None) -> float:
    """Return the memory that the first batch of 64 takes in an engine, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.inference", model, engine, str(width or NETWORKS[model][1])]
    here = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    return float(done.stdout.split()[-1])


def _print_peak(model: str, engine: str, width: str) -> None:
    """Print the memory that the first batch of 64 takes beyond that of the engine when it is ready."""
    torch.set_num_threads(1)
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    made = make_engine(engine, make_network(model, "abn, 18 %", float(width)), 64)
    print(peak_bytes(lambda: made.run(images), torch.device("cpu")))


Ratio = tuple[float, float, float]


def ratio(found: Findings, model: str, batch: int, slow: tuple[str, str], fast: tuple[str, str]) -> Ratio:
    """Return how many times as long the first (norm, engine) takes as the second: the geometric mean of pairs, and
    its 95 % interval by Student's t."""
    logs = np.log(np.divide(found.seconds[model, *slow, batch], found.seconds[model, *fast, batch]))
    mean = float(np.mean(logs))
    half = float(stats.t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / np.sqrt(len(logs)))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _text(found: Ratio) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*found)


def over_bn(found: Findings, model: str, norm: str, engine: str, batch: int) -> tuple[float, float, float, str]:
    """Return a norm's time over BN's in one engine, its 95 % interval, and what the interval says."""
    mean, low, high = ratio(found, model, batch, (norm, engine), ("bn", engine))
    return mean, low, high, "slower" if low > 1 else "faster" if high < 1 else "no difference seen"


def write(found: Findings, repetitions: int, width: float | None, command: str, folder: Path) -> Path:
    """Write inference.csv and inference.md into a folder of the device's name; return it."""
    folder = device_folder(folder, provenance.device_name(torch.device("cpu"), 1))
    write_text_atomic(folder / "inference.csv", _csv(found, width))
    write_text_atomic(folder / "inference.md", _markdown(found, repetitions, width, command))
    return folder


def _csv(found: Findings, width: float | None) -> str:
    times = ("time_over_bn", "time_over_bn_low", "time_over_bn_high", "verdict", "n")
    header = ("network", "norm", "engine", "batch", "width", *times, "seconds of each repetition")
    rows = []
    for key, values in found.seconds.items():
        *ratios, verdict = over_bn(found, *key) if key[1] != "bn" else ("", "", "", "")
        shown = [f"{ratio:.4f}" if ratio else "" for ratio in ratios]
        own_width = f"{width or NETWORKS[key[0]][1]:g}"
        rows.append([*key, own_width, *shown, verdict, len(values), " ".join(f"{value:.6g}" for value in values)])
    return csv_text([dict(zip(header, row, strict=True)) for row in rows])


def _markdown(found: Findings, repetitions: int, width: float | None, command: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    sections = [
        f"# Inference on {provenance.device_name(torch.device('cpu'), 1)}\n",
        f"Made by `{command}` on {datetime.now(UTC):%Y-%m-%d} at commit {provenance.git_commit()}; {packages}. "
        f"One thread; medians (quartiles) of {repetitions} interleaved repetitions, ratios geometric means of pairs "
        "with 95 % intervals. From uint8 images to logits. torch's binary weights are made once. Peak: of the first "
        "batch of 64, beyond the engine when it is ready.\n",
    ]
    for model, (_, full) in NETWORKS.items():
        rows = []
        for norm in TWO_THRESHOLDS:
            for engine in ENGINES:
                if (model, norm, engine, BATCHES[0]) not in found.seconds:
                    continue
                times = [found.seconds[model, norm, engine, batch] for batch in BATCHES]
                rows.append(
                    [
                        f"{norm}: {engine}",
                        cell(quartiles([1e3 * value for value in times[0]])),
                        _text(ratio(found, model, 1, ("bn", "torch"), (norm, engine))),
                        cell(quartiles([BATCHES[1] / value for value in times[1]])),
                        _text(ratio(found, model, BATCHES[1], ("bn", "torch"), (norm, engine))),
                        f"{found.files[model, norm, engine] / 1e6:.2f}",
                        f"{found.peaks[model, engine] / 1e6:.0f}" if (model, engine) in found.peaks else "",
                    ]
                )
        header = ["norm: engine", "ms, batch 1", "times torch, bn", "images/s, batch 64", "times torch, bn"]
        sections.append(f"## {model} at width {full if width is None else width:g}\n")
        sections.append(table([*header, "file, MB", "peak, MB (abn, 18 %)"], rows))
        sections.append("\nABN's time over BN's:\n")
        columns = [(name, batch) for name in FOLDED for batch in BATCHES]
        lines = [
            [norm, *(_text(ratio(found, model, batch, (norm, name), ("bn", name))) for name, batch in columns)]
            for norm in TWO_THRESHOLDS
            if norm != "bn"
        ]
        sections.append(table(["two thresholds", *(f"{name}, batch {batch}" for name, batch in columns)], lines))
    return "\n".join(sections)


if __name__ == "__main__":
    _print_peak(*sys.argv[1:])
