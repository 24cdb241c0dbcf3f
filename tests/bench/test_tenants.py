from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from starlette.responses import JSONResponse

from server.bench.options import BenchError, BenchOptions
from server.bench.session import Session
from server.bench.target import Target, connect
from server.bench.tenants import tenants
from server.bench.workload import Order, Prompt

from .fake import FakeServer

ORDER = Order(Prompt("hello", ()), None, 1)


@asynccontextmanager
async def _tenants(server: FakeServer, weights: Sequence[float], **keys: object) -> AsyncIterator[list[Target]]:
    options = BenchOptions(**keys)  # type: ignore[arg-type]
    async with (
        connect("http://server", api_key=options.api_key, request_seconds=5, transport=server.transport) as target,
        tenants(Session(target, options, {}, 1), weights) as made,
    ):
        yield made


async def test_given_keys_are_used_as_they_are() -> None:
    server = FakeServer(keys={"v": "victim", "a": "attacker"})
    async with _tenants(server, (1, 1), api_keys=("v", "a")) as made:
        for each in made:
            await each.generate(ORDER)
    assert server.owners == ["victim", "attacker"]
    assert server.tenants == {}
    assert server.removed == []


async def _break_off(server: FakeServer) -> None:
    async with _tenants(server, (1, 2, 4), api_key="admin") as made:
        for each in made:
            await each.generate(ORDER)
        assert server.removed == []
        raise RuntimeError("in between")


async def test_an_administrators_key_makes_them_and_takes_them_away_whatever_happens() -> None:
    server = FakeServer(keys={"admin": "root"})
    with pytest.raises(RuntimeError, match="in between"):
        await _break_off(server)
    assert [policy["weight"] for policy in server.tenants.values()] == [1, 2, 4]
    assert server.owners == list(server.tenants)
    assert server.removed == list(server.tenants)


async def test_a_key_that_may_not_administer_is_said_and_nothing_stays() -> None:
    server = FakeServer(keys={"user": "somebody"})
    with pytest.raises(BenchError, match=r"PUT /admin/tenants/bench-\w+ with 403.*admin scope"):
        await _tenants(server, (1, 1), api_key="user").__aenter__()
    assert server.tenants == {}


async def test_a_refusal_of_one_tenant_stays_with_it() -> None:
    server = FakeServer(keys={"v": "victim", "a": "attacker"}, refuse={1: JSONResponse({"error": "full"}, 429)})
    async with _tenants(server, (1, 1), api_keys=("v", "a")) as (victim, attacker):
        refused = await attacker.generate(Order(Prompt("hello", ()), "bench-1", 1))
        served = await victim.generate(Order(Prompt("hello", ()), "bench-0", 1))
    assert (refused.status, served.status) == ("429", "ok")
