"""Blobs: immutable bytes under their sha256. Owns `blobs/`; knows nothing of tenants, names or versions.

blobs/sha256/9f/2c...    a blob; the first two hex digits are a directory
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from . import disk
from .digest import Digest
from .drafts import Draft, Drafts
from .errors import disk_errors
from .exclusion import DirectoryExclusion, Exclusion

_CHUNK = 1 << 20  # bytes read at once when re-hashing


class Blobs(Protocol):
    """Where bytes live: `FileBlobs` in a directory, `ObjectBlobs` in a bucket. Drafts are local with both."""

    def draft(self) -> Draft:
        """A new, empty draft, on the file system from which `keep` can take it."""

    def keep(self, drafts: Iterable[Draft]) -> None:
        """Makes drafts blobs, durable on return. One already there that is not what it was is replaced by equal bytes."""

    def path(self, digest: Digest) -> Path:
        """A readable local file, which exists if the blob does. Raises: Corrupt, Unavailable when it has to be fetched."""

    def local_size(self, digest: Digest) -> int | None:
        """Bytes of the file at `path`, or None when none is there. Raises: as `path`."""

    def size(self, digest: Digest) -> int | None:
        """Bytes, or None when there is no such blob."""

    def modified(self, digest: Digest) -> datetime | None:
        """When the blob was last written, aware; None when there is no such blob."""

    def intact(self, digest: Digest) -> bool:
        """Reads the whole blob and compares its sha256. False also when it is missing or unreadable."""

    def delete(self, digest: Digest) -> None:
        """Idempotent."""

    def sweep(self) -> int:
        """Removes drafts that nobody is writing any more; how many directories of them."""

    def publishing(self) -> AbstractContextManager[None]:
        """Held from `keep` to the catalog's commit: no blob is collected meanwhile. Any number may hold it."""

    def collecting(self) -> AbstractContextManager[None]:
        """Held while blobs are deleted: excludes `publishing`, and is not starved by it."""

    def __iter__(self) -> Iterator[Digest]:
        """Every blob there is."""

    def close(self) -> None: ...


class FileBlobs:
    """Blobs in a directory. Any number of instances and processes may share it.

    Invariant: a file under `blobs/sha256` is complete and durable from the moment its name exists.
    """

    def __init__(self, root: Path, exclusion: Exclusion | None = None) -> None:
        """`exclusion` is by locks on these directories unless it is given."""
        self._home = root / "blobs" / "sha256"
        with disk_errors():
            self._home.mkdir(parents=True, exist_ok=True)
            disk.sync_directory(self._home.parent)
            disk.sync_directory(root)
            self._drafts = Drafts(root)
        self._exclusion = exclusion or DirectoryExclusion(self._home.parent, self._home)

    def draft(self) -> Draft:
        return self._drafts.new()

    def keep(self, drafts: Iterable[Draft]) -> None:
        """temp -> fsync -> rename -> fsync of the directories, so that a name never points to bytes not yet on disk."""
        shelves: set[Path] = set()
        with disk_errors():
            for draft in drafts:
                draft.finish()
                target = self.path(draft.digest)
                disk.make_directory(target.parent)
                disk.move(draft.path, target)
                shelves.add(target.parent)
            for directory in (*sorted(shelves), self._home):
                disk.sync_directory(directory)

    def path(self, digest: Digest) -> Path:
        return self._home / digest[:2] / digest[2:]

    def local_size(self, digest: Digest) -> int | None:
        return self.size(digest)

    def size(self, digest: Digest) -> int | None:
        status = self._status(digest)
        return None if status is None else status.st_size

    def modified(self, digest: Digest) -> datetime | None:
        status = self._status(digest)
        return None if status is None else datetime.fromtimestamp(status.st_mtime, UTC)

    def intact(self, digest: Digest) -> bool:
        sha256 = hashlib.sha256()
        try:
            with self.path(digest).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    sha256.update(chunk)
        except OSError:
            return False
        return sha256.hexdigest() == digest

    def delete(self, digest: Digest) -> None:
        with disk_errors():
            disk.remove(self.path(digest))

    def sweep(self) -> int:
        return self._drafts.sweep()

    def publishing(self) -> AbstractContextManager[None]:
        return self._exclusion.publishing()

    def collecting(self) -> AbstractContextManager[None]:
        return self._exclusion.collecting()

    def __iter__(self) -> Iterator[Digest]:
        """A file whose name is no digest is none of ours and is left alone."""
        with disk_errors():
            for path in self._home.glob("*/*"):
                with suppress(ValueError):
                    yield Digest(path.parent.name + path.name)

    def close(self) -> None:
        """Drops this instance's drafts. Idempotent."""
        self._drafts.close()

    def _status(self, digest: Digest) -> os.stat_result | None:
        with disk_errors():
            try:
                return self.path(digest).stat()
            except FileNotFoundError:
                return None
