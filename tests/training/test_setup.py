"""How a run's network starts: the published initial weights and torch's, paired by seed."""

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from abn_exp.binarize import BinaryConv2d
from abn_exp.identity import RunPlan
from abn_exp.training.setup import make_network

Make = Callable[..., RunPlan]


def start(plan: RunPlan) -> torch.nn.Module:
    return make_network(plan.config, plan.choices["norm"], 10, torch.device("cpu"))


def parameters(plan: RunPlan) -> dict[str, Tensor]:
    return dict(start(plan).named_parameters())


def test_the_published_start_is_normal_by_its_layer_s_output(make_plan: Make) -> None:
    """Variance 2 / (kernel size^2 * output channels), each binary convolution by itself, 1x1 shortcuts too."""
    network = start(make_plan("recipe=paper", "model=resnet18_paper", "model.width=2", "norm=bn"))
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, BinaryConv2d)}
    assert len(layers) == 14
    for name, layer in layers.items():
        size = layer.weight.shape[-1]
        scaled = layer.weight.detach().flatten() * (size**2 * layer.weight.shape[0] / 2) ** 0.5
        assert stats.kstest(scaled.numpy(), "norm").pvalue > 1e-4, name
    assert {layer.weight.shape[-1] for layer in layers.values()} == {1, 3}


def test_all_other_layers_keep_torch_s_start(make_plan: Make) -> None:
    paper = ["recipe=paper", "model=resnet18_paper"]
    network = start(make_plan(*paper))
    published, torchs = dict(network.named_parameters()), parameters(make_plan(*paper, "recipe.init=torch"))
    binary = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, BinaryConv2d)}
    assert {name for name in published if not torch.equal(published[name], torchs[name])} == binary


@pytest.mark.parametrize("model", ["binarynet", "vgg_small", "resnet18"])
def test_every_other_network_starts_as_ever(make_plan: Make, model: str) -> None:
    authors, torchs = (
        parameters(make_plan(f"model={model}", f"recipe.init={init}")) for init in ("authors", "torch")
    )
    assert all(torch.equal(authors[name], torchs[name]) for name in torchs)


def test_norms_of_one_seed_have_the_published_start_in_common(make_plan: Make) -> None:
    common = ["model=resnet18_paper", "recipe.init=authors", "seed=3"]
    bn, abn = (parameters(make_plan(*common, f"norm={norm}")) for norm in ("bn", "abn"))
    assert all(torch.equal(bn[name], abn[name]) for name in bn if bn[name].dim() > 1)
    other = parameters(make_plan(*common[:2], "seed=4", "norm=bn"))
    assert not any(torch.equal(bn[name], other[name]) for name in bn if bn[name].dim() == 4)
