"""Blobs in an object store, on one in memory. Whole stores, on S3 too: the modules that say `EVERYWHERE = True`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from obstore.store import MemoryStore

from adapters_store import object_blobs as module
from adapters_store.digest import Digest
from adapters_store.drafts import Draft
from adapters_store.errors import Corrupt, Invalid, Unavailable
from adapters_store.object_blobs import ObjectBlobs, check_access
from adapters_store.opening import s3_bucket
from adapters_store.store import Store, open_store

from .conftest import Upload

CACHE = 1 << 30
NOWHERE = "http://127.0.0.1:1"  # nobody listens there


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def blobs(objects: MemoryStore, root: Path) -> Iterator[ObjectBlobs]:
    root.mkdir()
    opened = ObjectBlobs(objects, root, CACHE)
    yield opened
    opened.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the object store is asked, as (verb, mode)."""
    asked: list[str] = []

    def spied(name: str) -> Callable[..., object]:
        real = getattr(obstore, name)

        def call(*arguments: object, **options: object) -> object:
            asked.append(f"{name} {options['mode']}" if "mode" in options else name)
            return real(*arguments, **options)

        return call

    for name in ("put", "head", "get", "delete", "list"):
        monkeypatch.setattr(obstore, name, spied(name))
    return asked


def written(blobs: ObjectBlobs, data: bytes) -> Draft:
    draft = blobs.draft()
    draft.write(data)
    return draft


def kept(blobs: ObjectBlobs, data: bytes) -> Digest:
    draft = written(blobs, data)
    blobs.keep([draft])
    draft.discard()
    return draft.digest


def key(digest: Digest) -> str:
    return f"blobs/sha256/{digest[:2]}/{digest[2:]}"


def forget(root: Path) -> None:
    """All local copies."""
    for path in (root / "cache" / "sha256").iterdir():
        path.unlink()


@pytest.mark.parametrize("data", [b"", b"weights"])
def test_a_kept_draft_is_an_object_under_its_digest_and_a_local_copy(
    blobs: ObjectBlobs, objects: MemoryStore, data: bytes
) -> None:
    digest = kept(blobs, data)
    assert bytes(obstore.get(objects, key(digest)).bytes()) == data
    assert blobs.path(digest).read_bytes() == data
    assert (blobs.size(digest), blobs.local_size(digest)) == (len(data), len(data))
    assert (blobs.intact(digest), list(blobs)) == (True, [digest])


def test_an_object_is_made_only_where_there_is_none(blobs: ObjectBlobs, calls: list[str]) -> None:
    kept(blobs, b"weights")
    assert calls == ["put create", "head"]


def test_bytes_that_are_there_already_stay_and_what_is_damaged_is_replaced(
    blobs: ObjectBlobs, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = kept(blobs, b"weights")
    monkeypatch.setattr(module.hashlib, "md5", lambda *_, **__: Tag(obstore.head(objects, key(digest))["e_tag"] or ""))
    before = obstore.head(objects, key(digest))
    kept(blobs, b"weights")
    assert obstore.head(objects, key(digest)) == before
    obstore.put(objects, key(digest), b"short")  # its tag is now "the md5" as well
    kept(blobs, b"weights")
    assert blobs.intact(digest)
    monkeypatch.undo()
    obstore.put(objects, key(digest), b"wEights")
    kept(blobs, b"weights")
    assert blobs.intact(digest)


class Tag:
    """What hashlib.md5 gives, made to agree with the store in memory, whose tags are numbers."""

    def __init__(self, tag: str) -> None:
        self.hexdigest = lambda: tag.strip('"')


def test_a_copy_is_fetched_once_for_all_who_want_it_at_once(
    blobs: ObjectBlobs, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = kept(blobs, b"weights" * 1000)
    forget(root)
    fetched, real, start = [], obstore.get, threading.Barrier(8)
    monkeypatch.setattr(obstore, "get", lambda *a: (fetched.append(a[1]), real(*a))[1])

    def work(_: int) -> bytes:
        start.wait(60)
        return blobs.path(digest).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(8))) == {b"weights" * 1000}
    assert fetched == [key(digest)]


