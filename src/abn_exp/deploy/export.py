"""Export a run: trace its network, write it for the engines asked for, verify each, and only then leave files."""

import importlib
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from abn_exp import provenance
from abn_exp.analysis.trained import source_at
from abn_exp.config import Config, parse
from abn_exp.data.prepare import ImageDataset, load
from abn_exp.data.splits import first_of_each_class
from abn_exp.deploy.graph import Graph, trace
from abn_exp.deploy.verify import Engine, Mismatch, Verification, verify
from abn_exp.errors import ConfigError
from abn_exp.files import writing
from abn_exp.models.cost import summarize
from abn_exp.trained_network import InputFormat, load_trained_network, read_config
from abn_exp.training.setup import trained_input_format

EXTRAS = {
    "onnx": "deploy",
    "onnxruntime": "deploy",
    "openvino": "openvino",
    "qonnx": "qonnx",
    "onnxscript": "qonnx",  # which needs it, as torch.onnx.export does
}
FILES = ("network.onnx", "network.qonnx.onnx", "network.xml", "network.bin", "summary.json", "summary.md")
QONNX_IMAGES = 500  # that go through qonnx's executor, which is slow
SUMS_IMAGES = 100  # of which OpenVINO shows the sums of every binary layer, one after another


@dataclass(frozen=True)
class TrainedRun:
    """A run's network, and what it is tested on."""

    directory: Path
    weights: Literal["last", "best"]
    config: Config
    network: nn.Module
    data: ImageDataset
    input_format: InputFormat


def require_extra(*packages: str) -> None:
    """Raise ConfigError where a package that an export needs is not installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"This needs {package}, which is not installed; pip install -e '.[{EXTRAS[package]}]' brings it."
            ) from error


def open_run(directory: Path, weights: Literal["last", "best"], root: str | None) -> TrainedRun:
    """Return a run's network and its test set. Raises ConfigError, DamagedFile or OSError with a sentence."""
    network, config = load_trained_network(directory, weights), parse(read_config(directory))
    source = source_at(config.dataset, root) | {"download": False}
    try:
        data = load(**source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"An export is verified on its test set, which is not at hand: {error}") from error
    return TrainedRun(directory, weights, config, network, data, trained_input_format(directory, data))


def export(
    run: TrainedRun,
    out: Path,
    *,
    qonnx: bool = False,
    openvino: bool = False,
    strict: bool = False,
    progress: Callable[[str, int, int], None] = lambda engine, done, total: None,
) -> dict[str, Any]:
    """Write network.onnx, what else is asked for, and the summary into `out`; return the summary.

    Everything is verified before any file is written. Raises ConfigError for a network that cannot be exported (with
    ``strict``, one of whose layers stays real behind a binary layer), Mismatch where ONNX Runtime does not do what
    torch does. Where another engine does not, its own files are left out, and the summary says why. Files of an
    earlier export that this one does not write are removed.
    """
    require_extra("onnx", "onnxruntime", *["qonnx"] * qonnx, *["openvino"] * openvino)
    from abn_exp.deploy.onnx import OnnxRuntime, Writer, with_digest

    graph = trace(run.network, run.config.dataset.image_size)
    if strict:
        _refuse_real(graph)
    writer = Writer(graph)
    contents: dict[str, bytes] = {}
    verifications: dict[str, Verification | str] = {}
    notes: list[str] = []
    contents["network.onnx"] = with_digest(writer.model(run.input_format, _metadata(run)))
    engine = OnnxRuntime(contents["network.onnx"], writer.codes, torch.get_num_threads())

    def check(name: str, engine: Engine, count: int | None = None, part: str = "") -> Verification:
        chosen = first_of_each_class(run.data.test.labels, count)
        images, labels = run.data.test.images[chosen], run.data.test.labels[chosen]
        shown = partial(progress, name + part)
        return verify(run.network, graph, engine, images, labels, run.input_format, shown, chosen)

    try:
        verifications["ONNX Runtime"] = check("ONNX Runtime", engine)
    except Mismatch:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        raise
    for wanted, name, other in ((qonnx, "qonnx", _qonnx), (openvino, "OpenVINO", _openvino)):
        if wanted:
            try:
                found, files, of_engine = other(run, graph, partial(check, name))
            except Mismatch as error:
                verifications[name] = str(error)
            else:
                verifications[name] = found
                contents |= files
                notes += of_engine
    summary = summarized(run, graph, contents, verifications, notes)
    contents["summary.json"] = (json.dumps(summary, indent=2) + "\n").encode()
    contents["summary.md"] = markdown(summary).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # an export that is cut off leaves no file of an earlier one beside its own
        (out / name).unlink(missing_ok=True)
    for name, content in contents.items():
        with writing(out / name) as file:
            file.write(content)
    return summary


