"""Promise 11: keys have 256 random bits, are stored as sha256 and shown once, carry scopes, rotate, and are compared by hash.

The store's part: `tests/adapters_store`; the cache that remembers them: `tests/api`.
"""

from __future__ import annotations

import hashlib
import re

from tests.house import Caller, House


def test_a_key_has_256_bits_and_no_two_are_alike(house: House) -> None:
    keys = {house.server.store.add_key("many-keys", ["infer"]).text for _ in range(20)}
    assert len(keys) == 20
    for key in keys:
        assert re.fullmatch(r"adk_[0-9a-f]{12}_[0-9a-f]{64}", key), "an id to talk about it by, and 256 bits"


def test_the_store_holds_only_the_hash_and_shows_a_key_once(house: House, operator: Caller) -> None:
    made = operator.post("/admin/keys", {"tenant": "keyed", "scopes": ["infer"], "note": "for a test"}).json()
    assert made["key"] not in operator.get("/admin/keys").text
    assert made["key"] not in repr(house.server.store.list_keys("keyed"))
    on_disk = b"".join(path.read_bytes() for path in house.store_root.glob("catalog.sqlite3*"))
    assert made["key"].encode() not in on_disk
    assert hashlib.sha256(made["key"].encode()).hexdigest().encode() in on_disk


def test_keys_rotate_without_a_gap_and_a_revoked_one_is_refused_at_once(house: House, operator: Caller) -> None:
    old, new = (operator.post("/admin/keys", {"tenant": "rotating", "scopes": ["infer"]}).json() for _ in range(2))
    old_caller, new_caller = (Caller(house, {"authorization": f"Bearer {made['key']}"}) for made in (old, new))
    assert old_caller.get("/info").status_code == new_caller.get("/info").status_code == 200
    assert operator.delete(f"/admin/keys/{old['id']}").status_code == 200
    assert old_caller.get("/info").status_code == 401
    assert new_caller.get("/info").status_code == 200


def test_what_is_wrong_with_a_key_is_never_said(house: House) -> None:
    """Malformed, unknown, revoked, somebody's with a letter changed: one answer, without the key in it."""
    key = house.tenant("spelled").headers["authorization"].removeprefix("Bearer ")
    wrong = [key[:-1] + ("A" if key[-1] != "A" else "B"), key[:-1], key + "A", "x", key.swapcase(), "é", "\u0130" * 40]
    sent = [house.http.get("/info", headers={"authorization": f"Bearer {each}".encode()}) for each in wrong]
    assert {(answer.status_code, answer.text) for answer in sent} == {
        (401, '{"error":"the API key is not valid","error_type":"unauthorized"}')
    }
