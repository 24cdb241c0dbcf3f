"""Adapters of the reserved tenant `shared`: everybody's, unless a tenant has one of that name itself."""

from __future__ import annotations

import pytest

from adapters_store.errors import NotFound
from adapters_store.names import SHARED
from adapters_store.store import Store
from tests.adapters_store.conftest import Upload


def test_a_name_is_the_tenants_own_first_and_then_a_shared_one(store: Store, upload: Upload) -> None:
    shared, _ = upload(store, SHARED, "support", f=b"shared")
    assert store.resolve("acme", "support") == shared
    own, _ = upload(store, "acme", "support", f=b"own")
    assert store.resolve("acme", "support") == own
    assert store.resolve("zeta", "support") == shared
    store.delete("acme", "support")
    assert store.resolve("acme", "support") == shared
    with pytest.raises(NotFound):
        store.get("acme", "support")


def test_an_own_name_hides_every_version_of_the_shared_one(store: Store, upload: Upload) -> None:
    for data in (b"1", b"2"):
        upload(store, SHARED, "support", f=data)
    assert store.resolve("acme", "support", 2).tenant == SHARED
    upload(store, "acme", "support", f=b"own")
    assert store.resolve("acme", "support", 1).tenant == "acme"
    with pytest.raises(NotFound, match="adapter 'support version 2' does not exist"):
        store.resolve("acme", "support", 2)


def test_foreign_and_missing_read_the_same(store: Store, upload: Upload) -> None:
    upload(store, "zeta", "secret", f=b"1")
    said = set()
    for name in ("secret", "absent"):
        with pytest.raises(NotFound) as refused:
            store.resolve("acme", name)
        said.add(str(refused.value).replace(name, "-"))
    assert len(said) == 1


def test_equal_files_shared_and_own_have_different_digests(store: Store, upload: Upload) -> None:
    shared, _ = upload(store, SHARED, "support", f=b"same")
    own, _ = upload(store, "acme", "support", f=b"same")
    assert shared.digest != own.digest


def test_a_listing_with_the_shared_ones(store: Store, upload: Upload) -> None:
    made = [
        upload(store, tenant, name, f=name.encode())[0]
        for tenant, name in ((SHARED, "a"), ("acme", "b"), (SHARED, "c"), ("zeta", "d"), (SHARED, "b"), ("acme", "e"))
    ]
    a, b, c, _, _, e = made
    assert store.list("acme", shared=True) == ((e, c, b, a), None), "newest first; zeta's is not there, acme's own b is"
    assert store.list("acme") == ((e, b), None)
    assert [record.name for record in store.list(SHARED, shared=True)[0]] == ["b", "c", "a"]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_pages_of_such_a_listing_show_everything_once(store: Store, upload: Upload, limit: int) -> None:
    for index in range(7):
        upload(store, SHARED if index % 2 else "acme", f"n{index}", f=b"%d" % index)
    upload(store, SHARED, "n2", f=b"hidden")
    seen, cursor = [], None
    while True:
        page, cursor = store.list("acme", limit=limit, cursor=cursor, shared=True)
        assert len(page) <= limit
        seen += [record.name for record in page]
        if cursor is None:
            break
    assert seen == [f"n{index}" for index in reversed(range(7))]


def test_a_user_may_be_bound_to_a_shared_adapter(store: Store, upload: Upload) -> None:
    upload(store, SHARED, "support", f=b"1")
    assert store.bind_user("acme", "ann", "support").adapter_id == "support"
    assert store.count("acme") == 0
    with pytest.raises(NotFound, match="adapter 'support' does not exist"):
        store.get("acme", "support")
    with pytest.raises(NotFound, match="adapter 'absent' does not exist"):
        store.bind_user("acme", "ann", "absent")
    record, created = upload(store, "acme", "support", f=b"own")
    assert (created, record.version) == (True, 1)
