"""Networks with parameters as training leaves them, and norms of a user's own."""

from collections.abc import Callable
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from abn_exp.trained_network import InputFormat
from tests.helpers.runs import REPOSITORY

INPUT = InputFormat(32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), None)


class TanhBatchNorm2d(nn.BatchNorm2d):
    """A user's own: y = tanh(xhat) + beta."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=False)
        self.shift = nn.Parameter(torch.zeros(num_features))  # torch's own kernel would add a `bias`

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input)) + self.shift.view(1, -1, 1, 1)


class CubicBatchNorm2d(TanhBatchNorm2d):
    """Another: y = xhat (xhat - 1) (xhat + 1) + beta, which crosses zero up to three times."""

    def forward(self, input: Tensor) -> Tensor:
        x = nn.BatchNorm2d.forward(self, input)
        return x * (x - 1) * (x + 1) + self.shift.view(1, -1, 1, 1)


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    if name in ("tanh", "cubic"):
        return {"tanh": TanhBatchNorm2d, "cubic": CubicBatchNorm2d}[name]
    return instantiate(yaml.safe_load((REPOSITORY / f"conf/norm/{name}.yaml").read_text()))


def trained(build: Callable[..., nn.Module], norm: str, **options: Any) -> Any:
    """Return a small network for 16 x 16 images, with random parameters of norms and statistics of random images."""
    torch.manual_seed(0)
    network = build(5, 16, norm_layer(norm), **{"width": 0.0625, **options})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for shift in (module.bias, getattr(module, "shift", None)):
                if shift is not None:
                    nn.init.normal_(shift, 0.05, 0.2)
            if module.weight is not None:
                nn.init.normal_(module.weight, 0, 1)
            module.momentum = 1.0  # the statistics of one pass
    with torch.no_grad():
        network.train()(INPUT.normalize(images(64)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # a few channels are constant, as hardly any of a trained network
            assert module.running_var is not None
            module.running_var.clamp_(min=0.05)
    return network.eval().requires_grad_(False)


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
