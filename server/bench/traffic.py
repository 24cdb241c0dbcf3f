"""Traffic that goes on by the clock: arrivals at given times, a flood without end, streams that are always full.

Owns when requests are sent and what was served in a span of time. Knows no scenario and no tenant.

    offer       at times fixed beforehand, whatever the server answers (open loop)
    flood       at random times of a given rate, until cancelled (open loop)
    keep_busy   the next as soon as one ends, until a deadline (closed loop)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from .options import BenchError
from .results import OK, Outcome
from .target import Target
from .workload import Order

#: What a token costs, as the server's fair scheduling counts (Fairness in Serving LLMs, OSDI'24, section 4).
PROMPT_PRICE: Final = 1.0
OUTPUT_PRICE: Final = 2.0

_QUIET_SECONDS = 60.0  # for requests of the phase before to end
_LOOK_SECONDS = 0.05  # between two looks whether they have


@dataclass(frozen=True, slots=True)
class Window:
    """A span of the monotonic clock, in seconds."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.begin)

    def holds(self, at: float) -> bool:
        return self.begin <= at < self.end


def arrivals(rate: float, seconds: float, random: Random) -> list[float]:
    """Times of a Poisson process of `rate` per second, from 0 to `seconds`."""
    times: list[float] = []
    at = random.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += random.expovariate(rate)
    return times


async def offer(target: Target, orders: Sequence[Order], times: Sequence[float], start: float) -> list[Outcome]:
    """Sends `orders[i]` at `start + times[i]` of the monotonic clock; ends with the last answer."""

    async def send(order: Order, at: float) -> Outcome:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        return await target.generate(order)

    return await asyncio.gather(*(send(order, at) for order, at in zip(orders, times, strict=True)))


async def flood(target: Target, make: Callable[[], Order], rate: float, random: Random, outcomes: list[Outcome]) -> None:
    """Poisson arrivals of `rate` per second until cancelled. Adds the outcome of each that has ended to `outcomes`."""

    async def send() -> None:
        outcomes.append(await target.generate(make()))

    at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        while True:
            at += random.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            group.create_task(send())


async def keep_busy(target: Target, make: Callable[[], Order], streams: int, deadline: float) -> list[Outcome]:
    """`streams` requests in flight until `deadline` (monotonic clock) or the first failure; then those in flight end."""
    outcomes: list[Outcome] = []
    failed = False

    async def work() -> None:
        nonlocal failed
        while not failed and time.perf_counter() < deadline:
            outcome = await target.generate(make())
            outcomes.append(outcome)
            failed = failed or outcome.status != OK

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(work())
    return outcomes


def check(outcomes: Iterable[Outcome], what: str) -> None:
    """Raises: BenchError when a request failed: the rest would be measured with less beside it than was meant."""
    for outcome in outcomes:
        if outcome.status != OK:
            raise BenchError(f"{what}: a request failed with {outcome.status}: {outcome.message}")


async def quiet(target: Target) -> None:
    """Until nothing runs and nothing waits. Raises: BenchError when that takes too long: somebody else uses the server."""
    deadline = time.perf_counter() + _QUIET_SECONDS
    while True:
        scrape = await target.scrape()
        busy = (scrape.total("adapterd_running") or 0) + (scrape.total("adapterd_waiting") or 0)
        if not busy:
            return
        if time.perf_counter() > deadline:
            raise BenchError(f"`url`: the server still has {busy:.0f} requests after {_QUIET_SECONDS:.0f} s without new ones")
        await asyncio.sleep(_LOOK_SECONDS)


def tokens_in(outcomes: Iterable[Outcome], window: Window) -> int:
    """Generated tokens that arrived in the window."""
    return sum(window.holds(at) for outcome in outcomes for at in outcome.token_times)


def served_in(outcomes: Iterable[Outcome], window: Window) -> float:
    """Service received in the window at the prices above; a prompt counts when its first token arrives."""
    done = [outcome for outcome in outcomes if outcome.token_times]
    prompts = sum(outcome.prompt_tokens for outcome in done if window.holds(outcome.token_times[0]))
    return PROMPT_PRICE * prompts + OUTPUT_PRICE * tokens_in(done, window)


def price(prompt_tokens: int, new_tokens: int) -> float:
    """Of one request that is served whole."""
    return PROMPT_PRICE * prompt_tokens + OUTPUT_PRICE * new_tokens
