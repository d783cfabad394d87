"""Two binary ResNets for small images: the field's ResNet-18, and the authors' 14 layers of that name."""

from collections import OrderedDict
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from abn_exp.binarize import DEFAULT_BINARIZATION, Binarization, BinaryConv2d
from abn_exp.models.blocks import NormLayer, check_arguments, scale_channels

Shortcut = Literal["bireal", "post_norm"]


class _Block(nn.Module):
    """Two binary 3x3 convs, each with a norm, and a shortcut; a subclass says in which order they act.

    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm_layer: NormLayer,
        binarization: Binarization,
    ) -> None:
        super().__init__()
        self.conv1 = BinaryConv2d(in_channels, out_channels, 3, stride, 1, binarization=binarization)
        self.norm1 = norm_layer(out_channels)
        self.conv2 = BinaryConv2d(out_channels, out_channels, 3, 1, 1, binarization=binarization)
        self.norm2: nn.Module = norm_layer(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            layers = self.downsample(in_channels, out_channels, stride, binarization)
            self.shortcut = nn.Sequential(*layers, norm_layer(out_channels))

    def downsample(self, inputs: int, outputs: int, stride: int, binarization: Binarization) -> list[nn.Module]:
        """Return the layers before the shortcut's norm: average pool, real 1x1 conv; it keeps its precision."""
        return [nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1, bias=False)]


class BiRealBlock(_Block):
    """A real-valued shortcut around each conv (Bi-Real Net, arXiv 1808.00278).

    h = norm1(conv1(x)) + shortcut(x), y = norm2(conv2(h)) + h; each conv binarizes its own input, and nothing
    bounds the sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)) + self.shortcut(x)
        return self.norm2(self.conv2(x)) + x


class PostNormBlock(_Block):
    """The classic basic block, ReLU replaced: one shortcut, added after the second norm and before its Hardtanh.

    h = Hardtanh(norm1(conv1(x))), y = Hardtanh(norm2(conv2(h)) + shortcut(x)).
    """

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardtanh(self.norm1(self.conv1(x)))
        return F.hardtanh(self.norm2(self.conv2(h)) + self.shortcut(x))


class PreNormBlock(_Block):
    """The authors' basic block: the shortcut is added to the second conv's integers, before the norm.

    h = Hardtanh(norm1(conv1(x))), y = Hardtanh(norm2(conv2(h) + shortcut(x))); with ``last`` y = conv2(h) +
    shortcut(x), and there is no norm2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm_layer: NormLayer,
        binarization: Binarization,
        last: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, norm_layer, binarization)
        self.last = last
        if last:
            self.norm2 = nn.Identity()

    def downsample(self, inputs: int, outputs: int, stride: int, binarization: Binarization) -> list[nn.Module]:
        """Return a binary strided 1x1 conv."""
        return [BinaryConv2d(inputs, outputs, 1, stride, binarization=binarization)]

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardtanh(self.norm1(self.conv1(x)))
        h = self.conv2(h) + self.shortcut(x)
        return h if self.last else F.hardtanh(self.norm2(h))


def _stem(channels: int, norm_layer: NormLayer) -> OrderedDict[str, nn.Module]:
    return OrderedDict(conv=nn.Conv2d(3, channels, 3, padding=1, bias=False), norm=norm_layer(channels))


