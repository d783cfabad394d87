import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from scipy import integrate, stats
from torch import nn

from abn_exp.analysis.activations import SILU_MINIMUM
from abn_exp.binarize import sign, sign_ste
from abn_exp.norm import AttentionBatchNorm2d, InstanceEnhancementBatchNorm2d
from tests.helpers.runs import REPOSITORY

CONF = REPOSITORY / "conf" / "norm"
NORMS = sorted(path.stem for path in CONF.glob("*.yaml"))
EPS = 1e-5


def norm_layer(name: str, **changes: Any) -> Callable[[int], Any]:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return instantiate({**node, **changes})


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def silu(z: Any) -> Any:
    return z * sigmoid(z)


def silu_slope(z: np.ndarray) -> np.ndarray:
    return sigmoid(z) * (1 + z * (1 - sigmoid(z)))


def per_channel(vector: np.ndarray) -> np.ndarray:
    return vector[None, :, None, None]


def one(z: np.ndarray) -> np.ndarray:
    return np.ones_like(z)


# name: (value of u = what the gate sees, its slope, gamma's place), written out by hand
CLOSED_FORMS = {
    "bn": (lambda u: u, one, "output"),
    "bn_noscale": (lambda u: u, one, "none"),
    "abn": (silu, silu_slope, "none"),
    "abn_paper": (silu, silu_slope, "none"),
    "abn_noshift": (silu, silu_slope, "none"),
    "abn_scale": (silu, silu_slope, "output"),
    "abn_gate": (silu, silu_slope, "gate"),
    "abn_forward": (silu, one, "none"),
    "abn_backward": (lambda u: u, silu_slope, "none"),
}


