"""/users: which adapter a user's requests go through. A user who is bound to none is answered by the base model."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from adapters_store.records import JSON, UserBinding

from .adapters import Cursor, Limit
from .auth import Tenant, requires
from .body import documented, json_body
from .context import Context
from .failures import trail_of
from .schemas import ErrorResponse, UserList, UserRequest, UserResponse

_REFUSALS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "No such user or adapter"},
    422: {"model": ErrorResponse, "description": "A field or parameter is wrong"},
    503: {"model": ErrorResponse, "description": "The store is out of order"},
}
_BODY_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    **_REFUSALS,
}

router = APIRouter(prefix="/users", tags=["users"])

UserBody = Annotated[UserRequest, Depends(json_body(UserRequest))]


@router.put(
    "/{user_id:id}",
    response_model=UserResponse,
    responses=_BODY_REFUSALS,
    openapi_extra=documented(UserRequest, bind={"adapter_id": "support"}),
)
@requires("adapters", action="user.bind")
async def bind_user(request: Request, user_id: str, body: UserBody, services: Context, tenant: Tenant) -> Response:
    """Send this user's requests through an adapter from now on. The name is bound: a new version takes effect at once."""
    trail_of(request).about(user=user_id, adapters=[body.adapter_id])
    binding = await to_thread.run_sync(services.store.bind_user, tenant, user_id, body.adapter_id)
    return JSONResponse(_described(binding))


@router.get("", response_model=UserList, responses={422: _REFUSALS[422], 503: _REFUSALS[503]})
@requires("infer")
async def list_users(services: Context, tenant: Tenant, limit: Limit = 100, cursor: Cursor = None) -> Response:
    """All users who are bound to an adapter, in the order of their ids."""
    users, following = await to_thread.run_sync(lambda: services.store.list_users(tenant, limit=limit, cursor=cursor))
    return JSONResponse({"users": [_described(user) for user in users], "next_cursor": following})


@router.get("/{user_id:id}", response_model=UserResponse, responses=_REFUSALS)
@requires("infer")
async def get_user(user_id: str, services: Context, tenant: Tenant) -> Response:
    """The adapter that this user's requests go through."""
    return JSONResponse(_described(await to_thread.run_sync(services.store.get_user, tenant, user_id)))


@router.delete("/{user_id:id}", status_code=204, responses=_REFUSALS)
@requires("adapters", action="user.unbind")
async def delete_user(request: Request, user_id: str, services: Context, tenant: Tenant) -> Response:
    """Unbind a user, whose requests go to the base model then."""
    trail_of(request).about(user=user_id)
    await to_thread.run_sync(services.store.delete_user, tenant, user_id)
    return Response(status_code=204)


def _described(binding: UserBinding) -> dict[str, JSON]:
    return {
        "user_id": binding.user_id,
        "adapter_id": binding.adapter_id,
        "updated_at": binding.updated_at.isoformat(),
    }
