from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.responses import JSONResponse, Response

from server.bench.options import BenchError
from server.bench.results import OK
from server.bench.target import Target, connect
from server.bench.workload import Order, Prompt

from .fake import FakeServer

URL = "http://server"


@asynccontextmanager
async def _target(transport: httpx.AsyncBaseTransport, api_key: str | None = None) -> AsyncIterator[Target]:
    async with connect(URL, api_key=api_key, request_seconds=5, transport=transport) as target:
        yield target


def _order(adapter: str | None = "bench-0") -> Order:
    return Order(Prompt("hello", (1, 2)), adapter, 4)


async def test_a_stream_becomes_token_times_and_ids() -> None:
    server = FakeServer()
    async with _target(server.transport) as target:
        outcome = await target.generate(_order())
    assert (outcome.status, outcome.token_ids, outcome.prompt_tokens) == (OK, (7, 7, 7, 7), 5)
    assert list(outcome.token_times) == sorted(outcome.token_times)
    assert outcome.started <= outcome.token_times[0] <= outcome.token_times[-1] <= outcome.ended
    assert server.requests[0] == {
        "inputs": "hello",
        "parameters": {
            "max_new_tokens": 4,
            "ignore_eos_token": True,
            "do_sample": False,
            "details": True,
            "adapter_id": "bench-0",
        },
    }


async def test_the_base_is_asked_for_without_an_adapter() -> None:
    server = FakeServer()
    async with _target(server.transport) as target:
        await target.generate(_order(None))
    assert "adapter_id" not in server.requests[0]["parameters"]


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (JSONResponse({"error": "Model is overloaded", "error_type": "overloaded"}, 429), "429", "overloaded"),
        ('data: {"error": "it broke", "error_type": "generation"}\n\n', "generation", "it broke"),
        ('data: {"token": {"id": 7}}\n\n', "incomplete", "ended without"),
        ("data: not json\n\n", "malformed", "not understood"),
        ("data: [1]\n\n", "malformed", "not understood"),
    ],
)
async def test_failures_are_outcomes(answer: Response | str, status: str, message: str) -> None:
    async with _target(FakeServer(refuse={0: answer}).transport) as target:
        outcome = await target.generate(_order())
    assert outcome.status == status
    assert message in outcome.message


class _Cut(httpx.AsyncByteStream):
    """A stream whose chunks end anywhere, one of them inside a character."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        token = 'data:{"token":{"id":7,"text":"ü"}}\n\n'.encode()
        last = b'data:{"token":{"id":8},"details":{"prompt_tokens":5}}\r\n\r\n'
        at = token.index(b"\xbc")
        for chunk in (token[:9], token[9:at], token[at:] + last[:20], last[20:]):
            yield chunk


async def test_events_may_come_in_pieces() -> None:
    async with _target(httpx.MockTransport(lambda _: httpx.Response(200, stream=_Cut()))) as target:
        outcome = await target.generate(_order())
    assert (outcome.status, outcome.token_ids, outcome.prompt_tokens) == (OK, (7, 8), 5)
    assert list(outcome.token_times) == sorted(outcome.token_times)


async def test_a_lost_connection_is_an_outcome() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    async with _target(httpx.MockTransport(refuse)) as target:
        assert (await target.generate(_order())).status == "ConnectError"
        with pytest.raises(BenchError, match=r"http://server/info got no answer"):
            await target.info()


async def test_the_key_is_sent_as_a_bearer_token() -> None:
    server = FakeServer()
    async with _target(server.transport, api_key="secret") as target:
        await target.info()
    assert server.headers[0]["authorization"] == "Bearer secret"


async def test_an_upload_sends_the_files_and_a_refusal_says_why() -> None:
    server = FakeServer()
    async with _target(server.transport) as target:
        await target.upload("bench-0", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    assert server.adapters == {"bench-0": ["adapter_config.json", "adapter_model.safetensors"]}
    transport = httpx.MockTransport(lambda _: httpx.Response(422, json={"error": "r: must be >= 1"}))
    async with _target(transport) as target:
        with pytest.raises(BenchError, match=r"422.*must be >= 1"):
            await target.upload("bench-0", {"adapter_config.json": b"{}"})


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_server_that_keeps_its_metrics_to_itself_is_measured_without(status: int) -> None:
    async with _target(httpx.MockTransport(lambda _: httpx.Response(status, json={"error": "no"}))) as target:
        assert (await target.scrape()).samples == {}


async def test_metrics_that_are_broken_are_an_error() -> None:
    async with _target(httpx.MockTransport(lambda _: httpx.Response(500))) as target:
        with pytest.raises(BenchError, match="GET /metrics with 500"):
            await target.scrape()


async def test_a_listing_is_read_page_by_page() -> None:
    server = FakeServer(adapters={f"a-{number}": [] for number in range(7)})
    async with _target(server.transport) as target:
        assert await target.adapter_names() == set(server.adapters)


async def test_another_key_goes_with_every_kind_of_request() -> None:
    seen: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization", "none"))
        return httpx.Response(403, stream=httpx.ByteStream(b"{}"))

    async with _target(httpx.MockTransport(note), api_key="mine") as target:
        other = target.under("other")
        await other.generate(_order())
        await other.scrape()
        await target.generate(_order())
        await target.under(None).scrape()
    assert seen == ["Bearer other", "Bearer other", "Bearer mine", "none"]


async def test_deleting_what_is_not_there_is_fine() -> None:
    async with _target(httpx.MockTransport(lambda _: httpx.Response(404))) as target:
        await target.delete("bench-0")


async def test_an_info_that_is_no_object_is_refused() -> None:
    async with _target(httpx.MockTransport(lambda _: httpx.Response(200, json=[]))) as target:
        with pytest.raises(BenchError, match="`url`"):
            await target.info()
