import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from abn_exp.binarize import (
    Binarization,
    BinaryConv2d,
    BinaryLinear,
    clip_latent_weights_,
    conv2d,
    sign,
    sign_ste,
)

INF = math.inf
JUST_OVER_1 = 1 + 2**-20
JUST_UNDER_1 = 1 - 2**-20
NEAR = 0.1 ** (-2 / 3)  # ReSTE's chord through the origin: 0.1^(1/3) / 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sign_has_two_values_and_both_zeros_are_plus(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([0.0, -0.0, tiny, -tiny, 3.0, -3.0, INF, -INF, math.nan], dtype=dtype)
    assert sign(x).tolist() == [1, 1, 1, -1, 1, -1, 1, -1, 1]
    assert sign(x).dtype is dtype


def test_sign_of_random_integers_is_total() -> None:
    x = torch.randint(-2, 3, (1000,)).float()
    assert set(sign(x).tolist()) == {-1.0, 1.0}
    assert torch.equal(sign(x), torch.where(x >= 0, 1.0, -1.0))


def test_sign_zero_has_a_third_value() -> None:
    assert sign_ste(torch.tensor([0.0, -0.0, 2.0, -2.0]), sign_zero="zero").tolist() == [0, 0, 1, -1]


OVER_T = 1.5 + 2**-20
SLOPES: dict[str, list[tuple[float, float]]] = {  # of |x|: every estimator is symmetric
    "identity": [(0.0, 1), (0.5, 1), (1.0, 1), (JUST_OVER_1, 1), (50.0, 1), (INF, 1)],
    "clipped": [(0.0, 1), (0.5, 1), (JUST_UNDER_1, 1), (1.0, 1), (JUST_OVER_1, 0), (50.0, 0), (INF, 0)],
    "approx_sign": [(0.0, 2), (0.25, 1.5), (0.5, 1), (JUST_UNDER_1, 2**-19), (1.0, 0), (JUST_OVER_1, 0), (50.0, 0)],
    "reste": [
        *[(0.0, NEAR), (0.05, NEAR), (0.1, NEAR), (0.125, 4 / 3), (1.0, 1 / 3)],
        *[(1.5, 1.5 ** (-2 / 3) / 3), (OVER_T, 0), (50.0, 0)],
    ],
}


@pytest.mark.parametrize("side", [1.0, -1.0])  # so 0.0 and -0.0, too
@pytest.mark.parametrize(
    ("estimator", "magnitude", "slope"), [(name, *row) for name, rows in SLOPES.items() for row in rows]
)
def test_estimator_slope(estimator: str, magnitude: float, side: float, slope: float) -> None:
    x = side * magnitude
    leaf = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    y = sign_ste(leaf, estimator)
    y.sum().backward()
    assert y.item() == (-1 if x < 0 else 1)
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(slope, abs=1e-15, rel=1e-12)


@pytest.mark.parametrize("estimator", SLOPES)
def test_estimator_multiplies_the_upstream_gradient(estimator: str) -> None:
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    upstream = torch.linspace(-3, 5, 41, dtype=torch.float64)

    def gradient(weights: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        sign_ste(leaf, estimator).backward(weights)
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(upstream), upstream * gradient(torch.ones_like(x)))


@pytest.mark.parametrize("clip_value", [0.3, 1.3, 2.0])
def test_clipped_is_hardtanh_gradient_with_its_border(clip_value: float) -> None:
    c = torch.tensor(clip_value)
    x = torch.stack([c, -c, torch.nextafter(c, c + 1), -torch.nextafter(c, c + 1), torch.nextafter(c, c - 1)])
    x.requires_grad_()
    sign_ste(x, "clipped", clip_value=c.item()).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0, 1]


def test_identity_saves_nothing_for_backward() -> None:
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        sign_ste(x, "identity")
        assert saved == []
        sign_ste(x, "clipped")
    assert len(saved) == 1
    assert saved[0].data_ptr() == x.data_ptr()


