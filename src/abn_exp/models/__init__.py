"""Binary networks that take their feature-map norm as an argument.

Each is a `torch.nn.Sequential` of named parts: stem, layer1, layer2, ..., head. Stem and head have real weights
(BinaryNet's head: only its last layer).
"""

from abn_exp.models.binarynet import binarynet
from abn_exp.models.resnet import resnet18, resnet18_paper
from abn_exp.models.vgg import vgg_small

__all__ = ["binarynet", "resnet18", "resnet18_paper", "vgg_small"]
