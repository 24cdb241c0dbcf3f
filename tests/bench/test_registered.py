from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from starlette.responses import JSONResponse

from server.bench.options import BenchOptions
from server.bench.registered import Round, _figures
from server.bench.report import BenchReport
from server.bench.run import bench

from .fake import FakeServer
from .test_scenarios import _printed


def _options(**changes: Any) -> BenchOptions:
    small: dict[str, Any] = {
        "url": "http://server",
        "scenario": "many-registered",
        "registered": 12,
        "adapters": 2,
        "families": ("lora", "ia3", "bitfit"),
        "concurrency": 2,
        "requests": 8,
        "prompt_tokens": 9,
        "max_new_tokens": 4,
        "rank": 2,
        "repeats": 1,
        "seed": 1,
    }
    return BenchOptions(**{**small, **changes})


def _value(report: BenchReport, name: str) -> float:
    assert report.verdict is not None
    return {figure.name: figure.value for figure in report.verdict.figures}[name]


async def test_many_against_few_and_streams_beside_loads() -> None:
    server = FakeServer(pace=0.001)
    report = await bench(_options(), server.transport)
    names = list(server.adapters)
    assert len(names) == 12
    assert [load.label for load in report.loads] == [
        "12 adapters, round 1",
        "2 adapters, round 1",
        "streams, round 1",
        "streams beside loads, round 1",
    ]
    few = Counter(_number(request) for request in server.requests[3 + 8 : 3 + 16])  # behind the warm-up and A
    assert set(few) <= {0, 1}
    assert server.loads
    assert {int(name.rpartition("-")[2]) for name in server.loads} <= set(range(2, 12))  # those that are not the few
    assert sorted(server.deleted) == sorted(names)
    assert report.uploads.families == {"lora": 4, "ia3": 4, "bitfit": 4}
    assert "all / few" in _printed(report)


def _number(request: dict[str, Any]) -> int:
    return int(request["parameters"]["adapter_id"].rpartition("-")[2])


async def test_answers_are_asked_for_again_alone_and_compared() -> None:
    server = FakeServer(pace=0.001)
    report = await bench(_options(), server.transport)
    sent = {(request["inputs"], request["parameters"].get("adapter_id")) for request in server.requests}
    again = [(request["inputs"], request["parameters"].get("adapter_id")) for request in server.asked_again]
    through = [request for request in again if request[1] is not None]
    assert set(through) <= sent
    assert len({name for _, name in through}) == len(through)  # of as many adapters as may be
    assert all(request["parameters"]["decoder_input_details"] for request in server.asked_again)  # no cached prompt helps
    assert _value(report, "answers asked for again alone: same tokens") == 1.0
    assert _value(report, "of these, unlike the base's answer") == 1.0


async def test_an_answer_that_differs_alone_misses_the_goal() -> None:
    report = await bench(_options(), FakeServer(pace=0.001, again=9).transport)
    assert _value(report, "answers asked for again alone: same tokens") == 0.0
    assert report.verdict is not None
    assert not report.verdict.met


async def test_kept_adapters_are_found_by_the_next_run_of_the_same_shape() -> None:
    server = FakeServer(pace=0.001)
    first = await bench(_options(keep=True, seed=1), server.transport)
    assert (first.uploads.count, server.deleted) == (12, [])
    second = await bench(_options(keep=True, seed=2), server.transport)
    assert second.uploads.count == 0
    other = await bench(_options(rank=3, registered=3), server.transport)
    assert other.uploads.count == 3
    assert len(server.deleted) == 3


async def test_what_an_unfinished_upload_has_left_is_completed() -> None:
    server = FakeServer(pace=0.001)
    await bench(_options(keep=True, registered=5), server.transport)
    report = await bench(_options(keep=True, registered=7), server.transport)
    assert report.uploads.count == 2
    assert len(server.adapters) == 7


async def test_5xx_are_counted_and_fail_the_run() -> None:
    server = FakeServer(pace=0.001, refuse={number: JSONResponse({"error": "broke"}, 500) for number in range(2, 12)})
    report = await bench(_options(requests=60), server.transport)
    assert _value(report, "answers of 5xx") == report.failed > 0
    assert report.verdict is not None
    assert not report.verdict.met


@pytest.mark.parametrize(
    ("round", "met"),
    [
        (Round(80.0, 100.0, 0.10, 0.13, 5, None), True),
        (Round(79.0, 100.0, 0.10, 0.10, 5, None), False),
        (Round(90.0, 100.0, 0.10, 0.14, 5, None), False),
    ],
)
def test_the_goals_are_0_8_of_the_throughput_and_1_3_times_the_gaps(round: Round, met: bool) -> None:
    assert all(figure.met is not False for figure in _figures((round,))) is met
