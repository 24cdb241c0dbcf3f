"""Object blobs: blobs in an S3 bucket, through obstore. Owns the keys under its prefix and the local copies.

blobs/sha256/9f/2c...    an object; PUT only where there is none, so no process can replace what is good

Drafts and copies are local. Where the bucket cannot be reached, uploads and copies that are yet to be fetched fail.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import ObjectStore

from .blob_cache import BlobCache
from .digest import Digest
from .drafts import Draft, Drafts
from .errors import Corrupt, Unavailable, disk_errors
from .exclusion import DirectoryExclusion, Exclusion

_PREFIX = "blobs/sha256/"


class ObjectBlobs:
    """`Blobs` in an object store. Any number of instances, processes and machines may share it.

    Invariant: an object under the prefix is complete from the moment it exists (a PUT is atomic).
    """

    def __init__(self, objects: ObjectStore, root: Path, cache_bytes: int, exclusion: Exclusion | None = None) -> None:
        """`root` holds drafts and copies. `exclusion` is by locks on its directories unless it is given."""
        self._objects = objects
        self._cache = BlobCache(root, cache_bytes)
        locks = root / "cache" / "locks"
        with disk_errors():
            (locks / "inner").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._drafts = Drafts(root)
        self._exclusion = exclusion or DirectoryExclusion(locks, locks / "inner")
        self._fetching = _Turns()

    def draft(self) -> Draft:
        return self._drafts.new()

    def keep(self, drafts: Iterable[Draft]) -> None:
        """One PUT each, and one HEAD, whether or not the object is there: who else has equal files makes no difference.

        Raises: Unavailable.
        """
        for draft in drafts:
            with disk_errors():
                draft.finish()
                content = _content(draft)
            with _object_errors():
                self._put(draft, content)
            self._cache.take(draft)

    def path(self, digest: Digest) -> Path:
        """The local copy, fetched first if there is none; no file is there if there is no object.

        Raises: Corrupt when the object is not what its key says; Unavailable.
        """
        if not self._cache.find(digest):
            with self._fetching.turn(digest):
                if not self._cache.find(digest):
                    self._fetch(digest)
        return self._cache.path(digest)

    def local_size(self, digest: Digest) -> int | None:
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def size(self, digest: Digest) -> int | None:
        status = self._status(digest)
        return None if status is None else status["size"]

    def modified(self, digest: Digest) -> datetime | None:
        status = self._status(digest)
        return None if status is None else status["last_modified"]

    def intact(self, digest: Digest) -> bool:
        """Of the object, not of the copy. Raises: Unavailable when the bucket cannot be reached."""
        sha256 = hashlib.sha256()
        try:
            for chunk in self._chunks(digest):
                sha256.update(chunk)
        except FileNotFoundError:
            return False
        return sha256.hexdigest() == digest

    def delete(self, digest: Digest) -> None:
        """Only while the lock of `collecting` is surely held. Copies elsewhere go when their caches need the room."""
        self._exclusion.confirm()
        with _object_errors(), suppress(FileNotFoundError):
            obstore.delete(self._objects, _key(digest))
        self._cache.drop(digest)

    def sweep(self) -> int:
        return self._drafts.sweep()

    def publishing(self) -> AbstractContextManager[None]:
        return self._exclusion.publishing()

    def collecting(self) -> AbstractContextManager[None]:
        return self._exclusion.collecting()

    def __iter__(self) -> Iterator[Digest]:
        """An object whose key is no digest is none of ours and is left alone."""
        with _object_errors():
            for batch in obstore.list(self._objects, _PREFIX):
                for found in batch:
                    with suppress(ValueError):
                        yield Digest(found["path"].removeprefix(_PREFIX).replace("/", ""))

    def close(self) -> None:
        """Drops this instance's drafts; the copies stay for the next one. Idempotent."""
        self._drafts.close()

    def _fetch(self, digest: Digest) -> None:
        draft = self._drafts.new()
        try:
            with suppress(FileNotFoundError):
                self._receive(draft, digest)
        finally:
            draft.discard()

    def _receive(self, draft: Draft, digest: Digest) -> None:
        for chunk in self._chunks(digest):
            with disk_errors():
                draft.write(chunk)
        if draft.digest != digest:
            raise Corrupt(f"blob {digest.short}: its sha256 is {draft.digest.short}")
        with disk_errors():
            draft.finish()
        self._cache.take(draft)

    def _chunks(self, digest: Digest) -> Iterator[bytes]:
        """Raises: FileNotFoundError when there is no such object; Unavailable."""
        with _object_errors():
            found = self._get(digest)
            if found is not None:
                yield from found.stream()
        if found is None:
            raise FileNotFoundError

    def _status(self, digest: Digest) -> obstore.ObjectMeta | None:
        with _object_errors():
            try:
                return obstore.head(self._objects, _key(digest))
            except FileNotFoundError:
                return None

    def _get(self, digest: Digest) -> obstore.GetResult | None:
        try:
            return obstore.get(self._objects, _key(digest))
        except FileNotFoundError:
            return None

    def _put(self, draft: Draft, content: mmap.mmap | bytes) -> None:
        """What is there already stays, if its size and entity tag (the md5, after a plain PUT) say that it is the same.

        Else it is replaced by the bytes that belong there: so is a damaged blob repaired. A store whose tags mean
        something else gets equal bytes once more.
        """
        key, tag = _key(draft.digest), None
        try:
            obstore.put(self._objects, key, content, mode="create", use_multipart=False)
        except AlreadyExistsError:
            tag = hashlib.md5(content, usedforsecurity=False).hexdigest()
        status = self._status(draft.digest)
        same = status is not None and status["size"] == draft.size and tag in (None, (status["e_tag"] or "").strip('"'))
        if not same:
            obstore.put(self._objects, key, content, mode="overwrite", use_multipart=False)


