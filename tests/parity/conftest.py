"""Both ways to compute a step."""

from __future__ import annotations

import pytest
import torch

from server.model.kernels import Kernels, choose_kernels
from server.settings import default_home


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return Kernels("torch")
    chosen = choose_kernels(torch.device("cpu"), torch.float32, True, default_home(), lambda line: None)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen
