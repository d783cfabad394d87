"""What is folded and what is not, and why."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abn_exp.binarize import Binarization, BinaryConv2d, BinaryLinear
from abn_exp.deploy.graph import Graph, trace
from abn_exp.errors import ConfigError
from abn_exp.models import binarynet, resnet18_paper
from abn_exp.models.build import restore_biases_
from tests.helpers.deploy import INPUT, images, norm_layer, trained


def reasons(graph: Graph) -> dict[str, str | None]:
    return {layer.name: layer.reason for layer in graph.layers}


@pytest.fixture(scope="module")
def paper() -> Graph:
    return trace(trained(resnet18_paper, "abn", width=0.25), 16)


def test_a_layer_behind_real_weights_or_a_real_shortcut_stays_real(paper: Graph) -> None:
    found = reasons(paper)
    assert found["layer1.0.conv1"] == "stem.conv has real weights"
    assert found["layer1.0.conv2"] is None
    assert found["layer1.1.conv1"] == "a real-valued shortcut is added before the sign"
    assert found["layer2.0.shortcut.0"] == found["layer2.0.conv1"]
    assert [layer.decided_by for layer in paper.layers[:3]] == [
        "stem.norm",
        "layer1.0.conv1, layer1.0.norm1",
        "layer1.0.norm2",
    ]


def test_operations_that_nothing_reads_any_more_are_left_out(paper: Graph) -> None:
    ops = [node.op for node in paper.nodes]
    assert ops.count("binary") == len(paper.layers) == 14
    assert ops.count("threshold") == 6
    assert ops.count("silu") == 1 + 2 + 2 + 1 + 2 - 1 + 1  # stem, norm2 of five blocks, two shortcuts


def test_iebn_reads_the_whole_map() -> None:
    found = reasons(trace(trained(resnet18_paper, "iebn", width=0.25), 16))
    assert found["layer1.0.conv2"] == "aten.mean.dim reads more than one place of a map"


def test_a_network_is_left_as_it_was() -> None:
    network = trained(binarynet, "abn")
    x = INPUT.normalize(images(4))
    before = network(x)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    trace(network, 16)
    assert torch.equal(network(x), before)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(layer.product is None for layer in network.modules() if isinstance(layer, BinaryConv2d | BinaryLinear))


def test_a_bias_that_a_norm_does_not_take_back_stays_real() -> None:
    network = trained(binarynet, "bn")
    restore_biases_(network, {"layer2.conv.bias": torch.zeros(1)})
    nn.init.constant_(network.layer2[0].bias, 0.3)
    assert reasons(trace(network, 16))["layer3.conv"] == "layer2.conv has a bias"


def test_zero_weights_and_zero_values_are_no_bits() -> None:
    network = trained(binarynet, "bn", binarization=Binarization(sign_zero="zero"))
    network.layer2.norm.running_mean.zero_()
    network.layer2.norm.bias.zero_()
    network.layer4.conv.weight[0, 0, 0, 0] = 0
    graph = trace(network, 16)
    assert reasons(graph)["layer3.conv"] == "the sum 0 of channel 0 gives exactly 0, which is no bit here"
    assert reasons(graph)["layer4.conv"] is None
    assert {layer.name: layer.packed for layer in graph.layers if not layer.packed} == {"layer4.conv": False}


class Odd(nn.Module):
    """Two binary layers with something of a user's own between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first = BinaryConv2d(3, 4, 3, padding=1)
        self.between = between
        self.second = BinaryLinear(4 * 8 * 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.between(self.first(x)).flatten(1)) + 0.5)


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.max_pool2d(F.silu(x - 1.5) + 0.1, 2), None),  # a pool behind the norm
        (lambda x: F.hardtanh(F.max_pool2d(x, 2) * torch.tensor([1.0, -2.0, 3.0, -4.0]).view(4, 1, 1) + 0.5), None),
        (lambda x: F.gelu(F.max_pool2d(x, 2)) + 0.1, None),  # of which no engine has to know
        (
            lambda x: F.max_pool2d(F.silu(x) + torch.zeros(16, 1), 2),
            "a constant in it is not one a channel",
        ),
        (lambda x: F.max_pool2d(x - x.mean(1, keepdim=True), 2), "aten.mean.dim reads more than one place of a map"),
        (
            lambda x: F.hardtanh(F.max_pool2d(F.silu(x) + 0.1, 2) - 0.5),
            "a pool or a reshape stands between two functions of the sums",
        ),
        (lambda x: F.avg_pool2d(x, 2) - 0.1, "aten.avg_pool2d.default reads more than one place of a map"),
    ],
)
def test_what_stands_between_may_be_any_function_of_single_values(
    function: Callable[[Tensor], Tensor], reason: str | None
) -> None:
    network = Odd(Between(function)).eval().requires_grad_(False)
    graph = trace(network, 16)
    layer = graph.layers[1]
    assert layer.reason == reason
    if reason is None:
        x = INPUT.normalize(images(5))
        threshold = layer.node.inputs[0]
        while threshold.op != "threshold":
            (threshold,) = threshold.inputs
        sums = network.first(x)
        if threshold.inputs[0].op == "max_pool":
            sums = F.max_pool2d(sums, 2)
        assert layer.fold is not None
        bits = torch.from_numpy(layer.fold.signs(sums.to(torch.int32).numpy()))
        bits = bits if bits.shape[-1] == 8 else F.max_pool2d(bits.float(), 2).bool()
        assert torch.equal(bits, network.between(network.first(x)) >= 0)


def test_what_cannot_be_exported_is_refused() -> None:
    with pytest.raises(ConfigError, match="ends in a binary layer"):
        trace(nn.Sequential(BinaryConv2d(3, 4, 3), nn.Flatten(), BinaryLinear(4 * 14 * 14, 6)), 16)
    with pytest.raises(ConfigError, match=r"aten.gelu.default stays real"):
        trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 4)), 16)
    with pytest.raises(ConfigError, match=r"aten\.cat\.default stays real"):
        trace(nn.Sequential(Between(lambda x: torch.cat([x, x], 1)), nn.Conv2d(6, 4, 3)), 16)
    with pytest.raises(ConfigError, match="This network cannot be traced, so it cannot be exported: "):
        trace(nn.Sequential(Between(lambda x: x if x.max() > 0 else -x), nn.Conv2d(3, 4, 3)), 16)
    with pytest.raises(ConfigError, match="no groups"):
        trace(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), norm_layer("bn")(6)).eval(), 16)
