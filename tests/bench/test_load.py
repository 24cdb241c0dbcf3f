from __future__ import annotations

import asyncio
from typing import cast

import pytest

from server.bench.load import drive, measure
from server.bench.results import OK, Outcome
from server.bench.target import Target, connect
from server.bench.workload import Order, Prompt

from .fake import FakeServer


def _orders(count: int) -> list[Order]:
    return [Order(Prompt(str(index), (1,)), f"bench-{index}", 3) for index in range(count)]


class _Gate:
    """A target that lets nobody through until as many requests are in flight as may be."""

    def __init__(self, concurrency: int) -> None:
        self._barrier = asyncio.Barrier(concurrency)
        self._concurrency = concurrency
        self._inside = 0
        self.most = 0

    async def generate(self, order: Order) -> Outcome:
        self._inside += 1
        self.most = max(self.most, self._inside)
        await self._barrier.wait()
        self._inside -= 1
        return Outcome(order.adapter, OK, 0.0, 1.0)


@pytest.mark.parametrize(("requests", "concurrency"), [(12, 4), (4, 4), (3, 1)])
async def test_exactly_so_many_are_in_flight(requests: int, concurrency: int) -> None:
    gate = _Gate(concurrency)
    outcomes = await asyncio.wait_for(drive(cast("Target", gate), _orders(requests), concurrency), 10)
    assert gate.most == concurrency
    assert [outcome.adapter for outcome in outcomes] == [f"bench-{index}" for index in range(requests)]


async def test_fewer_requests_than_concurrency_are_all_sent_at_once() -> None:
    gate = _Gate(2)
    await asyncio.wait_for(drive(cast("Target", gate), _orders(2), 8), 10)
    assert gate.most == 2


async def test_a_run_is_reported_with_the_servers_steps() -> None:
    server = FakeServer()
    async with connect("http://server", api_key=None, request_seconds=5, transport=server.transport) as target:
        load, outcomes = await measure(target, _orders(4), 2, "run")
    assert (load.label, load.completed, load.generated_tokens) == ("run", 4, 12)
    assert len(outcomes) == 4
    assert load.steps is not None
    assert load.steps.steps == 4
    assert load.steps.distinct_adapters is not None
    assert (load.steps.distinct_adapters.mean, load.steps.distinct_adapters.most) == (3.0, 4.0)
    assert load.foreign_cpu is None  # this server does not export its own CPU time
