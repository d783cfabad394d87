"""How a run's network starts: the published initial weights and torch's, paired by seed."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from torch import Tensor

from abn_exp.binarize import BinaryConv2d
from abn_exp.data.prepare import load
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from abn_exp.training import setup
from abn_exp.training.setup import make_network, normalization, select_device

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


def test_the_published_protocol_pairs_nothing_and_takes_imagenet_s_colours(make_plan: Make) -> None:
    bn, abn = (parameters(make_plan("recipe=paper", f"norm={norm}")) for norm in ("bn", "abn"))
    assert not any(torch.equal(bn[name], abn[name]) for name in bn if bn[name].dim() > 1)
    mean, std = normalization(make_plan("recipe=paper").config, load("digits", "."))
    assert list(mean) == [0.485, 0.456, 0.406]
    assert list(std) == [0.229, 0.224, 0.225]


def test_norms_of_one_seed_have_the_published_start_in_common(make_plan: Make) -> None:
    common = ["model=resnet18_paper", "recipe.init=authors", "seed=3"]
    bn, abn = (parameters(make_plan(*common, f"norm={norm}")) for norm in ("bn", "abn"))
    assert all(torch.equal(bn[name], abn[name]) for name in bn if bn[name].dim() > 1)
    other = parameters(make_plan(*common[:2], "seed=4", "norm=bn"))
    assert not any(torch.equal(bn[name], other[name]) for name in bn if bn[name].dim() == 4)


@pytest.mark.parametrize(
    ("driver", "visible", "device", "told"),
    [
        (True, None, "auto", True),
        (True, "0", "auto", True),
        (True, "", "auto", False),  # hidden on purpose
        (True, None, "cpu", False),
        (False, None, "auto", False),
    ],
)
def test_an_nvidia_device_that_torch_does_not_see_is_told(
    make_plan: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    driver: bool,
    visible: str | None,
    device: str,
    told: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(setup, "NVIDIA_DRIVER", (tmp_path if driver else tmp_path / "no driver",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with caplog.at_level(logging.WARNING):
        assert select_device(make_plan(f"device={device}").config) == torch.device("cpu")
    assert ("has an NVIDIA device, but torch sees none" in caplog.text) == told
    assert (f"torch {torch.__version__} is built" in caplog.text) == told


@pytest.mark.parametrize(("process", "gpu"), [("MainProcess", 0), ("worker-1", 0), ("worker-2", 1), ("worker-3", 0)])
def test_workers_take_the_gpus_in_turn(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch, process: str, gpu: int
) -> None:
    monkeypatch.setattr(setup, "cuda_works", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(setup, "current_process", lambda: SimpleNamespace(name=process))
    assert select_device(make_plan("device=cuda").config) == torch.device("cuda", gpu)


def test_a_driver_that_is_too_old_for_torch_is_told(
    make_plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts its devices all the same."""

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(setup, "NVIDIA_DRIVER", (tmp_path,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with caplog.at_level(logging.WARNING):
        assert select_device(make_plan().config) == torch.device("cpu")
    assert "has an NVIDIA device, but torch sees none" in caplog.text
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        select_device(make_plan("device=cuda").config)


def test_a_device_that_is_not_there_is_refused(make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"torch sees no CUDA device \(torch .* is built without CUDA\)"):
        select_device(make_plan("device=cuda").config)


def test_a_channel_of_one_value_is_refused(make_plan: Make) -> None:
    """Its standard deviation is 0, so that every image would be NaN."""
    config, digits = make_plan("dataset=folder", "dataset.path=.").config, load("digits", ".")
    images = digits.train.images.clone()
    images[:, 2] = 7
    flat = replace(digits, train=replace(digits.train, images=images))
    with pytest.raises(ConfigError, match=r"the same value in every pixel, .* is 0: give dataset\.mean"):
        normalization(config, flat)
    assert normalization(config, digits)[1][0] > 0
