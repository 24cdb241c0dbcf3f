"""The store: tenants' adapters as immutable, content-addressed versions behind mutable names.

Owns the order in which blobs and catalog change, on which every promise rests: bytes are durable before a row names
them, and a row is gone before its bytes are. Knows nothing of models, requests or HTTP.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from . import manifest
from .access import Access
from .blobs import Blobs
from .catalog import Catalog, Clock
from .digest import Digest
from .errors import Corrupt, Invalid, NotFound
from .names import MAX_NAME, SHARED, check_name
from .opening import CACHE_BYTES, open_parts
from .quota import UNLIMITED, Quota, Usage
from .records import JSON, AdapterRecord, UserBinding
from .staging import Staged
from .upkeep import Upkeep

MAX_PAGE = 1000  # records per page of a listing


def utc_now() -> datetime:
    return datetime.now(UTC)


class Store(Access, Upkeep):
    """Adapters and users of all tenants. Synchronous and thread-safe; instances and processes may share a directory.

    Invariant: every live version has every byte it needs, durably, whenever anybody can see it.

    Usage:
        with Store.open(Path("store")) as store, store.stage(max_bytes=1 << 28) as staged:
            staged.write("adapter_model.safetensors", chunks)
            record, created = store.publish(
                staged, tenant="acme", name="support", method="lora", parts=("lora",), details={"rank": 16}
            )
    """

    def __init__(self, blobs: Blobs, catalog: Catalog, clock: Clock = utc_now) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._clock = clock

    @classmethod
    def open(cls, root: Path, *, clock: Clock = utc_now) -> Self:
        """The store in directory `root`, which is made if need be; uploads that a dead process left are removed.

        Raises: Conflict when newer code wrote it; Corrupt; Unavailable.
        """
        return cls(*open_parts(root, None, None, CACHE_BYTES, clock), clock)

    def close(self) -> None:
        """Uploads still being staged are dropped. Idempotent."""
        self._blobs.close()
        self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # Adapters.

    def stage(self, *, max_bytes: int | None = None) -> Staged:
        """A new upload, at most `max_bytes` over all its files. Use it as a context manager."""
        return Staged(self._blobs.draft, max_bytes)

    def publish(
        self,
        staged: Staged,
        *,
        tenant: str,
        name: str,
        method: str,
        parts: tuple[str, ...],
        details: Mapping[str, JSON],
        quota: Quota = UNLIMITED,
    ) -> tuple[AdapterRecord, bool]:
        """Makes an upload the newest version of `name`. Durable and visible to every process on return.

        The flag is False when the newest version already has exactly these files: nothing changes, and that version's
        record is returned. Files that other names or tenants hold take no extra space and look no different; the digest
        is this tenant's own.

        Raises: Invalid for a name, an upload without files, details that are not JSON; Conflict for an upload that is
            broken or already published; OverQuota for a new version beyond what this tenant may keep; Unavailable.
        """
        check_name("tenant", tenant)
        check_name("adapter_id", name)
        report = _plain_json(details)
        digest, drafts = staged.seal(tenant)
        entries = staged.entries.values()
        size_bytes = sum(entry.size for entry in entries)
        self._catalog.check_quota(tenant, name, digest, size_bytes, quota)  # what is refused here has left no byte behind
        with self._blobs.publishing():
            self._blobs.keep(drafts)
            return self._catalog.add(
                tenant=tenant,
                name=name,
                digest=digest,
                blobs={digest, *(entry.blob for entry in entries)},
                method=method,
                parts=parts,
                size_bytes=size_bytes,
                details=report,
                quota=quota,
            )

    def get(self, tenant: str, name: str, version: int | None = None) -> AdapterRecord:
        """One version, the newest by default. Raises: NotFound, the same for a foreign name as for a missing one."""
        check_name("tenant", tenant)
        return self._catalog.get(tenant, check_name("adapter_id", name), version)

    def resolve(self, tenant: str, name: str, version: int | None = None) -> AdapterRecord:
        """What `name` means to this tenant: its own adapter, or else a shared one. Raises: NotFound as `get` does."""
        try:
            return self.get(tenant, name, version)
        except NotFound:
            if version is None or not self._owns(tenant, name):
                with suppress(NotFound):
                    return self.get(SHARED, name, version)
            raise

    def versions(self, tenant: str, name: str) -> tuple[AdapterRecord, ...]:
        """Newest first. Raises: NotFound."""
        check_name("tenant", tenant)
        return self._catalog.versions(tenant, check_name("adapter_id", name))

    def list(
        self, tenant: str, *, limit: int = 100, cursor: str | None = None, shared: bool = False
    ) -> tuple[tuple[AdapterRecord, ...], str | None]:
        """The newest version of each name, newest first, and the cursor of the next page (None on the last).

        With `shared` also what operators share, under names that the tenant has no adapter of its own for. An adapter
        published while a client pages through moves to the front and is not seen twice.

        Raises: Invalid for a limit outside 1..MAX_PAGE or a cursor that this method did not give.
        """
        check_name("tenant", tenant)
        after = None if cursor is None else _age_of(cursor)
        records = self._catalog.list(tenant, _page(limit) + 1, after)
        if shared and tenant != SHARED:
            more = self._catalog.list(SHARED, limit + 1, after, beside=tenant)
            records = tuple(sorted((*records, *more), key=_age, reverse=True))
        shown = records[:limit]
        if len(records) <= limit:
            return shown, None
        return shown, _cursor(f"{shown[-1].created_at.isoformat()} {shown[-1].name}")

    def count(self, tenant: str | None = None) -> int:
        """Adapter names in use; of every tenant by default."""
        return self._catalog.count(None if tenant is None else check_name("tenant", tenant))

    def usage(self, tenant: str) -> Usage:
        """What counts against a tenant's quota."""
        return self._catalog.usage(check_name("tenant", tenant))

    def delete(self, tenant: str, name: str, version: int | None = None) -> frozenset[Digest]:
        """Deletes one version, or the adapter. At once for everybody who asks by name; `gc` frees the space.

        Returns the digests that no name leads to any more: another name of the tenant's may have the same content.

        Requests that run on it can still load its `files` until `gc`'s grace is over. A later upload under the name
        goes on counting. Users bound to the adapter stay bound: their requests fail as for any missing adapter, rather
        than silently reach the bare base model, and work again once the name is uploaded anew.

        Raises: NotFound.
        """
        check_name("tenant", tenant)
        return self._catalog.delete(tenant, check_name("adapter_id", name), version)

    def files(self, digest: Digest) -> Mapping[str, Path]:
        """File name -> local file of the content that a record's `digest` names. Sizes are checked, bytes by `verify`.

        Only the digest of a version is accepted, so a file that merely looks like a manifest is never read as one.

        Raises: NotFound for a digest of no version; Corrupt when a file is missing or has another size.
        """
        if not self._catalog.knows(digest):
            raise NotFound("digest", digest)
        entries = manifest.read(self._blobs, digest).files
        for name, entry in entries.items():
            size = self._blobs.local_size(entry.blob)
            if size != entry.size:
                found = "is missing" if size is None else f"has {size} bytes"
                raise Corrupt(f"adapter {digest.short}: file {name!r} of {entry.size} bytes {found}")
        return {name: self._blobs.path(entry.blob) for name, entry in entries.items()}

    # Users.

    def bind_user(self, tenant: str, user_id: str, adapter_id: str) -> UserBinding:
        """Requests of `user_id` go through `adapter_id` from now on, whatever it was before.

        Raises: NotFound when this tenant has no such adapter.
        """
        check_name("tenant", tenant)
        return self._catalog.bind_user(tenant, check_name("user_id", user_id), check_name("adapter_id", adapter_id))

    def get_user(self, tenant: str, user_id: str) -> UserBinding:
        """The binding, also while its adapter is deleted. Raises: NotFound."""
        check_name("tenant", tenant)
        return self._catalog.get_user(tenant, check_name("user_id", user_id))

    def list_users(
        self, tenant: str, *, limit: int = 100, cursor: str | None = None
    ) -> tuple[tuple[UserBinding, ...], str | None]:
        """Bindings in the order of their user ids, and the cursor of the next page (None on the last).

        Raises: Invalid for a limit outside 1..MAX_PAGE or a cursor that this method did not give.
        """
        check_name("tenant", tenant)
        after = None if cursor is None else _user_of(cursor)
        bindings = self._catalog.list_users(tenant, _page(limit) + 1, after)
        shown = bindings[:limit]
        return shown, _cursor(shown[-1].user_id) if len(bindings) > limit else None

    def delete_user(self, tenant: str, user_id: str) -> None:
        """Raises: NotFound."""
        check_name("tenant", tenant)
        self._catalog.delete_user(tenant, check_name("user_id", user_id))

    def _owns(self, tenant: str, name: str) -> bool:
        """Whether the tenant has any version of that name."""
        try:
            self.get(tenant, name)
        except NotFound:
            return False
        return True


