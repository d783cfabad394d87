"""Numbers as text: what is printed does not contradict what was decided, nor change its form from one to the next."""

import math

import pytest

from abn_exp.report.formatting import p_equation, p_text, significant_text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0009, "< 0.001"),
        (0.0123, "0.0123"),
        (0.2, "0.200"),
        (0.05, "0.0500"),
        (0.04996, "0.0499600"),  # with four digits both were 0.0500, and only one is below the level
        (0.05004, "0.0500400"),
    ],
)
def test_p_values(p: float, text: str) -> None:
    assert p_text(p) == text
    assert p_equation(p) == (f"p {text}" if text.startswith("<") else f"p = {text}")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (98.76, "98.8"), (999.4, "999"), (999.6, "1,000"), (12345.6, "12,346"), (math.nan, "-")],
)
def test_three_significant_digits_without_an_exponent(value: float, text: str) -> None:
    assert significant_text(value) == text
