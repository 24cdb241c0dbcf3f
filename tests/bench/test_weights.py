from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import JSONResponse

from server.bench.options import BenchError, BenchOptions
from server.bench.results import OK, Outcome
from server.bench.run import bench
from server.bench.traffic import Window
from server.bench.weights import verdict

from .fake import FakeServer
from .test_scenarios import _printed


def _options(**changes: Any) -> BenchOptions:
    small: dict[str, Any] = {
        "url": "http://server",
        "scenario": "weights",
        "api_keys": ("one", "two", "four"),
        "concurrency": 3,
        "prompt_tokens": 9,
        "max_new_tokens": 4,
        "adapters": 5,
        "rank": 2,
        "seconds": 0.1,
        "seed": 1,
    }
    return BenchOptions(**{**small, **changes})


def _server(**changes: Any) -> FakeServer:
    return FakeServer(keys={"one": "a", "two": "b", "four": "c"}, pace=0.001, **changes)


async def test_three_tenants_with_an_adapter_each_are_all_busy() -> None:
    server = _server()
    report = await bench(_options(), server.transport)
    assert set(server.owners) == {"a", "b", "c"}
    assert len(server.adapters) == 3
    assert sorted(server.deleted) == sorted(server.adapters)
    assert [load.label for load in report.loads] == [f"tenant of weight {weight}" for weight in (1, 2, 4)]
    assert report.verdict is not None
    assert not report.verdict.met  # the fake server knows no weights
    assert "weight 4: off by" in _printed(report)


async def test_tenants_that_could_all_run_at_once_are_not_backlogged() -> None:
    server = _server()
    server.info["max_running"] = 3
    with pytest.raises(BenchError, match=r"`concurrency` must be over 3.*Given: 3"):
        await bench(_options(), server.transport)
    await bench(_options(concurrency=4), server.transport)


async def test_a_tenant_that_is_refused_ends_the_run() -> None:
    server = _server(refuse={0: JSONResponse({"error": "quota"}, 429)})
    with pytest.raises(BenchError, match="the tenant of weight 1: a request failed with 429"):
        await bench(_options(warmup=False), server.transport)
    assert sorted(server.deleted) == sorted(server.adapters)


def _served(requests: int) -> list[Outcome]:
    """Requests of 10 prompt tokens and 5 new ones, one every millisecond: 20 units each."""
    times = [tuple(0.001 * number + 0.0001 * token for token in range(5)) for number in range(requests)]
    return [Outcome(None, OK, 0.0, each[-1], each, (7,) * 5, prompt_tokens=10) for each in times]


@pytest.mark.parametrize(
    ("requests", "off", "met"),
    [((10, 20, 40), (0, 0, 0), True), ((10, 20, 38), (0.03, 0.03, -0.02), True), ((20, 20, 20), (1.33, 0.17, -0.42), False)],
)
def test_service_is_compared_with_the_weights(requests: tuple[int, ...], off: tuple[float, ...], met: bool) -> None:
    found = verdict([_served(count) for count in requests], Window(0.0, 1.0))
    figures = {figure.name: figure.value for figure in found.figures}
    assert [figures[f"weight {weight}: off by"] for weight in (1, 2, 4)] == pytest.approx(off, abs=0.01)
    assert [figures[f"weight {weight}: served"] for weight in (1, 2, 4)] == [20 * count for count in requests]
    assert found.met is met


def test_nothing_served_is_not_fair() -> None:
    assert not verdict([[], [], []], Window(0.0, 1.0)).met
