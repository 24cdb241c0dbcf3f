"""The native kernels on one thread, compiled once for every run; skipped where no compiler is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.model.native import NativeKernels, NativeUnavailable, open_library
from server.model.native.build import find_compiler


@pytest.fixture(scope="session")
def kernels() -> Iterator[NativeKernels]:
    try:
        find_compiler()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    cache = Path(__file__).parents[3] / ".pytest_cache" / "native-kernels"
    opened = open_library(cache, print)
    opened.set_threads(1)
    yield opened
    opened.set_threads(torch.get_num_threads())
