"""Write a traced network as QONNX, the form that flows for FPGAs read, and run it in qonnx's executor.

Bits are -1 and +1. A layer of thresholds is a MultiThreshold; one with intervals is a product of two BipolarQuant.
Both give +1 from their threshold on, so that falling channels are multiplied by -1. Weights are float32 behind a
BipolarQuant.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_shapes import InferShapes

from abn_exp.deploy.fold import Fold
from abn_exp.deploy.graph import Graph, Layer, Node
from abn_exp.deploy.onnx import OPSET, Writer
from abn_exp.deploy.verify import Answer
from abn_exp.trained_network import InputFormat

DOMAIN = "qonnx.custom_op.general"


class QonnxWriter(Writer):
    """Make the QONNX model of a graph, of a fixed batch: pixels as float32 (B, 3, S, S) to logits."""

    def qonnx_model(self, input_format: InputFormat, batch: int = 1) -> ModelProto:
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        model = self.assembled(input_format, "images", TensorProto.FLOAT, batch, opsets)
        return ModelWrapper(model).transform(InferShapes()).model

    def bipolar(self, value: str) -> str:
        return self.add("BipolarQuant", [value, self.constant(1)], domain=DOMAIN)

    def sign(self, node: Node) -> tuple[str, int]:
        value = self.real_of(node.inputs[0])
        return (self.add("Sign", [value]) if node.options["sign_zero"] == "zero" else self.bipolar(value)), 1

    def threshold(self, node: Node) -> tuple[str, int]:
        fold = node.options["fold"]
        sums = self.real_of(node.inputs[0])
        if fold.counts.max() <= 1:
            inputs = [sums, self.constant(fold.single_thresholds()[:, None])]
            layout = "NCHW" if len(node.shape) == 3 else "NC"
            options: dict[str, Any] = {
                "out_scale": 2.0,
                "out_bias": -1.0,
                "out_dtype": "BIPOLAR",
                "data_layout": layout,
            }
            value = self.add("MultiThreshold", inputs, domain=DOMAIN, **options)
            return self.negative_where(fold.first & (fold.counts == 1), value, node), 1
        *columns, negative = fold.intervals() if fold.counts.max() <= 2 else (*fold.thresholds.T, _odd(fold))
        value = ""
        for column in columns:
            side = self.bipolar(self.add("Sub", [sums, self.per_channel(column, np.float32, node.shape)]))
            value = self.add("Mul", [value, side]) if value else side
        return self.negative_where(negative, value, node), 1

    def negative_where(self, channels: NDArray[np.bool_], value: str, node: Node) -> str:
        if not channels.any():
            return value
        return self.add("Mul", [value, self.per_channel(np.where(channels, -1, 1), np.float32, node.shape)])

    def sums(self, layer: Layer) -> str:
        bits, _ = self.bits_of(layer.node.inputs[0])
        options = layer.node.options
        weight = layer.weight.T if layer.weight.ndim == 2 else layer.weight
        stored = self.constant(weight)
        stored = self.bipolar(stored) if layer.packed else stored
        if weight.ndim == 2:
            return self.add("MatMul", [bits, stored])
        height, width = options["padding"]
        pads = [height, width] * 2
        if options["pad_value"] and any(pads):
            border = self.constant([0, 0, height, width] * 2, np.int64)
            bits, pads = self.add("Pad", [bits, border, self.constant(options["pad_value"])]), [0] * 4
        kernel = list(weight.shape[2:])
        return self.add("Conv", [bits, stored], strides=options["stride"], pads=pads, kernel_shape=kernel)


def _odd(fold: Fold) -> NDArray[np.bool_]:
    """Return where a product of T signs, of which those of missing thresholds are -1, is not the fold's sign."""
    return fold.first ^ (fold.thresholds.shape[1] % 2 == 0)


class Executor:
    """qonnx's executor as an `Engine` of `verify`."""

    def __init__(self, graph: Graph, input_format: InputFormat) -> None:
        self.graph, self.input_format = graph, input_format

    def __call__(self, images: NDArray[np.uint8]) -> Answer:
        writer = QonnxWriter(self.graph)
        model = ModelWrapper(writer.qonnx_model(self.input_format, len(images)))
        found = execute_onnx(model, {"images": images.astype(np.float32)}, return_full_exec_context=True)
        bits = {layer: found[name].astype(np.int8) for layer, (name, _) in writer.codes.items()}
        return Answer(found["logits"], bits)
