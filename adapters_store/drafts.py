"""Drafts: bytes on their way in, on local disk, whatever holds the blobs later. Owns `staging/`; knows no blob.

staging/x7f3q_ab/0       a draft; its writer holds a lock on the directory, so what is not locked is dead
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

from . import disk
from .digest import Digest
from .errors import Corrupt, disk_errors


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


class Drafts:
    """One instance's drafts, in a directory of their own that it locks for as long as it lives."""

    def __init__(self, root: Path) -> None:
        """Removes what dead instances left in `root`/staging. Raises: OSError."""
        self._staging = root / "staging"
        self._numbers = itertools.count()
        self._staging.mkdir(exist_ok=True)
        with disk.locked(self._staging):
            self._remove_abandoned()
            self._session = Path(mkdtemp(dir=self._staging))
            self._held = disk.hold(self._session)

    def new(self) -> Draft:
        """Raises: Unavailable."""
        with disk_errors():
            return Draft(self._session / str(next(self._numbers)))

    def sweep(self) -> int:
        """Removes the drafts of dead instances; how many directories of them. Raises: Unavailable."""
        with disk_errors(), disk.locked(self._staging):
            return self._remove_abandoned()

    def close(self) -> None:
        """Drops this instance's drafts. Idempotent. Raises: Unavailable."""
        if self._held is None:
            return
        with disk_errors(), disk.locked(self._staging):
            shutil.rmtree(self._session, ignore_errors=True)
            os.close(self._held)
            self._held = None

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
