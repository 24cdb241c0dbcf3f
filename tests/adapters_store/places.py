"""Places: where a store under test is. Blobs in files, objects in memory or S3; catalog in SQLite or PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import obstore
from obstore.store import MemoryStore, ObjectStore

from adapters_store.catalog import Clock
from adapters_store.digest import Digest
from adapters_store.object_blobs import ObjectBlobs
from adapters_store.opening import CACHE_BYTES, open_catalog, s3_bucket
from adapters_store.store import Store, open_store, utc_now
from tests.servers import PostgreSQL, SeaweedFS

FAST = ("files-sqlite", "objects-sqlite")
SLOW = ("files-postgresql", "s3-sqlite", "s3-postgresql")


class Place:
    """One store's place. Any number of stores may be opened there."""

    def __init__(self, root: Path, catalog_url: str | None, blobs_url: str | None, objects: ObjectStore | None) -> None:
        self.root = root
        self.catalog_url = catalog_url
        self.blobs_url = blobs_url
        self._objects = s3_bucket(blobs_url) if blobs_url else objects

    def open(self, *, clock: Clock = utc_now, cache_bytes: int = CACHE_BYTES) -> Store:
        """As `open_store` does it, but for the object store in memory, which has no URL."""
        if self._objects is None or self.blobs_url is not None:
            return open_store(self.root, self.catalog_url, self.blobs_url, cache_bytes=cache_bytes, clock=clock)
        catalog = open_catalog(self.root, self.catalog_url, clock)
        return Store(ObjectBlobs(self._objects, self.root, cache_bytes, catalog.exclusion), catalog, clock)

    def forget(self, digest: Digest) -> None:
        """As if this machine had never had it."""
        (self.root / "cache" / "sha256" / digest).unlink(missing_ok=True)

    def damage(self, digest: Digest, data: bytes | None) -> None:
        """What the store holds under `digest` becomes `data`, or nothing."""
        self.forget(digest)
        if self._objects is None:
            path = self.root / "blobs" / "sha256" / digest[:2] / digest[2:]
            path.unlink() if data is None else path.write_bytes(data)
        elif data is None:
            obstore.delete(self._objects, _key(digest))
        else:
            obstore.put(self._objects, _key(digest), data)


def new_place(kind: str, root: Path, postgresql: Callable[[], PostgreSQL], s3: Callable[[], SeaweedFS]) -> Place:
    """A new, empty one. The servers are started when they are first asked for."""
    blobs, _, catalog = kind.partition("-")
    return Place(
        root,
        catalog_url=postgresql().database() if catalog == "postgresql" else None,
        blobs_url=s3().place() if blobs == "s3" else None,
        objects=MemoryStore() if blobs == "objects" else None,
    )


def _key(digest: Digest) -> str:
    return f"blobs/sha256/{digest[:2]}/{digest[2:]}"
