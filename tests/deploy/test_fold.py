"""Folding, against the layers themselves at every integer, and against closed forms in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor, nn

from abn_exp.deploy.fold import Fold, Unfoldable, fold
from abn_exp.norm import AttentionBatchNorm2d
from tests.helpers.deploy import CubicBatchNorm2d, norm_layer
from tests.helpers.runs import REPOSITORY

CHANNELS = 6
NORMS = sorted(path.stem for path in (REPOSITORY / "conf/norm").glob("*.yaml"))
EDGE = [float(np.float32(0.27846454276107377) + k * np.spacing(np.float32(0.278))) for k in (-1, 0, 1)]  # -min silu


def set_parameters(norm: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor(mean))
        norm.running_var.copy_(torch.tensor(var))
        if norm.weight is not None:
            norm.weight.copy_(torch.tensor(weight))
        if (shift := getattr(norm, "shift", norm.bias)) is not None:
            shift.copy_(torch.tensor(bias))
    return norm.eval()


def assert_decides_as_the_layer(found: Fold, function: Callable[[Tensor], Tensor], limit: int) -> None:
    """Compare all integers, somewhere in maps of odd shape, and each channel's own."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(-limit, limit + 1).repeat(CHANNELS, 1)
    y = torch.stack([row[torch.randperm(len(row), generator=random)] for row in y])
    y = torch.nn.functional.pad(y, (0, -y.size(1) % 15)).view(CHANNELS, -1, 3, 5).transpose(0, 1).contiguous()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            value = function(y.float().contiguous(memory_format=memory_format))
        assert np.array_equal(found.signs(y.numpy()), (value >= 0).numpy())
    assert (np.diff(found.thresholds, axis=1)[found.thresholds[:, 1:] <= limit] > 0).all()


floats = st.floats(-3, 3, width=32)
scales = floats | st.sampled_from([0.0, -0.0, 1e-38, -1e-30, 1e-8])
shifts = floats | st.sampled_from([0.0, -0.0, 1e-30, 1e-7, -1e-7, 0.25, 0.278, 0.279, *EDGE])
variances = st.floats(0, 3000, width=32) | st.sampled_from([0.0, 1e-38, 1e-12, 1e6])


def channels(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=CHANNELS, max_size=CHANNELS)


@pytest.mark.parametrize("name", [*(n for n in NORMS if n != "iebn"), "tanh", "cubic"])
@settings(max_examples=25, deadline=None)
@given(
    mean=channels(st.floats(-200, 200, width=32)),
    var=channels(variances),
    weight=channels(scales),
    bias=channels(shifts),
    eps=st.sampled_from([1e-5, 1e-12, 1.0, 1e6]),
    limit=st.integers(1, 150),
)
def test_every_integer_is_decided_as_by_the_layer(
    name: str, mean: Any, var: Any, weight: Any, bias: Any, eps: float, limit: int
) -> None:
    norm = set_parameters(norm_layer(name)(CHANNELS), mean, var, weight, bias)
    norm.eps = eps
    function = nn.Sequential(norm, nn.Hardtanh())
    assert_decides_as_the_layer(fold(function, CHANNELS, limit), function, limit)


