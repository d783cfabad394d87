"""exact16: the forward pass of float32 bit for bit, gradients as good as float32's, refusal where a kernel rounds."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from abn_exp import exact16, models
from abn_exp.binarize import Binarization, BinaryConv2d, BinaryLinear, SignZero, ste_gradient
from abn_exp.data.prepare import load
from abn_exp.errors import ConfigError
from abn_exp.exact16 import (
    EXACT_TO,
    accumulation_bound,
    channels_per_chunk,
    check_exact16,
    has_integer_conv2d,
    use_exact16_,
)
from abn_exp.identity import RunPlan
from abn_exp.models import binarynet
from abn_exp.models.build import initialize_
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.trained_network import load_network, read_config
from abn_exp.training import setup as parts
from abn_exp.training.run import run
from abn_exp.training.setup import make_loaders, make_network
from tests.helpers.exact16 import needs_exact16
from tests.helpers.runs import TINY

BF16, FP16 = torch.bfloat16, torch.float16


INTEGERS = [False, True] if has_integer_conv2d(torch.device("cpu")) else [False]


def both(layer: nn.Module, dtype: torch.dtype = BF16, integers: bool = False) -> tuple[Any, Any]:
    """The layer, and the same one in exact16."""
    other = copy.deepcopy(layer)
    use_exact16_(other, dtype, integers=integers)
    return layer, other


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_types_hold_the_integers_they_are_trusted_with(dtype: torch.dtype) -> None:
    limit = EXACT_TO[dtype]
    whole, even = torch.arange(limit + 1), torch.arange(0, 2 * limit + 1, 2)
    assert torch.equal(whole.to(dtype).long(), whole)
    assert torch.equal(even.to(dtype).long(), even)
    assert torch.tensor(limit + 1).to(dtype).item() != limit + 1
    assert torch.tensor(2 * limit + 2).to(dtype).item() != 2 * limit + 2


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("sign_zero", ["plus", "zero"])
@pytest.mark.parametrize(
    ("channels", "taps"), [(1, 1), (2, 3), (3, 3), (56, 3), (57, 3), (58, 3), (770, 3), (8192, 1)]
)
def test_no_part_can_pass_the_range_of_its_type(
    channels: int, taps: int, sign_zero: SignZero, dtype: torch.dtype
) -> None:
    layer = BinaryConv2d(channels, 1, taps, binarization=Binarization(sign_zero=sign_zero))
    part = channels_per_chunk(layer, dtype)
    sizes = [p.size(1) for p in layer.weight.split(part, 1)]
    for size in sizes:
        only_even_sums = size % 2 == 0 and sign_zero == "plus"
        assert size * taps**2 <= EXACT_TO[dtype] * (2 if only_even_sums else 1)
    even = channels % 2 == 0 and sign_zero == "plus"
    most = EXACT_TO[dtype] * (2 if even else 1) // taps**2
    assert len(sizes) == -(-channels // (most - most % 2 if even else most))  # no more parts than it takes


@pytest.mark.parametrize("sign_zero", ["plus", "zero"])
@pytest.mark.parametrize(("channels", "taps"), [(3, 3), (227, 3), (228, 3), (455, 3), (456, 3), (3640, 3), (3642, 3)])
def test_what_is_kept_for_the_gradient_holds_every_sum(channels: int, taps: int, sign_zero: SignZero) -> None:
    layer = BinaryConv2d(channels, 1, taps, binarization=Binarization(sign_zero=sign_zero))
    most = channels * taps**2
    step = 2 if channels % 2 == 0 and sign_zero == "plus" else 1
    sums = torch.arange(-most, most + 1, step)
    kept = exact16.smallest_exact_dtype(layer)
    assert torch.equal(sums.float().to(kept).long(), sums)
    assert kept != torch.float32 or most >= 2**15
    assert kept == torch.float16 or not torch.equal(sums.float().to(torch.float16).long(), sums)


@pytest.mark.skipif(True not in INTEGERS, reason="no 8-bit convolutions here")
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_integer_convolutions_are_an_operation_that_torch_compile_can_trust(stride: int, padding: int) -> None:
    """Its description without data agrees with what it gives: shape, type, memory format."""
    signs = torch.ones(2, 8, 7, 7, dtype=torch.int8).to(memory_format=torch.channels_last)
    weight = torch.ones(16, 8, 3, 3, dtype=torch.int8)
    arguments = (signs, weight, [stride] * 2, [padding] * 2)
    torch.library.opcheck(exact16._integer_conv2d, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_kernel_too_large_for_the_type_stays_in_float32() -> None:
    layer = BinaryConv2d(2, 1, 17)  # 289 taps: two channels' sums are even, but beyond 512
    assert channels_per_chunk(layer, BF16) == 0
    assert channels_per_chunk(layer, FP16) == 2
    use_exact16_(layer, BF16)
    assert layer.product is None


@pytest.mark.parametrize("integers", INTEGERS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad_value", [0.0, -1.0, 1.0])
@pytest.mark.parametrize("sign_zero", ["plus", "zero"])
@pytest.mark.parametrize("channels", [3, 57, 58, 320])
def test_conv_equals_float32_whatever_the_weights_are(
    channels: int, sign_zero: SignZero, pad_value: float, stride: int, integers: bool
) -> None:
    """Sums from one end of the range to the other; bfloat16 without parts would round most of them."""
    binarization = Binarization(sign_zero=sign_zero, pad_value=pad_value)
    layer = BinaryConv2d(channels, 6, 3, stride, padding=1, binarization=binarization)
    plain, exact = both(layer, integers=integers)
    random = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.5, 0.9):
        weight = torch.rand(plain.weight.shape, generator=random) - share
        x = torch.rand(2, channels, 6, 6, generator=random) - share
        x[:, ::7] = 0.0
        x[:, 1::7] = -0.0
        plain.weight.data, exact.weight.data = weight, weight.clone()
        assert torch.equal(plain(x), exact(x))
    if channels == 320:
        assert plain(torch.ones(1, 320, 6, 6)).abs().max() > 512


@pytest.mark.parametrize("features", [7, 514, 2000])
def test_linear_equals_float32(features: int) -> None:
    torch.manual_seed(1)  # one of 128 seeds makes nothing but multiples of four, which bfloat16 holds
    plain, exact = both(BinaryLinear(features, 5))
    x = torch.rand(3, features) - 0.2
    plain.weight.data = torch.rand(5, features) - 0.2
    exact.weight.data = plain.weight.data.clone()
    assert torch.equal(plain(x), exact(x))
    assert features < 2000 or not torch.equal(plain(x).bfloat16().float(), plain(x))


@pytest.mark.parametrize("layer", [BinaryConv2d(6, 4, 3, bias=True), BinaryLinear(6, 4, bias=True)])
def test_a_bias_is_added_in_float32(layer: BinaryConv2d | BinaryLinear) -> None:
    """Where float32 itself rounds: its kernels begin their sums with the bias."""
    plain, exact = both(layer)
    x = torch.randn(2, 6, 5, 5) if isinstance(layer, BinaryConv2d) else torch.randn(2, 6)
    torch.testing.assert_close(exact(x), plain(x), rtol=1e-6, atol=1e-6)
    for network in (plain, exact):
        network(x).square().sum().backward()
    torch.testing.assert_close(exact.bias.grad, plain.bias.grad)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@needs_exact16
@pytest.mark.parametrize(
    ("estimator", "pad_value"),
    [("identity", 0.0), ("identity", 1.0), ("clipped", 0.0), ("approx_sign", -1.0), ("reste", 0.0)],
)
def test_both_ways_have_the_same_gradients_bit_for_bit(estimator: str, pad_value: float) -> None:
    binarization = Binarization(estimator, estimator, pad_value=pad_value)
    layer = BinaryConv2d(6, 4, 3, 2, padding=1, binarization=binarization).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 9).to(memory_format=torch.channels_last)
    upstream = torch.randn_like(layer(x)).bfloat16().float()
    gradients = []
    for integers in [*INTEGERS, None]:
        network = layer if integers is None else both(layer, integers=integers)[1]
        network.weight.grad = None
        leaf = x.clone().requires_grad_()
        network(leaf).backward(upstream)
        gradients.append((leaf.grad, network.weight.grad))
    *exact, plain = gradients
    # Sums of |terms|, and their number: 4 x 3 x 3 of an input's gradient, 2 images of 5 x 5 of a weight's.
    signs, weights = (torch.ones_like(t).double() for t in (layer.pad(x, 1.0), layer.weight))
    absolute = upstream.double().abs()
    sizes = (
        grad.conv2d_input(signs.shape, weights, absolute, 2)[:, :, 1:-1, 1:-1],
        grad.conv2d_weight(signs, weights.shape, absolute, 2),
    )
    for found in exact:
        for a, b, c, n, size, t in zip(found, exact[0], plain, (36, 50), sizes, (x, layer.weight), strict=True):
            assert torch.equal(a, b)
            slope = ste_gradient(torch.ones_like(t), t, estimator).detach()
            assert ((a - c).abs() <= accumulation_bound(c, slope * size, n)).all()
            assert torch.equal(a == 0, c == 0)


@pytest.mark.parametrize("layer", [BinaryConv2d(64, 32, 3, padding=1), BinaryLinear(600, 40)])
def test_gradients_point_where_float64_s_do(layer: BinaryConv2d | BinaryLinear) -> None:
    """Rounding to 8 bits turns a gradient of many values by less than 2e-5: 1 - cos <= 2^-18 x a few products."""
    plain, exact = both(layer)
    torch.manual_seed(0)
    x = torch.randn(8, 64, 8, 8) if isinstance(layer, BinaryConv2d) else torch.randn(64, 600)
    upstream = torch.randn_like(plain(x))
    gradients = []
    for network, dtype in (
        (copy.deepcopy(plain).double(), torch.float64),
        (plain, torch.float32),
        (exact, torch.float32),
    ):
        leaf = x.to(dtype, copy=True).requires_grad_()
        network(leaf).backward(upstream.to(leaf.dtype))
        assert leaf.grad is not None
        gradients.append((leaf.grad, network.weight.grad))
    reference, fp32, ours = gradients
    for true, single, half in zip(reference, fp32, ours, strict=True):
        assert half.dtype == torch.float32
        assert cosine(half, true) >= cosine(single, true) - 2e-5


def test_gradients_are_not_made_where_they_are_not_asked_for() -> None:
    _, exact = both(BinaryConv2d(4, 4, 3))
    x = torch.randn(1, 4, 5, 5)
    exact(x).sum().backward()  # no gradient of x
    assert exact.weight.grad is not None
    exact.weight.requires_grad_(False)
    exact(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("integers", INTEGERS)
@pytest.mark.parametrize("model", ["binarynet", "vgg_small", "resnet18", "resnet18_paper"])
def test_a_network_s_forward_pass_is_float32_s(model: str, integers: bool) -> None:
    network = getattr(models, model)(10, 32, AttentionBatchNorm2d, width=0.5)
    initialize_(network, 0).to(memory_format=torch.channels_last)  # as a run's; norms add up in that order
    plain, exact = both(network, integers=integers)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(x), exact(x))
    assert torch.equal(plain.eval()(x), exact.eval()(x))
    assert plain.state_dict().keys() == exact.state_dict().keys()


@needs_exact16
def test_a_trained_network_evaluates_bit_for_bit_the_same(
    make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("abn_exp.training.run.time_against_fp32", lambda *_: 2.4)
    plan = make_plan("precision=exact16", "model=resnet18_paper", "model.width=1", "dataset.train_images=100")
    run(plan, "python train.py")
    assert "precision=exact16 is slower than fp32 on this device: a pass takes 2.4 times" in caplog.text
    assert "precision-exact16" in plan.variant
    assert read_config(plan.directory)["precision"] == "exact16"
    plain, exact = both(load_network(plan.directory))
    data = load("digits", "", image_size=32)
    images, _ = next(iter(make_loaders(plan.config, data, torch.device("cpu"))["test"]))
    assert torch.equal(plain(images[:64]), exact(images[:64]))


@needs_exact16
@pytest.mark.parametrize("integers", INTEGERS)
def test_the_check_passes_here_and_leaves_the_network_as_it_was(integers: bool) -> None:
    network = models.resnet18_paper(10, 32, AttentionBatchNorm2d, width=5)
    use_exact16_(network, BF16, integers=integers)
    network.get_submodule("layer1").eval()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    check_exact16(network, torch.zeros(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert not network.get_submodule("layer1").training
    assert not any(layer._forward_pre_hooks for layer in network.modules())


@needs_exact16
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_check_finds_a_kernel_that_rounds(kind: str) -> None:
    """As one whose accumulators are too short would, or one that transforms its tiles (Winograd)."""
    layer = BinaryConv2d(64, 8, 3) if kind == "conv" else BinaryLinear(600, 8)
    use_exact16_(layer, BF16)
    x = torch.zeros(2, 64, 8, 8) if kind == "conv" else torch.zeros(2, 600)
    check_exact16(layer, x)
    product = layer.product
    assert product is not None
    layer.product = lambda *arguments: product(*arguments) * (1 + 2**-9)
    with pytest.raises(ValueError, match="not exact"):
        check_exact16(layer, x)


def test_the_check_finds_gradients_that_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a type that is too short, where small ones vanish, would."""
    network = binarynet(10, 32, nn.BatchNorm2d, width=0.05)
    use_exact16_(network, BF16)
    monkeypatch.setattr(exact16, "ste_gradient", lambda grad, *_: grad.relu())
    with pytest.raises(ValueError, match="another direction"):
        check_exact16(network, torch.zeros(2, 3, 32, 32))