def test_one_slow_fetch_keeps_no_other_waiting(blobs: ObjectBlobs, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = kept(blobs, b"slow"), kept(blobs, b"quick")
    forget(root)
    real, begun, go_on = obstore.get, threading.Event(), threading.Event()

    def get(objects: MemoryStore, path: str) -> object:
        if path == key(slow):
            begun.set()
            assert go_on.wait(60)
        return real(objects, path)

    monkeypatch.setattr(obstore, "get", get)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(blobs.path, slow)
        assert begun.wait(60)
        assert blobs.path(quick).read_bytes() == b"quick"
        assert not waiting.done()
        go_on.set()
        assert waiting.result().read_bytes() == b"slow"


def test_a_corrupt_object_is_told_and_leaves_no_copy_and_no_draft(blobs: ObjectBlobs, objects: MemoryStore, root: Path) -> None:
    digest = kept(blobs, b"weights")
    forget(root)
    obstore.put(objects, key(digest), b"wEights")
    with pytest.raises(Corrupt, match=f"blob {digest.short}: its sha256 is {Digest.of(b'wEights').short}"):
        blobs.path(digest)
    assert list((root / "cache" / "sha256").iterdir()) == []
    assert [path for path in (root / "staging").rglob("*") if path.is_file()] == []
    assert not blobs.intact(digest)


def test_a_missing_object_is_a_file_that_is_not_there(blobs: ObjectBlobs, root: Path) -> None:
    digest = Digest.of(b"nothing")
    assert not blobs.path(digest).exists()
    assert (blobs.size(digest), blobs.local_size(digest), blobs.modified(digest)) == (None, None, None)
    assert not blobs.intact(digest)
    blobs.delete(digest)


def test_foreign_objects_are_left_alone(blobs: ObjectBlobs, objects: MemoryStore) -> None:
    digest = kept(blobs, b"x")
    for path in ("blobs/sha256/notes.txt", "blobs/other/ab", "notes.txt"):
        obstore.put(objects, path, b"mine")
    assert list(blobs) == [digest]


def test_more_blobs_than_a_page_of_a_listing_are_all_found(blobs: ObjectBlobs, objects: MemoryStore) -> None:
    digests = {Digest.of(b"%d" % number) for number in range(1100)}
    for digest in digests:
        obstore.put(objects, key(digest), b"")
    assert set(blobs) == digests


def test_nothing_is_deleted_once_the_lock_is_lost(objects: MemoryStore, root: Path) -> None:
    class Lost:
        def confirm(self) -> None:
            raise Unavailable("lost")

    root.mkdir()
    blobs = ObjectBlobs(objects, root, CACHE, Lost())  # type: ignore[arg-type]
    digest = kept(blobs, b"weights")
    with pytest.raises(Unavailable, match="lost"):
        blobs.delete(digest)
    assert list(blobs) == [digest]
    blobs.close()


def test_collecting_waits_for_publishers_on_the_same_directory(blobs: ObjectBlobs, objects: MemoryStore, root: Path) -> None:
    other, done = ObjectBlobs(objects, root, CACHE), threading.Event()

    def collect() -> None:
        with other.collecting():
            done.set()

    collector = threading.Thread(target=collect)
    with blobs.publishing(), blobs.publishing():
        collector.start()
        assert not done.wait(0.2)
    collector.join(60)
    assert done.is_set()
    other.close()


# An object store that cannot be reached.


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ENDPOINT_URL", NOWHERE), ("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "hush"), ("REGION", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.mark.usefixtures("unreachable")
def test_without_it_copies_go_on_and_uploads_and_cold_loads_are_unavailable(
    objects: MemoryStore, root: Path, upload: Upload
) -> None:
    with open_store(root, None, "s3://bucket/prefix") as down:  # it may be back soon
        up = Store(ObjectBlobs(objects, root, CACHE), down._catalog)
        warm, cold = upload(up, "acme", "warm", a=b"1")[0], upload(up, "acme", "cold", a=b"2")[0]
        (root / "cache" / "sha256" / Digest.of(b"2")).unlink()
        assert down.get("acme", "cold") == cold
        assert down.files(warm.digest)["a"].read_bytes() == b"1"
        refusals = []
        for call in (lambda: down.files(cold.digest), lambda: upload(down, "acme", "new", a=b"3"), down.verify):
            with pytest.raises(Unavailable, match=r"^the store's object storage failed: \w+$") as refused:
                call()
            refusals.append(str(refused.value))
        assert not any(word in text for text in refusals for word in ("127.0.0.1", "bucket", "hush", "/"))
        assert down.count("acme") == 2
        assert [path for path in (root / "staging").rglob("*") if path.is_file()] == []
        assert up.files(cold.digest)["a"].read_bytes() == b"2"
        up._blobs.close()


@pytest.mark.slow
def test_a_bucket_that_must_not_be_read_or_is_not_there_is_refused_at_once(
    s3: object, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unavailable, match="the bucket does not exist, or must not be listed"):
        open_store(root, None, "s3://nobody-made-this")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Unavailable, match="PermissionDeniedError"):
        open_store(root, None, "s3://adapters")
    with pytest.raises(Unavailable, match="PermissionDeniedError"):
        check_access(s3_bucket("s3://adapters/any/prefix"))


@pytest.mark.parametrize(
    "url", ["", "bucket", "gs://bucket", "s3://", "s3:///x", "s3://me:hush@bucket", "s3://b:1", "s3://b?x=y", "s3://b#x"]
)
def test_a_url_that_is_not_of_a_bucket_is_refused_without_repeating_it(url: str, root: Path) -> None:
    with pytest.raises(Invalid, match=r"^blobs_url: must be s3://BUCKET or s3://BUCKET/PREFIX") as refused:
        open_store(root, None, url)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "http://me:hush@host"])
def test_an_endpoint_that_is_no_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(Invalid, match=r"^AWS_ENDPOINT_URL: must be http://HOST:PORT or https://HOST:PORT") as refused:
        s3_bucket("s3://bucket")
    assert "hush" not in str(refused.value)
