"""Whether the CPU at hand takes exact16, for tests that need it."""

from functools import cache

import pytest
import torch

from abn_exp.binarize import BinaryConv2d
from abn_exp.exact16 import check_exact16, use_exact16_


@cache
def why_no_exact16() -> str:
    """Return why exact16 is refused on this CPU; "" where it is not."""
    layer = BinaryConv2d(6, 4, 3, 2, padding=1)
    use_exact16_(layer, torch.bfloat16)
    try:
        check_exact16(layer, torch.zeros(2, 6, 9, 9))
    except ValueError as error:
        return str(error)
    return ""


needs_exact16 = pytest.mark.skipif(bool(why_no_exact16()), reason=f"exact16 is refused here: {why_no_exact16()}")
