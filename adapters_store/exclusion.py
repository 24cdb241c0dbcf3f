"""Exclusion: publishers and the collector of blobs keep out of each other's way. Here by locks on local directories.

The catalog has the other implementation (`Catalog.exclusion`): PostgreSQL's advisory locks, which reach every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from . import disk
from .errors import disk_errors


class Exclusion(Protocol):
    """Any number of publishers, or one collector. Held by the thread that entered it."""

    def publishing(self) -> AbstractContextManager[None]:
        """Held from the first blob to the catalog's commit. Raises: Unavailable."""

    def collecting(self) -> AbstractContextManager[None]:
        """Held while blobs are deleted: excludes `publishing`, and is not starved by it. Raises: Unavailable."""

    def confirm(self) -> None:
        """Raises: Unavailable when what this thread holds was lost, with the session that held it."""


class DirectoryExclusion:
    """For processes of one machine."""

    def __init__(self, outer: Path, inner: Path) -> None:
        """Two directories that exist: a waiting collector holds `outer`, through which publishers enter one by one."""
        self._outer = outer
        self._inner = inner

    @contextmanager
    def publishing(self) -> Iterator[None]:
        with ExitStack() as stack:
            with disk_errors(), disk.locked(self._outer):
                stack.enter_context(disk.locked(self._inner, shared=True))
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        with disk_errors(), disk.locked(self._outer), disk.locked(self._inner):
            yield

    def confirm(self) -> None:
        """The kernel keeps a lock for as long as its descriptor is open."""
