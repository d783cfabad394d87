"""OpenVINO and QONNX: every sum, sign and logit against torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from abn_exp.binarize import Binarization
from abn_exp.deploy.graph import trace
from abn_exp.deploy.verify import Mismatch, verify
from abn_exp.models import binarynet, resnet18_paper
from tests.helpers.deploy import INPUT, images, trained

COUNT = 12
LABELS = torch.zeros(COUNT, dtype=torch.int64)

OPTIONS = [
    (binarynet, "abn_scale", {"binarization": Binarization(pad_value=1.0)}),  # intervals of -1 and of +1, pools
    (
        binarynet,
        "cubic",
        {"binarization": Binarization(sign_zero="zero", pad_value=-1.0)},
    ),  # three thresholds, no bits
    (resnet18_paper, "abn", {"width": 0.75}),  # real shortcuts; 12 channels
]


@pytest.mark.parametrize(("build", "norm", "options"), OPTIONS)
def test_qonnx_s_executor_decides_as_torch_does(
    build: Callable[..., nn.Module], norm: str, options: dict[str, Any]
) -> None:
    qonnx = pytest.importorskip("abn_exp.deploy.qonnx")
    network = trained(build, norm, **options)
    graph = trace(network, 16)
    found = verify(network, graph, qonnx.Executor(graph, INPUT), images(COUNT), LABELS, INPUT)
    bits = sum(COUNT * int(np.prod(layer.node.inputs[0].shape)) for layer in graph.layers)
    assert found.folded_bits + found.real_bits == bits
    model = qonnx.QonnxWriter(graph).qonnx_model(INPUT)
    kinds = {node.op_type for node in model.graph.node if node.domain}
    thresholds = any(x.fold is not None and x.fold.counts.max(initial=0) < 2 for x in graph.layers)
    assert kinds == {"BipolarQuant", *["MultiThreshold"] * thresholds}
    assert (
        onnx.load_from_string(model.SerializeToString()).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    )


@pytest.mark.parametrize(("build", "norm", "options"), OPTIONS)
def test_openvino_decides_as_torch_does(build: Callable[..., nn.Module], norm: str, options: dict[str, Any]) -> None:
    openvino = pytest.importorskip("abn_exp.deploy.openvino")
    network = trained(build, norm, **options)
    graph = trace(network, 16)
    with openvino.OpenVINO(graph, INPUT, 1) as engine:
        found = verify(network, graph, engine, images(COUNT), LABELS, INPUT)
    real = sum(COUNT * int(np.prod(x.node.inputs[0].shape)) for x in graph.layers if x.fold is None)
    assert (found.images, found.real_bits) == (COUNT, real)
    layer = graph.layers[-1]
    with openvino.OpenVINO(graph, INPUT, 1, sums=layer) as engine:
        found = verify(network, graph, engine, images(COUNT), LABELS, INPUT)
    assert found.sums == COUNT * int(np.prod(layer.node.shape))


def test_openvino_s_file_holds_a_bit_a_weight_and_its_kernels_multiply_bits() -> None:
    openvino = pytest.importorskip("abn_exp.deploy.openvino")
    import openvino as ov

    network = trained(binarynet, "abn", width=0.25)
    writer = openvino.Writer(trace(network, 16))
    model = writer.model(INPUT)
    _, binary = openvino.serialized(model)
    weights = sum(m.weight.numel() for m in network.modules() if type(m).__name__.startswith("Binary"))
    rest = 4 * (sum(p.numel() for p in network.parameters()) - weights)
    assert weights / 8 < len(binary) < weights / 8 + 2 * rest + 5000
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert layers.count("BinaryConvolution") == 7
    assert writer.real_layers == {}


def test_a_layer_of_twelve_channels_is_given_as_a_real_one() -> None:
    openvino = pytest.importorskip("abn_exp.deploy.openvino")
    writer = openvino.Writer(trace(trained(resnet18_paper, "abn", width=0.75), 16))
    writer.model(INPUT)
    assert writer.real_layers["layer1.0.conv1"] == "12 input channels are no multiple of 8"
    assert "layer2.0.conv2" not in writer.real_layers


def test_a_crash_of_openvino_is_a_sentence() -> None:
    openvino = pytest.importorskip("abn_exp.deploy.openvino")
    graph = trace(trained(binarynet, "bn"), 16)
    with openvino.OpenVINO(graph, INPUT, 1) as engine:
        engine.observed.process.kill()
        with pytest.raises(Mismatch, match=r"OpenVINO ended its process with signal SIGKILL"):
            engine(images(1).numpy())
    assert not Path(engine.observed.folder.name).exists()
