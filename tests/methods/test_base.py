"""What every family's reader relies on."""

from __future__ import annotations

import pytest
import torch

from server.methods.base import finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    value = torch.randn(37, 53).to(dtype)
    assert finite(value)
    for at in (0, 1000, 37 * 53 - 1):
        spoilt = value.clone()
        spoilt.view(-1)[at] = bad
        assert not finite(spoilt)
        assert not finite(spoilt.t())
    assert finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    assert finite(torch.empty(0, dtype=dtype))
