"""Building a network from its configuration, with norms of a user's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from abn_exp.binarize import Binarization
from abn_exp.errors import ConfigError
from abn_exp.models.build import build_network
from abn_exp.training.setup import make_network
from tests.helpers.runs import plan_in

MODELS = ("binarynet", "vgg_small", "resnet18", "resnet18_paper")


class TanhNorm(nn.BatchNorm2d):
    """A norm whose gradient autograd computes from its output."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input))


class CopiedTanhNorm(TanhNorm):
    """The same, with an output that nothing needs."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clone()


def build(model: str, norm: type[nn.Module]) -> nn.Module:
    name = norm.__module__ + "." + norm.__qualname__
    torch.manual_seed(0)
    return build_network(
        {"_target_": f"abn_exp.models.{model}", "width": 0.125}, {"_target_": name, "_partial_": True}, 10, 32
    )


@pytest.mark.parametrize("model", MODELS)
def test_a_norm_may_end_in_what_keeps_its_output_for_the_gradient(model: str) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, copied = build(model, TanhNorm), build(model, CopiedTanhNorm)
    for network in (plain, copied):
        network(images).square().sum().backward()
    for (name, ours), theirs in zip(plain.named_parameters(), copied.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_norm_without_running_statistics_is_refused() -> None:
    """What a network predicts of an image would depend on the others in its batch; an InstanceNorm's does not."""
    model, norm = {"_target_": "abn_exp.models.binarynet", "width": 0.125}, {"_partial_": True}
    build_network(model, norm | {"_target_": "torch.nn.InstanceNorm2d"}, 10, 32)
    batch_norm = {"_target_": "torch.nn.BatchNorm2d", "track_running_stats": False}
    with pytest.raises(ConfigError, match=r"norm\.track_running_stats=false is not allowed"):
        build_network(model, norm | batch_norm, 10, 32)
    unsaved = {"_target_": "abn_exp.norm.AttentionBatchNorm2d", "persistent_stats": False}
    with pytest.raises(ConfigError, match=r"norm\.persistent_stats=false is not allowed"):
        build_network(model, norm | unsaved, 10, 32)


class Gated(nn.Module):
    """A norm with a layer of its own, which it starts from zero; a parameter of five dimensions, drawn when made."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("blur", torch.ones(3), persistent=False)  # no statistics: it need not be saved
        self.norm, self.gate = nn.BatchNorm2d(num_features), nn.Linear(num_features, num_features)
        self.drawn = nn.Parameter(torch.rand(1, 2, num_features // 2, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate.weight)

    def forward(self, input: Tensor) -> Tensor:
        x = self.norm(input)
        return x * torch.sigmoid(self.gate(x.mean((2, 3))))[..., None, None] * self.drawn.view(1, -1, 1, 1)


def test_a_norm_s_own_start_is_the_one_that_it_trains_from(tmp_path: Path) -> None:
    def made(seed: int) -> nn.Module:
        norm = f"norm._target_={Gated.__module__}.Gated"
        drop = [f"~norm.{key}" for key in ("eps", "momentum")]
        config = plan_in(tmp_path, "norm=bn", norm, *drop, f"seed={seed}").config
        torch.rand(seed + 1)  # whatever was drawn before
        return make_network(config, "gated", 10, torch.device("cpu"))

    first, again, other = (made(seed).get_submodule("layer2.norm") for seed in (0, 0, 1))
    assert isinstance(first, Gated)
    assert not first.gate.weight.any()
    assert torch.equal(first.drawn, again.get_parameter("drawn"))
    assert not torch.equal(first.drawn, other.get_parameter("drawn"))


class Drawn(nn.Module):
    """A linear layer whose weights are drawn when it is made."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight.T


def with_drawn_weights(num_classes: int, image_size: int, norm_layer: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm_layer(4), Drawn(num_classes))


def test_what_a_norm_draws_changes_no_other_layer() -> None:
    """Else two norms of a seed would not start from the same weights."""
    model, drawn = {"_target_": f"{__name__}.with_drawn_weights"}, []
    for norm in ("torch.nn.BatchNorm2d", f"{__name__}.Gated"):
        torch.manual_seed(0)
        drawn.append(build_network(model, {"_target_": norm, "_partial_": True}, 10, 32).get_parameter("2.weight"))
    assert torch.equal(*drawn)


def test_a_part_of_an_argument_that_is_a_data_class_may_stand_alone() -> None:
    """As where `recipe=paper` sets one field of `binarization`, and the file of the network none."""
    model = {"_target_": "abn_exp.models.binarynet", "width": 0.125, "binarization": {"sign_zero": "zero"}}
    layer = build_network(model, {"_target_": "torch.nn.BatchNorm2d", "_partial_": True}, 10, 32).get_submodule(
        "layer2.conv"
    )
    assert layer.binarization == Binarization(sign_zero="zero")


def test_a_layer_beyond_any_memory_is_told_in_words() -> None:
    model = {"_target_": "abn_exp.models.binarynet", "width": 1e9}
    with (
        pytest.raises(ConfigError, match=r"larger than any memory; choose a smaller model\.width"),
        torch.device("meta"),
    ):
        build_network(model, {"_target_": "torch.nn.BatchNorm2d", "_partial_": True}, 10, 32)
