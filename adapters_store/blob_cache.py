"""Blob cache: local copies of blobs that live elsewhere, bounded in bytes, the longest unused dropped first. Fetches nothing.

cache/sha256/9f2c...    a copy under its sha256; its modification time says when it was last used

Any number of processes may share the directory: what they must agree on is in the file system and under its lock.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from . import disk
from .digest import Digest
from .drafts import Draft
from .errors import disk_errors

IN_USE = 60.0  # seconds since its last use in which a copy stays, even beyond the limit: somebody may be about to open it


class BlobCache:
    """Thread-safe. Invariant: a path that `find` gave holds the bytes of its digest, for `IN_USE` seconds at least."""

    def __init__(self, root: Path, limit: int) -> None:
        """`limit` in bytes. Raises: Unavailable."""
        self._home = root / "cache" / "sha256"
        self._limit = limit
        self._checked: dict[Digest, tuple[int, int]] = {}  # what this process has hashed: inode and size
        with disk_errors():
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: Digest) -> Path:
        return self._home / digest

    def find(self, digest: Digest) -> bool:
        """Whether there is a copy, which counts as used now. One that was damaged while nobody looked is dropped."""
        path = self.path(digest)
        with disk_errors(), disk.locked(self._home, shared=True):
            try:
                status = path.stat()
                if self._checked.get(digest) != (status.st_ino, status.st_size):
                    if _sha256(path) != digest:
                        disk.remove(path)
                        return False
                    self._checked[digest] = (status.st_ino, status.st_size)
                os.utime(path)
            except FileNotFoundError:
                return False
        return True

    def take(self, draft: Draft) -> None:
        """Makes a finished draft a copy, and room for it. Raises: Unavailable."""
        with disk_errors(), disk.locked(self._home):
            disk.move(draft.path, self.path(draft.digest))
            status = self.path(draft.digest).stat()
            self._checked[draft.digest] = (status.st_ino, status.st_size)
            self._evict()

    def drop(self, digest: Digest) -> None:
        self._checked.pop(digest, None)
        with disk_errors():
            disk.remove(self.path(digest))

    def _evict(self) -> None:
        """Needs the exclusive lock: nobody is between finding a copy and marking it as used."""
        found = [(entry.stat(), Path(entry.path)) for entry in os.scandir(self._home)]
        total = sum(status.st_size for status, _ in found)
        for status, path in sorted(found, key=lambda copy: copy[0].st_mtime):
            if total <= self._limit or status.st_mtime > time.time() - IN_USE:
                return
            disk.remove(path)
            total -= status.st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
