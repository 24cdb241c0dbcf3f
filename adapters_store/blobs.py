"""Blobs: immutable bytes under their sha256. Owns `blobs/` and `staging/`; knows nothing of tenants, names or versions.

staging/x7f3q_ab/0       a draft; its writer holds a lock on the directory, so what is not locked is dead
blobs/sha256/9f/2c...    a blob; the first two hex digits are a directory
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Protocol

from . import disk
from .digest import Digest
from .errors import Corrupt, disk_errors

_CHUNK = 1 << 20  # bytes read at once when re-hashing


class Draft:
    """A blob being written. Invariant: the file at `path` holds exactly the `size` bytes that `digest` covers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._file = disk.create(path)

    def write(self, data: bytes) -> None:
        disk.write(self._file, data)
        self._sha256.update(data)
        self.size += len(data)

    @property
    def digest(self) -> Digest:
        return Digest(self._sha256.hexdigest())

    def finish(self) -> None:
        """Flush to the device, and close. The descriptor that wrote is the one synced, so no write error goes unseen.

        Raises: Corrupt when the file is not as long as what was written to it.
        """
        length = os.fstat(self._file.fileno()).st_size
        if length != self.size:
            raise Corrupt(f"upload: {self.size} bytes were written, {length} are on disk")
        disk.sync(self._file)
        self._file.close()

    def discard(self) -> None:
        """Close, and remove what is still at `path`. Idempotent."""
        try:
            self._file.close()
        finally:
            disk.remove(self.path)


class Blobs(Protocol):
    """Where bytes live. `FileBlobs` is the embedded one; an object store keeps drafts local and PUTs them in `keep`."""

    def draft(self) -> Draft:
        """A new, empty draft, on the file system from which `keep` can take it."""

    def keep(self, drafts: Iterable[Draft]) -> None:
        """Makes drafts blobs, durable on return. A blob already there is replaced by equal bytes."""

    def path(self, digest: Digest) -> Path:
        """A readable local file, if the blob exists."""

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

    def __init__(self, root: Path) -> None:
        self._home = root / "blobs" / "sha256"
        self._staging = root / "staging"
        self._numbers = itertools.count()
        with disk_errors():
            self._home.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            disk.sync_directory(self._home.parent)
            disk.sync_directory(root)
            with disk.locked(self._staging):
                self._remove_abandoned()
                self._session, self._held = self._new_session()

    def draft(self) -> Draft:
        with disk_errors():
            return Draft(self._session / str(next(self._numbers)))

    def keep(self, drafts: Iterable[Draft]) -> None:
        """temp -> fsync -> rename -> fsync of the directories, so that a name never points to bytes not yet on disk."""
        shelves: set[Path] = set()
        with disk_errors():
            for draft in drafts:
                draft.finish()
                target = self.path(draft.digest)
                target.parent.mkdir(exist_ok=True)
                disk.move(draft.path, target)
                shelves.add(target.parent)
            for directory in (*sorted(shelves), self._home):
                disk.sync_directory(directory)

    def path(self, digest: Digest) -> Path:
        return self._home / digest[:2] / digest[2:]

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
        with disk_errors(), disk.locked(self._staging):
            return self._remove_abandoned()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Publishers enter one by one through the lock on `blobs/`, which a waiting collector holds: none overtakes it."""
        with ExitStack() as stack:
            with disk_errors(), disk.locked(self._home.parent):
                stack.enter_context(disk.locked(self._home, shared=True))
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        with disk_errors(), disk.locked(self._home.parent), disk.locked(self._home):
            yield

    def __iter__(self) -> Iterator[Digest]:
        """A file whose name is no digest is none of ours and is left alone."""
        with disk_errors():
            for path in self._home.glob("*/*"):
                with suppress(ValueError):
                    yield Digest(path.parent.name + path.name)

    def close(self) -> None:
        """Drops this instance's drafts. Idempotent."""
        if self._held is None:
            return
        with disk_errors(), disk.locked(self._staging):
            shutil.rmtree(self._session, ignore_errors=True)
            os.close(self._held)
            self._held = None

    def _status(self, digest: Digest) -> os.stat_result | None:
        with disk_errors():
            try:
                return self.path(digest).stat()
            except FileNotFoundError:
                return None

    def _new_session(self) -> tuple[Path, int | None]:
        """This instance's own staging directory, locked for as long as the instance lives."""
        session = Path(mkdtemp(dir=self._staging))
        return session, disk.hold(session)

    def _remove_abandoned(self) -> int:
        """Needs the lock on `staging/`: a session between its mkdir and its lock would look abandoned."""
        removed = 0
        for session in [path for path in self._staging.iterdir() if path.is_dir()]:
            held = disk.hold(session)
            if held is not None:
                shutil.rmtree(session)
                os.close(held)
                removed += 1
        return removed
