"""Offered load: so many requests in flight at once until all are done (a closed loop), and one run of it as a report.

Owns concurrency and what is read before and after a run. Knows no scenario.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from .machine import CpuClock, foreign_cpus
from .results import Load, Outcome, summarise
from .scrape import steps_between
from .target import Target
from .workload import Order


async def drive(target: Target, orders: Sequence[Order], concurrency: int) -> list[Outcome]:
    """Sends `orders` in this sequence, the next as soon as one of `concurrency` ends. Outcomes in the same sequence."""
    outcomes: dict[int, Outcome] = {}
    pending = iter(enumerate(orders))

    async def work() -> None:
        for index, order in pending:
            outcomes[index] = await target.generate(order)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(orders))):
            group.create_task(work())
    return [outcomes[index] for index in range(len(orders))]


async def measure(target: Target, orders: Sequence[Order], concurrency: int, label: str) -> tuple[Load, list[Outcome]]:
    """One run between two scrapes, with what the server's steps and other processes did meanwhile."""
    before = await target.scrape()
    start = CpuClock.read(before.cpu_seconds)
    outcomes = await drive(target, orders, concurrency)
    after = await target.scrape()
    foreign = foreign_cpus(start, CpuClock.read(after.cpu_seconds))
    return summarise(label, outcomes, steps_between(before, after), foreign), outcomes
