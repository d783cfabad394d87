"""Build a run's optimizer from its configuration: `adam`, `sgd`, or any class of `torch.optim` by its `_target_`."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abn_exp.errors import ConfigError, in_a_line
from abn_exp.models.build import check_call, get_object_or_explain

SHORT_NAMES: dict[str, dict[str, Any]] = {
    "adam": {"_target_": "torch.optim.Adam", "fused": True},  # one pass over the weights; last bits differ
    "sgd": {"_target_": "torch.optim.SGD"},
}
SHARED_OPTIONS = ("name", "_target_", "momentum", "weight_decay", "rebuild_each_epoch")  # not passed on unchanged
PATH = "recipe.optimizer"


def build_optimizer(options: Mapping[str, Any], parameters: Iterable[Tensor]) -> Optimizer:
    """Return the optimizer that `recipe.optimizer` describes, for these parameters.

    Its class is `_target_`, or what `name` stands for. `lr` is always passed; `momentum` where the class has such an
    argument; `weight_decay` too, and it must be 0 where the class has none. `rebuild_each_epoch` is not passed.
    Every other key is an argument of the class, a list standing for a tuple.

    Raises ConfigError for a class or an argument that is not allowed.
    """
    node = SHORT_NAMES[options["name"]] if options.get("_target_") is None else {"_target_": options["_target_"]}
    node = node | {key: as_tuples(value) for key, value in options.items() if key not in SHARED_OPTIONS}
    optimizer, target = get_object_or_explain(node, PATH), node["_target_"]
    if not (inspect.isclass(optimizer) and issubclass(optimizer, Optimizer)):
        raise ConfigError(
            f"{PATH}._target_={target} is not allowed: it should be a subclass of torch.optim.Optimizer."
        )
    takes = inspect.signature(optimizer).parameters
    if "lr" not in takes:
        raise ConfigError(f"{PATH}._target_={target} is not allowed: it takes no lr, which the schedule changes.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"{PATH}._target_={target} is not allowed: it computes the loss several times a step.")
    node |= {key: options[key] for key in ("momentum", "weight_decay") if key in takes}
    if options["weight_decay"] and "weight_decay" not in takes:
        raise ConfigError(f"{PATH}.weight_decay={options['weight_decay']}, but {target} has none; use 0.")
    check_call(node, PATH, Optimizer, given=("params",))
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    try:
        return optimizer(parameters, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{PATH}: {target} refuses its arguments ({in_a_line(error)}).") from error


def check_optimizer(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an optimizer that cannot be built, or cannot take a step on a convolution with a bias.

    The step is left out for the short names alone: the first one of a process imports much.
    """
    if options.get("_target_") is None and not options.keys() - {*SHARED_OPTIONS, "lr"}:
        build_optimizer(options, [nn.Parameter(torch.ones(2))])
    else:
        state_size(options)


def state_size(options: Mapping[str, Any]) -> float:
    """Return how many numbers the optimizer stores for each weight, found by one step on a few weights.

    Raises ConfigError for an optimizer that cannot take a step.
    """
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((2, 2, 3, 3), (2,))]
    optimizer = build_optimizer(options, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    try:
        with warnings.catch_warnings(action="ignore"):
            optimizer.step()
    except Exception as error:  # any class may raise anything
        raise ConfigError(f"{PATH}: {type(optimizer).__name__} cannot take a step ({in_a_line(error)}).") from error
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in state if value.dim()) / sum(weight.numel() for weight in weights)


def as_tuples(value: Any) -> Any:
    """Return a list as the tuple that torch's optimizers take; YAML has no tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
