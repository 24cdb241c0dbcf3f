"""Export and import: everything comes over, byte for byte, into any store, once or again; and what is no export is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters_store import archive, backup, manifest
from adapters_store.backup import Exported, Imported
from adapters_store.digest import Digest
from adapters_store.errors import Conflict, Corrupt, Invalid, NotFound, StoreError
from adapters_store.manifest import Entry
from adapters_store.records import AdapterRecord
from adapters_store.store import Store

from .conftest import HandClock, Upload

Files = dict[str, bytes]


@pytest.fixture
def other(directory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(directory / "other", clock=clock) as opened:
        yield opened


@pytest.fixture
def full(store: Store, upload: Upload) -> Store:
    """Two tenants with a file in common, deleted versions, users, a policy, a key."""
    upload(store, "acme", "support", config=b"{}", weights=b"one")
    upload(store, "acme", "support", config=b"{}", weights=b"two")
    upload(store, "acme", "gone", weights=b"deleted")
    upload(store, "zeta", "org/helper", config=b"{}", weights=b"")
    store.bind_user("acme", "ann@example.org", "support")
    store.bind_user("acme", "bob", "gone")
    store.delete("acme", "gone")
    store.put_tenant("acme", {"weight": 2.0})
    store.add_key("acme", scopes=("infer",), note="laptop")
    return store


def exported(store: Store, *tenants: str) -> bytes:
    target = io.BytesIO()
    store.export_to(target, tenants or None)
    return target.getvalue()


def imported(store: Store, data: bytes) -> Imported:
    return store.import_from(io.BytesIO(data))


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def packed(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    for name, data in files.items():
        archive.write_member(target, name, len(data), [data])
    archive.write_end(target)
    return target.getvalue()


def everything(store: Store, *tenants: str) -> object:
    """All that clients can see of these tenants."""
    records = {tenant: store.list(tenant)[0] for tenant in tenants}
    versions = [store.versions(tenant, record.name) for tenant, found in records.items() for record in found]
    users = [store.list_users(tenant) for tenant in tenants]
    return records, versions, users, store.list_tenants(), [contents(store, record) for found in versions for record in found]


def contents(store: Store, record: AdapterRecord) -> Files:
    return {name: path.read_bytes() for name, path in store.files(record.digest).items()}


def test_all_that_tenants_have_comes_over(full: Store, other: Store) -> None:
    target = io.BytesIO()
    done = full.export_to(target)
    assert done == Exported(tenants=2, versions=3, users=2, blobs=7, size_bytes=done.size_bytes)
    came = imported(other, target.getvalue())
    assert came == Imported(tenants=2, versions=3, new_versions=3, new_users=2, size_bytes=done.size_bytes)
    assert everything(other, "acme", "zeta") == everything(full, "acme", "zeta")
    assert other.verify() == ()
    assert other.gc(0).blobs == 0


def test_numbers_go_on_where_they_were(full: Store, other: Store, upload: Upload) -> None:
    imported(other, exported(full))
    assert upload(other, "acme", "support", weights=b"three")[0].version == 3
    assert upload(other, "acme", "gone", weights=b"anew")[0].version == 2


def test_one_tenant_alone(full: Store, other: Store) -> None:
    data = exported(full, "zeta")
    assert imported(other, data).versions == 1
    assert other.count("acme") == 0
    assert b"acme" not in data
    with pytest.raises(NotFound, match="tenant 'nobody' does not exist"):
        exported(full, "zeta", "nobody")


def test_keys_stay_where_they_are(full: Store, other: Store) -> None:
    (key,) = full.list_keys("acme")
    data = exported(full)
    assert b"laptop" not in data
    assert key.id.encode() not in data
    imported(other, data)
    assert other.list_keys("acme") == ()


def test_a_second_import_changes_nothing(full: Store, other: Store) -> None:
    data = exported(full)
    imported(other, data)
    before = everything(other, "acme", "zeta")
    again = imported(other, data)
    assert (again.versions, again.new_versions, again.new_users) == (3, 0, 0)
    assert everything(other, "acme", "zeta") == before
    assert exported(other) == data


def test_into_the_store_it_came_from(full: Store) -> None:
    """Deleted and collected since, or damaged: it is as it was."""
    before, data = everything(full, "acme", "zeta"), exported(full)
    full.delete("acme", "support")
    full.gc(0)
    record = full.get("zeta", "org/helper")
    full.files(record.digest)["config"].write_bytes(b"xx")
    assert full.verify() != ()
    assert imported(full, data).new_versions == 2
    assert everything(full, "acme", "zeta") == before
    assert full.verify() == ()


def test_a_version_deleted_but_not_collected_comes_back(full: Store) -> None:
    data = exported(full)
    full.delete("acme", "support", 1)
    assert imported(full, data).new_versions == 1
    assert [record.version for record in full.versions("acme", "support")] == [2, 1]
    full.gc(0)
    assert full.verify() == ()


def test_what_is_newer_here_stays(full: Store, other: Store, upload: Upload) -> None:
    data = exported(full)
    imported(other, data)
    newest, _ = upload(other, "acme", "support", weights=b"three")
    upload(other, "acme", "sales", weights=b"four")
    mine = other.bind_user("acme", "ann@example.org", "sales")
    policy = other.put_tenant("acme", {"weight": 5.0})
    imported(other, data)
    assert other.get("acme", "support") == newest
    assert other.get_user("acme", "ann@example.org") == mine
    assert other.tenant("acme") == policy


def test_a_number_that_stands_for_other_content_refuses_all(full: Store, other: Store, upload: Upload) -> None:
    upload(other, "zeta", "org/helper", weights=b"something else")
    with pytest.raises(Conflict, match="zeta org/helper@1 is another adapter here"):
        imported(other, exported(full))
    assert other.count("acme") == 0
    assert other.list_tenants() == ()
    other.gc(0)
    assert len(list(other._blobs)) == 2


def _without_owner(tenant: str, files: Mapping[str, Entry]) -> bytes:
    return json.dumps(files, sort_keys=True, separators=(",", ":")).encode()


def test_versions_of_releases_that_named_no_owner(
    store: Store, other: Store, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "encode", _without_owner)
        old, _ = upload(store, "default", "support", weights=b"one")
    assert contents(store, old) == {"weights": b"one"}
    imported(other, exported(store))
    assert contents(other, other.get("default", "support")) == {"weights": b"one"}
    new, created = upload(other, "default", "support", weights=b"one")
    assert (created, new.version, new.digest != old.digest) == (True, 2, True)


def test_an_empty_store(store: Store, other: Store) -> None:
    assert imported(other, exported(store)) == Imported(0, 0, 0, 0, 0)


def test_an_export_is_a_tar_file_with_nothing_but_plain_files(full: Store) -> None:
    data = exported(full)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {(info.type, info.mode, info.mtime, info.uname) for info in tar} == {(tarfile.REGTYPE, 0o600, 0, "")}
    held = members(data)
    assert next(iter(held)) == "index.json"
    for name, content in list(held.items())[1:]:
        assert name == f"blobs/{Digest.of(content)}"
    assert packed(held) == data


@pytest.mark.parametrize("damage", [b"", b"tvo", b"twoo"])
def test_damage_is_not_exported(full: Store, damage: bytes) -> None:
    full.files(full.get("acme", "support").digest)["weights"].write_bytes(damage)
    with pytest.raises(Corrupt, match="verify says whose it is"):
        exported(full)


def test_a_missing_manifest_is_not_exported(full: Store) -> None:
    full._blobs.path(full.get("acme", "support").digest).unlink()
    with pytest.raises(Corrupt, match="its manifest is missing"):
        exported(full)


def test_an_index_that_is_too_large_is_not_written(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "MAX_INDEX", 100)
    with pytest.raises(Invalid, match="export tenant by tenant"):
        exported(full)


# What is no export.


def changed(data: bytes, change: Callable[[dict[str, bytes]], object]) -> bytes:
    files = members(data)
    change(files)
    return packed(files)


def reindexed(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        index = json.loads(files["index.json"])
        change(index)
        files["index.json"] = json.dumps(index).encode()

    return apply


def flipped(files: dict[str, bytes]) -> None:
    name = next(name for name, data in files.items() if data == b"two")
    files[name] = b"tvo"


def last_gone(files: dict[str, bytes]) -> None:
    files.popitem()


def refused(store: Store, data: bytes) -> StoreError:
    """The error; nothing of the archive is visible, and collecting leaves nothing of it."""
    with pytest.raises(StoreError) as failure:
        imported(store, data)
    assert store.count() == 0
    assert store.list_tenants() == ()
    store.gc(0)
    assert list(store._blobs) == []
    return failure.value


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (flipped, Corrupt, "of the archive is damaged"),
        (last_gone, Invalid, "must hold every blob its index names, got '1 missing"),
        (lambda files: files.pop("index.json"), Invalid, "must begin with index.json"),
        (lambda files: files.update({"../../etc/passwd": b"x"}), Invalid, "may hold index.json and blobs/<sha256> only"),
        (lambda files: files.update({"blobs/../x": b"x"}), Invalid, "may hold index.json and blobs/<sha256> only"),
        (lambda files: files.update({f"blobs/{Digest.of(b'x')}": b"x"}), Invalid, "may hold each blob of its index once"),
        (lambda files: files.update({"index.json": b"{}"}), Invalid, "KeyError: 'format'"),
        (lambda files: files.update({"index.json": b"["}), Invalid, "JSONDecodeError"),
        (lambda files: files.update({"index.json": b"[" * 100_000}), Invalid, "RecursionError"),
        (reindexed(lambda index: index.update(format_version=2)), Invalid, "version 2"),
        (reindexed(lambda index: index["tenants"].append(index["tenants"][0])), Invalid, "tenant 'acme' is there twice"),
        (reindexed(lambda index: index["tenants"][0].update(tenant="../acme")), Invalid, "may not hold '..'"),
        (reindexed(lambda index: index["tenants"][0].update(tenant="shared")), Invalid, "is reserved"),
        (reindexed(lambda index: index["tenants"][0].update(tenant="eve")), Invalid, "a manifest of its own tenant"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(version=0)), Invalid, "no whole number from 1"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(version=3)), Invalid, "no whole number from 1"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(version=2)), Invalid, "is there twice"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(name="x")), Invalid, "KeyError: 'x'"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(digest="../x")), Invalid, "not a sha256"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(details=[])), Invalid, "is no object"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(size_bytes=6)), Invalid, "as large as its files"),
        (reindexed(lambda index: index["tenants"][0]["versions"][0].update(created_at="2026-01-01")), Invalid, "no time zone"),
        (reindexed(lambda index: index["tenants"][0]["users"][0].update(user_id="")), Invalid, "user_id"),
        (reindexed(lambda index: index["tenants"][0]["users"][0].update(adapter_id="x")), Invalid, "KeyError"),
        (reindexed(lambda index: index["tenants"][0]["last_versions"].update({"a b": 1})), Invalid, "adapter_id"),
        (reindexed(lambda index: index["tenants"][0].update(policy=7)), Invalid, "is no object"),
    ],
)
def test_an_archive_that_is_wrong_is_refused_whole(
    full: Store, other: Store, change: Callable[[dict[str, bytes]], object], kind: type[StoreError], words: str
) -> None:
    error = refused(other, changed(exported(full), change))
    assert type(error) is kind
    assert words in str(error)


def test_a_manifest_that_asks_for_another_tenants_file_is_refused(full: Store, other: Store) -> None:
    """Its owner never sent that file: an archive may not hand out what it does not hold."""
    stolen = Digest.of(b"private to somebody here")
    forged = manifest.encode("eve", {"weights": Entry(stolen, 24)})
    version = json.loads(members(exported(full, "zeta"))["index.json"])["tenants"][0]["versions"][0]
    version.update(name="x", version=1, digest=Digest.of(forged), size_bytes=24)
    tenant: dict[str, Any] = {"tenant": "eve", "policy": None, "created_at": None, "users": []}
    tenant |= {"last_versions": {"x": 1}, "versions": [version]}
    index = {"format": "adapterd-export", "format_version": 1, "tenants": [tenant], "blobs": {Digest.of(forged): len(forged)}}
    data = packed({"index.json": json.dumps(index).encode(), archive.blob_name(Digest.of(forged)): forged})
    assert "every file of a version must be among its blobs" in str(refused(other, data))


def test_cut_short_anywhere_it_is_refused_whole(full: Store, other: Store) -> None:
    data = exported(full)
    for length in range(0, len(data), 512 + 100):
        assert isinstance(refused(other, data[:length]), Invalid)


def test_a_policy_may_be_refused(full: Store, other: Store) -> None:
    def check(policy: object) -> None:
        raise Invalid("policy", "is not liked", policy)

    with pytest.raises(Invalid, match="is not liked"):
        other.import_from(io.BytesIO(exported(full)), check)
    assert other.count() == 0


def test_a_collection_in_the_middle_of_an_import_is_noticed(full: Store, other: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data, real = exported(full), backup._needs

    def collecting(*arguments: object) -> object:
        found = real(*arguments)  # type: ignore[arg-type]
        other.gc(0)
        return found

    monkeypatch.setattr(backup, "_needs", collecting)
    with pytest.raises((Conflict, Corrupt)):
        imported(other, data)
    monkeypatch.undo()
    assert other.count() == 0
    assert imported(other, data).new_versions == 3


def test_many_blobs_are_kept_in_portions(
    store: Store, other: Store, directory: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "_TOGETHER", 3)
    for number in range(5):
        upload(store, "acme", f"adapter-{number}", weights=b"%d" % number, config=b"{}")
    imported(other, exported(store))
    assert everything(other, "acme") == everything(store, "acme")
    assert [path for path in (directory / "other" / "staging").rglob("*") if path.is_file()] == []
