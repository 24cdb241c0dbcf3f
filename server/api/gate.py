"""Gate: the one ASGI app of a server's whole life. While the base is loading it answers for itself; then `open` puts the
application behind it.

Owns what is said before there is an application: alive, not ready, how far. Knows no engine, store or model.
"""

from __future__ import annotations

import asyncio
import threading

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import UnavailableError
from .failures import answer
from .readiness import Readiness
from .scope import RequestScope

RETRY_AFTER = 5.0  # seconds


class Gate:
    """Invariant: every request is answered, by the application once its lifespan has begun, by `Waiting` before."""

    def __init__(self, readiness: Readiness) -> None:
        self.started = threading.Event()  # the event loop runs; `open` may be called
        self._app: ASGIApp = RequestScope(Waiting(readiness))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._behind: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    def open(self, app: FastAPI) -> None:
        """From another thread: begin the application's lifespan, then let every request through to it.

        Raises: whatever its lifespan raises.
        """
        if self._loop is None:
            raise UnavailableError("the server is not listening")
        asyncio.run_coroutine_threadsafe(self._open(app), self._loop).result()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        self.started.set()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._closing.set()
        if self._behind is not None:
            await self._behind
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self, app: FastAPI) -> None:
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._behind = asyncio.create_task(self._run(app, begun))
        await begun

    async def _run(self, app: FastAPI, begun: asyncio.Future[None]) -> None:
        """One task enters and leaves the lifespan. What it raises on the way in is for whoever opens the gate."""
        try:
            async with app.router.lifespan_context(app):
                self._app = app
                begun.set_result(None)
                if self._closing is not None:
                    await self._closing.wait()
        except Exception as error:
            if begun.done():
                raise
            begun.set_exception(error)


class Waiting:
    """Says that the process lives and how far it is; refuses everything else for a while."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await self._answer(request)(scope, receive, send)

    def _answer(self, request: Request) -> Response:
        match request.url.path:
            case "/livez":
                return JSONResponse({"status": "ok"})
            case "/readyz":
                return self._readiness.report()
            case "/health":
                return self._readiness.health()
        percent = f"{self._readiness.percent:.0f}%"
        return answer(request, UnavailableError(f"the server is {self._readiness.phase} ({percent})", RETRY_AFTER))
