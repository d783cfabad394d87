"""Building blocks of the networks: argument checks, widths, and the unit conv - pool - norm - Hardtanh."""

import math
from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from abn_exp.binarize import Binarization, BinaryConv2d

NormLayer = Callable[[int], nn.Module]


def check_arguments(num_classes: int, image_size: int, width: float) -> None:
    """Raise ValueError, in one sentence, for what no network here can be built with."""
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} is not allowed; a classifier needs at least 2 classes.")
    if image_size < 8 or image_size % 8:
        raise ValueError(
            f"image_size={image_size} does not fit the networks' three halvings; use a multiple of 8, such as 32."
        )
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width={width} is not allowed; use a number above 0, where 1 is the classic width.")


def scale_channels(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded to an even number, at least 2."""
    return max(2, 2 * round(channels * width / 2))


def vgg_features(channels: list[int], norm_layer: NormLayer, binarization: Binarization) -> nn.Sequential:
    """Return six units of 3x3 conv, 2x2 max-pool (after convs 2, 4, 6), norm, Hardtanh: stem, layer1 to layer5.

    (B, 3, s, s) -> (B, channels[5], s/8, s/8). The stem's conv has real weights and sees the real image; the others
    are binary. No conv has a bias: the norm behind it would subtract it again, max-pool or not.
    """
    features = OrderedDict[str, nn.Module]()
    for i, out_channels in enumerate(channels):
        conv = (
            nn.Conv2d(3, out_channels, 3, padding=1, bias=False)
            if i == 0
            else BinaryConv2d(channels[i - 1], out_channels, 3, padding=1, binarization=binarization)
        )
        unit = OrderedDict[str, nn.Module](conv=conv)
        if i % 2:
            unit["pool"] = nn.MaxPool2d(2)
        unit["norm"] = norm_layer(out_channels)
        unit["act"] = nn.Hardtanh()
        features["stem" if i == 0 else f"layer{i}"] = nn.Sequential(unit)
    return nn.Sequential(features)
