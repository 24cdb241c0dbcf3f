"""Both ways to compute a step."""

from __future__ import annotations

import pytest

from server.model.kernels import Kernels
from tests.lab import kernels_named


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)
