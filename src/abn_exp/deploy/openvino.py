"""Write a traced network as OpenVINO IR, for its CPU plug-in's XNOR-popcount convolutions, and run it.

A binary convolution reads bits, 0 and 1, of a FakeQuantize of two levels, which is also what a folded norm is: a
threshold a channel, or, behind a subtraction and an absolute value, an interval. The plug-in has limits that it does
not report: the channels read must be a multiple of eight, or the sums are wrong; a FakeQuantize of two levels that
anything but a binary convolution reads ends the process; the batch must be a fixed one; a sum of two maps before a
sign is wrong where one comes from a binary convolution directly. What is outside of these limits is given to it as
real-valued operations on -1 and +1, and each model is compared with torch before it is kept.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset13 as op

from abn_exp.deploy.graph import BINARY, MOVES, UNARY, Graph, Layer, Node
from abn_exp.deploy.openvino_process import receive, send
from abn_exp.deploy.verify import Answer, Mismatch
from abn_exp.trained_network import InputFormat

BELOW_ZERO = -1.1754944e-38  # the largest float32 below zero that no engine takes for zero: +1 is what is above it
# OpenVINO's names; the others are torch's
NAMES = {"sub": "subtract", "mul": "multiply", "div": "divide", "silu": "swish", "neg": "negative"}
CHANNELS = 8  # the plug-in's kernels read whole bytes of bits


class Writer:
    """Make the OpenVINO model of a graph.

    ``real_layers`` are the binary layers that are given as real ones, each with the reason; ``signs`` are the real
    values before the bits that a layer reads, by layer.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.real: dict[Node, Any] = {}
        self.bits: dict[Node, tuple[Any, tuple[int, ...]]] = {}
        self.real_layers: dict[str, str] = {}
        self.signs: dict[str, Any] = {}
        self.buffers: list[Any] = []  # a constant of bits shares the memory of the array it is made of

    def model(self, input_format: InputFormat, *, observed: bool = False, sums: Layer | None = None) -> ov.Model:
        """Return the model: uint8 images (1, 3, S, S) to logits.

        Further results are, with `observed`, the values before signs, and after them the sums of one layer.
        """
        image = next(node for node in self.graph.nodes if node.op == "image")
        images = op.parameter([1, *image.shape], np.uint8, name="images")
        scale, shift = input_format.scale_and_shift()
        value = op.multiply(op.convert(images, np.float32), _constant(scale.numpy()[None]))
        self.real[image] = op.add(value, _constant(shift.numpy()[None]))
        last = self.real_of(self.graph.nodes[-1])
        last.output(0).tensor.set_names({"logits"})
        results = [op.result(last)]
        for layer in self.graph.layers:
            node = layer.node.inputs[0]
            while node.op in MOVES and node.op != "max_pool":
                (node,) = node.inputs
            if node.op == "sign":
                self.signs[layer.name] = self.real_of(node.inputs[0])
        if observed:
            results += [op.result(value) for value in self.signs.values()]
        if sums is not None:
            results.append(op.result(self.real_of(sums.node)))
        return ov.Model(results, [images], "network")

    # bits

    def bits_of(self, node: Node) -> tuple[Any, tuple[int, ...]]:
        """Return bits as 0 and 1, (B, C, H, W), for binary convolutions alone, and (C, H, W)."""
        if node not in self.bits:
            self.bits[node] = self.quantized(node)
        return self.bits[node]

    def quantized(self, node: Node) -> tuple[Any, tuple[int, ...]]:
        shape = _maps(node.shape)
        if node.op == "reshape" and len(node.shape) == 1 and node.inputs[0].op != "max_pool":
            return self.bits_of(node.inputs[0])  # a linear layer is a convolution of the whole map
        if node.op == "sign":
            value = op.reshape(self.real_of(node.inputs[0]), [0, *shape], True)
            return _two_levels(value, np.full(1, BELOW_ZERO), np.zeros(1, np.bool_)), shape
        if node.op == "threshold" and (fold := node.options["fold"]).counts.max() <= 2:
            value = self.real_of(node.inputs[0])
            if len(node.shape) == 1:
                value = op.reshape(value, [0, *shape], True)
            if fold.counts.max() < 2:
                return _two_levels(value, fold.thresholds[:, 0] - 0.5, fold.first), shape
            low, high, inverted = fold.intervals()
            distance = op.abs(op.subtract(value, _constant(_column((low + high - 1) / 2))))
            return _two_levels(distance, (high - low) / 2, inverted), shape
        value = op.reshape(self.signs_of(node), [0, *shape], True)
        return _two_levels(value, np.zeros(1), np.zeros(1, np.bool_)), shape

    def signs_of(self, node: Node) -> Any:
        """Return bits as -1 and +1 (and 0, where there is one), by real-valued operations."""
        if node in self.real:
            return self.real[node]
        if node.op in MOVES:
            value = self.move(node, self.signs_of(node.inputs[0]))
        elif node.op == "sign":
            value = self.real_of(node.inputs[0])
            if node.options["sign_zero"] == "zero":
                value = op.sign(value)
            else:
                value = op.select(op.less(value, _constant(0)), _constant(-1), _constant(1))
        else:
            fold, sums = node.options["fold"], self.real_of(node.inputs[0])
            value = _constant(_column(np.where(fold.first, 1, -1), len(node.shape)))
            for column in fold.thresholds.T:
                reached = op.greater_equal(sums, _constant(_column(column, len(node.shape))))
                value = op.multiply(value, op.select(reached, _constant(-1), _constant(1)))
        self.real[node] = value
        return value

    # sums and real values

    def sums(self, layer: Layer) -> Any:
        """Return a binary layer's sums."""
        bits, options = layer.node.inputs[0], layer.node.options
        linear = len(layer.node.shape) == 1
        source = bits
        while linear and source.op == "reshape":
            (source,) = source.inputs
        channels = _maps(source.shape)[0]
        ternary = source.op == "sign" and source.options["sign_zero"] == "zero"
        if not layer.packed:
            self.real_layers[layer.name] = "a weight is 0, which is no bit"
        elif ternary:
            self.real_layers[layer.name] = "a sign may be 0, which is no bit"
        elif channels % CHANNELS:
            self.real_layers[layer.name] = f"{channels} input channels are no multiple of {CHANNELS}"
        if layer.name in self.real_layers:
            weight = layer.weight.astype(np.float32)
            if linear:
                return _kept(op.matmul(self.signs_of(bits), _constant(weight), False, True))
            value, pads = self.signs_of(bits), list(options["padding"])
            if options["pad_value"] and any(pads):
                border = op.constant(np.array([0, 0, *pads]))
                value = op.pad(value, border, border, "constant", _constant(options["pad_value"]))
                pads = [0, 0]
            return _kept(op.convolution(value, _constant(weight), list(options["stride"]), pads, pads, [1, 1]))
        value, shape = self.bits_of(bits)
        binary = layer.weight.reshape(len(layer.weight), *shape) if linear else layer.weight
        stride, pads = ([1, 1], [0, 0]) if linear else (list(options["stride"]), list(options["padding"]))
        packed = np.packbits(binary.ravel() > 0, bitorder="little")
        tensor = ov.Tensor(packed, ov.Shape(list(binary.shape)), ov.Type.u1)
        self.buffers += [packed, tensor]
        sums = op.binary_convolution(
            value, ov.op.Constant(tensor), stride, pads, pads, [1, 1], "xnor-popcount", options["pad_value"]
        )
        return op.reshape(sums, [0, -1], True) if linear else sums

    def move(self, node: Node, value: Any) -> Any:
        if node.op == "reshape":
            return op.reshape(value, [0, *node.shape], True)
        kernel, stride, pads = (list(node.options[key]) for key in ("kernel", "stride", "padding"))
        return op.max_pool(value, stride, [1, 1], pads, pads, kernel).output(0)

    def real_of(self, node: Node) -> Any:
        """Return real values, or sums."""
        if node not in self.real:
            if node.op == "binary":
                self.real[node] = self.sums(node.options["layer"])
            elif node.op == "constant":
                self.real[node] = _constant(node.options["value"].numpy())
            else:
                values = [self.real_of(source) for source in node.inputs]
                self.real[node] = self.move(node, *values) if node.op in MOVES else _operation(node, values)
        return self.real[node]


