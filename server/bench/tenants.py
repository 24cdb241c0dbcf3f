"""The tenants of a scenario: given by their keys, or made for the run with an administrator's key and removed after it.

Owns which routes that takes. Knows no scenario.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from .options import BenchError
from .session import Session
from .target import Target

_SCOPES = ("infer", "adapters")


@asynccontextmanager
async def tenants(session: Session, weights: Sequence[float]) -> AsyncIterator[list[Target]]:
    """The server as one tenant after the other sees it. Tenants whose keys were given have the weights they have."""
    given = session.options.api_keys
    if given:
        yield [session.target.under(key) for key in given]
        return
    made: list[str] = []
    try:
        yield [session.target.under(await _tenant(session.target, made, weight)) for weight in weights]
    finally:
        for name in made:
            with suppress(BenchError):
                await asyncio.shield(session.target.remove_tenant(name))


async def _tenant(admin: Target, made: list[str], weight: float) -> str:
    """A new tenant's key. Its name is in `made` before the server hears of it."""
    made.append(f"bench-{secrets.token_hex(4)}")
    await admin.put_tenant(made[-1], {"weight": weight})
    return await admin.make_key(made[-1], _SCOPES)
