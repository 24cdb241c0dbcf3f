"""Which key stands for whom: looked up in the store off the event loop, and remembered for a moment.

Owns the memory, so also how long a revoked key goes on working here. Knows no route and no header.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from anyio import CapacityLimiter, to_thread
from pydantic import ValidationError

from adapters_store.keys import hashed
from adapters_store.records import KeyRecord, TenantRecord
from adapters_store.store import Store

from ..errors import UnavailableError
from ..tenancy.policy import OPEN, TenantPolicy
from ..tenancy.scopes import SCOPES, Scope, known_scopes

_log = structlog.get_logger("adapterd.keys")

TTL = 1.0  # seconds that a key is believed without asking the store
SIZE = 4096  # keys remembered
LOOKUPS = 4  # threads that wrong keys can keep busy


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a tenant, what its key may be used for, and what the tenant may have."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None  # None: the server asks for no keys
    policy: TenantPolicy = OPEN


def anybody(tenant: str) -> Principal:
    """Whoever reaches a server that asks for no keys."""
    return Principal(tenant, frozenset(SCOPES))


class Keyring:
    """Keys in, principals out. Event loop only.

    Invariant: what it answers was so in the store at most `TTL` seconds ago. A key that the store does not know is never
    remembered, so that a new one works at once.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, Principal]] = OrderedDict()  # sha256 of the key -> until when, whom
        self._lookups = CapacityLimiter(LOOKUPS)

    async def principal(self, text: str) -> Principal | None:
        """Whom a key stands for; None for one that is unknown or revoked. Raises: what the store raises."""
        name = hashed(text)
        if name is None:
            return None
        remembered = self._known.get(name)
        if remembered is not None and self._clock() < remembered[0]:
            return remembered[1]
        asked = self._clock()  # a revocation while the store answers must not count from the answer
        found = await to_thread.run_sync(self._store.find_key, text, limiter=self._lookups)
        if found is None:
            self._known.pop(name, None)
            return None
        principal = _principal(*found)
        self._remember(name, asked + TTL, principal)
        return principal

    def forget(self) -> None:
        """Ask the store again for every key: a key or a policy was changed through this process."""
        self._known.clear()

    def _remember(self, name: str, until: float, principal: Principal) -> None:
        self._known[name] = (until, principal)
        self._known.move_to_end(name)
        if len(self._known) > SIZE:
            self._known.popitem(last=False)


def _principal(key: KeyRecord, tenant: TenantRecord) -> Principal:
    return Principal(tenant.name, known_scopes(key.scopes), key.id, policy_of(tenant))


def policy_of(tenant: TenantRecord) -> TenantPolicy:
    """Raises: UnavailableError for a policy that this release cannot read: quotas are not guessed."""
    try:
        return TenantPolicy.model_validate(tenant.policy)
    except ValidationError as error:
        _log.error("a tenant's policy cannot be read", tenant=tenant.name, fields=[p["loc"] for p in error.errors()])
        raise UnavailableError("the policy of this key's tenant was written by another release") from error
