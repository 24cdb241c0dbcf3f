"""A tenant's names are its own: a foreign one is exactly a missing one, no name goes unchecked, and forging gets nowhere."""

from __future__ import annotations

import pytest

from adapters_store.digest import Digest
from adapters_store.errors import Invalid, NotFound
from adapters_store.store import Store

from .conftest import Upload

EVERYWHERE = True


def test_a_foreign_name_is_exactly_a_missing_one(store: Store, upload: Upload) -> None:
    upload(store, "zeta", "support", a=b"1")
    upload(store, "acme", "bait", a=b"1")
    store.bind_user("zeta", "ann", "support")

    def answers(tenant: str) -> list[str]:
        calls = (
            lambda: store.get(tenant, "support"),
            lambda: store.get(tenant, "support", 1),
            lambda: store.versions(tenant, "support"),
            lambda: store.delete(tenant, "support"),
            lambda: store.delete(tenant, "support", 1),
            lambda: store.bind_user(tenant, "eve", "support"),
            lambda: store.get_user(tenant, "ann"),
            lambda: store.delete_user(tenant, "ann"),
        )
        found = []
        for call in calls:
            with pytest.raises(NotFound) as missing:
                call()
            found.append(str(missing.value))
        return found

    assert answers("acme") == answers("nobody")
    assert store.list("nobody") == store.list_users("acme") == ((), None)
    assert store.count("nobody") == 0
    assert store.get("zeta", "support").version == 1
    assert upload(store, "acme", "support", a=b"1")[0].version == 1


def test_every_method_checks_every_name(store: Store, upload: Upload) -> None:
    bad = "../etc"
    calls = {
        "tenant": (
            lambda: upload(store, bad, "x", a=b""),
            lambda: store.get(bad, "x"),
            lambda: store.versions(bad, "x"),
            lambda: store.list(bad),
            lambda: store.count(bad),
            lambda: store.delete(bad, "x"),
            lambda: store.bind_user(bad, "u", "x"),
            lambda: store.get_user(bad, "u"),
            lambda: store.list_users(bad),
            lambda: store.delete_user(bad, "u"),
        ),
        "adapter_id": (
            lambda: upload(store, "acme", bad, a=b""),
            lambda: store.get("acme", bad),
            lambda: store.versions("acme", bad),
            lambda: store.delete("acme", bad),
            lambda: store.bind_user("acme", "u", bad),
        ),
        "user_id": (
            lambda: store.bind_user("acme", bad, "x"),
            lambda: store.get_user("acme", bad),
            lambda: store.delete_user("acme", bad),
        ),
    }
    for field, group in calls.items():
        for call in group:
            with pytest.raises(Invalid) as refused:
                call()
            assert refused.value.field == field


def test_names_that_differ_in_case_are_different(store: Store, upload: Upload) -> None:
    upload(store, "acme", "Support", a=b"1")
    with pytest.raises(NotFound):
        store.get("acme", "support")
    with pytest.raises(NotFound):
        store.get("Acme", "Support")


def test_an_uploaded_file_that_looks_like_a_manifest_is_not_one(store: Store, upload: Upload) -> None:
    secret, _ = upload(store, "zeta", "secret", weights=b"private")
    forged = b'{"mine":["%s",7]}' % Digest.of(b"private").encode()
    upload(store, "acme", "bait", file=forged)
    for digest in (Digest.of(forged), Digest.of(b"private"), Digest.of(b"nothing")):
        with pytest.raises(NotFound):
            store.files(digest)
    assert set(store.files(secret.digest)) == {"weights"}
