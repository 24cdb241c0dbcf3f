"""Noisy neighbour: who sends what in which phase, and the verdict from phases of known times."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from starlette.responses import JSONResponse

from server.bench.neighbour import Phase, Round, _phase_of, _verdict
from server.bench.options import BenchError, BenchOptions
from server.bench.results import OK, Outcome, summarise
from server.bench.run import bench, to_json
from server.bench.session import Session
from server.bench.traffic import Window

from .fake import FakeServer
from .test_scenarios import _printed


def _options(**changes: Any) -> BenchOptions:
    small: dict[str, Any] = {
        "url": "http://server",
        "scenario": "noisy-neighbour",
        "api_keys": ("v", "a"),
        "concurrency": 2,
        "prompt_tokens": 9,
        "long_prompt_tokens": 40,
        "max_new_tokens": 4,
        "adapters": 3,
        "rank": 2,
        "repeats": 2,
        "seconds": 0.2,
        "seed": 1,
    }
    return BenchOptions(**{**small, **changes})


def _server(**changes: Any) -> FakeServer:
    return FakeServer(keys={"v": "victim", "a": "attacker"}, pace=0.002, **changes)


async def test_the_victim_is_alone_in_every_other_phase() -> None:
    server = _server()
    report = await bench(_options(), server.transport)
    assert [load.label for load in report.loads] == [
        "victim alone, round 1",
        "victim beside, round 1",
        "victim alone, round 2",
        "victim beside, round 2",
    ]
    owners = [owner for owner, request in zip(server.owners, server.requests, strict=True) if _is_attack(request)]
    assert set(owners) == {"attacker"}
    assert report.verdict is not None
    assert len(report.verdict.rounds) == 2
    assert report.loads[0].requests == report.loads[1].requests  # the same arrivals
    assert sorted(server.deleted) == sorted(server.adapters)
    assert len(server.adapters) == 4  # the victim's and the attacker's three
    assert "throughput lost" in _printed(report)


def _is_attack(request: dict[str, Any]) -> bool:
    return len(request["inputs"].split()) == 40


async def test_the_attackers_refusals_are_counted_and_fail_nothing() -> None:
    class Picky(FakeServer):
        async def _generate(self, request: Any) -> Any:
            if self._caller(request) == "attacker":
                return JSONResponse({"error": "quota", "error_type": "overloaded"}, 429)
            return await super()._generate(request)

    server = Picky(keys={"v": "victim", "a": "attacker"}, pace=0.002)
    report = await bench(_options(repeats=1), server.transport)
    assert report.failed == 0
    assert report.verdict is not None
    beside = report.verdict.rounds[0]["beside"]
    assert isinstance(beside, dict)
    assert beside["attacker_refused"] > 0
    assert beside["attacker_ended"] == 0


async def test_a_victim_that_is_refused_when_capacity_is_measured_ends_the_run() -> None:
    server = _server(refuse={0: JSONResponse({"error": "no quota"}, 429)})
    with pytest.raises(BenchError, match="failed with 429"):
        await bench(_options(warmup=False), server.transport)
    assert sorted(server.deleted) == sorted(server.adapters)


def _phase(ttft: tuple[float, ...], rate: float = 100.0, step: float = 0.05) -> Phase:
    return Phase(ttft, (0.02, 0.03), rate, step)


def _round(beside: tuple[float, ...], rate: float) -> Round:
    load = summarise("", [])
    return Round(_phase((0.1, 0.1, 0.2)), _phase(beside, rate), (load, load), None)


def _goals(*rounds: Round) -> dict[str, bool | None]:
    session = Session(None, _options(), {}, 1)  # type: ignore[arg-type]
    return {figure.name: figure.met for figure in _verdict(session, 300.0, rounds).figures if figure.met is not None}


def test_the_goal_is_1_2_times_alone_and_one_step() -> None:
    alone = float(np.percentile((0.1, 0.1, 0.2), 99))
    assert _goals(_round((1.2 * alone + 0.049,), 96.0)) == {"TTFT beside, p99": True, "throughput lost": True}
    assert _goals(_round((1.2 * alone + 0.051,), 94.0)) == {"TTFT beside, p99": False, "throughput lost": False}


def test_percentiles_are_over_the_requests_of_all_rounds() -> None:
    session = Session(None, _options(), {}, 1)  # type: ignore[arg-type]
    figures = _verdict(session, 300.0, (_round((0.1,), 100.0), _round((0.3,), 90.0))).figures
    found = {figure.name: figure.value for figure in figures}
    assert found["TTFT beside, p50"] == pytest.approx(0.2)
    assert found["throughput lost"] == pytest.approx(0.05)


def test_a_phase_counts_what_falls_into_its_window() -> None:
    before = Outcome("v", OK, 0.5, 2.0, (1.5, 1.7), (7, 7))
    within = Outcome("v", OK, 1.0, 3.0, (1.25, 2.5), (7, 7))
    failed = Outcome("v", "503", 1.1, 1.2)
    theirs = [Outcome("a", OK, 0.0, 1.6, (1.6,), (7,)), Outcome("a", "429", 0.0, 0.1)]
    found = _phase_of([before, within, failed], theirs, Window(1.0, 2.0), 0.04)
    assert found.first_tokens == (0.25,)
    assert found.gaps == pytest.approx((0.2,))
    assert (found.tokens_per_second, found.attacker_tokens_per_second) == (3, 1)
    assert (found.attacker_ended, found.attacker_refused) == (1, 1)


async def test_the_json_report_holds_the_verdict_and_no_key() -> None:
    text = to_json(await bench(_options(repeats=1, api_keys=("secret-v", "secret-a")), FakeServer(pace=0.002).transport))
    found = json.loads(text)["verdict"]
    assert "secret" not in text
    assert {figure["name"]: figure["met"] for figure in found["figures"]}["capacity, generated"] is None
    assert isinstance(found["met"], bool)
    assert found["rounds"][0]["alone"]["step_seconds"] == pytest.approx(0.02)
