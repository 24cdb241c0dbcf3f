"""Server-sent events, and noticing that a client is gone while it has nothing to read. No wire format of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(payload: Mapping[str, object]) -> bytes:
    """One `data:` event. One is sent for each token, which is why the encoder is a quick one."""
    return b"data: %b\n\n" % orjson.dumps(payload)


class EventStream(Response):
    """Sends events as they are generated, and stops when the client leaves, also while there is nothing to send.

    `close` is called once at the end, whatever happened; a generator that was never started would not clean up itself.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, headers: Mapping[str, str], close: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._close = close
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A task of its own sends: to wake this one leads through all the frames of the application above it, at each token."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._send, send, group.cancel_scope)
                await _disconnected(receive)
                group.cancel_scope.cancel()
        finally:
            self._close()

    async def _send(self, send: Send, scope: anyio.CancelScope) -> None:
        async with aclosing(self._events):
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for chunk in self._events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except OSError:  # how a server says that the client closed the connection
                pass
        scope.cancel()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result; it is cancelled when the client leaves first.

    Raises: ClientDisconnect then, and whatever `work` raises.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
