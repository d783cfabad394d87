"""What a recipe does to gradients and latent weights, seen in whole runs of a few steps."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from abn_exp.identity import RunPlan
from abn_exp.results import read_metrics
from abn_exp.trained_network import read_checkpoint
from abn_exp.training.classifier import rate
from abn_exp.training.run import run
from abn_exp.training.setup import load_data, make_loaders, make_network

Make = Callable[..., RunPlan]


def test_steps_go_down_the_gradient_of_each_batch_alone(make_plan: Make) -> None:
    """Three steps of plain SGD, written out; with the signs that changed meanwhile."""
    sgd = ["recipe.optimizer.name=sgd", "recipe.optimizer.momentum=0", "recipe.optimizer.lr=1"]
    once = ["recipe.schedule.name=constant", "recipe.epochs=1", "recipe.batch_size=60"]
    plan = make_plan(*sgd, *once, "recipe.label_smoothing=0.1")
    run(plan, "python train.py")
    cpu, (line,) = torch.device("cpu"), read_metrics(plan.directory)
    network, losses = make_network(plan.config, "abn", 10, cpu), []
    before = {name: parameter.detach() > 0 for name, parameter in network.named_parameters()}
    for images, labels in make_loaders(plan.config, load_data(plan.config), cpu)["train"]:
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= gradient
        losses.append(loss.item())
    assert len(losses) == 3
    after = read_checkpoint(plan.directory / "checkpoints" / "last.ckpt")["state_dict"]
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(after[f"network.{name}"], parameter.detach(), rtol=1e-4, atol=1e-5)
    assert line["train/loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    flipped = {key: value for key, value in line.items() if key.startswith("bnn/flip_ratio/")}
    assert max(flipped.values()) > 0
    for key, value in flipped.items():
        name = f"{key.removeprefix('bnn/flip_ratio/')}.weight"
        changed = before[name] != (network.get_parameter(name) > 0)
        assert value == pytest.approx(changed.float().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("cosine", 0, [1, 0.8535534, 0.5, 0.1464466, 0]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 0.5, 0]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1]),
    ],
)
def test_the_learning_rate_by_hand(
    schedule: Literal["constant", "cosine", "linear"], warmup: int, factors: list[float]
) -> None:
    assert [rate(step, 4, warmup, schedule) for step in range(5)] == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipped_gradients_have_the_norm_that_was_asked_for(make_plan: Make, limit: float) -> None:
    """One step of plain SGD moves all weights together by lr times the gradients' norm."""
    sgd = ["recipe.optimizer.name=sgd", "recipe.optimizer.momentum=0", "recipe.schedule.name=constant"]
    plan = make_plan(*sgd, "recipe.epochs=1", "recipe.batch_size=180", f"recipe.clip_grad_norm={limit}")
    run(plan, "python train.py")
    before = make_network(plan.config, "abn", 10, torch.device("cpu"))
    after = read_checkpoint(plan.directory / "checkpoints" / "last.ckpt")["state_dict"]
    moved = [after[f"network.{name}"] - weight.detach() for name, weight in before.named_parameters()]
    norm = torch.cat([part.flatten() for part in moved]).double().norm().item() / 1e-3
    assert norm == pytest.approx(limit, rel=1e-3) if limit < 1 else 0.01 < norm < limit


@pytest.mark.parametrize(("share", "kept"), [("[0,0.5]", [True, False]), ("[0.5,1]", [False, True])])
def test_latent_weights_are_clipped_early_or_late(make_plan: Make, share: str, kept: list[bool]) -> None:
    """Of two epochs the first or the second; the rate is such that weights leave [-1, 1] at once."""
    plan = make_plan(
        "recipe.optimizer.lr=0.3",
        "recipe.schedule.name=constant",
        "recipe.clip_latent_weights=true",
        f"recipe.clip_latent_range={share}",
    )
    run(plan, "python train.py")
    beyond = [
        sum(value for key, value in line.items() if key.startswith("bnn/latent_beyond_one/"))
        for line in read_metrics(plan.directory)
    ]
    assert [value == 0 for value in beyond] == kept
