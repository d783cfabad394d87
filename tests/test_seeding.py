"""Seeds of random choices are what they were when results were recorded."""

import pytest

from abn_exp.seeding import derive_seed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ((0, "order", 0), 3471081512423777433),
        ((0, "init", 0), 900553517829159482),
        ((0, "split", 0), 2619165586269882832),
        ((3, "crop", 2), 8289301620893894145),
    ],
)
def test_recorded_seeds_stay(key: tuple[int, str, int], value: int) -> None:
    assert derive_seed(*key) == value