Found = tuple[Verification, dict[str, bytes], list[str]]  # what was compared, files, notes


def _qonnx(run: TrainedRun, graph: Graph, check: Callable[..., Verification]) -> Found:
    from abn_exp.deploy.qonnx import Executor, QonnxWriter

    found = check(Executor(graph, run.input_format), QONNX_IMAGES)
    content = QonnxWriter(graph).qonnx_model(run.input_format).SerializeToString(deterministic=True)
    return found, {"network.qonnx.onnx": content}, []


def _openvino(run: TrainedRun, graph: Graph, check: Callable[..., Verification]) -> Found:
    from abn_exp.deploy.openvino import OpenVINO, Writer, serialized

    threads = torch.get_num_threads()
    with OpenVINO(graph, run.input_format, threads) as engine:
        found = check(engine)
    for layer in graph.layers:
        with OpenVINO(graph, run.input_format, threads, sums=layer) as engine:
            found.sums += check(engine, SUMS_IMAGES, f", sums of {layer.name}").sums
    writer = Writer(graph)
    xml, binary = serialized(writer.model(run.input_format))
    notes = [f"OpenVINO has no binary kernel for {name}: {reason}." for name, reason in writer.real_layers.items()]
    return found, {"network.xml": xml, "network.bin": binary}, notes


def _refuse_real(graph: Graph) -> None:
    for layer in graph.layers:
        if layer.reason is not None and not layer.reason.endswith(("has real weights", "it is the image")):
            raise ConfigError(
                f"{layer.name} reads signs of real values of {layer.decided_by}: {layer.reason}; without --strict it "
                "stays real."
            )


def _metadata(run: TrainedRun) -> dict[str, str]:
    return {
        "format": "abn_exp 1",
        "classes": json.dumps(run.data.classes),
        "image_size": str(run.config.dataset.image_size),
        "run": "/".join(run.directory.resolve().parts[-5:]),
        "weights": run.weights,
        "commit": provenance.git_commit() or "",
    }


