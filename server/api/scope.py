"""What every HTTP request gets, whoever answers it: an id, a start time, and an answer whatever happens."""

from __future__ import annotations

import re
import time
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import failures

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestScope:
    """Gives every request an id and a start time, every answer X-Request-Id, and every stray exception an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.started = time.monotonic()
        request.state.request_id = request_id = _request_id(request)
        begun = False

        async def tagged(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception as error:
            if begun:
                raise
            await failures.answer(request, error)(scope, receive, tagged)


def _request_id(request: Request) -> str:
    """The client's own, if it is one that a log line can hold."""
    given = request.headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid4().hex
