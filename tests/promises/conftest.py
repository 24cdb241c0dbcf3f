"""A house with two tenants and an operator, made once per worker; tests use names of their own in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import Caller, House


@pytest.fixture(scope="session")
def house(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tiny_base, tmp_path_factory.mktemp("promises")) as opened:
        yield opened


@pytest.fixture(scope="session")
def acme(house: House) -> Caller:
    return house.tenant("acme")


@pytest.fixture(scope="session")
def zeta(house: House) -> Caller:
    return house.tenant("zeta")


@pytest.fixture(scope="session")
def operator(house: House) -> Caller:
    return house.tenant("operations", "infer", "adapters", "admin")
