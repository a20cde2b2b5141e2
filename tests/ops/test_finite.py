"""The question whether all values are numbers, in one pass."""

import math

import pytest
import torch

from opd.ops.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_is_enough(dtype):
    generator = torch.Generator().manual_seed(0)
    values = (1000 * torch.randn(300, 700, generator=generator)).to(dtype)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(values.t()[:5])
    for wrong in (math.nan, math.inf, -math.inf):
        broken = values.clone()
        broken[211, 3] = wrong
        assert not all_finite(broken)
        broken[0, 0] = -wrong  # infinities of both signs do not cancel
        assert not all_finite(broken)


def test_half_precision_does_not_overflow_in_the_sum():
    assert all_finite(torch.full((4096, 64), 60_000.0, dtype=torch.float16))
