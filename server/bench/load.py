"""Offered load: so many requests in flight at once until all are done (a closed loop), and one run of it as a report.

Owns concurrency and what is read before and after a run. Knows no scenario.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .machine import CpuClock, foreign_cpus
from .results import Load, Outcome, StepReport, summarise
from .scrape import mean_step_seconds, steps_between
from .target import Target
from .workload import Order


@dataclass
class Meanwhile:
    """What the server's steps and other processes did during a run; filled in when it ends."""

    report: StepReport | None = None
    step_seconds: float = 0.0  # mean
    foreign_cpu: float | None = None


@asynccontextmanager
async def around(target: Target) -> AsyncIterator[Meanwhile]:
    """A run between two scrapes."""
    found = Meanwhile()
    before = await target.scrape()
    start = CpuClock.read(before.cpu_seconds)
    yield found
    after = await target.scrape()
    found.foreign_cpu = foreign_cpus(start, CpuClock.read(after.cpu_seconds))
    found.report = steps_between(before, after)
    found.step_seconds = mean_step_seconds(before, after)


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
    async with around(target) as meanwhile:
        outcomes = await drive(target, orders, concurrency)
    return summarise(label, outcomes, meanwhile.report, meanwhile.foreign_cpu), outcomes