def test_sign_zero_option_reaches_weights_and_activations() -> None:
    x = torch.tensor([0.0, -1.0])
    assert Binarization(sign_zero="zero").activations(x).tolist() == [0, -1]
    assert Binarization(sign_zero="zero").weights(x).tolist() == [0, -1]
    assert Binarization().weights(x).tolist() == [1, -1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"pad_value": 0.5},
        {"sign_zero": "minus"},
        {"weight_estimator": "ste"},
        {"activation_estimator": "tanh"},
    ],
)
def test_binarization_refuses_what_it_does_not_know(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.*; use"):
        Binarization(**arguments)
    with pytest.raises(ValueError, match="estimator='ste' is unknown; use one of identity, clipped"):
        sign_ste(torch.ones(1), "ste")


@pytest.mark.parametrize("pad_value", [0.0, -1.0, 1.0])
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0)])
def test_binary_conv_is_a_sum_of_signs(pad_value: float, kernel_size: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(6, 4, kernel_size, stride, padding, binarization=Binarization(pad_value=pad_value))
    x = torch.randn(2, 6, 8, 8)
    x[0, 0] = 0.0
    y = layer(x)

    signs = torch.full((2, 6, 8 + 2 * padding, 8 + 2 * padding), pad_value)
    signs[:, :, padding : 8 + padding, padding : 8 + padding] = torch.where(x >= 0, 1.0, -1.0)
    patches = F.unfold(signs, kernel_size, stride=stride)
    weights = torch.where(layer.weight >= 0, 1.0, -1.0).flatten(1)
    assert torch.equal(y.flatten(2), weights @ patches)
    assert torch.equal(y, y.round())
    if pad_value or not padding:  # two values everywhere: as many odd products as K, so y has K's parity
        assert torch.equal(y.remainder(2), torch.full_like(y, 6 * kernel_size**2 % 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"), [(1, 2, 0), (1, 3, 0), (1, 2, 1), (3, 2, 1), (1, 1, 0)]
)
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 16])
def test_conv2d_is_torch_s_with_its_gradients(
    channels: int, kernel_size: int, stride: int, padding: int, memory_format: torch.memory_format
) -> None:
    """Integers, whose sums float32 holds, in every memory format and at sizes that the stride does not divide."""
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (2, channels, 9, 8)).float().to(memory_format=memory_format).requires_grad_()
    weight = torch.randint(-3, 4, (4, channels, kernel_size, kernel_size)).float().requires_grad_()
    truth = F.conv2d(x.double(), weight.double(), None, stride, padding)
    upstream = torch.randint(-3, 4, truth.shape)
    y = conv2d(x, weight, None, (stride, stride), (padding, padding))
    assert torch.equal(y.double(), truth)
    expected = torch.autograd.grad(truth, (x, weight), upstream.double())
    for found, true in zip(torch.autograd.grad(y, (x, weight), upstream.float()), expected, strict=True):
        assert torch.equal(found, true)


@pytest.mark.parametrize("channels", [8, 16])
def test_conv2d_of_8_channels_and_more_is_torch_s_bit_for_bit(channels: int) -> None:
    torch.manual_seed(0)
    x, weight = (
        torch.randn(4, channels, 8, 8, requires_grad=True),
        torch.randn(32, channels, 1, 1, requires_grad=True),
    )
    ours, theirs = conv2d(x, weight, None, (2, 2), (0, 0)), F.conv2d(x, weight, None, 2)
    assert ours.grad_fn is not None
    assert theirs.grad_fn is not None
    assert ours.grad_fn.name() == theirs.grad_fn.name() == "ConvolutionBackward0"
    assert ours.grad_fn.next_functions[0][0] is theirs.grad_fn.next_functions[0][0]  # x itself, no slice of it
    assert torch.equal(ours, theirs)


def test_zero_padding_after_binarisation_is_not_padding_of_the_input() -> None:
    layer = BinaryConv2d(1, 1, 3, padding=1)
    layer.weight.data.fill_(1.0)
    assert layer(torch.ones(1, 1, 3, 3))[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_binary_linear_is_a_sum_of_signs() -> None:
    torch.manual_seed(0)
    layer = BinaryLinear(32, 5)
    x = torch.randn(3, 32)
    expected = torch.where(x >= 0, 1.0, -1.0) @ torch.where(layer.weight >= 0, 1.0, -1.0).T
    assert torch.equal(layer(x), expected)
    assert layer.bias is None


@pytest.mark.parametrize("bias", [False, True])
def test_layers_keep_torch_s_parameters(bias: bool) -> None:
    conv, linear = BinaryConv2d(2, 3, 3, bias=bias), BinaryLinear(2, 3, bias=bias)
    assert isinstance(conv, torch.nn.Conv2d)
    assert isinstance(linear, torch.nn.Linear)
    names = ["weight", "bias"] if bias else ["weight"]
    assert [list(layer.state_dict()) for layer in (conv, linear)] == [names, names]
    if bias:
        x = torch.randn(1, 2)
        assert torch.equal(linear(x), F.linear(sign(x), sign(linear.weight), linear.bias))


def test_gradients_go_to_latent_weights_and_inputs_by_their_own_estimators() -> None:
    binarization = Binarization(weight_estimator="clipped", activation_estimator="approx_sign")
    layer = BinaryLinear(2, 1, binarization=binarization)
    layer.weight.data = torch.tensor([[0.5, -2.0]])
    x = torch.tensor([[0.25, -0.5]], requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]  # the input's signs are +1, -1; the second weight is out
    assert x.grad is not None
    assert x.grad.tolist() == [[1.5, -1.0]]  # slopes 1.5 and 1, weights' signs +1 and -1


def test_clip_latent_weights_touches_binary_layers_alone() -> None:
    layers: list[Any] = [BinaryConv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1), BinaryLinear(1, 1)]
    network = torch.nn.Sequential(*layers)
    for layer in layers:
        layer.weight.data.fill_(-3.0)
    clip_latent_weights_(network)
    assert [layer.weight.item() for layer in layers] == [-1.0, -3.0, -1.0]
    layers[0].weight.data.fill_(0.5)
    clip_latent_weights_(network)
    assert layers[0].weight.item() == 0.5
    assert layers[0].weight.requires_grad
