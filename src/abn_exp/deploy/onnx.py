"""Write a traced network as ONNX: standard operators, weights as packed bits that the graph itself unpacks.

Between layers a bit is a byte, a code of 0 or 2u, which its quantisation (scale 1/u, zero point u) makes -1
and +1, so that a border of zeros is the zero point. A folded convolution is a QLinearConv, exact in int32, whose own
scale, bias and rounding put the thresholds between two codes; what is left to do is to look at one bit of the code.
Sums that a real-valued norm reads are float32's, exact up to 2^24, and more products than that no layer here adds.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from abn_exp.deploy.fold import Fold
from abn_exp.deploy.graph import MOVES, Graph, Layer, Node
from abn_exp.deploy.verify import Answer
from abn_exp.trained_network import InputFormat

OPSET, IR_VERSION = 18, 8  # the first opset with all that is used; older engines do not read it, newer ones do
NO_DIGEST = "0" * 64
MIDDLE = 128  # the code of a sum at its threshold, and the zero point of a folded convolution's result
OUTSIDE = 64  # the bit of a code that says: outside the interval


class Writer:
    """Make the ONNX model of a graph. ``codes``: the name of the bits that each binary layer reads, and their u."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.known: dict[Any, str] = {}  # shared constants
        self.real: dict[Node, str] = {}
        self.bits: dict[Node, tuple[str, int]] = {}  # the name of the codes, and u
        self.codes: dict[str, tuple[str, int]] = {}

    def model(self, input_format: InputFormat, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Return the model: uint8 images (N, 3, S, S) to logits (N, classes)."""
        pixels = self.add("Cast", ["images"], to=TensorProto.FLOAT)
        model = self.assembled(input_format, pixels, TensorProto.UINT8, "N", [helper.make_opsetid("", OPSET)])
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model

    def assembled(
        self, input_format: InputFormat, pixels: str, dtype: int, batch: int | str, opsets: list[Any]
    ) -> onnx.ModelProto:
        """Return the model of all operations; its images are of type `dtype`, and `pixels` are these as float32."""
        image, last = next(node for node in self.graph.nodes if node.op == "image"), self.graph.nodes[-1]
        scale, shift = input_format.scale_and_shift()
        value = self.add("Mul", [pixels, self.constant(scale.numpy())])
        self.real[image] = self.add("Add", [value, self.constant(shift.numpy())])
        for layer in self.graph.layers:
            self.codes[layer.name] = self.bits_of(layer.node.inputs[0])
        self.add("Identity", [self.real_of(last)], "logits")
        inputs = [helper.make_tensor_value_info("images", dtype, [batch, *image.shape])]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, *last.shape])]
        proto = helper.make_graph(self.nodes, "network", inputs, outputs, self.initializers)
        return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="abn_exp")

    # pieces of a graph

    def add(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = f"c{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def per_channel(self, values: Iterable[Any], dtype: Any, shape: tuple[int, ...]) -> str:
        """Return a constant of one value a channel, for a map of this shape (C, H, W), or features (C,)."""
        return self.constant(np.asarray(values, dtype).reshape(-1, *[1] * (len(shape) - 1)), dtype)

    def weight(self, layer: Layer, one: Any, flipped: NDArray[np.bool_] | None = None) -> str:
        """Return the weights of a binary layer, in the type of `one`; those of a linear layer are (in, out)."""
        weight = layer.weight if flipped is None else np.where(_column(flipped, layer), -layer.weight, layer.weight)
        weight = weight.T if weight.ndim == 2 else weight
        if not layer.packed:
            stored = self.constant(weight, np.int8)
            return stored if one.dtype == np.int8 else self.add("Cast", [stored], to=TensorProto.FLOAT)
        bits = np.packbits(weight.ravel() > 0, bitorder="little")
        shifts = self.constant(np.arange(8), np.uint8)
        value = self.add("BitShift", [self.constant(bits[:, None], np.uint8), shifts], direction="RIGHT")
        value = self.add("BitwiseAnd", [value, self.constant(1, np.uint8)])
        value = self.add("Cast", [value], to=TensorProto.BOOL)
        value = self.add("Where", [value, self.constant(one, one.dtype), self.constant(-one, one.dtype)])
        if weight.size % 8:
            value = self.add("Reshape", [value, self.constant([-1], np.int64)])
            ends = (self.constant([end], np.int64) for end in (0, weight.size))
            value = self.add("Slice", [value, *ends])
        return self.add("Reshape", [value, self.constant(weight.shape, np.int64)])

    # bits

    def bits_of(self, node: Node) -> tuple[str, int]:
        """Return the codes of bits and their u."""
        if node not in self.bits:
            if node.op == "sign":
                self.bits[node] = self.sign(node)
            elif node.op == "threshold":
                self.bits[node] = self.threshold(node)
            else:
                codes, u = self.bits_of(node.inputs[0])
                self.bits[node] = self.move(node, codes), u
        return self.bits[node]

    def sign(self, node: Node) -> tuple[str, int]:
        """Return the codes of real values: +1 where they are not below 0, which NaN is not."""
        u = OUTSIDE // 2
        value = self.real_of(node.inputs[0])
        if node.options["sign_zero"] == "zero":
            scale, zero = self.constant(1 / u), self.constant(u, np.uint8)
            return self.add("QuantizeLinear", [self.add("Sign", [value]), scale, zero]), u
        below = self.add("Less", [value, self.constant(0)])
        return self.add("Where", [below, self.constant(0, np.uint8), self.constant(2 * u, np.uint8)]), u

    def threshold(self, node: Node) -> tuple[str, int]:
        """Return the codes of folded sums."""
        moves, layer = producer(node.inputs[0])
        fold = node.options["fold"]
        if len(layer.node.shape) == 3 and len(fold.first) == layer.node.shape[0] and fold.counts.max() <= 2:
            return self.quantized(node, moves, layer, fold)
        if len(layer.node.shape) == 1:
            value, unit = self.linear_sums(layer)
            for move in moves:
                value = self.move(move, value)
            return self.compared(value, unit, np.int32, fold, node.shape)
        return self.compared(self.real_of(node.inputs[0]), 1, np.float32, fold, node.shape)

    def quantized(self, node: Node, moves: list[Node], layer: Layer, fold: Fold) -> tuple[str, int]:
        """Return the codes of a folded convolution.

        Without intervals, the bit MIDDLE of a code says whether the sum has reached the threshold. With them, the
        codes from 64 to 191 are the inside of a channel's interval, and after max(q, 255 - q) the bit OUTSIDE of a
        code says whether it is not; a single threshold is one end of an interval whose other end no sum reaches.
        """
        codes, u = self.bits_of(layer.node.inputs[0])
        flipped, inverted = None, np.zeros(len(fold.first), np.bool_)
        if intervals := bool(fold.counts.max() == 2):
            low, high, inverted = fold.intervals()
            scale, bias = _interval_code(low, high, u)
        else:
            falling = fold.first & (fold.counts == 1)
            if any(move.op == "max_pool" for move in moves):
                inverted = falling
                fold = Fold(fold.first ^ inverted, fold.thresholds, fold.limit)
            else:
                flipped = falling
                fold = fold.negated(flipped)
            # MIDDLE or more from the threshold on; a constant never changes
            scale, bias = np.ones((), np.float32), (-u * fold.single_thresholds()).astype(np.int32)
        weight = self.weight(layer, np.int8(1), flipped)
        value, pads = self.padded(layer, codes, u)
        zero = self.constant(0, np.int8)
        one, middle = self.constant(1), self.constant(MIDDLE, np.uint8)
        inputs = [value, self.constant(1 / u), self.constant(u, np.uint8), weight, self.constant(scale), zero]
        inputs += [one, middle, self.constant(bias, np.int32)]
        value = self.add("QLinearConv", inputs, strides=layer.node.options["stride"], pads=pads)
        for move in moves:
            value = self.move(move, value)
        if intervals:
            value = self.add("Max", [value, self.add("BitwiseNot", [value])])
        bit = OUTSIDE if intervals else MIDDLE
        value = self.add("BitwiseAnd", [value, self.constant(bit, np.uint8)])
        if inverted.any():
            value = self.add("BitwiseXor", [value, self.per_channel(inverted * bit, np.uint8, node.shape)])
        return value, bit // 2

    def compared(self, value: str, unit: int, dtype: Any, fold: Fold, shape: tuple[int, ...]) -> tuple[str, int]:
        """Return the codes of sums, `unit` times each, by comparisons: one for each threshold of a channel."""
        u = OUTSIDE // 2
        passed = ""
        for column in fold.thresholds.T:
            reached = self.add("GreaterOrEqual", [value, self.per_channel(unit * column, dtype, shape)])
            passed = self.add("Xor", [passed, reached]) if passed else reached
        ends = (self.per_channel(2 * u * which, np.uint8, shape) for which in (~fold.first, fold.first))
        return self.add("Where", [passed, *ends]), u

    # sums and real values

    def padded(self, layer: Layer, codes: str, u: int) -> tuple[str, list[int]]:
        """Return a convolution's codes with a border that is not of zeros, and the border that is left to it."""
        height, width = layer.node.options["padding"]
        if (pad_value := layer.node.options["pad_value"]) == 0 or not height + width:
            return codes, [height, width, height, width]
        border = self.constant([0, 0, height, width, 0, 0, height, width], np.int64)
        return self.add("Pad", [codes, border, self.constant(u + u * pad_value, np.uint8)]), [0, 0, 0, 0]

    def linear_sums(self, layer: Layer) -> tuple[str, int]:
        """Return the sums of a binary linear layer as int32, times the unit that is returned with them."""
        codes, u = self.bits_of(layer.node.inputs[0])
        weight = self.weight(layer, np.int8(1))
        return self.add("MatMulInteger", [codes, weight, self.constant(u, np.uint8), self.constant(0, np.int8)]), u

    def sums(self, layer: Layer) -> str:
        """Return a binary layer's sums as float32."""
        if len(layer.node.shape) == 1:
            value, unit = self.linear_sums(layer)
            return self.add("Mul", [self.add("Cast", [value], to=TensorProto.FLOAT), self.constant(1 / unit)])
        codes, u = self.bits_of(layer.node.inputs[0])
        value, pads = self.padded(layer, codes, u)
        value = self.add("DequantizeLinear", [value, self.constant(1 / u), self.constant(u, np.uint8)])
        weight = self.weight(layer, np.float32(1))
        value = self.add("Conv", [value, weight], strides=layer.node.options["stride"], pads=pads)
        # Nothing is beyond these limits. They keep an engine from multiplying a norm into the weights, whose products
        # would add up to no integers.
        return self.add("Clip", [value, self.constant(-(2.0**24)), self.constant(2.0**24)])

    def move(self, node: Node, value: str) -> str:
        if node.op == "reshape":
            return self.add("Reshape", [value, self.constant([0, *node.shape], np.int64)])
        return self.add("MaxPool", [value], **_pool(node))

    def real_of(self, node: Node) -> str:
        """Return real values, or sums as real ones."""
        if node not in self.real:
            if node.op == "binary":
                self.real[node] = self.sums(node.options["layer"])
            elif node.op == "constant":
                self.real[node] = self.constant(node.options["value"].numpy())
            else:
                values = [self.real_of(source) for source in node.inputs]
                self.real[node] = self.move(node, *values) if node.op in MOVES else self.operation(node, values)
        return self.real[node]

    def operation(self, node: Node, values: list[str]) -> str:
        """Return the result of a real-valued operation."""
        options = node.options
        if node.op in ("add", "sub", "mul", "div", "tanh", "relu", "neg", "abs"):
            return self.add(node.op.capitalize(), values)
        (x,) = values
        if node.op in ("silu", "sigmoid"):
            # ONNX Runtime's Sigmoid is off by 1.7e-7, many roundings where it is small.
            one = self.constant(1)
            below = self.add("Add", [self.add("Exp", [self.add("Neg", [x])]), one])
            return self.add("Div", [x if node.op == "silu" else one, below])
        if node.op == "clip":
            return self.add("Clip", [x, self.constant(options["low"]), self.constant(options["high"])])
        if node.op == "batch_norm":
            ones = np.ones(node.shape[0])
            weight, bias = (ones if options["weight"] is None else options["weight"].numpy()), options["bias"]
            vectors = (weight, 0 * ones if bias is None else bias.numpy(), options["mean"], options["var"])
            inputs = [x, *(self.constant(np.asarray(vector)) for vector in vectors)]
            return self.add("BatchNormalization", inputs, epsilon=options["eps"])
        if node.op in ("conv", "linear"):
            weights = [self.constant(t.numpy()) for t in (options["weight"], options["bias"]) if t is not None]
            if node.op == "linear":
                return self.add("Gemm", [x, *weights], transB=1)
            return self.add("Conv", [x, *weights], strides=options["stride"], pads=[*options["padding"]] * 2)
        if node.op == "avg_pool":
            return self.add("AveragePool", [x], **_pool(node))
        assert node.op == "mean"
        return self.add("ReduceMean", [x, self.constant(options["dims"], np.int64)], keepdims=int(options["keep"]))


def producer(node: Node) -> tuple[list[Node], Layer]:
    """Return the layer whose sums a node holds, and the moves between them, in their order."""
    moves: list[Node] = []
    while node.op in MOVES:
        moves.insert(0, node)
        (node,) = node.inputs
    return moves, node.options["layer"]


def _interval_code(
    low: NDArray[np.int64], high: NDArray[np.int64], u: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return scale and bias with which the codes of the integers from `low` to `high - 1` are 64 to 191, no others.

    The ends of an interval, half way between two integers, are put half way between two codes. The bias is rounded to
    1/u of the distance of two integers, of which half is to spare.
    """
    empty = high == low  # beyond all sums
    scale = 128 / np.where(empty, 2, high - low)
    # (u y + bias) scale / u + MIDDLE is 63.5 at y = low - 1/2
    bias = np.rint(u * ((63.5 - MIDDLE) / scale - (low - 0.5)))
    return scale.astype(np.float32), bias.astype(np.int32)


def _column(channels: NDArray[np.bool_], layer: Layer) -> NDArray[np.bool_]:
    return channels.reshape(-1, *[1] * (layer.weight.ndim - 1))


def _pool(node: Node) -> dict[str, Any]:
    options = node.options
    return {"kernel_shape": options["kernel"], "strides": options["stride"], "pads": [*options["padding"]] * 2}


def with_digest(model: onnx.ModelProto) -> bytes:
    """Return the bytes of a model whose metadata have the SHA-256 of all of them, with zeros in its own place."""
    properties = {prop.key: prop.value for prop in model.metadata_props}
    helper.set_model_props(model, properties | {"sha256": NO_DIGEST})
    content = model.SerializeToString(deterministic=True)
    return content.replace(NO_DIGEST.encode(), hashlib.sha256(content).hexdigest().encode())


class OnnxRuntime:
    """An `Engine` of `verify`: ONNX Runtime with a model as it is, for its logits, and with its bits as results."""

    def __init__(self, content: bytes, codes: Mapping[str, tuple[str, int]], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        model = onnx.load_from_string(content)
        names = list(dict.fromkeys(name for name, _ in codes.values()))
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names)
        self.codes, self.names = codes, names
        self.plain = onnxruntime.InferenceSession(content, options)
        self.observed = onnxruntime.InferenceSession(model.SerializeToString(), options)

    def __call__(self, images: NDArray[np.uint8]) -> Answer:
        (logits,) = self.plain.run(None, {"images": images})
        codes = self.observed.run(self.names, {"images": images})
        found = dict(zip(self.names, codes, strict=True))
        bits = {
            layer: np.sign(found[name].astype(np.int16) - u).astype(np.int8)
            for layer, (name, u) in self.codes.items()
        }
        return Answer(logits, bits)
