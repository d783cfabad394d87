"""BinaryNet (arXiv 1602.02830): six convolutions and three linear layers."""

from torch import nn

from abn_exp.binarize import DEFAULT_BINARIZATION, Binarization, BinaryLinear
from abn_exp.models.blocks import NormLayer, check_arguments, scale_channels, vgg_features


def binarynet(
    num_classes: int,
    image_size: int,
    norm_layer: NormLayer,
    width: float = 3.0,
    binarization: Binarization = DEFAULT_BINARIZATION,
) -> nn.Sequential:
    """Return BinaryNet: (B, 3, image_size, image_size) -> logits (B, num_classes).

    =========== ============================================================== =====================
    part        layers                                                         channels at width 3
    =========== ============================================================== =====================
    stem        3x3 conv (real), norm, Hardtanh                                384
    layer1..5   binary 3x3 conv, 2x2 max-pool (1, 3, 5), norm, Hardtanh        384, 768, 768, 1536, 512
    head        binary linear, BatchNorm1d, Hardtanh, twice                    1024, 1024
    ..          linear (real), BatchNorm1d without affine parameters           classes
    =========== ============================================================== =====================

    ``width`` multiplies the classic 128-128-256-256-512 channels; the last conv's 512 and the linears' 1024 are
    multiplied by min(width, 1), as published at width 3. Only the norms on feature maps are `norm_layer`'s.
    The authors' network, doi 10.3390/e27060645, has biases on its convs and on two linear layers; a norm cancels each
    of them, so there are none here.

    Raises ValueError for an image_size that is no multiple of 8, a width that is not above 0, fewer than 2 classes.
    """
    check_arguments(num_classes, image_size, width)
    last_width = min(width, 1.0)
    channels = [scale_channels(c, width) for c in (128, 128, 256, 256, 512)] + [scale_channels(512, last_width)]
    hidden = scale_channels(1024, last_width)
    network = vgg_features(channels, norm_layer, binarization)
    network.add_module(
        "head",
        nn.Sequential(
            nn.Flatten(),
            BinaryLinear(channels[-1] * (image_size // 8) ** 2, hidden, binarization=binarization),
            nn.BatchNorm1d(hidden),
            nn.Hardtanh(),
            BinaryLinear(hidden, hidden, binarization=binarization),
            nn.BatchNorm1d(hidden),
            nn.Hardtanh(),
            nn.Linear(hidden, num_classes, bias=False),
            nn.BatchNorm1d(num_classes, affine=False),
        ),
    )
    return network
