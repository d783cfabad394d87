"""Binarisation to {-1, +1}, the estimators that train through it, and the layers that use it (W1A1)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SignZero = Literal["plus", "zero"]

RESTE_POWER = 3.0  # o of |x|^(1/o); its authors raise it from 1 to 3 while training, here it is 3 throughout
RESTE_CLIP = 1.5  # t: no gradient beyond
RESTE_LINEAR = 0.1  # m: within, the slope of the chord of |x|^(1/o) from 0 to m, as the power's is unbounded


def sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 where x < 0, of x's shape and dtype: two values, as a bit has.

    Both zeros give +1, and so does NaN: a network that diverged shows it in its weights, not here.
    """
    # -1, 0, 1 become -0.5, 0.5, 1.5. torch.where does the same and is nine times slower on a CPU; copysign needs
    # x + 0.0 to get rid of -0.0, which torch.compile takes out.
    return torch.sign(x).add_(0.5).sign_()


def _inside(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    """Return grad * 1[|x| <= bound]; without a mask, which costs a CPU five times the kernel used here."""
    return grad - torch.ops.aten.hardshrink_backward(grad, x, bound)


def _approx_sign(grad: Tensor, x: Tensor, clip_value: float) -> Tensor:
    return grad * F.relu(2 - 2 * x.abs())


def _reste(grad: Tensor, x: Tensor, clip_value: float) -> Tensor:
    exponent = (1 - RESTE_POWER) / RESTE_POWER
    power_slope = x.abs().clamp_min(RESTE_LINEAR).pow(exponent) / RESTE_POWER
    near = _inside(grad, x, RESTE_LINEAR)
    return near * RESTE_LINEAR**exponent + (_inside(grad, x, RESTE_CLIP) - near) * power_slope


# Straight-through estimators: (grad, x, clip_value) -> grad * s(x); the table in `sign_ste` gives s and its source.
ESTIMATORS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "identity": lambda grad, x, clip_value: grad,
    "clipped": _inside,
    "approx_sign": _approx_sign,
    "reste": _reste,
}


def ste_gradient(grad: Tensor, x: Tensor, estimator: str, clip_value: float = 1.0) -> Tensor:
    """Return grad * s(x), the gradient of `sign_ste`."""
    return ESTIMATORS[estimator](grad, x, clip_value)


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: str, clip_value: float, sign_zero: SignZero) -> Tensor:
        ctx.estimator, ctx.clip_value = estimator, clip_value
        # x and not a mask of it: latent weights and Hardtanh's outputs are kept anyway, a mask is extra.
        ctx.save_for_backward(None if estimator == "identity" else x)
        return sign(x) if sign_zero == "plus" else torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return ste_gradient(grads[0], x, ctx.estimator, ctx.clip_value), None, None, None


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}.")


def sign_ste(x: Tensor, estimator: str = "clipped", clip_value: float = 1.0, sign_zero: SignZero = "plus") -> Tensor:
    r"""Binarize x, with a straight-through estimator as its gradient.

    .. math:: y = \mathrm{sign}(x), \qquad \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\, s(x)

    ============= ======================================================================== ================
    estimator     s(x)                                                                     source
    ============= ======================================================================== ================
    identity      1                                                                        arXiv 1308.3432
    clipped       1 where ``|x| <= clip_value``, else 0 (Hardtanh's)                       arXiv 1602.02830
    approx_sign   ``max(0, 2 - 2 |x|)``: 2 + 2x on [-1, 0), 2 - 2x on [0, 1)               arXiv 1808.00278
    reste         ``|x|^((1-o)/o) / o`` on (m, t], ``m^((1-o)/o)`` on [0, m], 0 beyond t;  arXiv 2308.06689
                  o = 3, t = 1.5, m = 0.1
    ============= ======================================================================== ================

    ``clip_value`` belongs to ``clipped`` alone. ``sign_zero="zero"`` gives sign(0) = 0, as torch's sign does, with
    which results were published. Any shape.

    Raises ValueError for an estimator or sign_zero that is none of those.
    """
    _check_choice("estimator", estimator, ESTIMATORS)
    _check_choice("sign_zero", sign_zero, get_args(SignZero))
    return _SignSTE.apply(x, estimator, clip_value, sign_zero)


