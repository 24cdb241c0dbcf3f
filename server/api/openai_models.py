"""OpenAI's /v1/models: the base model, and the adapters that a tenant may use in its place."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from adapters_store.errors import Invalid, NotFound
from adapters_store.records import AdapterRecord
from adapters_store.store import Store

from .auth import Tenant, requires
from .context import Context, Services
from .failures import UnknownModelError
from .openai_answers import REFUSALS

_PAGE = 1000

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models")
@requires("infer")
async def models(services: Context, tenant: Tenant) -> Response:
    """The base model, then the adapters that this tenant may use."""
    records = await to_thread.run_sync(_all_adapters, services.store, tenant)
    return JSONResponse({"object": "list", "data": [_base_card(services), *(_card(services, r) for r in records)]})


@router.get("/models/{model:id}", responses={404: REFUSALS[404]})
@requires("infer")
async def model(model: str, services: Context, tenant: Tenant) -> Response:
    """One model or adapter."""
    if model == services.model_name:
        return JSONResponse(_base_card(services))
    try:
        record = await to_thread.run_sync(services.store.resolve, tenant, model)
    except (NotFound, Invalid):
        raise UnknownModelError(model) from None
    return JSONResponse(_card(services, record))


def _all_adapters(store: Store, tenant: str) -> list[AdapterRecord]:
    records, cursor = store.list(tenant, limit=_PAGE, shared=True)
    found = list(records)
    while cursor is not None:
        records, cursor = store.list(tenant, limit=_PAGE, cursor=cursor, shared=True)
        found += records
    return found


def _base_card(services: Services) -> dict[str, object]:
    return _model_card(services, services.model_name, services.started_at, root=services.model_name, parent=None)


def _card(services: Services, record: AdapterRecord) -> dict[str, object]:
    created = int(record.created_at.timestamp())
    return _model_card(services, record.name, created, root=record.name, parent=services.model_name)


def _model_card(services: Services, name: str, created: int, *, root: str, parent: str | None) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "adapterd",
        "root": root,
        "parent": parent,
        "max_model_len": services.limits.max_total_tokens,
    }
