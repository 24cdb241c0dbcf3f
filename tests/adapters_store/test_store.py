import itertools
from collections.abc import Callable
from datetime import UTC
from pathlib import Path

import pytest

from adapters_store import disk
from adapters_store.digest import Digest
from adapters_store.errors import Conflict, Corrupt, Invalid, NotFound, Unavailable
from adapters_store.records import AdapterRecord
from adapters_store.store import MAX_PAGE, Store

from .changes import raised
from .places import Place

Upload = Callable[..., tuple[AdapterRecord, bool]]
Content = Callable[[Store, AdapterRecord], dict[str, bytes]]

EVERYWHERE = True  # blobs in files, objects and S3, catalogs in SQLite and PostgreSQL


# Publishing and reading.


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


# Tenants and names.


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


# Listing.


def test_pages_show_every_name_once_newest_first(store: Store, upload: Upload) -> None:
    for number in range(7):
        upload(store, "acme", f"adapter/{number}", a=b"%d" % number)
    upload(store, "acme", "adapter/2", a=b"new")
    upload(store, "zeta", "other", a=b"1")
    seen, cursor, pages = [], None, 0
    while pages == 0 or cursor is not None:
        records, cursor = store.list("acme", limit=3, cursor=cursor)
        seen += [(record.name, record.version) for record in records]
        pages += 1
    assert seen == [(f"adapter/{n}", 2 if n == 2 else 1) for n in (2, 6, 5, 4, 3, 1, 0)]
    assert pages == 3
    assert store.list("acme", limit=7)[1] is None
    assert (store.count("acme"), store.count("zeta"), store.count()) == (7, 1, 8)


def test_a_name_published_between_two_pages_is_not_shown_twice(store: Store, upload: Upload) -> None:
    for name in "abcd":
        upload(store, "acme", name, a=name.encode())
    first, cursor = store.list("acme", limit=2)
    upload(store, "acme", "d", a=b"again")
    upload(store, "acme", "e", a=b"e")
    second, _ = store.list("acme", limit=2, cursor=cursor)
    assert [record.name for record in first + second] == ["d", "c", "b", "a"]


def test_records_of_one_instant_are_paged_by_name(place: Place, upload: Upload, clock: Callable[..., object]) -> None:
    instant = clock()
    with place.open(clock=lambda: instant) as store:
        for name in "bcBa":  # by bytes, not as a language sorts them
            upload(store, "acme", name, a=b"1")
        first, cursor = store.list("acme", limit=1)
        rest, _ = store.list("acme", cursor=cursor)
        assert [record.name for record in first + rest] == ["c", "b", "a", "B"]


def test_users_are_paged_by_id(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    for user in ("c@x.org", "a@x.org", "b@x.org", "B@x.org"):
        store.bind_user("acme", user, "support")
    first, cursor = store.list_users("acme", limit=2)
    rest, end = store.list_users("acme", limit=2, cursor=cursor)
    assert [binding.user_id for binding in first + rest] == ["B@x.org", "a@x.org", "b@x.org", "c@x.org"]
    assert end is None


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1, 10**30])
def test_a_limit_out_of_range_is_refused(store: Store, limit: int) -> None:
    for call in (store.list, store.list_users):
        with pytest.raises(Invalid, match=f"^limit: must be between 1 and {MAX_PAGE}, got {limit}"):
            call("acme", limit=limit)


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "====",
        "AAAA",
        "é",
        "Li4v",
        "MDAwMS0wMS0wMVQwMDowMDowMCsyMzo1OSB4",
        "eA",
        "eA===",
        "e A==",
        "MjAyNi0wMS0wMVQwMDowMDowMCB4 ",
        "\x00",
        "A" * 10_000,
    ],
)
def test_a_cursor_that_no_page_gave_is_refused(store: Store, cursor: str) -> None:
    for call in (store.list, store.list_users):
        with pytest.raises(Invalid, match=r"^cursor: must be one that a page of this listing gave"):
            call("acme", cursor=cursor)


# Deleting.


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


# Users.


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


# Damage.


def test_verify_finds_every_changed_or_missing_byte_and_an_upload_repairs_it(
    store: Store, place: Place, upload: Upload
) -> None:
    upload(store, "acme", "support", a=b"12345", b=b"678")
    upload(store, "zeta", "helper", a=b"12345")
    assert store.verify() == ()
    place.damage(Digest.of(b"12345"), b"12346")
    place.damage(Digest.of(b"678"), None)
    damage = {fault.problem: fault for fault in store.verify()}
    assert damage["damaged"].blob == Digest.of(b"12345")
    assert damage["damaged"].versions == ("acme support@1", "zeta helper@1")
    assert (damage["missing"].blob, damage["missing"].versions) == (Digest.of(b"678"), ("acme support@1",))
    upload(store, "acme", "repair", a=b"12345", b=b"678")
    assert store.verify() == ()


@pytest.mark.usefixtures("files_only")
def test_verify_reports_what_cannot_be_read_and_goes_on(store: Store, upload: Upload) -> None:
    record, _ = upload(store, "acme", "support", a=b"1", b=b"2")
    for path in store.files(record.digest).values():
        path.unlink()
        path.mkdir()
    assert [fault.problem for fault in store.verify()] == ["damaged", "damaged"]


