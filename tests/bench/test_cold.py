from __future__ import annotations

from typing import Any

import pytest

from server.bench.cold import Round, _verdict
from server.bench.options import BenchError, BenchOptions
from server.bench.run import bench
from server.bench.session import Session

from .fake import FakeServer
from .test_scenarios import _printed


def _options(**changes: Any) -> BenchOptions:
    small: dict[str, Any] = {
        "url": "http://server",
        "scenario": "cold-start",
        "concurrency": 1,
        "prompt_tokens": 9,
        "max_new_tokens": 4,
        "adapters": 2,
        "rank": 2,
        "repeats": 1,
        "seed": 1,
    }
    return BenchOptions(**{**small, **changes})


async def test_every_round_asks_the_resident_and_then_the_cold_one() -> None:
    server = FakeServer()
    report = await bench(_options(warmup=False), server.transport)
    names = list(server.adapters)
    asked = [request["parameters"]["adapter_id"] for request in server.requests]
    turns = [names[index % 2] for index in range(7)]  # seven rounds at the least
    assert asked == [name for name in turns for _ in range(2)]
    assert server.loads == turns
    assert len({request["inputs"] for request in server.requests}) == len(server.requests)  # no cached prompt helps
    assert "added by the cold start" in _printed(report)


async def test_an_adapter_that_stays_is_no_cold_start() -> None:
    server = FakeServer()

    class Sticky(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            return "resident"

    server.states = Sticky()
    with pytest.raises(BenchError, match=r"bench-\w+-0 is resident after its unload"):
        await bench(_options(), server.transport)
    assert sorted(server.deleted) == sorted(server.adapters)


@pytest.mark.parametrize(("cold", "met"), [(0.55, True), (0.65, False)])
def test_half_a_second_may_be_added(cold: float, met: bool) -> None:
    session = Session(None, _options(), {}, 1)  # type: ignore[arg-type]
    found = _verdict(session, (Round(0.1, cold, None), Round(0.1, 0.1, None), Round(0.1, 9.0, None)))
    assert found.figures[-1].value == pytest.approx(cold - 0.1)
    assert found.met is met
