"""Bytes are safe before the catalog knows of them, a failing disk leaves nothing behind, and damage is found and said."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store import disk
from adapters_store.digest import Digest
from adapters_store.errors import Corrupt
from adapters_store.store import Store

from .changes import raised
from .conftest import Upload
from .places import Place

EVERYWHERE = True


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
