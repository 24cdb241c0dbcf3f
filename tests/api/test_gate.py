"""The gate: what a server says before there is an application, and how the application is put behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from anyio import to_thread
from fastapi import FastAPI

from server.api.gate import RETRY_AFTER, Gate
from server.api.readiness import Readiness
from server.errors import UnavailableError


class Living:
    """A gate whose lifespan runs, as uvicorn runs it."""

    def __init__(self, readiness: Readiness) -> None:
        self.gate = Gate(readiness)
        self.sent: list[str] = []
        self._events: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self._task = asyncio.create_task(self.gate({"type": "lifespan"}, self._events.get, self._send))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.gate), base_url="http://test")

    async def start(self) -> None:
        self._events.put_nowait({"type": "lifespan.startup"})
        await asyncio.wait_for(to_thread.run_sync(self.gate.started.wait), 10)

    async def stop(self) -> None:
        self._events.put_nowait({"type": "lifespan.shutdown"})
        await asyncio.wait_for(self._task, 10)

    async def _send(self, message: Any) -> None:
        self.sent.append(message["type"])


@pytest.fixture
async def living() -> AsyncIterator[Living]:
    living = Living(Readiness("loading"))
    await living.start()
    yield living
    await living.http.aclose()


def application(readiness: Readiness, log: list[str], failure: Exception | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log.append("begun")
        if failure is not None:
            raise failure
        readiness.ready()
        yield
        log.append("ended")

    run: Callable[[FastAPI], AbstractAsyncContextManager[None]] = lifespan
    app = FastAPI(lifespan=run)

    @app.get("/hello")
    async def hello() -> str:
        return "hello"

    return app


async def test_before_there_is_an_application_health_is_answered_and_work_refused() -> None:
    readiness = Readiness("loading")
    readiness.loading(41.97)
    living = Living(readiness)
    await living.start()
    assert (await living.http.get("/livez")).json() == {"status": "ok"}
    ready = await living.http.get("/readyz")
    assert (ready.status_code, ready.json()) == (503, {"phase": "loading", "percent": 42.0})
    assert (await living.http.get("/health")).status_code == 503
    refused = await living.http.post("/generate", json={"inputs": "hello"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, f"{RETRY_AFTER:.0f}")
    assert refused.json() == {"error": "the server is loading (42%)", "error_type": "unavailable"}
    assert refused.headers["x-request-id"]
    openai = await living.http.post("/v1/chat/completions", json={})
    assert openai.json()["error"]["code"] == "unavailable"
    await living.stop()
    assert living.sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_opening_begins_the_applications_lifespan_and_closing_ends_it(living: Living) -> None:
    log: list[str] = []
    app = application(Readiness("loading"), log)
    await to_thread.run_sync(living.gate.open, app)
    assert log == ["begun"]
    assert (await living.http.get("/hello")).json() == "hello"
    await living.stop()
    assert log == ["begun", "ended"]
    assert living.sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_an_application_that_cannot_begin_is_not_let_in(living: Living) -> None:
    app = application(Readiness("loading"), [], UnavailableError("no engine"))
    with pytest.raises(UnavailableError, match="no engine"):
        await to_thread.run_sync(living.gate.open, app)
    assert (await living.http.get("/hello")).status_code == 503
    await living.stop()


def test_a_gate_that_does_not_run_cannot_be_opened() -> None:
    with pytest.raises(UnavailableError, match="not listening"):
        Gate(Readiness("loading")).open(FastAPI())