def open_store(
    root: Path,
    catalog_url: str | None = None,
    blobs_url: str | None = None,
    *,
    cache_bytes: int = CACHE_BYTES,
    clock: Clock = utc_now,
) -> Store:
    """The store whose catalog is in PostgreSQL, whose blobs are in S3, or both; `root` keeps the rest, and copies of blobs.

    Raises: Invalid for a URL; Conflict when newer code wrote it; Corrupt; Unavailable.
    """
    return Store(*open_parts(root, catalog_url, blobs_url, cache_bytes, clock), clock)


def _plain_json(details: Mapping[str, JSON]) -> dict[str, JSON]:
    """A copy that is exactly what a later `get` will return. Raises: Invalid when it is not JSON (NaN is not)."""
    try:
        copy: dict[str, JSON] = json.loads(json.dumps(details, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid("details", "must be JSON", f"{type(error).__name__}: {error}") from error
    return copy


def _age(record: AdapterRecord) -> tuple[datetime, str]:
    """What listings are ordered by."""
    return record.created_at, record.name


def _page(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE:
        raise Invalid("limit", f"must be between 1 and {MAX_PAGE}", limit)
    return limit


def _cursor(position: str) -> str:
    return base64.urlsafe_b64encode(position.encode()).decode()


def _position(cursor: str) -> str:
    """The inverse of `_cursor`. Raises: ValueError."""
    if len(cursor) > 4 * MAX_NAME:
        raise ValueError("too long")
    position = base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    if _cursor(position) != cursor:
        raise ValueError("not canonical")
    return position


def _age_of(cursor: str) -> tuple[datetime, str]:
    """Raises: Invalid."""
    try:
        moment, name = _position(cursor).split(" ")
        return datetime.fromisoformat(moment).astimezone(UTC), check_name("adapter_id", name)
    except (ValueError, OverflowError, Invalid):
        raise Invalid("cursor", "must be one that a page of this listing gave", cursor) from None


def _user_of(cursor: str) -> str:
    """Raises: Invalid."""
    try:
        return check_name("user_id", _position(cursor))
    except (ValueError, Invalid):
        raise Invalid("cursor", "must be one that a page of this listing gave", cursor) from None
