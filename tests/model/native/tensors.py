"""Random tensors, what counts as close to a kernel's torch twin, and how many examples hypothesis may take."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

FP32, BF16 = torch.float32, torch.bfloat16
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
