"""Tenants in the store: policies kept as they were given, and what is left of one that is deleted."""

from __future__ import annotations

import pytest

from adapters_store.errors import Conflict, NotFound
from adapters_store.store import Store
from tests.adapters_store.conftest import Upload


def test_a_policy_is_kept_and_replaced_whole(store: Store) -> None:
    first = store.put_tenant("acme", {"weight": 2, "max_slots": 4})
    second = store.put_tenant("acme", {"max_slots": None})
    assert store.tenant("acme") == second
    assert (first.policy, second.policy) == ({"weight": 2, "max_slots": 4}, {"max_slots": None})
    assert second.created_at == first.created_at


def test_a_key_makes_its_tenant_and_leaves_one_that_is_there_alone(store: Store) -> None:
    store.add_key("new", ("infer",))
    assert store.tenant("new").policy == {}
    store.put_tenant("old", {"weight": 3})
    store.add_key("old", ("infer",))
    assert store.tenant("old").policy == {"weight": 3}
    assert [tenant.name for tenant in store.list_tenants()] == ["new", "old"]


def test_a_key_finds_its_tenants_policy_as_it_is_now(store: Store) -> None:
    text = store.add_key("acme", ("infer",)).text
    store.put_tenant("acme", {"weight": 5})
    found = store.find_key(text)
    assert found is not None
    assert found[1].policy == {"weight": 5}


def test_a_missing_tenant(store: Store) -> None:
    for act in (store.tenant, store.delete_tenant):
        with pytest.raises(NotFound, match="tenant 'nobody' does not exist"):
            act("nobody")


def test_deleting_a_tenant_takes_its_keys_users_and_if_told_so_its_adapters(store: Store, upload: Upload) -> None:
    record, _ = upload(store, "acme", "support", f=b"1")
    kept, _ = upload(store, "zeta", "support", f=b"1")
    store.bind_user("acme", "ann", "support")
    text, other = store.add_key("acme", ("infer",)).text, store.add_key("zeta", ("infer",)).text
    with pytest.raises(Conflict, match="tenant 'acme' has adapters"):
        store.delete_tenant("acme")
    assert store.find_key(text) is not None, "a refusal changes nothing"

    assert store.delete_tenant("acme", adapters=True) == {record.digest}

    assert store.find_key(text) is None
    assert store.list_keys("acme")[0].revoked_at is not None
    assert store.count("acme") == 0
    with pytest.raises(NotFound):
        store.get_user("acme", "ann")
    assert store.get("zeta", "support") == kept
    assert store.find_key(other) is not None


def test_a_tenants_old_keys_do_not_come_back_with_its_name(store: Store) -> None:
    text = store.add_key("acme", ("infer",)).text
    store.delete_tenant("acme")
    store.put_tenant("acme", {})
    assert store.find_key(text) is None
    store.add_key("acme", ("infer",))
    assert store.find_key(text) is None
