"""Binary products in a 16-bit type with the results of float32, bit for bit (`precision=exact16`)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abn_exp.binarize import BinaryConv2d, BinaryLinear

# Up to here a type holds every integer; up to twice that, every even one.
EXACT_TO = {torch.bfloat16: 2**8, torch.float16: 2**11}


class _Product(torch.autograd.Function):
    """A binary convolution, or linear layer, in a 16-bit type, by parts whose sums that type can hold.

    The parts are added in float32: the result is float32's, bit for bit. The gradients are products in bfloat16,
    whose exponents reach as far as float32's, accumulated in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Any, dtype: torch.dtype, part: int) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        y: Tensor | None = None
        for a, b in zip(x.split(part, 1), weight.split(part, 1), strict=True):
            sums = F.linear(a, b) if geometry is None else F.conv2d(a, b, None, *geometry)
            y = sums.float() if y is None else y.add_(sums)
        assert y is not None
        if torch.compiler.is_compiling() and weight[0].numel() < 2**15:
            y = y.to(torch.int16).float()  # the integers are what is kept for the norm's gradient
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (saved.to(torch.bfloat16) for saved in ctx.saved_tensors)
        grad = grads[0].to(torch.bfloat16)
        of_x, of_weight = ctx.needs_input_grad[:2]
        if ctx.geometry is None:
            grad_x, grad_weight = grad @ weight if of_x else None, grad.T @ x if of_weight else None
        else:
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *ctx.geometry, (1, 1), False, (0, 0), 1, (of_x, of_weight, False)
            )
        return *(None if g is None else g.float() for g in (grad_x, grad_weight)), None, None, None


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    *,
    dtype: torch.dtype,
    part: int,
) -> Tensor:
    y = _Product.apply(x, weight, (stride, padding), dtype, part)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, part: int) -> Tensor:
    y = _Product.apply(x, weight, None, dtype, part)
    return y if bias is None else y + bias


def part_of(layer: BinaryConv2d | BinaryLinear, dtype: torch.dtype) -> int:
    """Return of how many input channels `dtype` holds every sum that this layer can make; 0: of not even one.

    Sums of +-1 over an even number of channels are even, also at a border of zeros, which leaves out whole pixels.
    """
    channels = layer.weight.size(1)
    even = channels % 2 == 0 and layer.binarization.sign_zero == "plus"
    step = 2 if even else 1
    most = step * EXACT_TO[dtype] // layer.weight[0, 0].numel() // step * step
    if most == 0:
        return 0
    parts = -(-channels // most)
    return -(-channels // (parts * step)) * step


def use_exact16_(network: nn.Module, dtype: torch.dtype) -> None:
    """Let the binary layers of `network` multiply in `dtype`, float16 or bfloat16, in place.

    Forward, a layer's results are float32's, whatever the weights are: a sum that the type might not hold is made of
    parts that it does. (A bias is added last, and float32 begins with it; no network here has one.) A layer of which
    not even one channel is sure stays as it is. Backward, the products are bfloat16's. Everything but the products
    of binary layers stays in float32.
    """
    # A matrix product that is split between thread blocks would be rounded in between.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for layer in network.modules():
        if isinstance(layer, BinaryConv2d | BinaryLinear) and (part := part_of(layer, dtype)):
            multiply = _conv2d if isinstance(layer, BinaryConv2d) else _linear
            layer.multiply = partial(multiply, dtype=dtype, part=part)


@torch.no_grad()
def check_exact16(network: nn.Module, images: Tensor) -> None:
    """Raise ValueError where a binary product on the device of `images`, at their shape, is not exact.

    Each layer multiplies signs of which three in four are +1, so that the sums are large; those of the first and the
    last image are compared with float64 on the CPU. The network runs once, in evaluation mode, and is left as it was.
    """
    random = torch.Generator().manual_seed(0)

    def signs(like: Tensor) -> Tensor:
        """Random signs of the shape, the device and the memory format of another tensor."""
        return torch.empty_like(like).copy_(torch.rand(like.shape, generator=random).sub_(0.25).sign_())

    def compare(layer: BinaryConv2d | BinaryLinear, inputs: tuple[Tensor]) -> None:
        x, weight = signs(inputs[0]), signs(layer.weight)
        few, weight64 = torch.stack([x[0], x[-1]]).cpu().double(), weight.cpu().double()
        if isinstance(layer, BinaryConv2d):
            y = layer.multiply(x, weight, None, layer.stride, layer.padding)
            expected = F.conv2d(few, weight64, None, layer.stride, layer.padding)
        else:
            y, expected = layer.multiply(x, weight, None), F.linear(few, weight64)
        if not torch.equal(torch.stack([y[0], y[-1]]).cpu().double(), expected):
            raise ValueError(f"precision=exact16, but products on {x.device} are not exact; use precision=fp32.")

    hooks = [
        layer.register_forward_pre_hook(compare)
        for layer in network.modules()
        if isinstance(layer, BinaryConv2d | BinaryLinear)
    ]
    training = [(module, module.training) for module in network.modules()]
    try:
        network.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training:
            module.training = flag
