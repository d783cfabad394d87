"""The file in ONNX Runtime: every bit and logit against torch, and that the comparison finds what is wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from abn_exp.binarize import Binarization, BinaryConv2d, BinaryLinear
from abn_exp.deploy import verify as verification
from abn_exp.deploy.fold import Fold
from abn_exp.deploy.graph import Graph, trace
from abn_exp.deploy.onnx import OnnxRuntime, Writer, with_digest
from abn_exp.deploy.verify import Answer, Engine, Mismatch, Verification, _Bounds, _Forced, verify
from abn_exp.models import binarynet, resnet18, resnet18_paper, vgg_small
from tests.helpers.deploy import INPUT, images, trained

COUNT = 24
LABELS = torch.zeros(COUNT, dtype=torch.int64)


def engine_of(graph: Graph) -> OnnxRuntime:
    writer = Writer(graph)
    return OnnxRuntime(with_digest(writer.model(INPUT, {})), writer.codes, 1)


def check(network: nn.Module, graph: Graph, engine: Engine) -> Verification:
    return verify(network, graph, engine, images(COUNT), LABELS, INPUT)


@pytest.mark.parametrize(
    ("build", "norm", "options"),
    [
        (binarynet, "abn", {}),
        (binarynet, "bn", {"binarization": Binarization(pad_value=-1.0)}),
        (binarynet, "abn_scale", {"binarization": Binarization(pad_value=1.0)}),  # intervals of +1 and of -1
        (binarynet, "cubic", {}),  # three thresholds
        (binarynet, "bn", {"binarization": Binarization(sign_zero="zero")}),
        (vgg_small, "iebn", {}),
        (vgg_small, "tanh", {}),
        (resnet18, "abn", {}),
        (resnet18, "abn_gate", {"shortcut": "post_norm"}),
        (resnet18_paper, "bn", {"width": 0.5}),
    ],
)
def test_the_file_decides_as_torch_does(build: Callable[..., nn.Module], norm: str, options: dict[str, Any]) -> None:
    network = trained(build, norm, **options)
    graph = trace(network, 16)
    writer = Writer(graph)
    content = with_digest(writer.model(INPUT, {}))
    found = check(network, graph, OnnxRuntime(content, writer.codes, 1))
    bits = {True: 0, False: 0}
    for layer in graph.layers:
        bits[layer.fold is not None] += COUNT * int(np.prod(layer.node.inputs[0].shape))
    assert (found.folded_bits, found.real_bits) == (bits[True], bits[False])
    assert (bits[True] > 0) == (norm != "iebn" and not (build is resnet18 and norm == "abn"))

    # and once more, by itself
    session = onnxruntime.InferenceSession(content)
    (logits,) = session.run(None, {"images": images(COUNT).numpy()})
    expected = network(INPUT.normalize(images(COUNT))).numpy()
    if not found.differing:
        assert np.allclose(logits, expected, atol=1e-4)
    assert np.array_equal(logits.argmax(1), expected.argmax(1))
    assert {node.domain for node in onnx.load_from_string(content).graph.node} == {""}


def test_weights_are_a_bit_each_in_the_file() -> None:
    network = trained(binarynet, "abn", width=0.25)
    binary = sum(m.weight.numel() for m in network.modules() if isinstance(m, BinaryConv2d | BinaryLinear))
    model = Writer(trace(network, 16)).model(INPUT, {})
    sizes = [len(tensor.raw_data) for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8]
    assert binary / 8 <= sum(sizes) <= binary / 8 + 1024
    assert len(with_digest(model)) < binary / 8 + 4 * (sum(p.numel() for p in network.parameters()) - binary) + 12_000


@pytest.fixture(scope="module")
def paper() -> tuple[Any, Graph]:
    """A network whose signs are decided in both ways."""
    network = trained(resnet18_paper, "abn", width=0.5)
    return network, trace(network, 16)


def test_a_threshold_that_is_off_by_two_is_found(paper: tuple[Any, Graph]) -> None:
    network, graph = paper
    layer = next(layer for layer in graph.layers if layer.fold is not None)
    fold = layer.fold
    assert fold is not None
    original = layer.node.inputs[0].options["fold"]
    channel = int(np.argmax((fold.counts == 1) & (np.abs(fold.thresholds[:, 0]) < 5)))
    moved = fold.thresholds.copy()
    moved[channel, 0] += 2  # sums are even
    try:
        layer.node.inputs[0].options["fold"] = Fold(fold.first, moved, fold.limit)
        with pytest.raises(
            Mismatch, match=r"layer1\.0\.conv2 reads other bits than torch's, folded from .*image \d+"
        ):
            check(network, graph, engine_of(graph))
    finally:
        layer.node.inputs[0].options["fold"] = original


def flipping(engine: Engine, layer: str, which: Callable[[np.ndarray], Any]) -> Engine:
    """An engine that reports other bits of a layer: those that `which` says of (image, ...)."""

    def run(batch: np.ndarray) -> Answer:
        answer = engine(batch)
        bits = {name: value.copy() for name, value in answer.bits.items()}
        where = which(bits[layer])
        bits[layer][where] *= -1
        return replace(answer, bits=bits)

    return run


def test_a_sign_that_rounding_does_not_explain_is_found(paper: tuple[Any, Graph]) -> None:
    network, graph = paper

    def one_of_image_5(bits: np.ndarray) -> np.ndarray:
        where = np.zeros(bits.shape, np.bool_)
        where[5, 0, 3, 3] = True
        return where

    with pytest.raises(Mismatch, match=r"layer1\.0\.conv1 reads a sign of stem\.norm that .* image 5 "):
        check(network, graph, flipping(engine_of(graph), "layer1.0.conv1", one_of_image_5))


def test_a_wrong_logit_is_found(paper: tuple[Any, Graph]) -> None:
    network, graph = paper
    engine = engine_of(graph)

    def run(batch: np.ndarray) -> Answer:
        answer = engine(batch)
        return replace(answer, logits=answer.logits + 1e-3)

    with pytest.raises(Mismatch, match="a logit of the engine is off by more than rounding, first in test image 0"):
        check(network, graph, run)


def test_signs_within_rounding_and_what_they_change_are_counted(
    paper: tuple[Any, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rounding a thousand times as coarse, an engine may decide many values near zero the other way."""
    network, graph = paper
    monkeypatch.setattr(verification, "UNIT", 1000 * verification.UNIT)
    values: dict[str, Tensor] = {}
    network.layer1[0].conv1.register_forward_pre_hook(lambda _, inputs: values.update(stem=inputs[0].clone()))
    network(INPUT.normalize(images(COUNT)))
    near = np.abs(values["stem"].numpy()) < 1e-4
    assert 0 < near.sum() < 1000
    network.layer1[0].conv1._forward_pre_hooks.clear()

    engine = flipping(engine_of(graph), "layer1.0.conv1", lambda bits: near)

    def run(batch: np.ndarray) -> Answer:
        """What follows the flipped signs is computed by torch, as an engine that had flipped them would."""
        answer = engine(batch)
        bits = {"layer1.0.conv1": answer.bits["layer1.0.conv1"]}
        logits = _Forced(network, graph, Answer(answer.logits, bits)).run(INPUT.normalize(torch.from_numpy(batch)))
        return Answer(logits.numpy(), bits)

    found = check(network, graph, run)
    assert found.differing == {"layer1.0.conv1": near.sum()}
    assert found.images_with_differences == near.any((1, 2, 3)).sum()


