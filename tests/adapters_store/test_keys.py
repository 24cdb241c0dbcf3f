"""API keys in the store: what they look like, what is kept of them, and when they stop working."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest

from adapters_store.errors import Invalid, NotFound
from adapters_store.keys import hashed
from adapters_store.store import Store


def test_a_key_stands_for_its_tenant_and_scopes(store: Store) -> None:
    made = store.add_key("acme", ("infer", "adapters"), note="laptop")
    found = store.find_key(made.text)
    assert found is not None
    key, tenant = found
    assert key == made.record
    assert (key.tenant, key.scopes, key.note, key.revoked_at) == ("acme", ("infer", "adapters"), "laptop", None)
    assert (tenant.name, tenant.policy) == ("acme", {})


def test_a_key_has_256_random_bits_behind_a_prefix_that_scanners_find(store: Store) -> None:
    texts = {store.add_key("acme", ("infer",)).text for _ in range(20)}
    assert len(texts) == 20
    assert all(re.fullmatch(r"adk_[0-9a-f]{12}_[0-9a-f]{64}", text) for text in texts)
    assert len({text[-64:] for text in texts}) == 20


def test_only_the_hash_is_kept(store: Store, root: Path) -> None:
    made = store.add_key("acme", ("infer",))
    secret = made.text.rpartition("_")[2].encode()
    store.close()
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    assert not any(secret in path.read_bytes() for path in files)
    with sqlite3.connect(root / "catalog.sqlite3") as db:
        assert db.execute("select sha256 from keys").fetchall() == [(hashed(made.text),)]


def test_a_new_key_does_not_show_in_a_log(store: Store) -> None:
    made = store.add_key("acme", ("infer",))
    assert made.text not in repr(made)
    assert made.record.id in repr(made)


@pytest.mark.parametrize("text", ["", "adk_", "Bearer", "adk_0123456789ab_" + "0" * 64, "\x00", "é" * 81, "x" * 10_000])
def test_what_is_no_key_finds_nothing(store: Store, text: str) -> None:
    store.add_key("acme", ("infer",))
    assert store.find_key(text) is None


def test_every_character_of_a_key_counts(store: Store) -> None:
    text = store.add_key("acme", ("infer",)).text
    for at in range(len(text)):
        other = text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :]
        assert store.find_key(other) is None
    assert store.find_key(text + "\n") is None
    assert store.find_key(text.upper()) is None


def test_the_store_does_not_trust_the_index_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of the row that was found is compared once more, in constant time."""
    compared: list[tuple[str, str]] = []

    def compare(found: str, given: str) -> bool:
        compared.append((found, given))
        return False

    text = store.add_key("acme", ("infer",)).text
    monkeypatch.setattr("adapters_store.keys.hmac.compare_digest", compare)
    assert store.find_key(text) is None
    assert compared == [(hashed(text), hashed(text))]


def test_a_revoked_key_is_unknown_and_stays_listed(store: Store) -> None:
    made, other = store.add_key("acme", ("infer",)), store.add_key("acme", ("infer",))
    revoked = store.revoke_key(made.record.id)
    assert revoked.revoked_at is not None
    assert store.find_key(made.text) is None
    assert store.find_key(other.text) is not None
    assert store.list_keys() == (other.record, revoked)
    assert store.revoke_key(made.record.id) == revoked, "a second time changes nothing"


def test_rotation_two_keys_of_a_tenant_work_side_by_side(store: Store) -> None:
    old = store.add_key("acme", ("infer",))
    new = store.add_key("acme", ("infer",))
    assert store.find_key(old.text) is not None
    assert store.find_key(new.text) is not None
    store.revoke_key(old.record.id)
    assert store.find_key(new.text) is not None


@pytest.mark.parametrize("key_id", ["0123456789ab", "", "'", "\x00", "é", "a" * 5000])
def test_revoking_what_is_no_key(store: Store, key_id: str) -> None:
    with pytest.raises(NotFound, match=r"key .* does not exist"):
        store.revoke_key(key_id)


def test_another_store_on_the_same_directory_sees_both(store: Store, root: Path) -> None:
    with Store.open(root) as other:
        made = other.add_key("acme", ("infer",))
        assert store.find_key(made.text) is not None
        other.revoke_key(made.record.id)
        assert store.find_key(made.text) is None


def test_keys_are_listed_newest_first_and_by_tenant(store: Store) -> None:
    records = [store.add_key(tenant, ("infer",)).record for tenant in ("acme", "zeta", "acme")]
    assert store.list_keys() == tuple(reversed(records))
    assert store.list_keys("acme") == (records[2], records[0])
    assert store.list_keys("nobody") == ()


@pytest.mark.parametrize("scopes", [(), ("Infer",), ("infer adapters",), ("",), ("a",) * 17])
def test_scopes_that_cannot_be_kept(store: Store, scopes: tuple[str, ...]) -> None:
    with pytest.raises(Invalid, match="scopes: must be"):
        store.add_key("acme", scopes)
    assert store.list_keys() == ()
    assert store.list_tenants() == ()


@pytest.mark.parametrize("note", ["x" * 201, "two\nlines", "\x1b[31m"])
def test_a_note_that_cannot_be_kept(store: Store, note: str) -> None:
    with pytest.raises(Invalid, match="note: must be"):
        store.add_key("acme", ("infer",), note)


def test_a_scope_said_twice_counts_once(store: Store) -> None:
    assert store.add_key("acme", ("infer", "infer")).record.scopes == ("infer",)