def _operation(node: Node, values: Sequence[Any]) -> Any:
    """Return the result of a real-valued operation."""
    options = node.options
    if node.op == "add" and all(source.op != "constant" for source in node.inputs):
        # An Add behind a binary convolution becomes a part of it, and where a sign follows, its other operand is then
        # read as bits.
        return op.add(*map(_kept, values))
    if node.op in {*UNARY.values(), *BINARY.values()}:
        return getattr(op, NAMES.get(node.op, node.op))(*values)
    (x,) = values
    if node.op == "clip":
        return op.clamp(x, options["low"], options["high"])
    if node.op == "batch_norm":
        mean, var = options["mean"].double().numpy(), options["var"].double().numpy()
        weight = 1 if options["weight"] is None else options["weight"].double().numpy()
        scale = weight / np.sqrt(var + options["eps"])
        shift = (0 if options["bias"] is None else options["bias"].double().numpy()) - mean * scale
        dims = len(node.shape)
        return op.add(op.multiply(x, _constant(_column(scale, dims))), _constant(_column(shift, dims)))
    if node.op in ("conv", "linear"):
        weight, pads = _constant(options["weight"].numpy()), list(options.get("padding", ()))
        value = (
            op.convolution(x, weight, list(options["stride"]), pads, pads, [1, 1])
            if node.op == "conv"
            else op.matmul(x, weight, False, True)
        )
        if options["bias"] is None:
            return value
        return op.add(value, _constant(_column(options["bias"].numpy(), len(node.shape))))
    if node.op == "avg_pool":
        return op.avg_pool(x, list(options["stride"]), [0, 0], [0, 0], list(options["kernel"]), True)
    assert node.op == "mean"
    return op.reduce_mean(x, op.constant(np.array(options["dims"])), options["keep"])