@pytest.mark.usefixtures("files_only")
@pytest.mark.parametrize("damage", [b"", b"123456"])
def test_a_file_of_another_size_is_corrupt(store: Store, upload: Upload, damage: bytes) -> None:
    record, _ = upload(store, "acme", "support", weights=b"12345")
    store.files(record.digest)["weights"].write_bytes(damage)
    with pytest.raises(Corrupt, match=f"file 'weights' of 5 bytes has {len(damage)} bytes"):
        store.files(record.digest)


def test_a_missing_file_or_manifest_is_corrupt(store: Store, place: Place, upload: Upload) -> None:
    record, _ = upload(store, "acme", "support", weights=b"12345")
    place.damage(Digest.of(b"12345"), None)
    with pytest.raises(Corrupt, match="file 'weights' of 5 bytes is missing"):
        store.files(record.digest)
    place.damage(record.digest, None)
    with pytest.raises(Corrupt, match="its manifest is missing"):
        store.files(record.digest)


def test_an_uploaded_file_that_looks_like_a_manifest_is_not_one(store: Store, upload: Upload) -> None:
    secret, _ = upload(store, "zeta", "secret", weights=b"private")
    forged = b'{"mine":["%s",7]}' % Digest.of(b"private").encode()
    upload(store, "acme", "bait", file=forged)
    for digest in (Digest.of(forged), Digest.of(b"private"), Digest.of(b"nothing")):
        with pytest.raises(NotFound):
            store.files(digest)
    assert set(store.files(secret.digest)) == {"weights"}


# Opening, closing, several stores on one directory.


def test_a_store_finds_everything_again(place: Place, upload: Upload, content: Content) -> None:
    with place.open() as store:
        record, _ = upload(store, "acme", "support", a=b"1")
        binding = store.bind_user("acme", "ann", "support")
    with place.open() as store:
        assert store.get("acme", "support") == record
        assert store.get_user("acme", "ann") == binding
        assert content(store, record) == {"a": b"1"}
    assert place.root.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("files_only")
def test_a_directory_holds_what_the_readme_says(store: Store, root: Path, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    store.close()
    assert sorted(path.name for path in root.iterdir()) == ["blobs", "catalog.sqlite3", "staging"]


def test_two_stores_at_one_place_see_each_others_changes(store: Store, place: Place, upload: Upload) -> None:
    with place.open() as other:
        record, _ = upload(store, "acme", "support", a=b"1")
        assert other.get("acme", "support") == record
        assert upload(other, "acme", "support", a=b"1") == (record, False)
        assert upload(other, "acme", "support", a=b"2")[0].version == 2
        assert set(store.files(store.get("acme", "support").digest)) == {"a"}
        other.delete("acme", "support")
        with pytest.raises(NotFound):
            store.get("acme", "support")


def test_opening_closing_and_collecting_elsewhere_spares_a_running_upload(store: Store, place: Place) -> None:
    with store.stage() as staged:
        staged.write("a", [b"1"])
        with place.open() as other:
            assert other.gc(0).uploads == 0
        record, _ = store.publish(staged, tenant="acme", name="x", method="lora", parts=(), details={})
    assert store.files(record.digest)["a"].read_bytes() == b"1"


def test_closing_twice_is_fine_and_an_upload_after_it_fails(place: Place) -> None:
    store = place.open()
    store.close()
    store.close()
    with pytest.raises(Unavailable), store.stage() as staged:
        staged.write("a", [b"1"])


def test_a_store_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="disk failed"):
        Store.open(tmp_path / "file")


# Order and failure.


@pytest.mark.usefixtures("files_only")
def test_the_catalog_learns_of_a_blob_after_it_is_durable(
    store: Store, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def spy(owner: object, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (done.append(name), real(*a, **k))[1])

    for name in ("write", "sync", "move", "sync_directory"):
        spy(disk, name)
    spy(store._catalog, "add")
    upload(store, "acme", "support", a=b"1")
    assert done == ["write", "write", *["sync", "move"] * 2, *["sync_directory"] * 3, "add"]


@pytest.mark.usefixtures("files_only")
def test_a_failure_at_any_disk_operation_leaves_nothing_and_the_next_upload_works(
    store: Store, root: Path, upload: Upload, blob_files: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th create, write, sync or rename fails with ENOSPC, for n = 1, 2, 3... until one upload passes."""
    kept, _ = upload(store, "acme", "support", a=b"1", b=b"2")
    failures = 0
    while True:
        with monkeypatch.context() as patch:
            fail_at(failures + 1, patch)
            failure = raised(lambda: upload(store, "acme", "support", a=b"1", b=b"3", c=b"4"))
        if failure is None:
            break
        failures += 1
        assert str(failure) == "the store's disk failed: No space left on device"
        assert store.versions("acme", "support") == (kept,)
        assert [path for path in (root / "staging").rglob("*") if path.is_file()] == []
        store.gc(0)
        assert (blob_files(), store.verify()) == (3, ())
    assert failures > 4 * 4  # four blobs, each created, written, synced and moved; then the directories
    assert store.get("acme", "support").version == 2


def fail_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """From now on the `number`-th operation on the disk fails, once."""
    operations = itertools.count(1)

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(operations) == number:
                raise OSError(28, "No space left on device", "/secret/path")
            return real(*arguments)

        return call

    for name in ("create", "write", "sync", "move", "sync_directory"):
        patch.setattr(disk, name, failing(getattr(disk, name)))
