"""One house for all of a worker's hostile tests; each leaves it serving, idle and with nothing more in its store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import Caller, House
from tests.process import until


@pytest.fixture(scope="session")
def house(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tiny_base, tmp_path_factory.mktemp("hostile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def healthy(house: House) -> list[int]:
    """What the base answers while nobody is hostile."""
    return house.tenant("acme").tokens()


@pytest.fixture
def acme(house: House, healthy: list[int]) -> Iterator[Caller]:
    """A tenant that may do anything a tenant may. Afterwards the server must be as it was."""
    stored = house.stored()
    caller = house.tenant("acme")
    yield caller
    until(house.idle)
    assert caller.tokens() == healthy
    assert caller.get("/health").status_code == 200
    until(lambda: house.stored() - stored == set() or kept(caller))
    for record in caller.get("/adapters").json()["adapters"]:
        assert caller.delete(f"/adapters/{record['adapter_id']}").status_code == 204


def kept(caller: Caller) -> bool:
    """Whether the test published something, whose files then stay."""
    return bool(caller.get("/adapters").json()["adapters"])


def refusal(response: object, *statuses: int) -> str:
    """The words of a refusal with one of the statuses (422 by default), in the one shape that clients know."""
    assert isinstance(response.status_code, int)  # type: ignore[attr-defined]
    assert response.status_code in (statuses or (422,)), response.text  # type: ignore[attr-defined]
    body = response.json()  # type: ignore[attr-defined]
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)
