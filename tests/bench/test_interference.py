"""Prefill while decoding: both ratios from a server of known delays, and what makes a round worthless."""

from __future__ import annotations

import asyncio
import re
import time
from io import StringIO

import pytest
from rich.console import Console

from server.bench.interference import Interference, Meeting, play
from server.bench.options import BenchError, BenchOptions
from server.bench.report import _interference
from server.bench.results import OK, Outcome
from server.bench.scenarios import prefill_while_decoding
from server.bench.scrape import Scrape
from server.bench.session import Session
from server.bench.target import Target
from server.bench.workload import Order, Piece

LONG = 40


class Slow(Target):
    """A token every 10 ms, every 30 ms while a long prompt is read; that takes 0.1 s, 0.2 s beside streams."""

    def __init__(self, status: str = OK) -> None:
        self.status = status
        self.streams = self.prompts = self.heard = 0
        self.heard_before: list[int] = []  # of each long prompt

    async def scrape(self) -> Scrape:
        return Scrape.parse("")

    async def tokenize(self, text: str) -> list[Piece]:
        stops = [at for at in range(len(text)) if text[at] == " "] + [len(text)]
        return [Piece(hash(text[:stop]) % 1000, stop) for stop in stops]

    async def generate(self, order: Order) -> Outcome:
        started = time.perf_counter()
        if len(order.prompt.ids) == LONG:
            self.heard_before.append(self.heard)
            self.prompts += 1
            await asyncio.sleep(0.2 if self.streams else 0.1)
            self.prompts -= 1
            times = [time.perf_counter()]
        else:
            times = await self._tokens(order.max_new_tokens)
        return Outcome(
            order.adapter, self.status, started, times[-1], tuple(times) if self.status == OK else (), message="full"
        )

    async def _tokens(self, count: int) -> list[float]:
        self.streams += 1
        times = []
        for _ in range(count):
            await asyncio.sleep(0.03 if self.prompts else 0.01)
            times.append(time.perf_counter())
            self.heard += 1
        self.streams -= 1
        return times


def session(target: Target, **changes: object) -> Session:
    given = {"concurrency": 3, "prompt_tokens": 5, "long_prompt_tokens": LONG, "max_new_tokens": 40, "adapters": 0, **changes}
    options = BenchOptions(scenario="prefill-while-decoding", repeats=1, warmup=False, seed=1, **given)  # type: ignore[arg-type]
    options.check()
    return Session(target, options, {}, 1)


async def test_both_ratios_are_those_of_the_server() -> None:
    server = Slow()
    findings = await prefill_while_decoding(session(server))
    found = findings.interference
    assert found is not None
    assert (found.streams, found.long_prompt_tokens) == (3, LONG)
    (met,) = found.rounds
    assert found.spread("first_token_ratio").median == met.beside / met.alone
    assert found.spread("gap_ratio").median == met.met_p99 / met.gap_p99
    assert met.beside >= 0.2  # what the server took beside streams, however slow this machine is
    assert met.alone >= 0.1
    alone, beside = server.heard_before
    assert alone == 0
    assert 120 + 30 <= beside < 120 + 40, "the second time three streams of 40 tokens had a quarter of them"
    assert met.gap_p50 >= 0.01
    assert [load.label for load in findings.loads][:3] == [
        "long prompt alone, round 1",
        "streams, round 1",
        "streams with a long prompt, round 1",
    ]


async def test_streams_that_end_too_early_are_no_measurement() -> None:
    with pytest.raises(BenchError, match="`max_new_tokens`: the streams ended before the long prompt had its first token"):
        await play(session(Slow(), max_new_tokens=6), (), 0)
    with pytest.raises(BenchError, match="`max_new_tokens`: the first stream ended"):
        await play(session(Slow(), max_new_tokens=1), (), 0)


async def test_a_request_that_fails_ends_the_run() -> None:
    with pytest.raises(BenchError, match="long prompt alone, round 1: a request failed with 429: full"):
        await play(session(Slow("429")), (), 0)


def meeting(beside: float, met: float, disturbed: bool = False) -> Meeting:
    return Meeting(1.0, beside, 0.04, 0.05, 0.08, met, None, disturbed)


def test_medians_are_over_the_undisturbed_rounds() -> None:
    rounds = (meeting(2.0, 0.1), meeting(2.2, 0.09), meeting(9.0, 9.0, disturbed=True), meeting(2.4, 0.08))
    found = Interference(8, 512, rounds)
    assert found.spread("first_token_ratio").median == pytest.approx(2.2)
    assert found.spread("gap_ratio").median == pytest.approx(1.8)
    assert len(Interference(8, 512, rounds[2:3]).counted) == 1


def test_the_report_prints_both_ratios() -> None:
    found = Interference(8, 512, (meeting(2.0, 0.1), meeting(2.4, 0.08, disturbed=True)))
    text = StringIO()
    Console(file=text, width=200).print(_interference(found))
    assert "a prompt of 512 tokens beside 8 streams, medians of 1 rounds" in text.getvalue()
    assert re.search(r"first token .* 1000 .* 2000 .* 2\.00 \(2\.00\.\.2\.00\)", text.getvalue())
    assert re.search(r"p99 .* 50 .* 100 .* 2\.00", text.getvalue())
    assert "Left out: 1 rounds" in text.getvalue()