def random_fold(norm: nn.Module, limit: int) -> tuple[Fold, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    values = {
        "mean": random.normal(0, 30, CHANNELS),
        "var": random.uniform(100, 3000, CHANNELS),
        "weight": random.normal(0, 1, CHANNELS),
        "bias": np.array([-0.5, -0.01, 0.05, 0.2, 0.27, 0.5]),
    }
    found = fold(set_parameters(norm, **{key: v.astype(np.float32) for key, v in values.items()}), CHANNELS, limit)
    return found, {key: v.astype(np.float32).astype(np.float64) for key, v in values.items()}


def test_the_threshold_of_batch_norm_is_where_its_line_crosses_zero() -> None:
    limit = 576
    found, p = random_fold(nn.BatchNorm2d(CHANNELS), limit)
    crossing = p["mean"] - p["bias"] * np.sqrt(p["var"] + 1e-5) / p["weight"]
    assert np.array_equal(found.counts, np.ones(CHANNELS))
    assert np.array_equal(found.thresholds[:, 0], np.ceil(crossing))
    assert np.array_equal(found.first, p["weight"] < 0)


def test_abn_has_one_threshold_two_or_none_where_silu_crosses_minus_beta() -> None:
    limit = 3456
    found, p = random_fold(AttentionBatchNorm2d(CHANNELS), limit)
    assert found.counts.tolist() == [1, 1, 2, 2, 2, 0]
    for c, beta in enumerate(p["bias"]):

        def value(x: float, beta: float = beta) -> float:
            return x / (1 + np.exp(-x)) + beta

        roots = [brentq(value, -1.2784645, 10)] if beta < 0.2784 else []
        if 0 < beta < 0.2784:
            roots.insert(0, brentq(value, -60, -1.2784645))
        sums = p["mean"][c] + np.array(roots) * np.sqrt(p["var"][c] + 1e-5)
        assert np.array_equal(found.thresholds[c, : len(roots)], np.ceil(sums))
    assert found.first.tolist() == [False, False, True, True, True, True]


def test_where_float32_cannot_hold_the_exponential_the_fold_follows_the_layer() -> None:
    """Below xhat = -88.7, silu gives -0 in float32, whose sign is +1 here; in real numbers it is -1."""
    norm = set_parameters(AttentionBatchNorm2d(1), 0.0, 1.0, 1.0, 0.0)
    found = fold(norm, 1, 200)
    assert found.first.tolist() == [True]
    assert found.thresholds.tolist()[0][-1] == 0
    assert -110 < found.thresholds.tolist()[0][0] < -85


def test_an_interval_may_hold_no_integer() -> None:
    norm = set_parameters(AttentionBatchNorm2d(1), 0.5, 0.01, 1.0, 0.27)  # the interval is about 0.03 wide
    found = fold(norm, 1, 100)
    assert found.counts.tolist() == [0]
    assert found.first.all()


def test_a_user_s_norm_with_three_crossings_has_three_thresholds() -> None:
    norm = set_parameters(CubicBatchNorm2d(1), 0.0, 100.0, 1.0, 0.1)
    found = fold(norm, 1, 50)
    roots = np.sort(np.roots([1, 0, -1, 0.1]).real) * np.sqrt(100.0 + 1e-5)
    assert np.array_equal(found.thresholds[0], np.ceil(roots))
    assert found.first.tolist() == [False]


def test_a_function_that_crosses_zero_all_the_time_is_not_folded() -> None:
    with pytest.raises(Unfoldable, match="changes its sign 200 times, more than 32"):
        fold(lambda y: torch.cos(torch.pi * y), 1, 100)


def test_a_value_of_exactly_zero_has_no_bit_where_sign_zero_is_zero() -> None:
    def function(y: Tensor) -> Tensor:
        return y - torch.tensor([0.5, 3.0]).view(1, -1, 1, 1)

    assert fold(function, 2, 10).thresholds.tolist() == [[1], [3]]
    with pytest.raises(Unfoldable, match="the sum 3 of channel 1 gives exactly 0"):
        fold(function, 2, 10, "zero")
    assert fold(function, 2, 2, "zero").counts.tolist() == [1, 0]


def test_a_function_that_rounds_by_position_is_not_folded() -> None:
    def function(y: Tensor) -> Tensor:
        return y - 0.5 + (y.size(3) > 1)  # otherwise in a map of one place

    with pytest.raises(Unfoldable, match="in more than one way"):
        fold(function, 1, 10)


def test_two_dimensions_are_a_linear_layer_s() -> None:
    norm = nn.BatchNorm1d(CHANNELS).eval()
    assert norm.running_mean is not None
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([-20.5, -3.0, 0.0, 0.25, 7.0, 99.0]))
        norm.weight.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, 1.0]))
    found = fold(norm, CHANNELS, 64, dims=2)
    y = torch.arange(-64, 65)[:, None].expand(-1, CHANNELS)
    with torch.no_grad():
        assert np.array_equal(found.signs(y.numpy()), (norm(y.float()) >= 0).numpy())


@given(st.lists(st.integers(-20, 20), unique=True, max_size=4), st.booleans())
def test_a_negated_fold_decides_the_negated_integers(thresholds: list[int], first: bool) -> None:
    limit = 21
    found = Fold(np.array([first, first]), np.array([sorted(thresholds)] * 2, np.int32).reshape(2, -1), limit)
    y = np.arange(-limit, limit + 1)[:, None].repeat(2, 1)
    negated = found.negated(np.array([True, False]))
    assert np.array_equal(negated.signs(-y)[:, 0], found.signs(y)[:, 0])
    assert np.array_equal(negated.signs(y)[:, 1], found.signs(y)[:, 1])


@given(st.lists(st.lists(st.integers(-9, 9), unique=True, max_size=2), min_size=1, max_size=6), st.data())
def test_two_thresholds_at_most_are_an_interval(thresholds: list[list[int]], data: st.DataObject) -> None:
    first = np.array([data.draw(st.booleans()) for _ in thresholds])
    padded = np.array([[*sorted(row), 11, 11][:2] for row in thresholds], np.int32)
    found = Fold(first, padded, 10)
    low, high, inverted = found.intervals()
    y = np.arange(-10, 11)[:, None].repeat(len(first), 1)
    assert np.array_equal(((y < low) | (y >= high)) ^ inverted, found.signs(y))
