"""Publishing: what was uploaded is found with its files, versions count up, and equal content is stored once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC

import pytest

from adapters_store.errors import Conflict, Invalid
from adapters_store.store import Store

from .conftest import Content, Upload

EVERYWHERE = True


def test_what_was_published_is_found_with_its_files(store: Store, upload: Upload, content: Content) -> None:
    record, created = upload(store, "acme", "support", config=b"{}", weights=b"12345")
    assert created
    assert (record.tenant, record.name, record.version, record.method) == ("acme", "support", 1, "lora")
    assert (record.parts, record.size_bytes, record.details) == (("lora",), 7, {"rank": 8})
    assert record.created_at.tzinfo is UTC
    assert store.get("acme", "support") == record == store.get("acme", "support", 1)
    assert content(store, record) == {"config": b"{}", "weights": b"12345"}


def test_the_digest_covers_the_tenant_and_names_and_contents_and_nothing_else(store: Store, upload: Upload) -> None:
    digest = upload(store, "acme", "one", a=b"1", b=b"2")[0].digest
    assert upload(store, "acme", "two", b=b"2", a=b"1")[0].digest == digest
    assert upload(store, "zeta", "one", a=b"1", b=b"2")[0].digest != digest
    assert upload(store, "acme", "three", a=b"2", b=b"1")[0].digest != digest
    assert upload(store, "acme", "four", a=b"1", c=b"2")[0].digest != digest


def test_equal_content_is_stored_once_and_looks_no_different(
    store: Store, upload: Upload, blob_files: Callable[[], int]
) -> None:
    mine, created = upload(store, "acme", "support", weights=b"12345")
    theirs, also_created = upload(store, "zeta", "helper", weights=b"12345")
    assert (created, also_created) == (True, True)
    assert (theirs.version, theirs.size_bytes) == (mine.version, mine.size_bytes)
    assert theirs.digest != mine.digest
    assert store.files(theirs.digest) == store.files(mine.digest)  # one copy of each file
    assert blob_files() == 3  # the file and a manifest each


def test_the_same_content_again_changes_nothing(store: Store, upload: Upload) -> None:
    first, _ = upload(store, "acme", "support", a=b"1")
    assert upload(store, "acme", "support", a=b"1") == (first, False)
    assert len(store.versions("acme", "support")) == 1


def test_only_the_newest_version_counts_as_the_same(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    upload(store, "acme", "support", a=b"2")
    record, created = upload(store, "acme", "support", a=b"1")
    assert created
    assert [r.version for r in store.versions("acme", "support")] == [3, 2, 1]
    assert store.get("acme", "support") == record
    assert store.get("acme", "support", 1).digest == record.digest


def test_an_upload_is_published_once(store: Store) -> None:
    with store.stage() as staged:
        staged.write("a", [b"1"])
        arguments = {"tenant": "acme", "method": "lora", "parts": (), "details": {}}
        store.publish(staged, name="one", **arguments)
        with pytest.raises(Conflict, match="is published"):
            store.publish(staged, name="two", **arguments)
        with pytest.raises(Conflict, match="is published"):
            staged.write("b", [b"1"])
    assert store.count() == 1


def test_what_was_published_can_no_longer_be_written_to(store: Store) -> None:
    with store.stage() as staged:
        with staged.file("a") as file:
            file.write(b"1")
        record, _ = store.publish(staged, tenant="acme", name="x", method="lora", parts=(), details={})
        with pytest.raises(Conflict, match="this file is closed"):
            file.write(b"2")
    assert store.files(record.digest)["a"].read_bytes() == b"1"


def test_an_upload_ends_with_its_context(store: Store) -> None:
    with store.stage() as staged:
        staged.write("a", [b"1"])
    with pytest.raises(Conflict, match="is closed"):
        store.publish(staged, tenant="acme", name="x", method="lora", parts=(), details={})


def test_an_empty_upload_is_refused(store: Store, upload: Upload) -> None:
    with pytest.raises(Invalid, match="at least one file"):
        upload(store, "acme", "support")
    assert store.count() == 0


@pytest.mark.parametrize("details", [{"x": float("nan")}, {"x": b"bytes"}, {"x": object()}])
def test_details_must_be_json(store: Store, details: dict[str, object]) -> None:
    with store.stage() as staged:
        staged.write("a", [b"1"])
        with pytest.raises(Invalid, match=r"^details: must be JSON"):
            store.publish(staged, tenant="acme", name="x", method="lora", parts=(), details=details)


def test_a_record_does_not_share_its_details_with_the_caller(store: Store) -> None:
    details = {"targets": ["q_proj"]}
    with store.stage() as staged:
        staged.write("a", [b"1"])
        record, _ = store.publish(staged, tenant="acme", name="x", method="lora", parts=(), details=details)
    details["targets"].append("v_proj")
    assert record == store.get("acme", "x")
    assert record.details == {"targets": ["q_proj"]}
    assert hash(record) == hash(store.get("acme", "x"))
