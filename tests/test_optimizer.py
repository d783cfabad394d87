"""`recipe.optimizer`: any class of torch.optim with its own arguments, checked before a run starts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from abn_exp.config import Config
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from abn_exp.optimizer import build_optimizer, check_optimizer
from abn_exp.results import read_metrics
from abn_exp.training.classifier import LitClassifier
from abn_exp.training.run import run

Make = Callable[..., RunPlan]
REFUSED = {
    "LBFGS": "it computes the loss several times a step",
    "Muon": "torch.optim.Muon refuses its arguments (Muon only supports 2D parameters",
    "SparseAdam": "SparseAdam cannot take a step (SparseAdam does not support dense gradients",
    "Optimizer": "it takes no lr, which the schedule changes",
}
CLASSES = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_torch_works_or_is_refused_in_a_sentence(name: str) -> None:
    options = {"_target_": f"torch.optim.{name}", "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}
    if name in REFUSED:
        with pytest.raises(ConfigError) as caught:
            check_optimizer(options)
        assert REFUSED[name] in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        return
    check_optimizer(options)
    optimizer = build_optimizer(options, [nn.Parameter(torch.ones(2))])
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.defaults.get("weight_decay", 0) == 0
    if "momentum" in optimizer.defaults:
        assert optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["+recipe.optimizer.beta=0.9"],
            "recipe.optimizer.beta is not a key of torch.optim.Adam; it takes lr, betas",
        ),
        (["+recipe.optimizer.betas=0.9"], "recipe.optimizer.betas=0.9 is not allowed"),
        (["+recipe.optimizer.betas=[0.9,2.0]"], "torch.optim.Adam refuses its arguments (Invalid beta"),
        (["+recipe.optimizer.params=[]"], "recipe.optimizer.params is not a key of torch.optim.Adam"),
        (
            ["recipe.optimizer._target_=torch.optim.Adan"],
            "recipe.optimizer._target_=torch.optim.Adan cannot be imported",
        ),
        (["recipe.optimizer._target_=torch.nn.Linear"], "it should be a subclass of torch.optim.Optimizer"),
        (["recipe.optimizer._target_=os.system"], "it should be a subclass of torch.optim.Optimizer"),
        (
            ["recipe.optimizer._target_=torch.optim.Rprop", "recipe.optimizer.weight_decay=0.1"],
            "recipe.optimizer.weight_decay=0.1, but torch.optim.Rprop has none; use 0",
        ),
        (["recipe.optimizer.name=null"], "recipe.optimizer needs a name, adam or sgd, or a class of torch.optim"),
        (["recipe.optimizer.name=adamw"], "it should be 'adam' or 'sgd'"),
    ],
)
def test_a_mistake_is_one_sentence(make_plan: Make, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(*overrides)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_adamw_steps_as_written_out_in_float64(make_plan: Make) -> None:
    """Decoupled decay (arXiv 1711.05101), with the schedule's rate, through the classifier."""
    torch.manual_seed(0)
    plan = make_plan(
        "recipe.optimizer._target_=torch.optim.AdamW",
        "recipe.optimizer.weight_decay=0.1",
        "recipe.schedule.name=linear",
        "recipe.epochs=5",
        "+recipe.optimizer.betas=[0.8,0.95]",
    )
    weight = torch.randn(100)
    network = nn.ParameterList([nn.Parameter(weight.clone())])
    configured: Any = LitClassifier(network, plan.config.recipe, 0, 10, 1).configure_optimizers()
    expected, m, v = weight.double(), torch.zeros(100).double(), torch.zeros(100).double()
    for step in range(1, 6):
        network[0].grad = torch.randn(100)
        configured["optimizer"].step()
        configured["lr_scheduler"].step()
        lr, gradient = 1e-3 * (1 - (step - 1) / 5), network[0].grad.double()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        expected = expected * (1 - 0.1 * lr) - lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(network[0].detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_the_record_of_a_short_name_is_what_it_was(make_plan: Make) -> None:
    """Runs from before there was a choice of class keep their configuration, and so their hash."""
    short = make_plan().config.recipe.optimizer.model_dump()
    assert list(short) == ["name", "lr", "momentum", "weight_decay", "rebuild_each_epoch"]
    plan = make_plan("recipe.optimizer._target_=torch.optim.RMSprop", "+recipe.optimizer.alpha=0.9")
    assert "name" not in plan.config.recipe.optimizer.model_dump()
    assert "optimizer._target_-torch.optim.RMSprop_optimizer.alpha-0.9" in plan.variant
    again = Config.model_validate(yaml.safe_load(yaml.safe_dump(plan.config.model_dump())))
    assert replace(plan, config=again).config_hash == plan.config_hash


def test_a_run_with_a_class_of_its_own_that_is_rebuilt_each_epoch(make_plan: Make) -> None:
    """Adagrad has state from its construction on, which a rebuilt one begins with anew."""
    adagrad = ["recipe.optimizer._target_=torch.optim.Adagrad", "+recipe.optimizer.initial_accumulator_value=0.5"]
    losses = []
    for rebuild in ("true", "false"):
        plan = make_plan(
            *adagrad, "keep=all", f"recipe.optimizer.rebuild_each_epoch={rebuild}", "recipe.schedule.name=constant"
        )
        run(plan, "python train.py")
        losses.append([line["train/loss"] for line in read_metrics(plan.directory)])
        state = torch.load(plan.directory / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0][
            "state"
        ]
        assert {int(parameter["step"]) for parameter in state.values()} == {6 if rebuild == "true" else 12}
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
