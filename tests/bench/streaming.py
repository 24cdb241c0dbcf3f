"""A transport for ASGI applications whose answers arrive as they are sent, so that token times and cancelled requests can be
looked at without a network. httpx's own holds an answer back until its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.applications import Starlette


class Streaming(httpx.AsyncBaseTransport):
    """An application as a transport."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The status and headers come first, then the body's chunks; closing the body cancels the application."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(_scope(request), await request.aread(), messages))
        begun = await messages.get()
        if begun is None:
            await task
            raise httpx.RemoteProtocolError("no answer")
        return httpx.Response(begun["status"], headers=begun["headers"], stream=_Body(messages, task))

    async def _run(self, scope: dict[str, Any], body: bytes, messages: asyncio.Queue[dict[str, Any] | None]) -> None:
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()  # nobody hangs up; a client that does cancels this
            return waiting.pop()

        async def send(message: Any) -> None:
            messages.put_nowait(message)

        try:
            await self._app(scope, receive, send)
        finally:
            messages.put_nowait(None)


class _Body(httpx.AsyncByteStream):
    def __init__(self, messages: asyncio.Queue[dict[str, Any] | None], task: asyncio.Task[None]) -> None:
        self._messages, self._task = messages, task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._messages.get()) is not None:
            yield message.get("body", b"")
        await self._task

    async def aclose(self) -> None:
        self._task.cancel()


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": ("127.0.0.1", 123),
        "root_path": "",
    }
