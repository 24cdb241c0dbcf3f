"""/adapters: upload, list, look at, delete, warm and drop. The store decides; the engine is only told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from anyio import CancelScope, to_thread
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store import manifest
from adapters_store.digest import Digest
from adapters_store.errors import StoreError
from adapters_store.names import check_name
from adapters_store.records import JSON, AdapterRecord
from adapters_store.staging import Staged

from ..engine.client import EngineLike
from ..errors import AdapterdError, TooLargeError, ValidationError
from .auth import Tenant
from .context import Context, Services, Validate, require_ready
from .failures import translate
from .schemas import AdapterList, AdapterResponse, ErrorResponse
from .upload import Upload

_VERBS = ("versions", "load", "unload")  # an id that ends in one of them could not be told from a route

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
async def upload(request: Request, services: Context, tenant: Tenant) -> Response:
    """Upload an adapter: `adapter_id`, and under `files` what the library's `save_pretrained()` wrote.

    The next request that names it goes through it. Requests in flight finish on the version they began with.
    """
    try:
        record, created = await _receive(request, services, tenant)
    except (AdapterdError, StoreError) as error:
        services.metrics.uploaded(translate(error, "").error_type)
        raise
    services.metrics.uploaded("created" if created else "unchanged")
    services.names.note(record.digest, record.name)
    return JSONResponse(described(record, services.client.engine), 201 if created else 200)


@router.get("", response_model=AdapterList, responses={422: _REFUSALS[422], 503: _REFUSALS[503]})
async def list_adapters(services: Context, tenant: Tenant, limit: Limit = 100, cursor: Cursor = None) -> Response:
    """The newest version of each adapter, newest first."""
    records, following = await to_thread.run_sync(lambda: services.store.list(tenant, limit=limit, cursor=cursor))
    shown = [described(record, services.client.engine) for record in records]
    return JSONResponse({"adapters": shown, "next_cursor": following})


@router.get("/{adapter_id:path}/versions", response_model=AdapterList, responses=_REFUSALS)
async def versions(adapter_id: str, services: Context, tenant: Tenant) -> Response:
    """Every version of an adapter, newest first."""
    records = await to_thread.run_sync(services.store.versions, tenant, adapter_id)
    shown = [described(record, services.client.engine) for record in records]
    return JSONResponse({"adapters": shown, "next_cursor": None})


@router.post(
    "/{adapter_id:path}/load",
    response_model=AdapterResponse,
    dependencies=[Depends(require_ready)],
    responses={**_REFUSALS, 424: {"model": ErrorResponse, "description": "The adapter cannot be loaded"}},
)
async def load(adapter_id: str, services: Context, tenant: Tenant, version: Version = None) -> Response:
    """Put an adapter on the device before anybody asks for it. Idempotent; an adapter nobody uses may be evicted."""
    record = await to_thread.run_sync(services.store.get, tenant, adapter_id, version)
    services.names.note(record.digest, record.name)
    await services.client.warm((record.digest,))
    return JSONResponse(described(record, services.client.engine))


@router.post("/{adapter_id:path}/unload", response_model=AdapterResponse, responses=_REFUSALS)
async def unload(adapter_id: str, services: Context, tenant: Tenant, version: Version = None) -> Response:
    """Take an adapter off the device once nothing runs on it. Idempotent; the next request loads it again."""
    record = await to_thread.run_sync(services.store.get, tenant, adapter_id, version)
    await to_thread.run_sync(services.client.engine.unload, record.digest)
    return JSONResponse(described(record, services.client.engine))


@router.get("/{adapter_id:path}", response_model=AdapterResponse, responses=_REFUSALS)
async def get_adapter(adapter_id: str, services: Context, tenant: Tenant, version: Version = None) -> Response:
    """One version of an adapter."""
    record = await to_thread.run_sync(services.store.get, tenant, adapter_id, version)
    return JSONResponse(described(record, services.client.engine))


@router.delete("/{adapter_id:path}", status_code=204, responses=_REFUSALS)
async def delete_adapter(adapter_id: str, services: Context, tenant: Tenant, version: Version = None) -> Response:
    """Delete an adapter or one version of it. Requests in flight finish."""
    await to_thread.run_sync(_delete, services, tenant, adapter_id, version)
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
        "details": record.details,
    }


async def _receive(request: Request, services: Services, tenant: str) -> tuple[AdapterRecord, bool]:
    limit = services.limits.max_upload_bytes
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise TooLargeError(f"an upload may have {limit} bytes, all files together; it has {length[:20]}")
    staged = await to_thread.run_sync(lambda: services.store.stage(max_bytes=limit))
    try:
        form = Upload(staged, limit)
        await form.receive(request.headers.get("content-type", ""), request.stream())
        _check_id(form.adapter_id, services.model_name)
        return await to_thread.run_sync(_publish, services, staged, tenant, form.adapter_id)
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


def _publish(services: Services, staged: Staged, tenant: str, name: str) -> tuple[AdapterRecord, bool]:
    """Validate, then make visible. In a thread."""
    method, parts, details = _validated(services.validate, staged)
    return services.store.publish(staged, tenant=tenant, name=name, method=method, parts=parts, details=details)


def _validated(validate: Validate, staged: Staged) -> tuple[str, tuple[str, ...], Mapping[str, JSON]]:
    """(method, names of the parts, all that was found out) of the staged files. Raises: AdapterError."""
    details = validate(staged.paths, Digest.of(manifest.encode(staged.entries)))
    methods = details["methods"]
    names = tuple(str(method) for method in methods) if isinstance(methods, list | tuple) else (str(methods),)
    return "+".join(names), names, details


def _delete(services: Services, tenant: str, name: str, version: int | None) -> None:
    store, engine = services.store, services.client.engine
    gone = [store.get(tenant, name, version)] if version is not None else list(store.versions(tenant, name))
    store.delete(tenant, name, version)
    for record in gone:
        engine.unload(record.digest)
