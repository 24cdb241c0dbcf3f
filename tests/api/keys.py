"""Keys for tests of an app that asks for them."""

from __future__ import annotations

from tests.api.conftest import World


def bearer(world: World, tenant: str, *scopes: str) -> dict[str, str]:
    """The headers of a client with a new key."""
    return {"authorization": f"Bearer {world.store.add_key(tenant, scopes).text}"}
