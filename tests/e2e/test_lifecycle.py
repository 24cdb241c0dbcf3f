"""What happens to running requests when adapters come, change and go, clients leave, limits are reached and servers restart."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Serve
from tests.e2e.uploads import lora
from tests.process import ServerProcess, streaming, until

LONG = 800  # tokens: a second or more of a stream on the tiny base


def tokens_of(events: Iterator[str]) -> list[int]:
    return [json.loads(event)["token"]["id"] for event in events]


def tokens(server: ServerProcess, adapter: str | None, count: int) -> list[int]:
    response = server.generate(adapter=adapter, max_new_tokens=count, ignore_eos_token=True, details=True)
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["details"]["tokens"]]


# -- adapters under running requests


def test_a_new_version_while_the_old_one_is_running(tiny_server: ServerProcess) -> None:
    """The stream ends on the version it began with, the next request is on the new one."""
    assert tiny_server.upload("news", lora(10)).json()["version"] == 1
    old = tokens(tiny_server, "news", LONG)
    with streaming(tiny_server, adapter_id="news", max_new_tokens=LONG) as events:
        first = tokens_of(iter([next(events)]))
        assert tiny_server.upload("news", lora(11)).json()["version"] == 2
        new = tokens(tiny_server, "news", 20)
        assert tiny_server.engine()["running"] == 1, "the stream was over too soon for this test to say anything"
        assert first + tokens_of(events) == old
    assert new != old[:20]
    assert tokens(tiny_server, "news", 20) == new
    assert tiny_server.http.delete("/adapters/news").status_code == 204


def test_an_adapter_deleted_while_it_is_running(tiny_server: ServerProcess) -> None:
    """The stream ends as if nothing had happened; the name is gone at once."""
    tiny_server.upload("doomed", lora(12))
    alone = tokens(tiny_server, "doomed", LONG)
    with streaming(tiny_server, adapter_id="doomed", max_new_tokens=LONG) as events:
        first = tokens_of(iter([next(events)]))
        assert tiny_server.http.delete("/adapters/doomed").status_code == 204
        assert tiny_server.generate(adapter="doomed").status_code == 404
        assert tiny_server.engine()["running"] == 1, "the stream was over too soon for this test to say anything"
        assert first + tokens_of(events) == alone
    assert tiny_server.generate(adapter="doomed").status_code == 404


def test_one_version_deleted_while_it_is_running(tiny_server: ServerProcess) -> None:
    tiny_server.upload("halves", lora(13))
    tiny_server.upload("halves", lora(14))
    newest = tokens(tiny_server, "halves", LONG)
    with streaming(tiny_server, adapter_id="halves", max_new_tokens=LONG) as events:
        first = tokens_of(iter([next(events)]))
        assert tiny_server.http.delete("/adapters/halves", params={"version": 2}).status_code == 204
        older = tokens(tiny_server, "halves", 20)
        assert first + tokens_of(events) == newest
    assert older != newest[:20]
    assert tiny_server.http.delete("/adapters/halves").status_code == 204


def test_loading_and_unloading_under_a_running_request(tiny_server: ServerProcess) -> None:
    """Unloading leaves a running request alone; both may be repeated."""
    tiny_server.upload("warm", lora(15))
    for _ in range(2):
        assert tiny_server.http.post("/adapters/warm/load").json()["state"] == "resident"
    with streaming(tiny_server, adapter_id="warm", max_new_tokens=LONG) as events:
        next(events)
        assert tiny_server.http.post("/adapters/warm/unload").json()["state"] == "resident"
    until(tiny_server.idle)
    for _ in range(2):
        assert tiny_server.http.post("/adapters/warm/unload").json()["state"] == "stored"
    assert tiny_server.http.delete("/adapters/warm").status_code == 204


# -- clients that leave


@pytest.fixture
def free(tiny_server: ServerProcess) -> dict[str, int]:
    """The engine's state with one adapter resident and nothing running."""
    tiny_server.upload("leaver", lora(16))
    assert tiny_server.generate(adapter="leaver").status_code == 200
    until(tiny_server.idle)
    return dict(tiny_server.engine())


