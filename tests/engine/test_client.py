"""The event loop's side of the engine: fan-out, exactly one end, stop strings, time limits, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from adapters_store.digest import Digest
from server.engine.client import EngineClient, Generation, Job, collect, merge
from server.engine.mailbox import Mailbox
from server.errors import GenerationError, OverloadedError, UnavailableError
from server.metrics import Metrics
from server.model.text import Text
from server.requests import Event, FinishReason, Request, Sampling, Token
from tests.api.fakes import FakeEngine, tiny_tokenizer

TEXT = Text(tiny_tokenizer())


@dataclass
class Bench:
    engine: FakeEngine
    client: EngineClient
    metrics: Metrics
    mailbox: Mailbox

    def generate(self, id: str, *, stop: Sequence[str] = (), limit: int = 99, adapters: Sequence[str] = ()) -> Generation:
        now = asyncio.get_running_loop().time()
        digests = tuple(Digest.of(name.encode()) for name in adapters)
        request = Request(id, "acme", digests, (5,), Sampling(limit), arrival=now)
        return self.client.generate(Job(request, tuple(stop), tuple(adapters), started=now))

    def outcomes(self) -> dict[str, float]:
        family = next(f for f in self.metrics.registry.collect() if f.name == "adapterd_requests")
        return {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}


@pytest.fixture
def bench() -> Iterator[Bench]:
    mailbox, metrics = Mailbox(), Metrics("tiny")
    engine = FakeEngine(mailbox.publish, lambda request: TEXT.encode("hello world"), eos=1)
    yield Bench(engine, EngineClient(engine, mailbox, TEXT, metrics, request_timeout=30), metrics, mailbox)
    engine.stop()


async def test_deltas_then_the_summary(bench: Bench) -> None:
    generation = bench.generate("a")
    deltas = await collect(generation)
    assert "".join(delta.text for delta in deltas) == "hello world"
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish is FinishReason.EOS
    assert generation.summary.answer == "hello world"
    assert generation.summary.generated_tokens == len(deltas)
    assert generation.summary.queue == 0.25
    assert bench.outcomes() == {"success": 1}
    assert bench.engine.cancelled == []


async def test_many_at_once_get_their_own(bench: Bench) -> None:
    words = {f"r{n}": f"hello {n}" for n in range(30)}
    bench.engine.script = lambda request: TEXT.encode(words[request.id])
    generations = [bench.generate(id) for id in words]
    await asyncio.gather(*(collect(generation) for generation in generations))
    assert [generation.summary.answer for generation in generations] == list(words.values())


async def test_one_wake_up_per_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.engine.hold()
    loop, woken = asyncio.get_running_loop(), 0
    wake = loop.call_soon_threadsafe

    def counting(*arguments: Any, **context: Any) -> Any:
        nonlocal woken
        woken += 1
        return wake(*arguments, **context)

    generations = [bench.generate(f"r{n}") for n in range(20)]
    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    bench.engine.go()
    await asyncio.gather(*(collect(generation) for generation in generations))
    assert woken <= len(TEXT.encode("hello world")) + 1


async def test_closing_cancels_once(bench: Bench) -> None:
    bench.engine.silent = True
    async with bench.generate("a") as generation:
        pass
    await generation.aclose()
    assert bench.engine.cancelled == ["a"]
    assert bench.outcomes() == {"cancelled": 1}
    assert [delta async for delta in generation] == []


async def test_closing_after_the_end_changes_nothing(bench: Bench) -> None:
    generation = bench.generate("a")
    await collect(generation)
    await generation.aclose()
    assert (bench.engine.cancelled, bench.outcomes()) == ([], {"success": 1})


async def test_cancelling_the_task_cancels_the_request(bench: Bench) -> None:
    bench.engine.silent = True
    task = asyncio.create_task(collect(bench.generate("a")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (bench.engine.cancelled, bench.outcomes()) == (["a"], {"cancelled": 1})


async def test_stop_sequence_cancels_what_the_engine_would_go_on_with(bench: Bench) -> None:
    bench.engine.pause_after = 100
    bench.engine.script = lambda request: TEXT.encode("hello world" * 50)
    generation = bench.generate("a", stop=["ld"])
    deltas = await collect(generation)
    assert deltas[-1].finish is FinishReason.STOP
    assert generation.summary.answer == "hello world"
    assert "".join(delta.text for delta in deltas) == "hello wor"
    assert (bench.engine.cancelled, bench.outcomes()) == (["a"], {"success": 1})


async def test_stop_sequence_on_the_last_token_beats_the_length(bench: Bench) -> None:
    deltas = await collect(bench.generate("a", stop=["hello"], limit=len(TEXT.encode("hello"))))
    assert deltas[-1].finish is FinishReason.STOP
    assert bench.engine.cancelled == []


async def test_time_limit(bench: Bench) -> None:
    bench.engine.silent = True
    client = EngineClient(bench.engine, bench.mailbox, TEXT, bench.metrics, request_timeout=0.01)
    bench.client = client
    with pytest.raises(GenerationError, match=r"longer than 0\.01 seconds"):
        await collect(bench.generate("a"))
    assert (bench.engine.cancelled, bench.outcomes()) == (["a"], {"timeout": 1})


async def test_refusal_leaves_nothing_behind(bench: Bench) -> None:
    bench.engine.refusal = OverloadedError()
    with pytest.raises(OverloadedError):
        bench.generate("a", adapters=["x"])
    assert bench.client.waiting_adapters() == []
    assert bench.outcomes() == {"overloaded": 1}


async def test_error_event_is_raised(bench: Bench) -> None:
    bench.engine.failure = GenerationError("out of luck")
    with pytest.raises(GenerationError, match="out of luck"):
        await collect(bench.generate("a"))
    assert (bench.engine.cancelled, bench.outcomes()) == ([], {"generation": 1})


async def test_cancelled_by_the_engine_itself(bench: Bench) -> None:
    bench.engine.silent = True
    generation = bench.generate("a")
    bench.engine.cancel("a")
    with pytest.raises(UnavailableError):
        await collect(generation)
    assert bench.outcomes() == {"unavailable": 1}


async def test_several_tokens_in_one_event_and_events_after_the_end(bench: Bench) -> None:
    bench.engine.silent = True
    generation = bench.generate("a")
    tokens = tuple(Token(id, -1.0) for id in TEXT.encode("hello world"))
    bench.mailbox.publish([Event("a", tokens, FinishReason.LENGTH), Event("a", tokens), Event("stranger", tokens)])
    deltas = await collect(generation)
    assert len(deltas) == len(tokens)
    assert deltas[-1].finish is FinishReason.LENGTH
    assert generation.summary.answer == "hello world"


async def test_prompt_in_chunks_before_the_first_token(bench: Bench) -> None:
    bench.engine.silent = True
    generation = bench.generate("a")
    prompt = tuple(Token(id, None if id == 5 else -1.0) for id in (5, 6, 7))
    bench.mailbox.publish([Event("a", prompt=prompt[:2])])
    bench.mailbox.publish([Event("a", prompt=prompt[2:])])
    bench.mailbox.publish([Event("a", (Token(8, -1.0),), FinishReason.LENGTH, cached_tokens=2)])
    assert len(await collect(generation)) == 1
    assert (generation.summary.prefill, generation.summary.cached_tokens) == (prompt, 2)


async def test_end_without_a_token_is_an_error(bench: Bench) -> None:
    bench.engine.silent = True
    generation = bench.generate("a")
    bench.mailbox.publish([Event("a", finish=FinishReason.LENGTH)])
    with pytest.raises(GenerationError, match="without a last token"):
        await collect(generation)
    assert bench.outcomes() == {"error": 1}


async def test_waiting_adapters_are_those_of_requests_not_yet_begun(bench: Bench) -> None:
    bench.engine.hold()
    first, second = bench.generate("a", adapters=["x", "y"]), bench.generate("b", adapters=["y"])
    assert bench.client.waiting_adapters() == ["x", "y"]
    bench.engine.go()
    await asyncio.gather(first.begin(), second.begin())
    assert bench.client.waiting_adapters() == []
    await asyncio.gather(collect(first), collect(second))


async def test_begin_keeps_what_it_waited_for(bench: Bench) -> None:
    generation = bench.generate("a")
    await generation.begin()
    await generation.begin()
    assert "".join(delta.text for delta in await collect(generation)) == "hello world"


async def test_merge_gives_all_and_closes_all(bench: Bench) -> None:
    texts = ["", "", ""]
    async for index, delta in merge([bench.generate(f"r{n}") for n in range(3)]):
        texts[index] += delta.text
    assert texts == ["hello world"] * 3
    bench.engine.pause_after = 1
    async with aclosing(merge([bench.generate("x"), bench.generate("y")])) as deltas:
        await anext(deltas)
    assert sorted(bench.engine.cancelled) == ["x", "y"]


async def test_merge_loses_nothing_that_comes_while_its_reader_is_busy(bench: Bench) -> None:
    bench.engine.hold()
    generations = [bench.generate("x"), bench.generate("y")]
    bench.engine.pause_after = 1
    bench.engine.go()
    seen = list[int]()
    async with asyncio.timeout(10), aclosing(merge(generations)) as deltas:
        async for index, _ in deltas:
            seen.append(index)
            if seen == [0, 1]:  # the first is not looked at again before somebody waits
                bench.engine.go()
                await asyncio.to_thread(bench.engine.wait_until, lambda: not bench.engine.stats().running)
    made = len(TEXT.encode("hello world")) + 1
    assert (seen.count(0), seen.count(1)) == (made, made)


async def test_merge_stops_at_the_first_error(bench: Bench) -> None:
    bench.engine.failure = GenerationError("out of luck")
    with pytest.raises(GenerationError):
        async for _ in merge([bench.generate("x"), bench.generate("y")]):
            pass
    assert bench.engine.stats().running == 0


async def test_warm(bench: Bench) -> None:
    digest = Digest.of(b"x")
    await bench.client.warm([digest])
    assert bench.engine.residency(digest) == ("resident", None)
    bench.engine.failure = GenerationError("no room")
    with pytest.raises(GenerationError, match="no room"):
        await bench.client.warm([digest])