@needs_exact16
@pytest.mark.parametrize("estimator", ["identity", "clipped", "approx_sign", "reste"])
def test_the_check_finds_gradients_that_are_rounded_in_between(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own bfloat16 convolution does on a CPU without oneDNN's: image by image, added in bfloat16."""
    layer = BinaryConv2d(64, 8, 3, padding=1, binarization=Binarization(estimator, estimator))
    use_exact16_(layer, BF16)
    images = torch.zeros(2, 64, 8, 8)
    check_exact16(layer, images)
    backward = torch.ops.aten.convolution_backward

    def per_image(grad: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, None]:
        parts = [backward(grad[i : i + 1], x[i : i + 1], weight, *arguments) for i in range(len(x))]
        return torch.cat([part[0] for part in parts]), sum(part[1] for part in parts), None

    once, twice = (f(*rounded_products()) for f in (backward, per_image))
    assert torch.equal(once[0], twice[0])
    assert cosine(once[1], twice[1]) > 0.9999  # which a comparison of directions does not find
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", per_image)
    with pytest.raises(ValueError, match="not accumulated in float32"):
        check_exact16(layer, images)


def rounded_products() -> tuple[Any, ...]:
    """Arguments of convolution_backward, in bfloat16."""
    random = torch.Generator().manual_seed(0)
    grad, x, weight = (
        torch.randn(shape, generator=random).bfloat16() for shape in ((2, 8, 8, 8), (2, 64, 8, 8), (8, 64, 3, 3))
    )
    return grad, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)


