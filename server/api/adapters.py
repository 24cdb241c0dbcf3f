"""/adapters: upload, list, look at, delete, warm and drop. The store decides; the engine is only told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from anyio import CancelScope, to_thread
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store.digest import Digest
from adapters_store.errors import StoreError
from adapters_store.names import SHARED, check_name
from adapters_store.quota import UNLIMITED, Quota
from adapters_store.records import JSON, AdapterRecord
from adapters_store.staging import Staged
from adapters_store.store import Store

from ..engine.client import EngineLike
from ..errors import AdapterdError, ForbiddenError, TooLargeError, ValidationError
from .auth import Caller, Owner, Tenant, requires, still_valid
from .context import Context, Services, Validate, require_ready
from .failures import refusal, trail_of
from .keyring import Principal
from .schemas import AdapterList, AdapterResponse, ErrorResponse
from .upload import Upload

_VERBS = ("versions", "load", "unload")  # an id that ends in one of them could not be told from a route

_FORM_BYTES = 64 << 10  # of an upload that may be the form's own: boundaries, headers, a model card that is left out

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["adapter_id", "files"],
                    "properties": {
                        "adapter_id": {"type": "string", "maxLength": 128, "example": "support"},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        },
    }
}

_REFUSALS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "No such adapter"},
    422: {"model": ErrorResponse, "description": "A parameter is wrong"},
    503: {"model": ErrorResponse, "description": "The store is out of order, or the server starting or stopping"},
}
_UPLOAD_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not a multipart form"},
    409: {"model": ErrorResponse, "description": "The upload broke off"},
    413: {"model": ErrorResponse, "description": "The upload is too large"},
    422: {"model": ErrorResponse, "description": "A field, file or tensor is wrong"},
    503: _REFUSALS[503],
}

_Found = tuple[str, tuple[str, ...], Mapping[str, JSON]]  # method, names of the parts, all that was found out

router = APIRouter(prefix="/adapters", tags=["adapters"])

Version = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="One version; the newest (or all) without it.")]
Limit = Annotated[int, Query(description="Entries per page, 1 to 1000.")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before.")]


@router.post(
    "",
    status_code=201,
    dependencies=[Depends(require_ready)],
    responses={
        200: {"model": AdapterResponse, "description": "The newest version has these very files; nothing changed"},
        201: {"model": AdapterResponse, "description": "A new version"},
        **_UPLOAD_REFUSALS,
    },
    openapi_extra=_FORM,
)
@requires("adapters", "admin", action="adapter.upload")
async def upload(request: Request, services: Context, caller: Caller, owner: Owner) -> Response:
    """Upload an adapter: `adapter_id`, and under `files` what the library's `save_pretrained()` wrote.

    The next request that names it goes through it. Requests in flight finish on the version they began with.
    """
    try:
        record, created = await _receive(request, services, caller, owner)
    except (AdapterdError, StoreError) as error:
        services.metrics.uploaded(refusal(error, services.metrics).error_type)
        raise
    services.metrics.uploaded("created" if created else "unchanged")
    trail_of(request).about(adapters=[record.name], digests=[record.digest], version=record.version, created=created)
    services.names.note(record.digest, record.name)
    return JSONResponse(described(record, services.client.engine), 201 if created else 200)


@router.get("", response_model=AdapterList, responses={422: _REFUSALS[422], 503: _REFUSALS[503]})
@requires("infer")
async def list_adapters(services: Context, tenant: Tenant, limit: Limit = 100, cursor: Cursor = None) -> Response:
    """The newest version of each adapter that this tenant may use, newest first; shared ones under names that it has not."""
    records, following = await to_thread.run_sync(lambda: services.store.list(tenant, limit=limit, cursor=cursor, shared=True))
    shown = [described(record, services.client.engine) for record in records]
    return JSONResponse({"adapters": shown, "next_cursor": following})


@router.get("/{adapter_id:id}/versions", response_model=AdapterList, responses=_REFUSALS)
@requires("infer")
async def versions(adapter_id: str, services: Context, tenant: Tenant) -> Response:
    """Every version of an adapter, newest first."""
    records = await to_thread.run_sync(_versions, services.store, tenant, adapter_id)
    shown = [described(record, services.client.engine) for record in records]
    return JSONResponse({"adapters": shown, "next_cursor": None})


@router.post(
    "/{adapter_id:id}/load",
    response_model=AdapterResponse,
    dependencies=[Depends(require_ready)],
    responses={**_REFUSALS, 424: {"model": ErrorResponse, "description": "The adapter cannot be loaded"}},
)
@requires("adapters", "admin", action="adapter.load")
async def load(request: Request, adapter_id: str, services: Context, owner: Owner, version: Version = None) -> Response:
    """Put an adapter on the device before anybody asks for it. Idempotent; an adapter nobody uses may be evicted."""
    trail_of(request).about(adapters=[adapter_id])
    record = await to_thread.run_sync(services.store.resolve, owner, adapter_id, version)
    trail_of(request).about(digests=[record.digest], version=record.version)
    services.names.note(record.digest, record.name)
    await services.client.warm((record.digest,), owner)
    return JSONResponse(described(record, services.client.engine))


@router.post("/{adapter_id:id}/unload", response_model=AdapterResponse, responses=_REFUSALS)
@requires("adapters", "admin", action="adapter.unload")
async def unload(request: Request, adapter_id: str, services: Context, owner: Owner, version: Version = None) -> Response:
    """Take an adapter off the device once nothing runs on it. Idempotent; the next request loads it again."""
    trail_of(request).about(adapters=[adapter_id])
    record = await to_thread.run_sync(_owned, services.store, owner, adapter_id, version)
    trail_of(request).about(digests=[record.digest], version=record.version)
    await to_thread.run_sync(services.client.engine.unload, record.digest)
    return JSONResponse(described(record, services.client.engine))


@router.get("/{adapter_id:id}", response_model=AdapterResponse, responses=_REFUSALS)
@requires("infer")
async def get_adapter(adapter_id: str, services: Context, tenant: Tenant, version: Version = None) -> Response:
    """One version of an adapter."""
    record = await to_thread.run_sync(services.store.resolve, tenant, adapter_id, version)
    return JSONResponse(described(record, services.client.engine))


@router.delete("/{adapter_id:id}", status_code=204, responses=_REFUSALS)
@requires("adapters", "admin", action="adapter.delete")
async def delete_adapter(
    request: Request, adapter_id: str, services: Context, owner: Owner, version: Version = None
) -> Response:
    """Delete an adapter or one version of it. Requests in flight finish."""
    trail_of(request).about(adapters=[adapter_id], version=version)
    gone = await to_thread.run_sync(_delete, services, owner, adapter_id, version)
    trail_of(request).about(digests=gone)
    return Response(status_code=204)


def described(record: AdapterRecord, engine: EngineLike) -> dict[str, JSON]:
    """One record as clients see it."""
    state, reason = engine.residency(record.digest)
    return {
        "adapter_id": record.name,
        "version": record.version,
        "digest": record.digest,
        "method": record.method,
        "parts": list(record.parts),
        "size_bytes": record.size_bytes,
        "created_at": record.created_at.isoformat(),
        "state": state if reason is None else f"{state}({reason})",
        "shared": record.tenant == SHARED,
        "details": record.details,
    }


async def _receive(request: Request, services: Services, caller: Principal, owner: str) -> tuple[AdapterRecord, bool]:
    limit = services.limits.max_upload_bytes
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise TooLargeError(f"an upload may have {limit} bytes, all files together; it has {length[:20]}")
    quota = _quota(caller, owner)
    if length.isdecimal() and quota.size_bytes is not None:
        usage = await to_thread.run_sync(services.store.usage, owner)
        quota.check_incoming(int(length) - _FORM_BYTES, usage)
    staged = await to_thread.run_sync(lambda: services.store.stage(max_bytes=limit))
    try:
        form = Upload(staged, limit, services.inspect)
        await form.receive(request.headers.get("content-type", ""), request.stream())
        _check_id(form.adapter_id, services.model_name)
        async with services.validating.turn(owner):
            found = await to_thread.run_sync(_validated, services.validate, staged, staged.digest_for(owner))
        await still_valid(request)
        return await to_thread.run_sync(_publish, services.store, staged, owner, form.adapter_id, found, quota)
    finally:
        with CancelScope(shield=True):
            await to_thread.run_sync(staged.discard)


def _check_id(adapter_id: str, model_name: str) -> None:
    """Raises: ValidationError for an id that could never be asked for; the store's Invalid for one it refuses."""
    check_name("adapter_id", adapter_id)
    if adapter_id == model_name:
        raise ValidationError(f"`adapter_id` cannot be the base model's name. Given: {adapter_id!r}")
    if adapter_id.rpartition("/")[2] in _VERBS:
        raise ValidationError(f"`adapter_id` cannot end in {', '.join(_VERBS)}. Given: {adapter_id!r}")


