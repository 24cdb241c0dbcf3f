"""Errors as clients see them: every exception becomes one of the tree's, and the tree becomes an answer. Routes only raise.

Native routes answer {"error", "error_type"}, those under /v1 OpenAI's {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from adapters_store import errors as store_errors

from ..audit import Trail
from ..errors import (
    AdapterdError,
    ConflictError,
    NotFoundError,
    QuotaError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
    ValidationError,
)
from ..metrics import Metrics
from .sse import event

_log = structlog.get_logger("adapterd.api")

_CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_HTTP_TYPES = {404: "not_found", 405: "method_not_allowed"}


class UnknownModelError(NotFoundError):
    """OpenAI's words for a model (here: an adapter) that this tenant does not have."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model[:200]}` does not exist.")

    @property
    def code(self) -> str:
        return "model_not_found"


def payload(error: AdapterdError, *, openai: bool = False) -> dict[str, object]:
    """The body, or the event within a stream, that tells a client about `error`."""
    if not openai:
        return {"error": str(error), "error_type": error.error_type}
    kind = _OPENAI_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    param = "model" if isinstance(error, UnknownModelError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.code}}


def translate(error: Exception, request_id: str) -> AdapterdError:
    """`error` as one of the tree. What is not the client's business is logged and stays opaque."""
    if isinstance(error, AdapterdError) and type(error) is not AdapterdError:
        return error
    if isinstance(error, store_errors.StoreError):
        return _of_store(error)
    _log.error("request failed", request_id=request_id, exc_info=error)
    return AdapterdError(f"internal error; the server's log has it under request id {request_id}")


async def reported(events: AsyncGenerator[bytes, None], request: Request) -> AsyncGenerator[bytes, None]:
    """`events`, and an error that ends them as their last one: the status line has long been sent."""
    async with aclosing(events):
        try:
            async for chunk in events:
                yield chunk
        except Exception as error:
            known = translate(error, request_id_of(request))
            trail_of(request).ended(known.error_type)
            yield event(payload(known, openai=is_openai(request)))


@contextmanager
def counting_refusals(metrics: Metrics) -> Iterator[None]:
    """Count a request that fails before the engine has seen it under its error's type."""
    try:
        yield
    except (AdapterdError, store_errors.StoreError) as error:
        metrics.finished(refusal(error, metrics).error_type)
        raise


def refusal(error: Exception, metrics: Metrics) -> AdapterdError:
    """`error` as one of the tree; one that is about a quota is counted under it."""
    known = translate(error, "-")
    if isinstance(known, QuotaError):
        metrics.refused(known.limit)
    return known


def install(app: FastAPI) -> None:
    """Make every exception of a route an answer."""
    app.add_exception_handler(AdapterdError, _on_error)
    app.add_exception_handler(store_errors.StoreError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def answer(request: Request, error: Exception) -> Response:
    """The HTTP answer for any exception."""
    known = translate(error, request_id_of(request))
    trail_of(request).ended(known.error_type)
    headers = {}
    if isinstance(known, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    if retry_after := getattr(known, "retry_after", None):
        headers["retry-after"] = str(math.ceil(retry_after))
    return JSONResponse(payload(known, openai=is_openai(request)), known.status, headers)


def is_openai(request: Request) -> bool:
    return request.url.path.startswith("/v1/")


def request_id_of(request: Request) -> str:
    return trail_of(request).request_id


def trail_of(request: Request) -> Trail:
    """What is noted about this request while it runs."""
    trail: Trail = request.state.trail
    return trail


def _of_store(error: store_errors.StoreError) -> AdapterdError:
    """Raises: nothing; what the store says is safe to show, but for damage, which only the operator can mend."""
    kinds: Mapping[type[store_errors.StoreError], type[AdapterdError]] = {
        store_errors.NotFound: NotFoundError,
        store_errors.TooLarge: TooLargeError,
        store_errors.Conflict: ConflictError,
        store_errors.Unavailable: UnavailableError,
        store_errors.Corrupt: UnavailableError,
    }
    if isinstance(error, store_errors.Invalid):
        return ValidationError(f"`{error.field}` {error.rule}. Given: {store_errors.clip(error.value)}")
    if isinstance(error, store_errors.OverQuota):
        return QuotaError(str(error), error.quota)
    if isinstance(error, store_errors.Corrupt | store_errors.Unavailable):
        _log.error("adapter store failed", exc_info=error)
    return kinds.get(type(error), UnavailableError)(str(error))


async def _on_error(request: Request, error: Exception) -> Response:
    return answer(request, error)


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    """A path or query parameter that FastAPI refused."""
    details = error.errors() if isinstance(error, RequestValidationError) else []
    first = details[0] if details else {"loc": ("?",), "msg": "is not valid"}
    return answer(request, ValidationError(f"`{first['loc'][-1]}`: {first['msg']}"))


async def _on_http(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = str(error.detail) if isinstance(error, HTTPException) else "error"
    kind = _HTTP_TYPES.get(status, "validation")
    headers = error.headers if isinstance(error, HTTPException) else None
    if is_openai(request):
        body: dict[str, object] = {"error": {"message": detail, "type": "invalid_request_error", "param": None, "code": kind}}
    else:
        body = {"error": detail, "error_type": kind}
    return JSONResponse(body, status, headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    trail_of(request).ended("cancelled")
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
