"""Users' bindings: to a name rather than a version, changed, outliving their adapter, and deleted."""

from __future__ import annotations

import pytest

from adapters_store.errors import NotFound
from adapters_store.store import Store

from .conftest import Upload

EVERYWHERE = True


def test_a_binding_follows_the_name_to_new_versions(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    upload(store, "acme", "sales", a=b"2")
    first = store.bind_user("acme", "ann@example.org", "support")
    assert store.get_user("acme", "ann@example.org") == first
    second = store.bind_user("acme", "ann@example.org", "sales")
    assert store.get_user("acme", "ann@example.org") == second
    assert second.updated_at > first.updated_at
    assert store.list_users("acme") == ((second,), None)


def test_binding_to_an_unknown_adapter_changes_nothing(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    kept = store.bind_user("acme", "ann", "support")
    upload(store, "acme", "gone", a=b"1")
    store.delete("acme", "gone")
    for name in ("never", "gone"):
        with pytest.raises(NotFound, match=f"adapter '{name}' does not exist"):
            store.bind_user("acme", "ann", name)
    assert store.get_user("acme", "ann") == kept


def test_a_binding_outlives_its_adapter_and_resolves_as_missing(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    binding = store.bind_user("acme", "ann", "support")
    store.delete("acme", "support")
    store.gc(0)
    assert store.get_user("acme", "ann") == binding
    with pytest.raises(NotFound):
        store.get("acme", binding.adapter_id)
    upload(store, "acme", "support", a=b"2")
    assert store.get("acme", binding.adapter_id).version == 2


def test_an_unbound_user_is_not_found(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    store.bind_user("acme", "ann", "support")
    store.delete_user("acme", "ann")
    for call in (store.get_user, store.delete_user):
        with pytest.raises(NotFound, match="user 'ann' does not exist"):
            call("acme", "ann")
