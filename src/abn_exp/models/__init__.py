"""Binary networks that take their feature-map norm as an argument, and how they start.

Each is a `torch.nn.Sequential` of named parts: stem, layer1, layer2, ..., head. Stem and head have real weights
(BinaryNet's head: only its last layer).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from abn_exp.models.binarynet import binarynet
from abn_exp.models.blocks import NormLayer
from abn_exp.models.resnet import resnet18, resnet18_paper
from abn_exp.models.vgg import vgg_small
from abn_exp.randomness import derive_seed

__all__ = ["NormLayer", "binarynet", "initialize_", "resnet18", "resnet18_paper", "restore_biases_", "vgg_small"]


def initialize_(network: nn.Module, seed: int, purpose: str = "init") -> nn.Module:
    """Draw the parameters anew, in place, each layer's from its own generator; return the network.

    A layer's initial weights are a function of (seed, purpose, its name in the network, their shape) alone, so two
    networks that differ only in their norms start from the same weights. The distributions are the layers'
    own (``reset_parameters``); torch's global generator is left as it was.

    Raises ValueError for a network that is not on the CPU, whose generator would be another one.
    """
    if any(tensor.device.type != "cpu" for tensor in network.parameters()):
        raise ValueError("initialize_ needs the network on the CPU; call it before moving the network.")
    with torch.random.fork_rng(devices=[]):
        for name, module in network.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                torch.default_generator.manual_seed(derive_seed(seed, f"{purpose}/{name}"))
                reset()
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
