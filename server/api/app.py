"""The application: routes, request ids, the one error handler and the OpenAPI document put together. Holds no logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import Depends, FastAPI

from adapters_store.records import JSON
from adapters_store.store import Store

from .. import __version__
from ..engine.client import EngineClient, EngineLike
from ..engine.mailbox import Mailbox
from ..metrics import Metrics
from ..model.text import Text
from ..settings import Settings
from . import adapters, admin, classify, docs, embed, failures, generate, openai, openai_models, ops, users
from .auth import authorize
from .context import Inspect, Limits, Services, Validate, anything
from .document import document_of
from .keyring import Keyring
from .readiness import Readiness
from .schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbedRequest,
    GenerateRequest,
    KeyRequest,
    PolicyRequest,
    TokenizeRequest,
    UserRequest,
)
from .scope import RequestScope

_BODIES = (
    *(GenerateRequest, ClassifyRequest, EmbedRequest, TokenizeRequest, CompletionRequest, ChatRequest),
    *(UserRequest, PolicyRequest, KeyRequest),
)
_LARGEST_CONTEXT = 8192  # tokens, where neither a flag nor the caller says otherwise
_MB = 1 << 20

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    *,
    engine: EngineLike,
    mailbox: Mailbox,
    text: Text,
    store: Store,
    metrics: Metrics,
    settings: Settings,
    validate: Validate,
    inspect: Inspect = anything,
    model_name: str,
    tenant: str = "default",
    max_total_tokens: int | None = None,
    info: Mapping[str, JSON] | None = None,
    readiness: Readiness | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The ASGI application. `mailbox` is the one whose `publish` the engine was given; `lifespan` moves `readiness`.

    `max_total_tokens` is the context a request may use: what the settings want, as far as the model and its cache allow.
    `info` adds to /info.
    """
    client = EngineClient(engine, mailbox, text, metrics, request_timeout=settings.request_timeout)
    services = Services(
        client=client,
        text=text,
        store=store,
        metrics=metrics,
        limits=_limits(settings, max_total_tokens),
        validate=validate,
        inspect=inspect,
        model_name=model_name,
        default_tenant=tenant,
        info=info or {},
        keyring=Keyring(store) if settings.require_keys else None,
        readiness=readiness or Readiness(),
    )
    metrics.mirror(engine.stats, running=services.names.of, waiting=client.waiting_adapters)
    app = FastAPI(
        title="adapterd",
        version=__version__,
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(authorize)],
    )
    app.state.services = services
    for module in (generate, openai, openai_models, classify, embed, adapters, users, admin, ops):
        app.include_router(module.router)
    app.include_router(generate.tokenizer_router)
    docs.install(app)
    failures.install(app)
    app.add_middleware(RequestScope)
    app.openapi = lambda: _document(app, keys=settings.require_keys)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


_ABOUT = "One frozen base model, every tenant's and user's own adapter, one forward pass."


def _limits(settings: Settings, max_total_tokens: int | None) -> Limits:
    return Limits(
        max_total_tokens=max_total_tokens or settings.max_total_tokens or _LARGEST_CONTEXT,
        max_stop_sequences=settings.max_stop_sequences,
        max_top_n=settings.max_top_n,
        max_request_bytes=int(settings.max_request_mb * _MB),
        max_upload_bytes=int(settings.max_upload_mb * _MB),
    )


def _document(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """Made once."""
    if app.openapi_schema is None:
        app.openapi_schema = document_of(app, _BODIES, keys=keys)
    return app.openapi_schema