def _quota(caller: Principal, owner: str) -> Quota:
    """What an operator shares counts against nobody."""
    return UNLIMITED if owner == SHARED else Quota(caller.policy.max_adapters, caller.policy.max_adapter_bytes)


def _publish(store: Store, staged: Staged, owner: str, name: str, found: _Found, quota: Quota) -> tuple[AdapterRecord, bool]:
    method, parts, details = found
    return store.publish(staged, tenant=owner, name=name, method=method, parts=parts, details=details, quota=quota)


def _validated(validate: Validate, staged: Staged, digest: Digest) -> _Found:
    """In a thread. Raises: AdapterError."""
    details = validate(staged.paths, digest)
    methods = details["methods"]
    names = tuple(str(method) for method in methods) if isinstance(methods, list | tuple) else (str(methods),)
    return "+".join(names), names, details


def _versions(store: Store, tenant: str, name: str) -> tuple[AdapterRecord, ...]:
    return store.versions(store.resolve(tenant, name).tenant, name)


def _owned(store: Store, owner: str, name: str, version: int | None) -> AdapterRecord:
    """Raises: NotFound; ForbiddenError for a shared adapter that is not the caller's to change."""
    record = store.resolve(owner, name, version)
    if record.tenant != owner:
        raise ForbiddenError(
            f"adapter {name!r} is shared with all tenants: that takes `shared=true` and a key with scope admin"
        )
    return record


def _delete(services: Services, owner: str, name: str, version: int | None) -> list[Digest]:
    """The digests of what was deleted."""
    store, engine = services.store, services.client.engine
    record = _owned(store, owner, name, version)
    gone = [record.digest] if version is not None else [record.digest for record in store.versions(owner, name)]
    for digest in store.delete(owner, name, version):
        engine.unload(digest, deleted=True)
    return gone
