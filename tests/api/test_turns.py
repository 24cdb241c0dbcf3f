from __future__ import annotations

import gc
from asyncio import Event, TaskGroup, sleep

import pytest

from server.api.turns import Turns


async def served(arrivals: list[str]) -> list[str]:
    """The order in which these tenants get their turns, all of them waiting while the first one has its own."""
    turns, order, go = Turns(), list[str](), Event()

    async def one(tenant: str) -> None:
        async with turns.turn(tenant):
            await go.wait()
            order.append(tenant)
            assert order.count("now") == 0
            order.append("now")
            await sleep(0)
            order.remove("now")

    async with TaskGroup() as tasks:
        for tenant in arrivals:
            tasks.create_task(one(tenant))
            await sleep(0)
        go.set()
    return order


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [
        (["a", "b", "c"], ["a", "b", "c"]),
        (["a", "a", "a", "a", "b"], ["a", "b", "a", "a", "a"]),
        (["a", "a", "a", "b", "b", "c"], ["a", "b", "c", "a", "b", "a"]),
    ],
)
async def test_one_at_a_time_and_no_tenant_overtakes_by_numbers(arrivals: list[str], order: list[str]) -> None:
    assert await served(arrivals) == order


async def test_who_fails_or_gives_up_passes_the_turn_on() -> None:
    turns = Turns()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="refused"):
            async with turns.turn("a"):
                raise RuntimeError("refused")
    async with turns.turn("a"):
        pass


async def test_tenants_that_are_gone_are_forgotten() -> None:
    turns = Turns()
    for number in range(100):
        async with turns.turn(f"tenant-{number}"):
            pass
    gc.collect()
    assert len(turns._own) == 0
