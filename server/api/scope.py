"""What every HTTP request gets, whoever answers it: an id, a trail, and an answer whatever happens."""

from __future__ import annotations

import re
from uuid import uuid4

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..audit import Trail
from . import failures

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestScope:
    """Gives every request an id and a trail, every answer X-Request-Id, and every stray exception an answer.

    Every line logged on the way, in worker threads too, carries the id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.trail = trail = Trail(_request_id(request))
        status: int | None = None

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = trail.request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=trail.request_id):
            try:
                await self._app(scope, receive, tagged)
            except Exception as error:
                trail.ended("internal")
                if status is not None:
                    raise
                await failures.answer(request, error)(scope, receive, tagged)
            finally:
                trail.close(status)


def _request_id(request: Request) -> str:
    """The client's own, if it is one that a log line can hold."""
    given = request.headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid4().hex