def _kept(value: Any) -> Any:
    """Return the same values, by an operation that the plug-in neither removes nor makes a part of another one."""
    return op.maximum(value, _constant(-(2.0**24)))


def _constant(value: Any) -> Any:
    return op.constant(np.asarray(value, np.float32))


def _column(values: NDArray[Any], dims: int = 3) -> NDArray[Any]:
    """Return one value a channel in the shape that (B, C, H, W), or with `dims` 1 (B, C), is combined with."""
    return np.asarray(values).reshape(1, -1, *[1] * (dims - 1))


def _maps(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 3 else (shape[0], 1, 1)


def _two_levels(value: Any, threshold: NDArray[Any], inverted: NDArray[np.bool_]) -> Any:
    """Return 1 where the value is above the threshold and 0 elsewhere, or the other way round, by channel."""
    at, low, high = (_constant(_column(values)) for values in (threshold, inverted, ~inverted))
    return op.fake_quantize(value, at, at, low, high, 2)


def serialized(model: ov.Model) -> tuple[bytes, bytes]:
    """Return a model's two files, network.xml and network.bin."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "network.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


class Process:
    """OpenVINO with a model, in a process of its own: a crash of the library is a Mismatch here, and a sentence."""

    def __init__(self, model: ov.Model, threads: int) -> None:
        self.folder = TemporaryDirectory()
        path = Path(self.folder.name) / "network.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        command = [sys.executable, "-m", "abn_exp.deploy.openvino_process", str(path), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        self.results = len(model.outputs)

    def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()
        self.folder.cleanup()

    def __call__(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Return all results of the model."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            send(self.process.stdin, images)
            self.process.stdin.flush()
            return [receive(self.process.stdout) for _ in range(self.results)]
        except (OSError, EOFError) as error:
            raise Mismatch(self.exit_message()) from error

    def exit_message(self) -> str:
        """Return how the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)  # its output is closed, so it is about to end by itself
        self.process.kill()
        _, errors = self.process.communicate()
        lines = errors.decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        return f"OpenVINO ended its process with {how}{': ' + lines[-1] if lines else ''}."


class OpenVINO:
    """An `Engine` of `verify`: the model as it is, and beside it one that also returns what verification compares.

    Bits cannot be looked at in OpenVINO. What can are the real values before signs, and with `sums` those of one
    binary layer; all binary layers before that one are then as in the model as it is.
    """

    def __init__(self, graph: Graph, input_format: InputFormat, threads: int, sums: Layer | None = None) -> None:
        self.sums, self.writer, plain = sums, Writer(graph), Writer(graph)  # each holds the bits of its model
        self.plain = Process(plain.model(input_format), threads) if sums is None else None
        self.observed = Process(self.writer.model(input_format, observed=True, sums=sums), threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.plain, self.observed):
            if process is not None:
                process.close()

    def __call__(self, images: NDArray[np.uint8]) -> Answer:
        logits, *values = self.observed(images)
        if self.plain is not None:
            (logits,) = self.plain(images)
        sums = {} if self.sums is None else {self.sums.name: values.pop()}
        real = dict(zip(self.writer.signs, values, strict=True))
        signs = {layer.name: layer.module.binarization.activations for layer in self.writer.graph.layers}
        bits = {name: signs[name](torch.from_numpy(value)).to(torch.int8).numpy() for name, value in real.items()}
        return Answer(logits, bits, real, sums)
