"""Weights: three tenants of weights 1, 2 and 4, none of whom ever runs out of requests, and what each of them was served.

Owns this scenario's order of events and its figures. Counts at the prices of traffic.py, prompt 1 and output 2.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Final

from .figures import Figure, Verdict
from .load import around
from .options import BenchError
from .results import Outcome, summarise
from .scenarios import Findings
from .session import Session
from .target import Target
from .tenants import tenants
from .traffic import Window, check, keep_busy, quiet, served_in
from .workload import Order, rough_prompt

WEIGHTS: Final = (1.0, 2.0, 4.0)
#: How far a tenant's service may be from its weight's share.
OFF_BY: Final = 0.05
#: Of the measured time, what passes before it begins: the batch has filled by then.
_LEAD: Final = 0.2


async def weights(session: Session) -> Findings:
    """Each tenant keeps `concurrency` requests in flight, through one adapter of its own."""
    _check_backlog(session)
    async with tenants(session, WEIGHTS) as targets, _prepared(session, targets) as orders:
        await quiet(session.target)
        async with around(session.target) as meanwhile:
            window, outcomes = await _all_busy(session, targets, orders)
    loads = tuple(
        summarise(f"tenant of weight {weight:g}", found, meanwhile.report, meanwhile.foreign_cpu)
        for weight, found in zip(WEIGHTS, outcomes, strict=True)
    )
    return Findings(loads, verdict=verdict(outcomes, window))


def _check_backlog(session: Session) -> None:
    """Raises: BenchError when a tenant's requests could all run at once: it would not be waiting, and get no more."""
    running, given = session.info.get("max_running"), session.options.concurrency
    if isinstance(running, int) and given <= running:
        raise BenchError(
            f"`concurrency` must be over {running}, which the server runs at once (its `--max-running`), so that every "
            f"tenant always has a request waiting. Given: {given}"
        )


@asynccontextmanager
async def _prepared(session: Session, targets: Sequence[Target]) -> AsyncIterator[list[Callable[[], Order]]]:
    """What each tenant sends next, its adapter uploaded and warm."""
    async with AsyncExitStack() as stack:
        makers = []
        for target in targets:
            tenant = session.under(target, adapters=min(1, session.options.adapters))
            names = await stack.enter_async_context(tenant.adapters())
            await tenant.warm_up(names)
            makers.append(_maker(tenant, names[0] if names else None))
        yield makers


def _maker(tenant: Session, adapter: str | None) -> Callable[[], Order]:
    options, random = tenant.options, Random(tenant.seed)
    return lambda: Order(rough_prompt(options.prompt_tokens, random), adapter, options.max_new_tokens)


async def _all_busy(
    session: Session, targets: Sequence[Target], orders: Sequence[Callable[[], Order]]
) -> tuple[Window, list[list[Outcome]]]:
    """Raises: BenchError when a request fails."""
    options = session.options
    begun = time.perf_counter()
    window = Window(begun + _LEAD * options.seconds, begun + (1 + _LEAD) * options.seconds)
    async with asyncio.TaskGroup() as group:  # the heaviest first: whoever fills the empty batch is soonest even again
        tasks = [
            group.create_task(keep_busy(target, make, options.concurrency, window.end))
            for target, make in reversed(list(zip(targets, orders, strict=True)))
        ]
    outcomes = [task.result() for task in reversed(tasks)]
    for weight, found in zip(WEIGHTS, outcomes, strict=True):
        check(found, f"the tenant of weight {weight:g}")
    return window, outcomes


def verdict(outcomes: Sequence[Sequence[Outcome]], window: Window) -> Verdict:
    """Shares of what all were served in the window, against the shares of their weights."""
    served = [served_in(found, window) for found in outcomes]
    total = sum(served)
    shares = [service / total if total else 0.0 for service in served]
    fair = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    off = [share / due - 1 for share, due in zip(shares, fair, strict=True)]
    figures = [Figure("served in all (prompt 1, output 2)", total / window.seconds, "tokens/s")]
    for weight, service, share, due, error in zip(WEIGHTS, served, shares, fair, off, strict=True):
        figures += (
            Figure(f"weight {weight:g}: served", service, "count"),
            Figure(f"weight {weight:g}: share, {due:.1%} being fair", share, "share"),
            Figure(f"weight {weight:g}: off by", error, "share", least=-OFF_BY, most=OFF_BY),
        )
    raw = tuple({"weight": w, "served": s} for w, s in zip(WEIGHTS, served, strict=True))
    return Verdict(f"three backlogged tenants of weights 1, 2 and 4, over {window.seconds:.0f} s", tuple(figures), rounds=raw)
