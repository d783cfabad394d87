"""Stratified splits and subsets: even shares of the classes, the same for the same seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abn_exp.data.splits import stratified_split, stratified_subset

some_labels = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(torch.tensor)


def shares_are_even(labels: torch.Tensor, chosen: torch.Tensor) -> bool:
    """Whether each class's count is its exact share rounded down or up."""
    counts, taken = labels.bincount(), labels[chosen].bincount(minlength=int(labels.max()) + 1)
    exact = counts.double() * len(chosen) / len(labels)
    return bool(((taken - exact).abs() < 1).all())


@settings(max_examples=80, deadline=None)
@given(labels=some_labels, fraction=st.floats(0, 0.99), seed=st.integers(0, 2**31))
def test_stratified_split(labels: torch.Tensor, fraction: float, seed: int) -> None:
    try:
        train, val = stratified_split(labels, fraction, seed)
    except ValueError as error:
        assert fraction > 0
        assert "leaves a class without" in str(error)  # noqa: PT017
        return
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert len(val) == round(fraction * len(labels))
    assert shares_are_even(labels, val)
    assert set(labels[train].tolist()) == set(labels.tolist())
    if fraction > 0:
        assert set(labels[val].tolist()) == set(labels.tolist())
    again = stratified_split(labels, fraction, seed)
    assert torch.equal(train, again[0])
    assert torch.equal(val, again[1])


def test_stratified_split_of_a_balanced_set() -> None:
    labels = torch.arange(1000) % 10
    train, val = stratified_split(labels, 0.1, seed=0)
    assert labels[val].bincount().tolist() == [10] * 10
    assert labels[train].bincount().tolist() == [90] * 10
    assert not torch.equal(val, stratified_split(labels, 0.1, seed=1)[1])
    assert len(stratified_split(labels, 0, seed=0)[1]) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.05, 0.95, float("nan")])
def test_stratified_split_refuses(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        stratified_split(torch.arange(20) % 5, fraction, seed=0)


@settings(max_examples=80, deadline=None)
@given(labels=some_labels, data=st.data(), seed=st.integers(0, 2**31))
def test_stratified_subset(labels: torch.Tensor, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, len(labels)))
    try:
        subset = stratified_subset(labels, count, seed)
    except ValueError as error:
        assert "empty" in str(error)  # noqa: PT017
        return
    assert len(subset.unique()) == count
    assert shares_are_even(labels, subset)
    assert set(labels[subset].tolist()) == set(labels.tolist())
    assert torch.equal(subset, stratified_subset(labels, count, seed))


def test_subsets_are_nested() -> None:
    labels = torch.arange(1000) % 10
    small, large = stratified_subset(labels, 50, seed=3), stratified_subset(labels, 215, seed=3)
    assert set(small.tolist()) < set(large.tolist())
    assert not torch.equal(small, stratified_subset(labels, 50, seed=4))


@pytest.mark.parametrize("count", [0, 4, 21])
def test_stratified_subset_refuses(count: int) -> None:
    with pytest.raises(ValueError, match="images"):
        stratified_subset(torch.arange(20) % 5, count, seed=0)
