"""What a recipe does to gradients and latent weights, seen in whole runs of a few steps."""

from collections.abc import Callable

import pytest
import torch

from abn_exp.identity import RunPlan
from abn_exp.results import read_metrics
from abn_exp.trained_network import read_checkpoint
from abn_exp.training.run import run
from abn_exp.training.setup import make_network

Make = Callable[..., RunPlan]


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