def test_clients_gone_mid_stream(tiny_server: ServerProcess, free: dict[str, int]) -> None:
    """Pages and slots are as before, and it counts as cancelled."""
    for adapter in (None, "leaver", "leaver", None):
        with streaming(tiny_server, adapter_id=adapter, max_new_tokens=LONG) as events:
            next(events)
            assert tiny_server.engine()["running"] == 1
        until(lambda: tiny_server.engine() == free)
    assert 'adapterd_requests_total{outcome="cancelled"}' in tiny_server.http.get("/metrics").text


def test_a_client_gone_while_it_waits_for_a_whole_answer(tiny_server: ServerProcess, free: dict[str, int]) -> None:
    body = json.dumps({"inputs": "hello", "parameters": {"max_new_tokens": LONG, "ignore_eos_token": True}}).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: tiny_server.engine()["running"] == 1)
    until(lambda: tiny_server.engine() == free)


def test_clients_gone_before_their_request_was_complete(tiny_server: ServerProcess, free: dict[str, int]) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
            connection.sendall(head)
    assert tiny_server.engine() == free


# -- limits


@pytest.fixture(scope="module")
def small(serve: Serve, tiny_base: Path) -> ServerProcess:
    """Room for one running and one waiting request."""
    return serve("--model", str(tiny_base), "--max-running", "1", "--max-waiting", "1")


def test_more_streams_than_limits(small: ServerProcess) -> None:
    """The third is told to come back later, on every route; the first two end as they should."""
    alone = tokens(small, None, LONG)
    until(small.idle)
    with streaming(small, max_new_tokens=LONG) as running:
        first = tokens_of(iter([next(running)]))
        with httpx.Client(base_url=small.url, timeout=300) as http:
            waiting = http.build_request("POST", "/generate_stream", json={"inputs": "hello", "parameters": PARAMETERS})
            with Later(http, waiting) as later:
                until(lambda: small.engine()["waiting"] == 1)
                for route in ("/generate", "/generate_stream"):
                    refused = small.http.post(route, json={"inputs": "hello"})
                    assert refused.status_code == 429
                    allowed = "2 requests are accepted, the most that max_running 1 and max_waiting 1 allow"
                    assert refused.json() == {"error": f"Model is overloaded: {allowed}", "error_type": "overloaded"}
                    assert int(refused.headers["retry-after"]) >= 1
                assert small.http.get("/health").status_code == 200
                assert first + tokens_of(running) == alone
                assert later.tokens() == alone[:20]
    assert small.generate().status_code == 200


PARAMETERS = {"max_new_tokens": 20, "ignore_eos_token": True, "details": True}


class Later:
    """A request sent from a thread: its answer begins only when its turn has come."""

    def __init__(self, http: httpx.Client, request: httpx.Request) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._threads = ThreadPoolExecutor(1)
        self._answer = self._threads.submit(http.send, request)

    def tokens(self) -> list[int]:
        lines = (line.removeprefix("data: ") for line in self._answer.result().text.splitlines() if line)
        return tokens_of(lines)

    def __enter__(self) -> Later:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown()


# -- restarts


def test_a_restart_on_the_same_store_keeps_adapters_versions_and_users(serve: Serve, tiny_base: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny_base), "--store", str(tmp_path / "store"))

    def listed(server: ServerProcess) -> Any:
        adapters = server.http.get("/adapters").json()["adapters"]
        return [{**adapter, "state": None} for adapter in adapters], server.http.get("/users").json()

    def said(server: ServerProcess) -> Any:
        ann = server.http.post("/generate", json={"inputs": "hello", "user_id": "ann", "parameters": PARAMETERS})
        return ann.json(), tokens(server, "kept", 20), tokens(server, "other", 20)

    with serve(*flags) as server:
        for seed in (20, 21):
            assert server.upload("kept", lora(seed)).status_code == 201
        assert server.upload("other", lora(22)).status_code == 201
        assert server.upload("deleted", lora(23)).status_code == 201
        assert server.http.delete("/adapters/deleted").status_code == 204
        assert server.http.put("/users/ann", json={"adapter_id": "other"}).status_code == 200
        before = listed(server), said(server)
        assert server.stop() == 0
    with serve(*flags) as server:
        assert (listed(server), said(server)) == before
        versions = server.http.get("/adapters/kept/versions").json()["adapters"]
        assert [version["version"] for version in versions] == [2, 1]
        assert server.upload("kept", lora(24)).json()["version"] == 3
        assert server.generate(adapter="deleted").status_code == 404
