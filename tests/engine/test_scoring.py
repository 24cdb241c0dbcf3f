"""Tasks that generate nothing, seen from the event loop: their scores, exactly one end, time limits, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from server.engine.client import EngineClient, Job
from server.engine.mailbox import Mailbox
from server.engine.scoring import Scoring, score_all
from server.errors import GenerationError, OverloadedError, UnavailableError
from server.metrics import Metrics
from server.model.text import Text
from server.requests import Request, Sampling
from tests.api.fakes import FakeEngine, tiny_tokenizer

TEXT = Text(tiny_tokenizer())


@dataclass
class Bench:
    engine: FakeEngine
    client: EngineClient
    metrics: Metrics

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"adapterd_{name}", labels)


def job(id: str) -> Job:
    now = time.monotonic()
    return Job(Request(id, "acme", (), (5, 6, 7), Sampling(0), now, "embed"), started=now)


def build(timeout: float) -> Bench:
    mailbox, metrics = Mailbox(), Metrics("tiny")
    engine = FakeEngine(mailbox.publish, lambda request: [], eos=1)
    return Bench(engine, EngineClient(engine, mailbox, TEXT, metrics, request_timeout=timeout), metrics)


@pytest.fixture
def bench() -> Iterator[Bench]:
    built = build(30)
    yield built
    built.engine.stop()


async def test_scores_come_in_the_order_of_the_jobs(bench: Bench) -> None:
    bench.engine.scorer = lambda request: ((float(ord(request.id)),),)
    assert await score_all(bench.client, [job(id) for id in "cab"]) == [((99.0,),), ((97.0,),), ((98.0,),)]
    assert bench.value("requests_total", outcome="success") == 3
    assert bench.value("prompt_tokens_total") == 9
    assert bench.value("generated_tokens_total") == 0
    assert bench.value("queue_seconds_count") == bench.value("request_seconds_count") == 3
    assert bench.engine.cancelled == []


async def test_one_failure_cancels_the_rest(bench: Bench) -> None:
    bench.engine.failure = GenerationError("broken")
    with pytest.raises(GenerationError, match="broken"):
        await score_all(bench.client, [job("a"), job("b")])
    assert bench.value("requests_total", outcome="generation") == 1
    assert bench.value("requests_total", outcome="cancelled") == 1
    assert bench.value("prompt_tokens_total") == 0


async def test_a_refusal_half_way_cancels_what_was_taken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = bench.engine.submit

    def full_after_one(request: Request) -> None:
        if request.id == "b":
            raise OverloadedError
        submit(request)

    bench.engine.hold()
    monkeypatch.setattr(bench.engine, "submit", full_after_one)
    with pytest.raises(OverloadedError):
        await score_all(bench.client, [job("a"), job("b")])
    assert bench.engine.cancelled == ["a"]
    assert bench.value("requests_total", outcome="overloaded") == 1


async def test_it_is_given_up_on_after_the_time_limit() -> None:
    bench = build(0.05)
    bench.engine.silent = True
    scoring = Scoring(bench.client, job("a"))
    with pytest.raises(GenerationError, match=r"longer than 0\.05 seconds"):
        await scoring.result()
    assert bench.engine.cancelled == ["a"]
    assert bench.value("requests_total", outcome="timeout") == 1
    bench.engine.stop()


async def test_cancelled_by_the_engine_is_unavailable(bench: Bench) -> None:
    bench.engine.hold()
    scoring = Scoring(bench.client, job("a"))
    bench.engine.cancel("a")
    with pytest.raises(UnavailableError):
        await scoring.result()


async def test_a_caller_that_leaves_cancels(bench: Bench) -> None:
    bench.engine.hold()
    waiting = asyncio.ensure_future(score_all(bench.client, [job("a"), job("b")]))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert sorted(bench.engine.cancelled) == ["a", "b"]
    assert bench.value("requests_total", outcome="cancelled") == 2