class _Turns:
    """One thread at a time per digest: the others wait, and find what it fetched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[Digest, tuple[threading.Lock, int]] = {}  # the lock of each, and how many want it

    @contextmanager
    def turn(self, digest: Digest) -> Iterator[None]:
        with self._lock:
            lock, wanted = self._taken.get(digest, (threading.Lock(), 0))
            self._taken[digest] = (lock, wanted + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, wanted = self._taken.pop(digest)
                if wanted > 1:
                    self._taken[digest] = (lock, wanted - 1)


def _key(digest: Digest) -> str:
    return f"{_PREFIX}{digest[:2]}/{digest[2:]}"


def _content(draft: Draft) -> mmap.mmap | bytes:
    """The file's bytes, mapped: the largest upload takes no memory of its own. Unmapped when nobody refers to them."""
    if not draft.size:
        return b""
    with draft.path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def check_access(objects: ObjectStore) -> None:
    """Asks for an object and for a listing. Who does not answer now may do so later; who refuses was set up wrongly.

    Raises: Unavailable for a bucket that does not exist, or keys that do not open it.
    """
    try:
        with suppress(FileNotFoundError):
            obstore.head(objects, f"{_PREFIX}00/0")
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise _unavailable(error) from error
    except (BaseError, OSError):
        return
    try:
        next(iter(obstore.list(objects, _PREFIX, chunk_size=1)), None)
    except (BaseError, OSError) as error:
        raise Unavailable("the store's object storage failed: the bucket does not exist, or must not be listed") from error


@contextmanager
def _object_errors() -> Iterator[None]:
    """Raises: Unavailable."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> Unavailable:
    """Only the kind of an error is told: its text names the endpoint and the bucket."""
    kind = "the bucket does not exist" if isinstance(error, FileNotFoundError) else type(error).__name__
    return Unavailable(f"the store's object storage failed: {kind}")