def randomized(norm: nn.Module, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    for parameter in norm.parameters():
        parameter.data = torch.tensor(rng.normal(0.5, 1.0, parameter.shape))
    return norm.double()


def data(seed: int = 1, shape: tuple[int, ...] = (4, 3, 5, 6)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(2.0, 3.0, shape), rng.normal(0.0, 1.0, shape)


def forward_backward(norm: nn.Module, x: np.ndarray, upstream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    leaf = torch.tensor(x, requires_grad=True)
    y = norm(leaf)
    y.backward(torch.tensor(upstream))
    assert leaf.grad is not None
    return y.detach().numpy(), leaf.grad.numpy()


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)


def gradient_through_standardisation(
    g_hat: np.ndarray, x_hat: np.ndarray, var: np.ndarray, training: bool
) -> np.ndarray:
    """The textbook batch-norm gradient, for the gradient g_hat with respect to x_hat."""
    if training:
        axes = (0, 2, 3)
        g_hat = g_hat - per_channel(g_hat.mean(axes)) - x_hat * per_channel((g_hat * x_hat).mean(axes))
    return g_hat / per_channel(np.sqrt(var + EPS))


def test_every_configuration_has_a_closed_form_here() -> None:
    assert set(NORMS) == {*CLOSED_FORMS, "iebn"}


@pytest.mark.parametrize("name", NORMS)
def test_configuration_is_a_partial_with_the_fields_every_norm_shares(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    node = yaml.safe_load(text)
    assert text.startswith("# y = ")
    assert node["_partial_"] is True
    assert node["eps"] == EPS
    assert node["momentum"] == (0.9 if name == "abn_paper" else 0.1)
    assert isinstance(norm_layer(name), partial)
    assert isinstance(norm_layer(name)(3), nn.BatchNorm2d)
    assert norm_layer(name, momentum=0.7)(3).momentum == 0.7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_value_and_gradients_are_the_closed_forms(name: str, training: bool) -> None:
    value, slope, gamma_at = CLOSED_FORMS[name]
    norm = randomized(norm_layer(name)(3)).train(training)
    x, upstream = data()
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    else:
        mean, var = np.array([1.0, 2.0, 3.0]), np.array([4.0, 9.0, 2.0])
        norm.running_mean.copy_(torch.tensor(mean))
        norm.running_var.copy_(torch.tensor(var))
    gamma = np.ones(3) if norm.weight is None else norm.weight.detach().numpy()
    beta = np.zeros(3) if norm.bias is None else norm.bias.detach().numpy()
    y, grad = forward_backward(norm, x, upstream)

    x_hat = (x - per_channel(mean)) / per_channel(np.sqrt(var + EPS))
    inner = per_channel(gamma if gamma_at == "gate" else np.ones(3))
    outer = per_channel(gamma if gamma_at == "output" else np.ones(3))
    close(y, outer * value(inner * x_hat) + per_channel(beta))
    g_hat = upstream * outer * slope(inner * x_hat) * inner
    close(grad, gradient_through_standardisation(g_hat, x_hat, var, training))

    assert (norm.weight is None) == (gamma_at == "none")
    assert (norm.bias is None) == (name == "abn_noshift")
    if norm.bias is not None:
        close(norm.bias.grad, upstream.sum((0, 2, 3)))
    if gamma_at == "output":
        close(norm.weight.grad, (upstream * value(x_hat)).sum((0, 2, 3)))
    if gamma_at == "gate":
        close(norm.weight.grad, (upstream * slope(inner * x_hat) * x_hat).sum((0, 2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_instance_enhancement_is_the_closed_form(training: bool) -> None:
    norm = randomized(norm_layer("iebn")(3)).train(training)
    x, upstream = data()
    mean = x.mean((0, 2, 3)) if training else np.zeros(3)
    var = x.var((0, 2, 3)) if training else np.ones(3)
    gamma, beta, w, b = (p.detach().numpy() for p in (norm.weight, norm.bias, norm.gate_weight, norm.gate_bias))
    y, grad = forward_backward(norm, x, upstream)

    x_hat = (x - per_channel(mean)) / per_channel(np.sqrt(var + EPS))
    x_bar = x.mean((2, 3))
    gate = sigmoid(w * x_bar + b)
    close(y, (gamma * gate)[:, :, None, None] * x_hat + per_channel(beta))
    g_hat = upstream * (gamma * gate)[:, :, None, None]
    g_z = (upstream * x_hat).sum((2, 3)) * gamma * gate * (1 - gate)
    expected = gradient_through_standardisation(g_hat, x_hat, var, training)
    close(grad, expected + (g_z * w)[:, :, None, None] / 30)
    close(norm.bias.grad, upstream.sum((0, 2, 3)))
    close(norm.weight.grad, ((upstream * x_hat).sum((2, 3)) * gate).sum(0))
    close(norm.gate_weight.grad, (g_z * x_bar).sum(0))
    close(norm.gate_bias.grad, g_z.sum(0))


def test_instance_enhancement_starts_as_batch_norm_times_sigmoid_of_minus_one() -> None:
    x = torch.tensor(data()[0])
    norm = InstanceEnhancementBatchNorm2d(3).double()
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3).double()(x) / (1 + math.e))
    norm.gate_bias.data.fill_(7.0)
    norm.reset_parameters()
    assert norm.gate_bias.tolist() == [-1.0] * 3


@pytest.mark.parametrize("name", [name for name in NORMS if name not in ("abn_forward", "abn_backward")])
def test_autograd_agrees_with_finite_differences(name: str) -> None:
    norm = randomized(norm_layer(name)(2))
    x = torch.tensor(data(shape=(3, 2, 2, 2))[0], requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


def test_a_scaled_norm_without_gate_is_torch_s_batch_norm() -> None:
    ours, torchs = AttentionBatchNorm2d(3, gate="none", scale="output"), nn.BatchNorm2d(3)
    randomized(torchs)
    randomized(ours)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    ours.load_state_dict(torchs.state_dict())
    x, upstream = data()
    for actual, expected in zip(
        forward_backward(ours, x, upstream), forward_backward(torchs, x, upstream), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("name", [name for name in NORMS if name != "abn_paper"])
def test_running_statistics_are_torch_s(name: str) -> None:
    ours = norm_layer(name, momentum=0.3)(3)
    torchs: Any = nn.BatchNorm2d(3, momentum=0.3)
    for seed in range(4):
        x = torch.tensor(data(seed)[0]).float() * (seed + 1)
        ours(x)
        torchs(x)
    assert torch.equal(ours.running_mean, torchs.running_mean)
    assert torch.equal(ours.running_var, torchs.running_var)
    assert ours.num_batches_tracked == torchs.num_batches_tracked == 4
    ours.eval()(x)
    assert torch.equal(ours.running_mean, torchs.running_mean)
    assert ours.num_batches_tracked == 4


def test_the_paper_s_running_statistics_follow_the_published_rule() -> None:
    norm = norm_layer("abn_paper")(3).double()
    mean, var = np.zeros(3), np.ones(3)
    for seed in range(4):
        x, upstream = data(seed)
        x *= seed + 1
        forward_backward(norm, x, upstream)
        mean = 0.1 * mean + 0.9 * x.mean((0, 2, 3))
        var = 0.1 * var + 0.9 * x.var((0, 2, 3))
        close(norm.running_mean, mean)
        close(norm.running_var, var)
    assert norm.num_batches_tracked == 4
    assert not norm.running_mean.requires_grad
    norm.eval()
    close(norm(torch.tensor(x)).detach(), silu((x - per_channel(mean)) / per_channel(np.sqrt(var + EPS))))
    close(norm.running_mean, mean)


def test_the_paper_s_running_statistics_read_no_uninitialised_memory() -> None:
    norm = norm_layer("abn_paper")(3)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        norm(torch.tensor(data()[0]).float())
    finally:
        torch.use_deterministic_algorithms(False)
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()


def test_statistics_can_stay_out_of_the_state_dict() -> None:
    kept, lost = norm_layer("abn_paper")(3), norm_layer("abn_paper", persistent_stats=False)(3)
    x = torch.tensor(data()[0]).float()
    for norm in (kept, lost):
        norm(x)
    assert {"running_mean", "running_var"} <= kept.state_dict().keys()
    assert set(lost.state_dict()) == {"bias", "num_batches_tracked"}
    assert torch.equal(lost.running_mean, kept.running_mean)
    reloaded = norm_layer("abn_paper", persistent_stats=False)(3)
    reloaded.load_state_dict(lost.state_dict())
    assert reloaded.running_mean.tolist() == [0, 0, 0]
    assert reloaded.running_var.tolist() == [1, 1, 1]
    assert lost.to(torch.float64).running_mean.dtype is torch.float64  # still a buffer


@pytest.mark.parametrize("name", NORMS)
def test_state_survives_a_round_trip_and_reset(name: str) -> None:
    norm = norm_layer(name)(3)
    x = torch.tensor(data()[0]).float()
    fresh = {key: value.clone() for key, value in norm.state_dict().items()}
    norm(x)
    for parameter in norm.parameters():
        parameter.data += 0.5
    copy = norm_layer(name)(3)
    copy.load_state_dict(norm.state_dict())
    assert torch.equal(norm.eval()(x), copy.eval()(x))
    norm.reset_parameters()
    assert all(torch.equal(value, fresh[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("name", NORMS)
def test_errors_are_torch_s_own(name: str) -> None:
    norm = norm_layer(name)(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.ones(2, 3))
    norm.eval()(torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize("arguments", [{"gate": "half"}, {"scale": "input"}])
def test_unknown_choices_are_refused(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.* is unknown; use one of"):
        AttentionBatchNorm2d(3, **arguments)


# What follows from the formula.


def test_silu_s_minimum() -> None:
    z = torch.linspace(-5, 5, 2_000_001, dtype=torch.float64)
    y = nn.functional.silu(z)
    assert y.min().item() == pytest.approx(-0.2784645, abs=1e-7)
    assert z[y.argmin()].item() == pytest.approx(-1.27846, abs=1e-5)
    assert y.min().item() == pytest.approx(SILU_MINIMUM, abs=1e-9)


def activations_of_all_integers(
    beta: float, mean: float = 3.3, var: float = 500.0, fan_in: int = 576
) -> tuple[np.ndarray, np.ndarray]:
    """(y, sign(ABN(y))) for every integer a binary layer of that fan-in can put out."""
    norm = norm_layer("abn")(1).double().eval()
    norm.running_mean.fill_(mean)
    norm.running_var.fill_(var)
    norm.bias.data.fill_(beta)
    y = torch.arange(-fan_in, fan_in + 1, 2, dtype=torch.float64)
    return y.numpy(), sign(norm(y.view(1, 1, 1, -1))).flatten().detach().numpy()


def roots_of_silu(level: float) -> tuple[float, float]:
    """The z < -1.27846 and the z > -1.27846 where SiLU(z) = level, by bisection."""

    def bisect(low: float, high: float) -> float:
        rising = silu(high) > silu(low)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (silu(middle) < level) == rising else (low, middle)
        return low

    return bisect(-60.0, -1.2784645427610738), bisect(-1.2784645427610738, 60.0)


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.1, 0.2, 0.27])
def test_between_0_and_the_minimum_a_sign_reader_sees_an_interval(beta: float) -> None:
    y, signs = activations_of_all_integers(beta)
    left, right = roots_of_silu(-beta)
    x_hat = (y - 3.3) / np.sqrt(500.0 + EPS)
    np.testing.assert_array_equal(signs, np.where((left < x_hat) & (x_hat < right), -1.0, 1.0))
    assert np.count_nonzero(np.diff(signs)) == 2
    assert signs[0] == signs[-1] == 1.0


@pytest.mark.parametrize("beta", [-2.0, -0.3, -0.01, 0.0])
def test_at_or_below_0_there_is_one_threshold(beta: float) -> None:
    y, signs = activations_of_all_integers(beta)
    threshold = 0.0 if beta == 0 else roots_of_silu(-beta)[1]
    x_hat = (y - 3.3) / np.sqrt(500.0 + EPS)
    np.testing.assert_array_equal(signs, np.where(x_hat < threshold, -1.0, 1.0))
    assert np.count_nonzero(np.diff(signs)) == 1


@pytest.mark.parametrize("beta", [0.2784646, 0.5])
def test_above_the_minimum_a_channel_is_stuck(beta: float) -> None:
    assert set(activations_of_all_integers(beta)[1]) == {1.0}


def test_with_beta_0_the_signs_are_those_of_batch_norm_and_the_gradients_are_not() -> None:
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    signs = []
    for name in ("abn", "bn_noscale"):
        leaf = x.clone().requires_grad_()
        y = norm_layer(name)(4).double()(leaf)
        signs.append(sign(y))
        (y * x.cos()).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(signs[0], signs[1])
    assert not torch.allclose(gradients[0], gradients[1])


def test_straight_through_gradient_after_hardtanh() -> None:
    z = torch.tensor([-3.0, -1.3, -1.2784645427610738, -1.2, 0.0, 1.27, 1.2784, 1.2785, 4.0], dtype=torch.float64)
    z.requires_grad_()
    sign_ste(nn.functional.hardtanh(nn.functional.silu(z)), "identity").sum().backward()
    assert z.grad is not None
    assert (z.grad[:2] < 0).all()
    assert z.grad[2].item() == pytest.approx(0, abs=1e-12)
    assert (z.grad[3:7] > 0).all()
    assert z.grad[7:].tolist() == [0, 0]


def test_real_valued_outputs_drift_upward() -> None:
    expectation, _ = integrate.quad(lambda z: silu(z) * stats.norm.pdf(z), -12, 12)
    assert expectation == pytest.approx(0.2066, abs=5e-5)
    x = torch.randn(200, 2, 50, 50, generator=torch.Generator().manual_seed(0))
    assert AttentionBatchNorm2d(2)(x).mean().item() == pytest.approx(expectation, abs=3e-3)


@pytest.mark.parametrize("name", [name for name in NORMS if name != "iebn"])
def test_a_scale_per_channel_before_the_norm_changes_nothing(name: str) -> None:
    norm = norm_layer(name, eps=1e-12)(3).double()
    x = torch.tensor(data()[0])
    torch.testing.assert_close(norm(x * torch.tensor([0.5, 2.0, 7.0]).view(1, 3, 1, 1)), norm(x))
