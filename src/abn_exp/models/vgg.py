"""VGG-small (arXiv 1807.10029 and after): BinaryNet's six convolutions and one linear layer."""

from torch import nn

from abn_exp.binarize import DEFAULT_BINARIZATION, Binarization
from abn_exp.models.blocks import NormLayer, check_arguments, scale_channels, vgg_features


def vgg_small(
    num_classes: int,
    image_size: int,
    norm_layer: NormLayer,
    width: float = 1.0,
    binarization: Binarization = DEFAULT_BINARIZATION,
) -> nn.Sequential:
    """Return VGG-small: (B, 3, image_size, image_size) -> logits (B, num_classes).

    =========== ============================================================== =====================
    part        layers                                                         channels at width 1
    =========== ============================================================== =====================
    stem        3x3 conv (real), norm, Hardtanh                                128
    layer1..5   binary 3x3 conv, 2x2 max-pool (1, 3, 5), norm, Hardtanh        128, 256, 256, 512, 512
    head        linear (real, with bias)                                       classes
    =========== ============================================================== =====================

    ``width`` multiplies every number of channels.

    Raises ValueError for an image_size that is no multiple of 8, a width that is not above 0, fewer than 2 classes.
    """
    check_arguments(num_classes, image_size, width)
    channels = [scale_channels(c, width) for c in (128, 128, 256, 256, 512, 512)]
    network = vgg_features(channels, norm_layer, binarization)
    features = channels[-1] * (image_size // 8) ** 2
    network.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes)))
    return network
