"""Clients that leave: each is cancelled, and a thousand at random moments of every kind of request leave nothing behind.

ASGI without a socket, so that the moment is the test's to choose. Over sockets: `tests/e2e/test_lifecycle.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from server.assembly import Server, assemble, check_files
from server.methods.read import describe
from server.settings import Settings
from tests.e2e.uploads import Files, lora

from .conftest import World

CLIENTS, AT_ONCE = 1000, 24
ROUTES = ("/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions", "/embed", "/classify")
ADAPTERS = (None, "one", "two", "three")  # more than there are slots


class Connection:
    """An ASGI connection whose client can hang up."""

    def __init__(self, path: str, body: Any) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def send(self, message: Any) -> None:
        await self.sent.put(message)

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
async def test_client_that_leaves_while_waiting_is_cancelled(world: World, path: str) -> None:
    world.engine.silent = True
    connection = Connection(path, {"inputs": "a", "prompt": "a", "model": "tiny"})
    serving = asyncio.create_task(world.app(connection.scope, connection.incoming.get, connection.send))
    await asyncio.to_thread(world.engine.wait_until, lambda: len(world.engine.submitted) == 1)
    connection.hang_up()
    await asyncio.wait_for(serving, 10)
    assert world.engine.cancelled == [world.last.id]
    assert 'adapterd_requests_total{outcome="cancelled"} 1.0' in (await world.http.get("/metrics")).text


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
async def test_client_that_leaves_a_stream_is_cancelled(world: World, path: str) -> None:
    world.says("a" * 90)
    world.engine.pause_after = 2
    connection = Connection(path, {"inputs": "a", "prompt": "a", "model": "tiny", "max_tokens": 50, "stream": True})
    serving = asyncio.create_task(world.app(connection.scope, connection.incoming.get, connection.send))
    assert (await connection.sent.get())["type"] == "http.response.start"
    await asyncio.to_thread(world.engine.wait_until, lambda: world.engine.held)
    connection.hang_up()
    await asyncio.wait_for(serving, 10)
    assert world.engine.cancelled == [world.last.id]
    assert world.engine.stats().running == 0


# -- a thousand of them, against the real engine -----------------------------------------------------------------------


def body_of(path: str, chance: random.Random) -> dict[str, Any]:
    text = " ".join(chance.choices(("hello", "world", "cat", "mat", "today"), k=chance.randint(1, 40)))
    adapter, new = chance.choice(ADAPTERS), chance.randint(1, 40)
    if path.startswith("/v1"):
        said = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
        stream = chance.random() < 0.7
        return {"model": adapter or "tiny", "max_tokens": new, "stream": stream, "n": chance.choice((1, 1, 3)), **said}
    if path in ("/embed", "/classify"):
        return {"inputs": [text] * chance.randint(1, 4), "adapter_id": adapter}
    return {"inputs": text, "parameters": {"adapter_id": adapter, "max_new_tokens": new, "ignore_eos_token": True}}


class Client:
    """One request. It leaves once so many parts of the answer have come, or so many turns of the loop have passed."""

    def __init__(self, server: Server, chance: random.Random) -> None:
        self._server = server
        self._path = chance.choice(ROUTES)
        self._body = json.dumps(body_of(self._path, chance)).encode()
        self._parts = chance.choice((0, 1, 2, 5, 10**6))
        self._turns = chance.randint(0, 400)
        self._gone = asyncio.Event()
        self._asked = False

    async def visit(self) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": self._path,
            "raw_path": self._path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "server": ("test", 80),
            "client": ("127.0.0.1", 1), "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
        }  # fmt: skip
        leaving = asyncio.create_task(self._leave())
        try:
            await self._server.app(scope, self._receive, self._send)
        finally:
            leaving.cancel()

    async def _leave(self) -> None:
        for _ in range(self._turns):
            await asyncio.sleep(0)
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        """As uvicorn does, it takes what is sent to a client that is gone."""
        if message["type"] == "http.response.body":
            self._parts -= 1
        if self._parts <= 0:
            self._gone.set()


def add(server: Server, name: str, files: Files) -> None:
    with server.store.stage() as staged:
        for file, data in files.items():
            staged.write(file, [data])
        details = describe(check_files(staged.paths, server.base, server.settings, server.adapter_budget))
        server.store.publish(staged, tenant="default", name=name, method="lora", parts=("lora",), details=details)


@pytest.fixture
async def server(tiny_base: Path, tmp_path: Path) -> AsyncIterator[Server]:
    small: dict[str, Any] = {"kv_cache_gb": 0.0005, "block_size": 4, "adapter_slots": 2, "max_running": 8, "max_waiting": 1000}
    settings = Settings(model=str(tiny_base), store=tmp_path / "store", native=False, threads=1, max_batch_tokens=32, **small)
    built = assemble(settings)
    for seed, name in enumerate(ADAPTERS[1:]):
        add(built, str(name), lora(seed))
    async with built.app.router.lifespan_context(built.app):
        yield built


@pytest.mark.slow
async def test_a_thousand_clients_that_leave_at_random_leave_nothing_behind(server: Server) -> None:
    chance, free, engine = random.Random(11), asyncio.Semaphore(AT_ONCE), server.engine
    ends = {"left": 0, "stayed": 0}

    async def one(client: Client) -> None:
        async with free:
            await client.visit()
            ends["left" if client._gone.is_set() else "stayed"] += 1

    with capture_logs():
        await asyncio.gather(*(one(Client(server, chance)) for _ in range(CLIENTS)))
    assert ends["left"] > CLIENTS / 2
    while engine.pending:  # the engine's next step tells
        await asyncio.to_thread(engine.unload, Digest("0" * 64))
    engine._scheduler.check_idle()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    for digest in stats.resident:
        assert await asyncio.to_thread(engine.unload, digest)
    assert engine.stats().slots_used == 0