@needs_exact16
def test_a_precision_is_timed_against_fp32_and_the_network_left_as_it_was(make_plan: Callable[..., RunPlan]) -> None:
    config = make_plan("precision=exact16", *TINY).config
    network: Any = make_network(config, "abn", 10, torch.device("cpu"))
    network[0].eval()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    products = [layer.product for layer in network.modules() if isinstance(layer, BinaryConv2d | BinaryLinear)]
    counts: list[int] = []
    with network[0].register_forward_pre_hook(lambda module, images: counts.append(len(images[0]))):
        assert parts.time_against_fp32(config, network, torch.device("cpu")) > 0
    assert counts[:8] == [4] * 8
    assert 4 < counts[-1] <= config.recipe.batch_size  # four images of such a network take no time
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert products == [
        layer.product for layer in network.modules() if isinstance(layer, BinaryConv2d | BinaryLinear)
    ]
    assert network.training
    assert not network[0].training
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("error", [ValueError("products are not exact"), RuntimeError("no such kernel\nhint")])
def test_what_the_device_cannot_do_is_refused(
    error: Exception, make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(parts, "check_exact16", fail)
    with pytest.raises(ConfigError, match=r"precision=exact16, but .*; use precision=fp32"):
        make_network(make_plan("precision=exact16", *TINY).config, "abn", 10, torch.device("cpu"))


def test_the_check_finds_parts_that_are_too_large() -> None:
    layer = BinaryConv2d(320, 8, 3)
    layer.product = partial(exact16._product, dtype=BF16, chunk=320, integers=False, kept=torch.float32)
    with pytest.raises(ValueError, match="not exact"):
        check_exact16(layer, torch.zeros(2, 320, 8, 8))


@needs_exact16
def test_precision_reaches_the_network(make_plan: Callable[..., RunPlan]) -> None:
    for precision, expected in (("fp32", 0), ("exact16", 7)):
        config = make_plan(f"precision={precision}", *TINY).config
        network = make_network(config, "abn", 10, torch.device("cpu"))
        layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, BinaryConv2d | BinaryLinear)]
        assert len(layers) == 7
        assert sum(layer.product is not None for layer in layers) == expected
        whole = [layer for layer in layers if layer.product is not None and layer.product.keywords["integers"]]
        convolutions = [layer for layer in layers if isinstance(layer, BinaryConv2d)]
        assert whole == (convolutions if expected and True in INTEGERS else [])