def summarized(
    run: TrainedRun,
    graph: Graph,
    contents: dict[str, bytes],
    verifications: Mapping[str, Verification | str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return the summary of an export, as it is written to summary.json."""
    totals = summarize(run.network, run.config.dataset.image_size).totals
    layers = []
    for layer in graph.layers:
        counts = None if layer.fold is None else np.bincount(layer.fold.counts, minlength=3).tolist()
        layers.append(
            {
                "layer": layer.name,
                "bits_from": layer.decided_by,
                "folded": layer.fold is not None,
                "real_because": layer.reason,
                "constant": counts and counts[0],
                "one_threshold": counts and counts[1],
                "two_thresholds": counts and counts[2],
                "more_thresholds": counts and sum(counts[3:]),
                "weights": "bits" if layer.packed else "bytes: some are 0",
            }
        )
    folds = [(node.options["fold"], int(np.prod(node.shape))) for node in graph.nodes if node.op == "threshold"]
    comparisons = sum(int(fold.counts.sum()) * values // len(fold.first) for fold, values in folds)
    size = len(contents["network.onnx"])
    engines = {
        name: v
        if isinstance(v, str)
        else {
            "test_images": v.images,
            "folded_bits_equal": v.folded_bits,
            "sums_equal": v.sums,
            "real_bits_compared": v.real_bits,
            "signs_within_rounding": v.differing,
            "images_with_such_signs": v.images_with_differences,
            "predictions_changed": v.changed,
            "accuracy": v.correct / v.images,
            "accuracy_torch": v.correct_torch / v.images,
        }
        for name, v in verifications.items()
    }
    return {
        "run": str(run.directory),
        "weights": run.weights,
        "bytes": {"float32": totals["bytes_real"], "file": size, "theory": totals["bytes_packed"]},
        "files": {name: len(content) for name, content in contents.items()},
        "times_smaller": totals["bytes_real"] / size,
        "operations": {
            "binary_macs": totals["binary_macs"],
            "real_macs": totals["real_macs"],
            "integer_comparisons": comparisons,
        },
        "layers": layers,
        "engines": engines,
        "notes": list(notes),
        "versions": provenance.versions() | {name: version(name) for name in EXTRAS if name in sys.modules},
        "machine": f"{provenance.device_name(torch.device('cpu'), torch.get_num_threads())}, {platform.machine()}",
    }


def markdown(summary: dict[str, Any]) -> str:
    """Return the summary for a reader."""
    size, operations = summary["bytes"], summary["operations"]
    lines = [
        f"# Exported network of {summary['run']}\n",
        f"Weights: {summary['weights']}. Machine: {summary['machine']}. "
        f"{', '.join(f'{name} {number}' for name, number in summary['versions'].items())}.\n",
        f"- **Size**: {size['file']:,} bytes in network.onnx, **{summary['times_smaller']:.1f} times smaller** than "
        f"the parameters as float32, {size['float32']:,}; in theory, with a bit a binary weight, {size['theory']:,}.",
        f"- **Operations** of an image: {operations['binary_macs']:,} binary and {operations['real_macs']:,} real "
        f"multiply-accumulates; {operations['integer_comparisons']:,} integer comparisons in place of folded norms.",
    ]
    for name, engine in summary["engines"].items():
        if isinstance(engine, str):
            lines.append(f"- **{name}**: not written. {engine}")
            continue
        signs, changed = sum(engine["signs_within_rounding"].values()), engine["predictions_changed"]
        exact = (
            ("bits of folded layers", engine["folded_bits_equal"]),
            ("sums of binary layers", engine["sums_equal"]),
        )
        equal = ", ".join(f"{count:,} {what}" for what, count in exact if count)
        lines.append(
            f"- **{name}**: {engine['test_images']:,} test images, accuracy {engine['accuracy']:.2%} (torch "
            f"{engine['accuracy_torch']:.2%}). {equal}{', all equal; of ' if equal else 'Of '}"
            f"{engine['real_bits_compared']:,} signs of real values {signs} differ, within rounding of "
            f"zero, in {engine['images_with_such_signs']} images. Predictions changed by them: {len(changed)}"
            f"{': images ' + ', '.join(map(str, changed[:20])) if changed else ''}."
        )
    others = [f"{name}, {length:,} bytes" for name, length in summary["files"].items() if name != "network.onnx"]
    lines += [f"- Further files: {'; '.join(others)}."] if others else []
    lines += [f"- {note}" for note in summary["notes"]]
    lines += [
        "\n| layer | reads signs of | | constant | one threshold | two | more |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for layer in summary["layers"]:
        how = "folded" if layer["folded"] else f"real: {layer['real_because']}"
        how += "" if layer["weights"] == "bits" else "; weights not packed: some are 0"
        keys = ("constant", "one_threshold", "two_thresholds", "more_thresholds")
        counts = " | ".join("" if layer[key] is None else str(layer[key]) for key in keys)
        lines.append(f"| {layer['layer']} | {layer['bits_from']} | {how} | {counts} |")
    return "\n".join(lines) + "\n"
