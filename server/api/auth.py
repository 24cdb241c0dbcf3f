"""Who asks, and whether they may. The one place that turns a request into a tenant, by its key alone.

Every route is marked with the scopes it takes (`requires`) or as `public`; `authorize` runs before all else of a route, and
what nobody has marked takes scope admin. Without `--require-keys` everybody is the tenant `default` with every scope.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request

from adapters_store.names import SHARED

from ..errors import ForbiddenError, UnauthorizedError
from ..tenancy.scopes import Scope
from .context import services_of
from .failures import trail_of
from .keyring import Principal, anybody

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_LEVEL = "__adapterd_level__"


@dataclass(frozen=True, slots=True)
class Level:
    """What a route takes: any one of `scopes`; none = no key. `action` is its name in the audit trail, if it has one."""

    scopes: tuple[Scope, ...] = ()
    action: str | None = None

    @property
    def public(self) -> bool:
        return not self.scopes


ADMIN = Level(("admin",))


def requires(*scopes: Scope, action: str | None = None) -> Callable[[Endpoint], Endpoint]:
    """Marks a route's function: a key needs one of these scopes. Every request to it gets a line in the audit trail if it
    has an `action`.
    """
    return _marked(Level(scopes, action))


def public(endpoint: Endpoint) -> Endpoint:
    """Marks a route's function: no key is asked for."""
    return _marked(Level())(endpoint)


def level_of(endpoint: object) -> Level:
    """What an endpoint was marked with."""
    level = getattr(endpoint, _LEVEL, ADMIN)
    return level if isinstance(level, Level) else ADMIN


def declared(endpoint: object) -> bool:
    return hasattr(endpoint, _LEVEL)


async def authorize(request: Request) -> None:
    """A dependency of the whole application. Raises: UnauthorizedError, ForbiddenError."""
    level = level_of(request.scope.get("endpoint"))
    trail = trail_of(request)
    trail.action = level.action
    if level.public:
        return
    caller = request.state.principal = await _identified(request)
    trail.who(caller.tenant, caller.key_id)
    if caller.scopes.isdisjoint(level.scopes):
        raise ForbiddenError(f"this needs a key with scope {' or '.join(level.scopes)}")


async def still_valid(request: Request) -> None:
    """Look again, at the end of what took long, before its effect is seen. Raises: UnauthorizedError."""
    await _identified(request)


async def caller_of(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


Caller = Annotated[Principal, Depends(caller_of)]


async def tenant_of(caller: Caller) -> str:
    return caller.tenant


Tenant = Annotated[str, Depends(tenant_of)]

SharedFlag = Annotated[bool, Query(description="Act on the adapters that all tenants may use; takes scope admin.")]


async def owner_of(caller: Caller, shared: SharedFlag = False) -> str:
    """Whose adapters a change is about. Raises: ForbiddenError."""
    needed: Scope = "admin" if shared else "adapters"
    if needed not in caller.scopes:
        raise ForbiddenError(f"this needs a key with scope {needed}")
    return SHARED if shared else caller.tenant


Owner = Annotated[str, Depends(owner_of)]


def _marked(level: Level) -> Callable[[Endpoint], Endpoint]:
    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _LEVEL, level)
        return endpoint

    return mark


async def _identified(request: Request) -> Principal:
    """Raises: UnauthorizedError with the same words for a key that is malformed, unknown or revoked."""
    services = services_of(request)
    if services.keyring is None:
        return anybody(services.default_tenant)
    given = request.headers.getlist("authorization")
    if not given:
        raise UnauthorizedError("this server needs an API key: Authorization: Bearer KEY")
    scheme, _, key = given[0].partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer":
        raise UnauthorizedError("the API key must be given once, as Authorization: Bearer KEY")
    principal = await services.keyring.principal(key.strip())
    if principal is None:
        raise UnauthorizedError("the API key is not valid")
    return principal