def test_logits_that_a_sign_within_rounding_explains_are_accounted_for(
    paper: tuple[Any, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model as it is may decide a value near zero otherwise than the one that shows its bits."""
    network, graph = paper
    x = INPUT.normalize(images(COUNT))
    bits: dict[str, np.ndarray] = {}
    first = network.layer1[0].conv1
    first.register_forward_pre_hook(lambda _, inputs: bits.update(stem=np.where(inputs[0].numpy() >= 0, 1, -1)))
    network(x)
    first._forward_pre_hooks.clear()
    shown = {"layer1.0.conv1": bits["stem"].astype(np.int8)}
    forced = _Forced(network, graph, Answer(np.zeros(0, np.float32), shown))
    forced.run(x)
    value, bound = _Bounds(forced.sums, x, INPUT).of(graph.layers[0].node.inputs[0].inputs[0])
    ratio = value.abs() / bound
    flipped = {"layer1.0.conv1": shown["layer1.0.conv1"].copy()}
    flipped["layer1.0.conv1"].reshape(-1)[int(ratio.argmin())] *= -1
    logits = _Forced(network, graph, Answer(np.zeros(0, np.float32), flipped)).run(x).numpy()

    def run(batch: np.ndarray) -> Answer:
        return Answer(logits, shown)

    # Where the value is within rounding of zero, its sign explains the logits; where rounding is finer, nothing does.
    monkeypatch.setattr(verification, "UNIT", 1.01 * float(ratio.min()) * 2.0**-24)
    monkeypatch.setattr(verification, "SMALLEST", 0.0)
    found = check(network, graph, run)
    assert found.differing == {"layer1.0.conv1": 1}
    assert found.images_with_differences == 1


@pytest.mark.parametrize(
    ("build", "norm", "tightness"),
    # Each of the three real convolutions in the shortcuts of resnet18 may add up the worst of all its inputs.
    [(resnet18, "abn", 1e-2), (resnet18_paper, "iebn", 1e-4), (vgg_small, "tanh", 1e-4)],
)
def test_bounds_hold_for_other_orders_of_addition_and_are_tight(
    build: Callable[..., nn.Module], norm: str, tightness: float
) -> None:
    """Values against the same network in float64; bounds against float32 in maps laid out in two ways."""
    network = trained(build, norm)
    graph = trace(network, 16)
    x = INPUT.normalize(images(8))
    bits: dict[str, np.ndarray] = {}
    for layer in graph.layers:

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], name: str = layer.name) -> None:
            bits[name] = np.where(inputs[0].numpy() >= 0, 1, -1).astype(np.int8)

        layer.module.register_forward_pre_hook(keep)
    network(x)
    for layer in graph.layers:
        layer.module._forward_pre_hooks.clear()
    answer = Answer(np.zeros(0, np.float32), bits)
    forced = _Forced(network, graph, answer)
    float32 = [forced.run(x), forced.run(x.contiguous(memory_format=torch.channels_last))]
    bounds = _Bounds(forced.sums, x, INPUT)
    value, bound = bounds.of(graph.nodes[-1])
    assert (bound > 0).all()
    assert bound.max() < tightness * value.abs().max()
    for logits in float32:
        assert ((logits - value).abs() <= bound).all()
    float64 = _Forced(network.double(), graph, answer).run(x.double())
    assert torch.allclose(float64, value, rtol=1e-10, atol=1e-10)
    network.float()
