"""Binary products in 16 bits or fewer with the results of float32, bit for bit (`precision=exact16`)."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abn_exp.binarize import BinaryConv2d, BinaryLinear, SignZero, ste_gradient

# Up to here a type holds every integer; up to twice that, every even one.
EXACT_TO = {torch.bfloat16: 2**8, torch.float16: 2**11}
BinaryLayer = BinaryConv2d | BinaryLinear


def _signs(x: Tensor, sign_zero: SignZero, dtype: torch.dtype) -> Tensor:
    """Return the signs of x, in fewer passes than in x's type and then converted."""
    if sign_zero == "zero":
        return torch.sign(x).to(dtype)
    if torch.compiler.is_compiling():
        return torch.where(x < 0, -1.0, 1.0).to(dtype)  # what it makes of 8-bit arithmetic on a CPU is slow
    if dtype == torch.int8:
        return torch.sign(x).to(dtype).bitwise_or_(1)  # -1, 0, 1 -> -1, 1, 1; a comparison takes a CPU longer
    return (x < 0).to(dtype).mul_(-2).add_(1)  # -0 and NaN are not below 0, as in `sign`


class _Product(torch.autograd.Function):
    """Input (B, in, ...) and latent weights (out, in, ...) -> sums of products of their signs, in float32.

    Forward, `chunk` input channels at a time are multiplied in `dtype`, which holds their sums, and added in
    float32; or all at once as 8-bit integers, which a CPU multiplies twice as fast as bfloat16 (`integers`). Either
    is float32's result, bit for bit. The gradients are products in bfloat16, whose exponents reach as far as
    float32's, accumulated in float32 (`check_exact16` finds where they are not). Compiled, the sums go through
    `kept`, a 16-bit type that holds them, so that they are what is kept for the norm's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        layer: BinaryLayer,
        dtype: torch.dtype,
        chunk: int,
        integers: bool,
        kept: torch.dtype,
    ) -> Tensor:
        b = layer.binarization
        ctx.layer = layer
        signs, weight = (_signs(t, b.sign_zero, torch.int8 if integers else dtype) for t in (x, latent))
        geometry: Any = None
        if isinstance(layer, BinaryConv2d):
            geometry = (layer.stride, layer.padding)
            if b.pad_value != 0:
                signs, geometry = layer.pad(signs, b.pad_value), (layer.stride, (0, 0))
        ctx.geometry = geometry
        ctx.save_for_backward(
            signs,
            weight,
            None if b.activation_estimator == "identity" else x,
            None if b.weight_estimator == "identity" else latent,
        )
        y: Tensor | None = None
        if integers:
            assert geometry is not None
            y = _integer_conv2d(signs, weight, *geometry)
        else:
            for a, w in zip(signs.split(chunk, 1), weight.split(chunk, 1), strict=True):
                sums = F.linear(a, w) if geometry is None else F.conv2d(a, w, None, *geometry)
                y = sums.float() if y is None else y.add_(sums)
            assert y is not None
        return y.to(kept).float() if torch.compiler.is_compiling() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        signs, weight, x, latent = ctx.saved_tensors
        b, geometry = ctx.layer.binarization, ctx.geometry
        signs, weight, grad = (t.to(torch.bfloat16) for t in (signs, weight, grads[0]))
        of_x, of_weight = ctx.needs_input_grad[:2]
        grad_x: Any
        grad_weight: Any
        if geometry is None:
            grad_x, grad_weight = grad @ weight if of_x else None, grad.T @ signs if of_weight else None
        else:
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, signs, weight, None, *geometry, (1, 1), False, (0, 0), 1, (of_x, of_weight, False)
            )
        if of_x:
            if b.pad_value != 0 and geometry is not None:
                height, width = ctx.layer.padding
                grad_x = F.pad(grad_x, (-width, -width, -height, -height))
            grad_x = ste_gradient(grad_x.float(), x, b.activation_estimator)
        if of_weight:
            grad_weight = ste_gradient(grad_weight.float(), latent, b.weight_estimator)
        return grad_x, grad_weight, None, None, None, None, None


@torch.library.custom_op("abn_exp::integer_conv2d", mutates_args=())  # as one operation for torch.compile
def _integer_conv2d(signs: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Return the convolution, in float32, of signs (int8) with binary weights (int8)."""
    zero, scale = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    # The kernel takes inputs from 0 on, and where their zero is. Weights that are packed for a zero at 0 will do, and
    # are packed four times as fast.
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, stride, padding, (1, 1), 1, signs.shape)
    return torch.ops.onednn.qconv2d_pointwise(
        (signs + 1).view(torch.uint8), 1.0, 1, packed, scale, zero, None,
        stride, padding, (1, 1), 1, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


@_integer_conv2d.register_fake
def _(signs: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    y = F.conv2d(signs.float(), weight.float(), None, stride, padding)
    return y.contiguous(memory_format=torch.channels_last)


def has_integer_conv2d(device: torch.device) -> bool:
    """Return whether the device has 8-bit convolutions that are worth it: oneDNN's on a CPU of AVX-512 or newer.

    What is asked is whether oneDNN has bfloat16 kernels: it has them on the same CPUs, and unlike torch's name of the
    CPU's capability it knows of ONEDNN_MAX_CPU_ISA.
    """
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return hasattr(torch.ops.onednn, "qconv2d_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def channels_per_chunk(layer: BinaryLayer, dtype: torch.dtype) -> int:
    """Return of how many input channels `dtype` holds every sum that this layer can make; 0: of not even one.

    Sums of +-1 over an even number of channels are even, also at a border of zeros, which leaves out whole pixels.
    """
    channels = layer.weight.size(1)
    even = channels % 2 == 0 and layer.binarization.sign_zero == "plus"
    step = 2 if even else 1
    most = step * EXACT_TO[dtype] // layer.weight[0, 0].numel() // step * step
    if most == 0:
        return 0
    chunks = -(-channels // most)
    return -(-channels // (chunks * step)) * step


def use_exact16_(network: nn.Module, dtype: torch.dtype, *, integers: bool = False) -> None:
    """Let the binary layers of `network` multiply in `dtype`, float16 or bfloat16, in place.

    Forward, a layer's results are float32's, whatever the weights are: a sum that the type might not hold is made of
    chunks that it does; with `integers`, convolutions are made of 8-bit ones, which hold any. (A bias is added last,
    and float32 begins with it; no network here has one.) A layer of which not even one channel is sure stays as it
    is. Backward, the products are bfloat16's. Everything but the products of binary layers stays in float32.
    On a GPU it takes products that are not rounded before their end (`training.setup.configure_process`).
    """
    for layer in network.modules():
        if isinstance(layer, BinaryLayer) and (chunk := channels_per_chunk(layer, dtype)):
            whole = integers and isinstance(layer, BinaryConv2d)
            layer.product = partial(
                _product, dtype=dtype, chunk=chunk, integers=whole, kept=smallest_exact_dtype(layer)
            )


def smallest_exact_dtype(layer: BinaryLayer) -> torch.dtype:
    """Return the smallest type that holds every sum of a layer; float16 before int16, which CPUs convert slowly."""
    if channels_per_chunk(layer, torch.float16) >= layer.weight.size(1):
        return torch.float16
    return torch.int16 if layer.weight[0].numel() < 2**15 else torch.float32


def _product(
    layer: BinaryLayer,
    x: Tensor,
    latent: Tensor,
    *,
    dtype: torch.dtype,
    chunk: int,
    integers: bool,
    kept: torch.dtype,
) -> Tensor:
    return _Product.apply(x, latent, layer, dtype, chunk, integers, kept)


def _product64(layer: BinaryLayer, signs: Tensor, weight: Tensor, pad_value: float) -> Tensor:
    """Return the layer's product of signs, in float64."""
    if isinstance(layer, BinaryConv2d):
        return F.conv2d(layer.pad(signs, pad_value), weight, None, layer.stride)
    return F.linear(signs, weight)


def accumulation_bound(total: Tensor, size: Tensor, n: int) -> Tensor:
    """Return how far a sum of n bfloat16 products may be off, accumulated in float32 and then rounded to bfloat16.

    `total` is the sum and `size` that of the absolute values; a slope that follows in float32 is allowed for.
    """
    return (2**-8 + 2**-20) * total.abs() + 8 * n**0.5 * 2**-24 * size


def check_exact16(network: nn.Module, images: Tensor) -> None:
    """Raise ValueError where binary products on the device of `images`, at their shape, are not what they should be.

    Each layer multiplies signs of which three in four are +1, so that the sums are large; those of the first and the
    last image must be float64's on the CPU. The gradients of these two must be products of bfloat16 accumulated in
    float32 and rounded once, to bfloat16. From an upstream gradient that bfloat16 holds, such a sum of n terms is
    within

        |found - sum t_i|  <=  2^-8 |sum t_i|  +  8 sqrt(n) 2^-24 sum |t_i|

    (in any order; the second term bounds the rounding of n additions but for a probability of 2n e^-32, Higham and
    Mary, doi 10.1137/18M1226312). Without oneDNN's bfloat16 kernels a CPU does not keep to it: torch rounds each
    image's part of a weight's gradient, and each kernel position's part of an input's, and adds them in bfloat16. The
    cosine of each gradient with float64's must be 0.999 besides. The network runs once, in evaluation mode, and is
    left as it was.
    """
    random = torch.Generator().manual_seed(0)

    def latent_like(like: Tensor) -> Tensor:
        """Random numbers +-0.5 of the shape, the device and the memory format of another tensor."""
        return torch.empty_like(like).copy_(torch.rand(like.shape, generator=random).ge(0.25)).sub_(0.5)

    def compare(layer: BinaryLayer, inputs: tuple[Tensor]) -> None:
        if layer.product is None:
            return
        b = layer.binarization
        x, weight = latent_like(inputs[0]), latent_like(layer.weight)
        whole = layer.product(layer, x, weight)
        two = torch.stack([x[0], x[-1]]).requires_grad_()
        with torch.enable_grad():
            y = layer.product(layer, two, weight.requires_grad_())
            signs, weight64 = (t.detach().cpu().double().sign().requires_grad_() for t in (two, weight))
            expected = _product64(layer, signs, weight64, b.pad_value)
            # One channel of ones stands for all in the sums of absolute values.
            one_x, one_weight = (torch.ones_like(t[:, :1], requires_grad=True) for t in (signs, weight64))
            largest = _product64(layer, one_x, one_weight, abs(b.pad_value))
        if not all(torch.equal(t.cpu().double(), expected) for t in (y, torch.stack([whole[0], whole[-1]]))):
            raise ValueError(f"products on {x.device} are not exact")
        upstream = torch.randn(expected.shape, generator=random).bfloat16()
        gradients = torch.autograd.grad(y, (two, weight), upstream.to(y))
        truths = torch.autograd.grad(expected, (signs, weight64), upstream.double())
        sizes = torch.autograd.grad(largest, (one_x, one_weight), upstream.double().abs())
        terms = weight64[:, :1].numel(), expected[:, :1].numel()
        half = torch.tensor(0.5, dtype=torch.float64)  # every |latent|: the estimator's slope is the same everywhere
        slopes = (ste_gradient(half / half, half, e) for e in (b.activation_estimator, b.weight_estimator))
        for gradient, truth, size, n, slope in zip(gradients, truths, sizes, terms, slopes, strict=True):
            found = gradient.cpu().double() / slope
            if F.cosine_similarity(found.flatten(), truth.flatten(), dim=0) < 0.999:
                raise ValueError(f"gradients of products on {x.device} have another direction than float64's")
            if ((found - truth).abs() > accumulation_bound(truth, size, n)).any():
                raise ValueError(
                    f"bfloat16 products on {x.device} are not accumulated in float32, so gradients are worse"
                )

    training = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad(), ExitStack() as hooks:
            for layer in network.modules():
                if isinstance(layer, BinaryLayer):
                    hooks.enter_context(layer.register_forward_pre_hook(compare))
            network.eval()(images)
    finally:
        for module, flag in training.items():
            module.training = flag
