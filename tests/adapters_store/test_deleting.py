"""Deleting takes effect at once; collecting takes the bytes later, and only those that nothing needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapters_store.errors import Invalid, NotFound, Unavailable
from adapters_store.store import Store

from .conftest import Content, Upload

EVERYWHERE = True


def test_a_deleted_adapter_is_gone_at_once_and_its_numbers_stay_used(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    upload(store, "acme", "support", a=b"2")
    store.delete("acme", "support")
    for call in (store.get, store.versions, store.delete):
        with pytest.raises(NotFound):
            call("acme", "support")
    assert store.list("acme") == ((), None)
    assert store.count("acme") == 0
    store.gc(0)
    record, created = upload(store, "acme", "support", a=b"2")
    assert (record.version, created) == (3, True)


def test_deleting_tells_which_contents_no_name_leads_to_any_more(store: Store, upload: Upload) -> None:
    one, two = (upload(store, "acme", "support", a=content)[0].digest for content in (b"1", b"2"))
    upload(store, "acme", "support", a=b"1")
    upload(store, "acme", "sales", a=b"2")
    assert store.delete("acme", "support", 3) == frozenset(), "version 1 has the same"
    assert store.delete("acme", "support") == {one}, "sales has version 2's"
    assert store.delete("acme", "sales") == {two}


def test_deleting_the_newest_version_brings_back_the_one_before(store: Store, upload: Upload) -> None:
    first, _ = upload(store, "acme", "support", a=b"1")
    upload(store, "acme", "support", a=b"2")
    store.delete("acme", "support", 2)
    assert store.get("acme", "support") == first
    assert store.list("acme") == ((first,), None)
    assert upload(store, "acme", "support", a=b"1") == (first, False)
    assert upload(store, "acme", "support", a=b"2")[0].version == 3


def test_a_version_can_be_deleted_only_once(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    store.delete("acme", "support", 1)
    with pytest.raises(NotFound, match="'support version 1'"):
        store.delete("acme", "support", 1)


def test_the_files_of_a_deleted_version_last_through_the_grace(
    store: Store, upload: Upload, clock: Callable[..., object], content: Content
) -> None:
    record, _ = upload(store, "acme", "support", a=b"12345")
    store.delete("acme", "support")
    clock.advance(59)
    assert store.gc(60).blobs == 0
    assert content(store, record) == {"a": b"12345"}
    clock.advance(2)
    collected = store.gc(60)
    assert (collected.blobs, collected.size_bytes > 5) == (2, True)
    with pytest.raises(NotFound, match="digest"):
        store.files(record.digest)


def test_gc_keeps_what_another_version_name_or_tenant_needs(
    store: Store, upload: Upload, content: Content, blob_files: Callable[[], int]
) -> None:
    upload(store, "acme", "one", shared=b"base", own=b"1")
    two, _ = upload(store, "acme", "two", shared=b"base", own=b"2")
    theirs, _ = upload(store, "zeta", "one", shared=b"base", own=b"1")
    store.delete("acme", "one")
    assert store.gc(0).blobs == 1  # the manifest
    store.delete("zeta", "one")
    assert store.gc(0).blobs == 2  # theirs, and the file `own`
    assert content(store, two) == {"shared": b"base", "own": b"2"}
    assert blob_files() == 3
    assert theirs.digest != two.digest


def test_gc_sweeps_old_orphans_and_leaves_young_ones(
    store: Store, upload: Upload, clock: Callable[..., object], blob_files: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise Unavailable("between rename and commit")

    monkeypatch.setattr(store._catalog, "add", fail)
    with pytest.raises(Unavailable):
        upload(store, "acme", "support", a=b"1")
    assert blob_files() == 2
    clock.advance(10)
    assert store.gc(3600).blobs == 0
    clock.advance(3600)
    assert store.gc(3600).blobs == 2
    assert blob_files() == 0


def test_a_negative_grace_is_refused(store: Store) -> None:
    with pytest.raises(Invalid, match=r"^grace_seconds: must be at least 0, got -1"):
        store.gc(-1)
