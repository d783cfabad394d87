"""Build a network from its configuration: `_target_` nodes are checked before anything is called."""

import inspect
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, get_type_hints

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from abn_exp.binarize import BinaryConv2d
from abn_exp.errors import ConfigError, validation_sentence
from abn_exp.norm import check_statistics
from abn_exp.seeding import derive_seed

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs each error that it raises


def check_call(node: Any, path: str, result: Any, given: Collection[str] = ()) -> None:
    """Check a `_target_` node, before anything that it names is called.

    `result` is the class of what it makes, None where the caller checks that. `given` are the arguments that the
    program itself will pass. A configuration may be of unknown origin, with a trained network, so that only classes
    of the required kind and functions with a network's arguments are called.
    """
    if not isinstance(node, dict):
        raise ConfigError(
            f"{path}={node!r} is not allowed: it should have a _target_, the class or function to call."
        )
    target, name = get_object_or_explain(node, path), node["_target_"]
    if result is not None and not (inspect.isclass(target) and issubclass(target, result)):
        raise ConfigError(f"{path}._target_={name} is not allowed: it should be a subclass of {result.__qualname__}.")
    try:
        parameters = inspect.signature(target).parameters
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (ValueError, TypeError, NameError) as error:
        raise ConfigError(f"{path}._target_={name} is not allowed: its arguments are not known.") from error
    if result is None and (missing := [key for key in given if key not in parameters]):
        raise ConfigError(f"{path}._target_={name} is not allowed: it should take {', '.join(missing)}.")
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in parameters or key in given:
            allowed = ", ".join(parameter for parameter in parameters if parameter not in ("self", *given))
            raise ConfigError(f"{path}.{key} is not a key of {name}; it takes {allowed}.")
        hint = hints.get(key)
        if isinstance(value, dict) and "_target_" in value:
            if not inspect.isclass(hint):
                raise ConfigError(f"{path}.{key} is not allowed: {name} does not say which class it takes there.")
            check_call(value, f"{path}.{key}", hint)
        elif key in hints:
            try:
                TypeAdapter(hints[key], config=None if is_dataclass(hint) else _CALL).validate_python(value)
            except ValidationError as error:
                item = dict(error.errors()[0])
                raise ConfigError(validation_sentence({**item, "loc": (path, key), "input": value})) from error


_CALL = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


def get_object_or_explain(node: dict[str, Any], path: str) -> Callable[..., Any]:
    """Return the class or function that a `_target_` names."""
    try:
        return get_object(node["_target_"])
    except KeyError as error:
        raise ConfigError(f"{path} needs a _target_, the class or function that makes it.") from error
    except Exception as error:  # an import runs code, which may raise anything
        raise ConfigError(
            f"{path}._target_={node['_target_']} cannot be imported: it should be package.module.Name."
        ) from error


GIVEN = ("num_classes", "image_size", "norm_layer")  # what the program passes to a network


def build_network(model: dict[str, Any], norm: dict[str, Any], num_classes: int, image_size: int) -> torch.nn.Module:
    """Return the network that the groups `model` and `norm` describe.

    Raises ConfigError where a part refuses its arguments, or is not a part of a network.
    """
    check_call(norm, "norm", torch.nn.Module, ("num_features", "device", "dtype"))
    check_call(model, "model", None, GIVEN)
    if norm.get("_partial_") is not True or model.get("_partial_", False) is not False:
        raise ConfigError("norm._partial_ should be true and model._partial_ absent: a network makes its norms.")
    try:
        made = instantiate(norm, _convert_="all")

        def norm_layer(*features: Any, **options: Any) -> nn.Module:
            with torch.random.fork_rng(devices=[]):  # what one norm draws changes no layer beside it
                layer: nn.Module = made(*features, **options)
                return layer

        network = instantiate(
            _with_classes(model),
            num_classes=num_classes,
            image_size=image_size,
            norm_layer=norm_layer,
            _convert_="all",
        )
    except (InstantiationException, OmegaConfBaseException) as error:
        text = str(error.__cause__ if error.__cause__ is not None else error).splitlines()[0]
        if "size calculation overflowed" in text:  # torch's words for more than 2^63 bytes
            text = "a layer of this network is larger than any memory; choose a smaller model.width."
        raise ConfigError(text) from error
    if not isinstance(network, torch.nn.Module):
        raise ConfigError(f"model._target_={model['_target_']} is not allowed: it does not make a torch.nn.Module.")
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ConfigError(
                "norm.track_running_stats=false is not allowed: without running statistics, what a network predicts "
                "for an image depends on the others in its batch."
            )
        if {"running_mean", "running_var"} & module._non_persistent_buffers_set:
            raise ConfigError(
                "norm.persistent_stats=false is not allowed: a run that goes on, and its test with the best epoch's "
                "weights, need the running statistics from their checkpoint."
            )
        if isinstance(module, _NormBase):
            try:
                check_statistics(module.eps, module.momentum)
            except ValueError as error:
                raise ConfigError(f"norm: {error}") from error
    return network


def _with_classes(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node in which every argument that is a data class names it: some of its fields may stand alone."""
    target = get_object(node["_target_"])
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    named = dict(node)
    for key, value in node.items():
        kind = hints.get(key)
        if isinstance(value, dict) and inspect.isclass(kind) and is_dataclass(kind):
            named[key] = {"_target_": f"{kind.__module__}.{kind.__qualname__}"} | value
    return named


def initialize_(
    network: nn.Module, seed: int, purpose: str = "init", init: Literal["torch", "authors"] = "torch"
) -> nn.Module:
    r"""Initialise the parameters, in place, each layer's from its own generator; return the network.

    A layer's initial weights are a function of (seed, purpose, its name in the network, their shape) alone, so two
    networks that differ only in their norms start from the same weights. The distributions are the layers'
    own (``reset_parameters``); with ``init="authors"`` the latent weights of binary convolutions of kernel size k are

    .. math:: w \sim N\left(0, \frac{2}{k^2\, \text{out\_channels}}\right)

    (a variance), as in the published code of doi 10.3390/e27060645. torch's global generator is not changed.

    Raises ValueError for a network that is not on the CPU, whose generator would be another one.
    """
    if any(tensor.device.type != "cpu" for tensor in network.parameters()):
        raise ValueError("initialize_ needs the network on the CPU; call it before moving the network.")
    with torch.random.fork_rng(devices=[]):
        for name, module in reversed([*network.named_modules()]):  # a module's own after those of its children
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                torch.default_generator.manual_seed(derive_seed(seed, f"{purpose}/{name}"))
                reset()
                if init == "authors" and isinstance(module, BinaryConv2d):
                    fan_out = module.out_channels * math.prod(module.kernel_size)
                    nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    return network


def channels_last_(network: nn.Module) -> nn.Module:
    """Lay out the parameters and buffers of four dimensions in channels-last order, in place; return the network.

    On a CPU convolutions are a fifth faster so, and tensor cores want it. `Module.to` would refuse others of five.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return network


def restore_biases_(network: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Give the layers of `network` the biases that a state dict has for them, in place; return the network.

    The networks here leave out every bias that a norm cancels. The published ones have them, and in evaluation they
    are cancelled only by running means that were taken with them: so a checkpoint of that form, its keys renamed to
    those of this network, keeps its biases.

        network = restore_biases_(binarynet(10, 32, AttentionBatchNorm2d), state_dict)
        network.load_state_dict(state_dict)
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None and f"{name}.bias" in state_dict:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return network
