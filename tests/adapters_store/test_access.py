"""Who may have keys and policies at all."""

from __future__ import annotations

import pytest

from adapters_store.errors import Invalid
from adapters_store.store import Store


@pytest.mark.parametrize("tenant", ["shared", "", "..", "a b", "x" * 129, "\x00"])
def test_some_names_can_have_neither_keys_nor_a_policy(store: Store, tenant: str) -> None:
    with pytest.raises(Invalid, match="tenant: "):
        store.add_key(tenant, ("infer",))
    with pytest.raises(Invalid, match="tenant: "):
        store.put_tenant(tenant, {})
    assert store.list_tenants() == ()
