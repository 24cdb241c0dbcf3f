from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from starlette.responses import JSONResponse

from server.bench.options import BenchError, BenchOptions
from server.bench.report import BenchReport
from server.bench.results import Round
from server.bench.run import bench, render, to_json
from server.bench.scenarios import play_rounds

from .fake import FakeServer

OVERLOADED = JSONResponse({"error": "Model is overloaded", "error_type": "overloaded"}, 429)


def _options(**changes: Any) -> BenchOptions:
    small: dict[str, Any] = {
        "url": "http://server",
        "requests": 6,
        "concurrency": 3,
        "prompt_tokens": 9,
        "max_new_tokens": 4,
        "adapters": 3,
        "rank": 2,
        "repeats": 2,
        "seed": 1,
    }
    return BenchOptions(**{**small, **changes})


def _printed(report: BenchReport) -> str:
    text = StringIO()
    Console(file=text, width=240).print(render(report))
    return text.getvalue()


def _asked(server: FakeServer, new_tokens: int = 4) -> list[int | None]:
    """The adapters' numbers of all requests but the short ones of the warm-up."""
    parameters = [request["parameters"] for request in server.requests]
    names = [one.get("adapter_id") for one in parameters if one["max_new_tokens"] == new_tokens]
    return [int(name.rpartition("-")[2]) if name else None for name in names]


async def test_a_load_goes_through_every_adapter_and_leaves_none_behind() -> None:
    server = FakeServer()
    report = await bench(_options(families=("lora", "ia3")), server.transport)
    (load,) = report.loads
    assert (load.completed, load.generated_tokens, report.failed) == (6, 24, 0)
    assert sorted(_asked(server), key=str) == [0, 0, 1, 1, 2, 2]
    assert report.uploads.families == {"lora": 2, "ia3": 1}
    assert sorted(server.deleted) == sorted(server.adapters)
    assert len(server.requests) == 6 + 4  # a warm-up through the base and through each adapter


async def test_zero_adapters_is_the_base_alone() -> None:
    server = FakeServer(info={"model_id": "tiny"})  # no description of the base is needed
    report = await bench(_options(adapters=0, warmup=False), server.transport)
    assert _asked(server) == [None] * 6
    assert report.loads[0].label == "base"
    assert server.adapters == {}


async def test_a_load_reports_failures_and_goes_on() -> None:
    server = FakeServer(refuse={1: OVERLOADED})
    report = await bench(_options(warmup=False), server.transport)
    assert (report.failed, report.loads[0].errors) == (2, {"429": 2})
    assert "Model is overloaded" in _printed(report)


async def test_a_failing_warm_up_ends_the_run_and_the_adapters_are_deleted() -> None:
    server = FakeServer(refuse={1: OVERLOADED})
    with pytest.raises(BenchError, match=r"warming up bench-.*-1 failed with 429"):
        await bench(_options(), server.transport)
    assert sorted(server.deleted) == sorted(server.adapters)


async def test_an_upload_that_fails_on_the_way_is_deleted_too() -> None:
    server = FakeServer()

    class CutUploads(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == "/adapters" and len(server.adapters) == 1:
                await server.transport.handle_async_request(request)
                raise httpx.ReadError("connection reset")
            return await server.transport.handle_async_request(request)

    with pytest.raises(BenchError, match="connection reset"):
        await bench(_options(), CutUploads())
    assert len(server.adapters) == 2
    assert sorted(server.deleted) == sorted(server.adapters)


async def test_base_and_adapters_take_turns_with_the_same_prompts() -> None:
    server = FakeServer()
    report = await bench(_options(scenario="base-vs-adapters", warmup=False, concurrency=1), server.transport)
    assert _asked(server) == [0, 1, 2, 0, 1, 2] + [None] * 12 + [0, 1, 2, 0, 1, 2]
    texts = [request["inputs"] for request in server.requests]
    assert texts[:6] == texts[6:12]
    assert texts[12:18] == texts[18:24]
    assert not set(texts[:6]) & set(texts[12:18])
    assert report.comparison is not None
    assert len(report.comparison.rounds) == 2
    assert "A / B" in _printed(report)


async def test_a_comparison_in_which_requests_fail_is_none() -> None:
    server = FakeServer(refuse={1: OVERLOADED})
    with pytest.raises(BenchError, match=r"2 of 6 requests .* failed .*429.*Model is overloaded"):
        await bench(_options(scenario="base-vs-adapters", warmup=False), server.transport)
    assert len(server.deleted) == 3


async def test_many_adapters_are_uploaded_and_used_batch_by_batch() -> None:
    server = FakeServer()
    report = await bench(_options(scenario="many-adapters", adapters=7), server.transport)
    assert sorted(_asked(server), key=str) == list(range(7))
    assert report.memory is not None
    assert [sample.adapters for sample in report.memory.samples] == [0, 3, 6, 7]
    assert [sample.resident_bytes for sample in report.memory.samples] == [800, 803, 806, 807]
    assert report.memory.budget_bytes == 810
    assert report.memory.within_budget is True
    assert len(server.deleted) == 7
    assert "within" in _printed(report)


async def test_memory_is_not_judged_by_half_a_budget() -> None:
    server = FakeServer()
    server.info.pop("base_bytes")
    report = await bench(_options(), server.transport)
    assert report.memory is not None
    assert report.memory.budget["base"] is None
    assert report.memory.within_budget is None
    assert "not told" in _printed(report)


async def test_the_same_seed_sends_the_same_requests() -> None:
    first, second = FakeServer(), FakeServer()
    for server in (first, second):
        await bench(_options(popularity="zipf", concurrency=1), server.transport)
    assert [request["inputs"] for request in first.requests] == [request["inputs"] for request in second.requests]
    assert _asked(first) == _asked(second)


async def test_without_a_seed_no_two_runs_send_the_same() -> None:
    first, second = FakeServer(), FakeServer()
    reports = [await bench(_options(seed=None, warmup=False), server.transport) for server in (first, second)]
    assert reports[0].seed != reports[1].seed
    assert {request["inputs"] for request in first.requests}.isdisjoint(request["inputs"] for request in second.requests)


async def test_the_report_is_json_without_the_key() -> None:
    report = await bench(_options(api_key="secret", scenario="base-vs-adapters", base=Path("base")), FakeServer().transport)
    text = to_json(report)
    found = json.loads(text)
    assert "secret" not in text
    assert found["comparison"]["ratio"]["median"] == pytest.approx(report.comparison.ratio.median)  # type: ignore[union-attr]
    assert found["loads"][0]["tokens_per_second"] == pytest.approx(report.loads[0].tokens_per_second)
    assert found["memory"]["peak_bytes"] == 803
    assert found["options"]["base"] == "base"


async def test_a_wrong_option_is_refused_before_anything_is_sent() -> None:
    server = FakeServer()
    with pytest.raises(BenchError, match="`concurrency`"):
        await bench(_options(concurrency=0), server.transport)
    assert server.headers == []


async def test_no_server_is_said_in_one_line() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    with pytest.raises(BenchError, match="got no answer"):
        await bench(_options(), httpx.MockTransport(refuse))


@pytest.mark.parametrize(("disturbed", "played"), [("...", 3), (".x..", 4), ("xxxxxxxx", 6), ("xxx...", 6), ("xxxx..", 6)])
async def test_disturbed_rounds_are_repeated_until_patience_ends(disturbed: str, played: int) -> None:
    async def play(index: int) -> Round:
        return Round(1.0, 1.0, None, disturbed[index] == "x")

    assert len(await play_rounds(3, play)) == played