def resnet18(
    num_classes: int,
    image_size: int,
    norm_layer: NormLayer,
    width: float = 1.0,
    shortcut: Shortcut = "bireal",
    binarization: Binarization = Binarization(activation_estimator="clipped"),  # noqa: B008 (it is frozen)
) -> nn.Sequential:
    """Return the field's binary ResNet-18: (B, 3, image_size, image_size) -> logits (B, num_classes).

    ========= ================================================================ ==================
    part      layers                                                           at width 1, s = 32
    ========= ================================================================ ==================
    stem      3x3 conv (real), norm (post_norm: and Hardtanh); no pool         64 x 32 x 32
    layer1    two blocks of two binary 3x3 convs                               64 x 32 x 32
    layer2    two blocks, the first of stride 2                                128 x 16 x 16
    layer3    idem                                                             256 x 8 x 8
    layer4    idem                                                             512 x 4 x 4
    head      global average pool, linear (real, with bias)                    classes
    ========= ================================================================ ==================

    A stage's first shortcut, where it changes the shape, is 2x2 average pool, real 1x1 conv, norm. ``shortcut``:
    ``bireal`` puts a real-valued shortcut around every conv (`BiRealBlock`); nothing but the sign's estimator bounds
    the gradient there, hence its default, ``clipped``. ``post_norm`` has one a block (`PostNormBlock`).
    ``width`` multiplies every number of channels. Every norm is `norm_layer`'s.

    Raises ValueError for an image_size that is no multiple of 8, a width that is not above 0, fewer than 2 classes,
    an unknown shortcut.
    """
    check_arguments(num_classes, image_size, width)
    if shortcut not in get_args(Shortcut):
        raise ValueError(f"shortcut={shortcut!r} is unknown; use one of {', '.join(get_args(Shortcut))}.")
    block = BiRealBlock if shortcut == "bireal" else PostNormBlock
    channels = [scale_channels(c, width) for c in (64, 128, 256, 512)]
    stem = _stem(channels[0], norm_layer)
    if shortcut == "post_norm":
        stem["act"] = nn.Hardtanh()
    network = OrderedDict[str, nn.Module](stem=nn.Sequential(stem))
    in_channels = channels[0]
    for i, out_channels in enumerate(channels):
        network[f"layer{i + 1}"] = nn.Sequential(
            block(in_channels, out_channels, 1 if i == 0 else 2, norm_layer, binarization),
            block(out_channels, out_channels, 1, norm_layer, binarization),
        )
        in_channels = out_channels
    network["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))
    return nn.Sequential(network)


def resnet18_paper(
    num_classes: int,
    image_size: int,
    norm_layer: NormLayer,
    width: float = 5.0,
    binarization: Binarization = DEFAULT_BINARIZATION,
) -> nn.Sequential:
    """Return the network that doi 10.3390/e27060645 calls ResNet-18; its published code builds 14 layers.

    (B, 3, image_size, image_size) -> logits (B, num_classes).

    ========= ================================================================ ==================
    part      layers                                                           at width 5, s = 32
    ========= ================================================================ ==================
    stem      3x3 conv (real), norm, Hardtanh                                  80 x 32 x 32
    layer1    two `PreNormBlock`                                               80 x 32 x 32
    layer2    two, the first of stride 2                                       160 x 16 x 16
    layer3    idem; the last block without its final norm and Hardtanh         320 x 8 x 8
    head      8x8 average pool, BatchNorm1d, Hardtanh, linear (real),          classes
              BatchNorm1d
    ========= ================================================================ ==================

    A stage's first shortcut, where it changes the shape, is a binary 1x1 conv of stride 2 and a norm. ``width``
    multiplies 16, 32, 64 channels. At 64 pixels the average pool leaves 2 x 2, so 1280 features; below 32 pixels it
    covers the whole map. Only the norms on feature maps are `norm_layer`'s. The authors' linear layer has a bias,
    which the BatchNorm1d behind it cancels, and their last block keeps a norm that nothing calls; both are left out.

    Raises ValueError for an image_size that is no multiple of 8 or does not pool evenly, a width that is not above
    0, fewer than 2 classes.
    """
    check_arguments(num_classes, image_size, width)
    map_size = image_size // 4
    pool = min(8, map_size)
    if map_size % pool:
        raise ValueError(
            f"image_size={image_size} does not fit the 8x8 average pool; use 8, 16, 24 or a multiple of 32."
        )
    channels = [scale_channels(c, width) for c in (16, 32, 64)]
    stem = _stem(channels[0], norm_layer)
    stem["act"] = nn.Hardtanh()
    network = OrderedDict[str, nn.Module](stem=nn.Sequential(stem))
    in_channels = channels[0]
    for i, out_channels in enumerate(channels):
        network[f"layer{i + 1}"] = nn.Sequential(
            PreNormBlock(in_channels, out_channels, 1 if i == 0 else 2, norm_layer, binarization),
            PreNormBlock(out_channels, out_channels, 1, norm_layer, binarization, last=i == len(channels) - 1),
        )
        in_channels = out_channels
    features = channels[-1] * (map_size // pool) ** 2
    network["head"] = nn.Sequential(
        nn.AvgPool2d(pool),
        nn.Flatten(),
        nn.BatchNorm1d(features),
        nn.Hardtanh(),
        nn.Linear(features, num_classes, bias=False),
        nn.BatchNorm1d(num_classes),
    )
    return nn.Sequential(network)
