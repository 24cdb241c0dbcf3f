"""Traffic by the clock: when requests are sent is looked at by number and order, never by elapsed time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import count, pairwise
from random import Random
from typing import cast

import pytest

from server.bench.options import BenchError
from server.bench.results import OK, Outcome
from server.bench.scrape import Scrape
from server.bench.target import Target
from server.bench.traffic import Window, arrivals, check, flood, keep_busy, offer, price, quiet, served_in, tokens_in
from server.bench.workload import Order, Prompt


class Scripted:
    """Answers at once, or when `gate` opens; the n-th request with `statuses[n]`, OK beyond."""

    def __init__(self, *statuses: str, gate: asyncio.Event | None = None, crowd: int = 0) -> None:
        """`crowded` is set once `crowd` requests are in flight."""
        self.statuses, self.gate = statuses, gate
        self.crowd, self.crowded = crowd, asyncio.Event()
        self.sent: list[Order] = []
        self.inside = self.most = self.cancelled = 0

    async def generate(self, order: Order) -> Outcome:
        index = len(self.sent)
        self.sent.append(order)
        self.inside += 1
        self.most = max(self.most, self.inside)
        if self.inside == self.crowd:
            self.crowded.set()
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1
        now = time.perf_counter()
        status = self.statuses[index] if index < len(self.statuses) else OK
        return Outcome(order.adapter, status, now, now, (now,) if status == OK else (), message="full")

    @property
    def target(self) -> Target:
        return cast("Target", self)


def _orders() -> Callable[[], Order]:
    numbers = count()
    return lambda: Order(Prompt(str(next(numbers)), ()), None, 1)


def test_arrivals_are_poisson_of_the_rate_and_of_the_seed() -> None:
    times = arrivals(200.0, 50.0, Random(1))
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 50.0
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)  # as exponential ones have
    assert arrivals(200.0, 50.0, Random(1)) == times != arrivals(200.0, 50.0, Random(2))


async def test_an_open_loop_waits_for_no_answer() -> None:
    gate, make = asyncio.Event(), _orders()
    server = Scripted(gate=gate, crowd=20)

    async def open_gate() -> None:
        await server.crowded.wait()
        gate.set()

    orders = [make() for _ in range(20)]
    outcomes, _ = await asyncio.gather(offer(server.target, orders, [0.0] * 20, time.perf_counter()), open_gate())
    assert [outcome.status for outcome in outcomes] == [OK] * 20


async def test_no_request_is_sent_before_its_time() -> None:
    server, make, begun = Scripted(), _orders(), time.perf_counter()
    outcomes = await offer(server.target, [make(), make()], [0.03, 0.0], begun)
    assert [order.prompt.text for order in server.sent] == ["1", "0"]
    assert outcomes[0].started >= begun + 0.03


async def test_a_flood_goes_on_until_it_is_cancelled_and_takes_its_requests_with_it() -> None:
    server, outcomes = Scripted(gate=asyncio.Event(), crowd=50), list[Outcome]()
    task = asyncio.create_task(flood(server.target, _orders(), 1e6, Random(1), outcomes))
    await server.crowded.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (server.inside, outcomes) == (0, [])
    assert server.cancelled == len(server.sent) >= 50


async def test_streams_are_always_full_until_the_deadline() -> None:
    server = Scripted()
    outcomes = await keep_busy(server.target, _orders(), 5, time.perf_counter() + 0.05)
    assert server.most == 5
    assert len(outcomes) == len(server.sent) > 5
    assert len({order.prompt.text for order in server.sent}) == len(server.sent)


async def test_a_failure_ends_a_closed_loop_early() -> None:
    server = Scripted(OK, OK, "429")
    outcomes = await asyncio.wait_for(keep_busy(server.target, _orders(), 2, time.perf_counter() + 3600), 10)
    with pytest.raises(BenchError, match="the victim: a request failed with 429: full"):
        check(outcomes, "the victim")


class Draining:
    def __init__(self, *left: int) -> None:
        self.left = list(left)

    async def scrape(self) -> Scrape:
        waiting = self.left.pop(0)
        return Scrape.parse(f"adapterd_running {min(1, waiting)}\nadapterd_waiting {waiting}\n")


async def test_quiet_is_when_nothing_runs_and_nothing_waits() -> None:
    server = Draining(2, 1, 0, 9)
    await quiet(cast("Target", server))
    assert server.left == [9]


async def test_a_server_that_others_use_is_never_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.traffic._QUIET_SECONDS", 0.0)
    with pytest.raises(BenchError, match=r"`url`: the server still has 3 requests"):
        await quiet(cast("Target", Draining(2, 2)))


def test_service_is_counted_when_it_arrives() -> None:
    early = Outcome(None, OK, 0.0, 3.0, (0.9, 1.5, 3.0), (7, 7, 7), prompt_tokens=100)
    late = Outcome(None, OK, 1.0, 2.9, (1.9, 2.0), (7, 7), prompt_tokens=40)
    refused = Outcome(None, "429", 1.0, 1.1)
    window = Window(1.0, 2.0)
    assert tokens_in((early, late, refused), window) == 2  # 1.5 and 1.9; the end is not in the window
    assert served_in((early, late, refused), window) == 40 + 2 * 2  # the early one's prompt was served before
    assert price(128, 64) == 256
