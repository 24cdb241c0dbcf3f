"""/admin: tenants and what each may have, and their keys. For operators; the store decides, the engine is only told."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store.digest import Digest
from adapters_store.records import JSON, KeyRecord, TenantRecord

from ..errors import ValidationError
from ..tenancy.scopes import SCOPES, unknown_scope
from .auth import requires
from .body import documented, json_body, shown
from .context import Context, Services
from .failures import trail_of
from .schemas import (
    ErrorResponse,
    KeyList,
    KeyRequest,
    KeyResponse,
    NewKeyResponse,
    PolicyRequest,
    TenantList,
    TenantResponse,
)

_REFUSALS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "No such tenant or key"},
    409: {"model": ErrorResponse, "description": "The tenant has adapters"},
    422: {"model": ErrorResponse, "description": "A field or parameter is wrong"},
    503: {"model": ErrorResponse, "description": "The store is out of order"},
}
_BODY_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    422: _REFUSALS[422],
    503: _REFUSALS[503],
}
_FINDING: dict[int | str, dict[str, Any]] = {status: _REFUSALS[status] for status in (404, 422, 503)}

router = APIRouter(prefix="/admin", tags=["admin"])

PolicyBody = Annotated[PolicyRequest, Depends(json_body(PolicyRequest))]
KeyBody = Annotated[KeyRequest, Depends(json_body(KeyRequest))]


# -- tenants ---------------------------------------------------------------------------------------------------------


@router.get("/tenants", response_model=TenantList, responses={503: _REFUSALS[503]})
@requires("admin")
async def list_tenants(services: Context) -> Response:
    """Every tenant that has a policy or was ever given a key, in the order of their names."""
    records = await to_thread.run_sync(services.store.list_tenants)
    return JSONResponse({"tenants": [_tenant(record) for record in records]})


@router.get("/tenants/{name:id}", response_model=TenantResponse, responses=_FINDING)
@requires("admin")
async def get_tenant(name: str, services: Context) -> Response:
    """One tenant's policy."""
    return JSONResponse(_tenant(await to_thread.run_sync(services.store.tenant, name)))


@router.put(
    "/tenants/{name:id}",
    response_model=TenantResponse,
    responses=_BODY_REFUSALS,
    openapi_extra=documented(PolicyRequest, quotas={"weight": 2, "max_slots": 4, "max_adapters": 100}),
)
@requires("admin", action="tenant.put")
async def put_tenant(request: Request, name: str, body: PolicyBody, services: Context) -> Response:
    """Make a tenant, or give one another policy: the whole of it, what is not named goes back to the default."""
    trail_of(request).about(subject=name)
    record = await to_thread.run_sync(services.store.put_tenant, name, body.model_dump(exclude_unset=True))
    _forget(services)
    return JSONResponse(_tenant(record))


@router.delete("/tenants/{name:id}", status_code=204, responses={409: _REFUSALS[409], **_FINDING})
@requires("admin", action="tenant.delete")
async def delete_tenant(
    request: Request,
    name: str,
    services: Context,
    adapters: Annotated[bool, Query(description="Delete its adapters with it; refused if it has any without.")] = False,
) -> Response:
    """Forget a tenant: its keys are revoked, its users unbound. Requests in flight finish."""
    trail_of(request).about(subject=name)
    gone = await to_thread.run_sync(lambda: services.store.delete_tenant(name, adapters=adapters))
    trail_of(request).about(digests=gone)
    _forget(services)
    await to_thread.run_sync(_unload, services, gone)
    return Response(status_code=204)


# -- keys ------------------------------------------------------------------------------------------------------------


@router.get("/keys", response_model=KeyList, responses={422: _REFUSALS[422], 503: _REFUSALS[503]})
@requires("admin")
async def list_keys(services: Context, tenant: str | None = None) -> Response:
    """Every key ever made, of one tenant if it is named, newest first; never the keys themselves."""
    records = await to_thread.run_sync(services.store.list_keys, tenant)
    return JSONResponse({"keys": [_key(record) for record in records]})


@router.post(
    "/keys",
    status_code=201,
    responses={201: {"model": NewKeyResponse, "description": "The new key; `key` is shown this once"}, **_BODY_REFUSALS},
    openapi_extra=documented(KeyRequest, for_a_tenant={"tenant": "acme", "scopes": ["infer", "adapters"]}),
)
@requires("admin", action="key.create")
async def create_key(request: Request, body: KeyBody, services: Context) -> Response:
    """A new key of a tenant, which is made if need be. Its other keys go on working."""
    trail_of(request).about(subject=body.tenant)
    strange = unknown_scope(body.scopes)
    if strange is not None:
        raise ValidationError(f"`scopes` must be among {', '.join(SCOPES)}. Given: {shown(strange)}")
    made = await to_thread.run_sync(services.store.add_key, body.tenant, body.scopes, body.note)
    trail_of(request).about(subject_key=made.record.id, scopes="+".join(made.record.scopes))
    return JSONResponse({**_key(made.record), "key": made.text}, 201, headers={"cache-control": "no-store"})


@router.delete("/keys/{key_id}", response_model=KeyResponse, responses=_FINDING)
@requires("admin", action="key.revoke")
async def revoke_key(request: Request, key_id: str, services: Context) -> Response:
    """A key that works no more: here at once, in other processes on the same store within two seconds."""
    trail_of(request).about(subject_key=key_id)
    record = await to_thread.run_sync(services.store.revoke_key, key_id)
    trail_of(request).about(subject=record.tenant)
    _forget(services)
    return JSONResponse(_key(record))


def _forget(services: Services) -> None:
    if services.keyring is not None:
        services.keyring.forget()


def _unload(services: Services, digests: frozenset[Digest]) -> None:
    for digest in digests:
        services.client.engine.unload(digest, deleted=True)


def _tenant(record: TenantRecord) -> dict[str, JSON]:
    return {"name": record.name, "policy": record.policy, "created_at": record.created_at.isoformat()}


def _key(record: KeyRecord) -> dict[str, JSON]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "scopes": list(record.scopes),
        "note": record.note,
        "created_at": record.created_at.isoformat(),
        "revoked_at": None if record.revoked_at is None else record.revoked_at.isoformat(),
    }