@dataclass(frozen=True)
class Binarization:
    """How a network binarizes: the gradients of both signs, what sign(0) is, what a convolution's border holds.

    ``pad_value`` is what surrounds the *binarized* input: 0 (a third value, as published), -1 or +1.

    Raises ValueError for a value that is not allowed.
    """

    weight_estimator: str = "identity"
    activation_estimator: str = "identity"
    sign_zero: SignZero = "plus"
    pad_value: float = 0.0

    def __post_init__(self) -> None:
        if self.pad_value not in (-1.0, 0.0, 1.0):
            raise ValueError(f"pad_value={self.pad_value} is not allowed; use 0, -1 or +1.")
        _check_choice("weight_estimator", self.weight_estimator, ESTIMATORS)
        _check_choice("activation_estimator", self.activation_estimator, ESTIMATORS)
        _check_choice("sign_zero", self.sign_zero, get_args(SignZero))

    def weights(self, latent: Tensor) -> Tensor:
        """Return the binary weights of latent ones."""
        return sign_ste(latent, self.weight_estimator, sign_zero=self.sign_zero)

    def activations(self, x: Tensor) -> Tensor:
        """Return the binary activations of real ones."""
        return sign_ste(x, self.activation_estimator, sign_zero=self.sign_zero)


DEFAULT_BINARIZATION = Binarization()


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: Any = 0) -> Tensor:
    """Return ``F.conv2d(x, weight, bias, stride, padding)``.

    A strided 1x1 convolution of fewer than 8 input channels is computed as one of stride 1 on every stride-th pixel,
    the same sums. On CPUs with AVX2 and nothing newer, oneDNN's kernel for the gradient of such weights
    (``jit_1x1:avx2`` with a channels-last input; torch 2.11 to 2.15) works on vectors of 8 channels and writes
    beyond the end of its memory.
    """
    if weight.size(1) < 8 and weight.shape[2:] == (1, 1) and max(stride) > 1 and padding in (0, (0, 0)):
        return F.conv2d(x[:, :, :: stride[0], :: stride[1]], weight, bias)
    return F.conv2d(x, weight, bias, stride, padding)


# From a layer, its input and its latent weights to its sums, without its bias: abn_exp.exact16 has its own.
Product = Callable[["BinaryConv2d | BinaryLinear", Tensor, Tensor], Tensor]


class BinaryConv2d(nn.Conv2d):
    r"""Convolution of binary activations with binary weights; ``weight`` holds the latent (real) weights.

    .. math:: y = \mathrm{sign}(W) * \mathrm{pad}(\mathrm{sign}(x))

    Shapes: x (B, in_channels, H, W), y (B, out_channels, H', W'), weight (out, in, kernel_size, kernel_size).
    y holds integers: sums of in_channels * kernel_size^2 products, each -1 or +1 (0 at a border padded with 0).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        binarization: Binarization = DEFAULT_BINARIZATION,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.binarization = binarization
        self.product: Product | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.product is not None:
            y = self.product(self, input, self.weight)
            return y if self.bias is None else y + self.bias.view(-1, 1, 1)
        x, weight = self.binarization.activations(input), self.binarization.weights(self.weight)
        if self.binarization.pad_value == 0:
            return conv2d(x, weight, self.bias, self.stride, self.padding)
        return conv2d(self.pad(x, self.binarization.pad_value), weight, self.bias, self.stride)

    def pad(self, x: Tensor, value: float) -> Tensor:
        """Return x with a border of `value`."""
        assert isinstance(self.padding, tuple)
        height, width = self.padding
        return F.pad(x, (width, width, height, height), value=value)


class BinaryLinear(nn.Linear):
    r"""Linear layer of binary activations and binary weights; ``weight`` holds the latent (real) weights.

    .. math:: y = \mathrm{sign}(x)\, \mathrm{sign}(W)^T

    Shapes: x (B, in_features), y (B, out_features), weight (out_features, in_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        binarization: Binarization = DEFAULT_BINARIZATION,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.binarization = binarization
        self.product: Product | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.product is not None:
            y = self.product(self, input, self.weight)
            return y if self.bias is None else y + self.bias
        x, weight = self.binarization.activations(input), self.binarization.weights(self.weight)
        return F.linear(x, weight, self.bias)


@torch.no_grad()
def clip_latent_weights_(module: nn.Module) -> None:
    """Clip the latent weights of every binary layer in `module` to [-1, 1], in place (arXiv 1511.00363)."""
    for layer in module.modules():
        if isinstance(layer, BinaryConv2d | BinaryLinear):
            layer.weight.clamp_(-1, 1)
