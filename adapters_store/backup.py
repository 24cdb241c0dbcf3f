"""Backup: a store's content into an archive, and an archive's into a store of any backend. Owns the order of the two.

    export   catalog -> index -> every blob, hashed while it is copied
    import   index -> every blob, hashed before it is kept -> one transaction

Both stream: what they hold in memory is the index. Both run beside servers that use the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from . import manifest, snapshot
from .archive import INDEX, MAX_INDEX, Member, blob_name, blob_of, read_members, write_end, write_member
from .blobs import Blobs
from .catalog import Catalog
from .digest import Digest
from .drafts import Draft
from .errors import Conflict, Corrupt, Invalid, NotFound, disk_errors
from .records import JSON, AdapterRecord
from .snapshot import Index

CheckPolicy = Callable[[Mapping[str, JSON]], object]  # raises what is wrong with a tenant's policy

_CHUNK = 1 << 20  # bytes read at once
_TOGETHER = 32  # blobs made durable at once


@dataclass(frozen=True, slots=True)
class Exported:
    """What an archive holds."""

    tenants: int
    versions: int
    users: int
    blobs: int
    size_bytes: int  # of all blobs


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import found in its archive, and how much of it was not in the store."""

    tenants: int
    versions: int
    new_versions: int
    new_users: int
    size_bytes: int  # of all blobs


def export_to(blobs: Blobs, catalog: Catalog, target: BinaryIO, tenants: Collection[str] | None) -> Exported:
    """`Store.export_to`."""
    found = catalog.transfer.take(tenants)
    missing = set(tenants or ()) - {tenant.tenant for tenant in found}
    if missing:
        raise NotFound("tenant", min(missing))
    versions = [version for tenant in found for version in tenant.versions]
    index = Index(found, _sizes(blobs, versions))
    head = snapshot.encode(index)
    if len(head) > MAX_INDEX:
        raise Invalid("archive", f"its index may have {MAX_INDEX} bytes; export tenant by tenant", len(head))
    write_member(target, INDEX, len(head), [head])
    for blob, size in index.blobs.items():
        write_member(target, blob_name(blob), size, _copied(blobs, blob))
    write_end(target)
    users = sum(len(tenant.users) for tenant in found)
    return Exported(len(found), len(versions), users, len(index.blobs), sum(index.blobs.values()))


def import_from(blobs: Blobs, catalog: Catalog, source: BinaryIO, check_policy: CheckPolicy) -> Imported:
    """`Store.import_from`."""
    members = read_members(source)
    index = _read_index(members)
    for tenant in index.tenants:
        if tenant.policy is not None:
            check_policy(tenant.policy)
    _keep(blobs, members, index)
    needs = {version.digest: _needs(blobs, version, index) for version in index.versions}
    with blobs.publishing():
        for blob, size in index.blobs.items():
            if blobs.size(blob) != size:
                raise Conflict(f"import: blob {blob.short} was collected meanwhile; import again, and collect with a grace")
        done = catalog.transfer.restore(index.tenants, needs)
    return Imported(len(index.tenants), len(index.versions), done.versions, done.users, sum(index.blobs.values()))


def _sizes(blobs: Blobs, versions: Iterable[AdapterRecord]) -> dict[Digest, int]:
    """Every blob that the versions need, manifests first. Raises: Corrupt before a byte is written."""
    manifests: dict[Digest, int] = {}
    files: dict[Digest, int] = {}
    for version in versions:
        listing = manifest.read(blobs, version.digest)
        manifests[version.digest] = blobs.size(version.digest) or 0
        files |= {entry.blob: entry.size for entry in listing.files.values()}
    for blob, size in files.items():
        if blobs.size(blob) != size:
            raise Corrupt(f"export: blob {blob.short} of {size} bytes is missing or damaged; verify says whose it is")
    return manifests | files


def _copied(blobs: Blobs, blob: Digest) -> Iterator[bytes]:
    """Its content. Raises: Corrupt at the end when that is not what its digest names."""
    sha256 = hashlib.sha256()
    with disk_errors(), blobs.path(blob).open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            yield chunk
    if sha256.hexdigest() != blob:
        raise Corrupt(f"export: blob {blob.short} is damaged; verify says whose it is")


def _read_index(members: Iterator[Member]) -> Index:
    first = next(members, None)
    if first is None or first.name != INDEX:
        raise Invalid("archive", f"must begin with {INDEX}", None if first is None else first.name)
    if first.size > MAX_INDEX:
        raise Invalid("archive", f"its index may have {MAX_INDEX} bytes", first.size)
    return snapshot.decode(b"".join(first.chunks))


def _keep(blobs: Blobs, members: Iterator[Member], index: Index) -> None:
    """Every blob that the index names and no other, durable on return. What an error leaves is swept like any orphan."""
    due = dict(index.blobs)
    drafts: list[Draft] = []
    try:
        for member in members:
            draft = blobs.draft()
            drafts.append(draft)
            _receive(member, draft, due)
            if len(drafts) == _TOGETHER:
                _flush(blobs, drafts)
        _flush(blobs, drafts)
    finally:
        _discard(drafts)
    if due:
        raise Invalid("archive", "must hold every blob its index names", f"{len(due)} missing, {min(due).short} among them")


def _receive(member: Member, draft: Draft, due: dict[Digest, int]) -> None:
    blob = blob_of(member.name)
    size = due.pop(blob, None)
    if size != member.size:
        raise Invalid(
            "archive", f"may hold each blob of its index once, with {size} bytes", f"{member.name}, {member.size} bytes"
        )
    for chunk in member.chunks:
        with disk_errors():
            draft.write(chunk)
    if draft.digest != blob:
        raise Corrupt(f"import: blob {blob.short} of the archive is damaged, its sha256 is {draft.digest.short}")


def _flush(blobs: Blobs, drafts: list[Draft]) -> None:
    blobs.keep(drafts)
    _discard(drafts)
    drafts.clear()


def _discard(drafts: Iterable[Draft]) -> None:
    for draft in drafts:
        with suppress(OSError):
            draft.discard()


def _needs(blobs: Blobs, version: AdapterRecord, index: Index) -> set[Digest]:
    """Every blob of a version. Raises: Invalid when its manifest is another tenant's or asks for what the index lacks."""
    shown = f"{version.tenant} {version.name}@{version.version}"
    listing = manifest.read(blobs, version.digest) if version.digest in index.blobs else None
    if listing is None or listing.tenant not in (None, version.tenant):
        raise Invalid("archive", "every version must have a manifest of its own tenant", shown)
    entries = listing.files.values()
    if any(index.blobs.get(entry.blob) != entry.size for entry in entries):
        raise Invalid("archive", "every file of a version must be among its blobs", shown)
    if sum(entry.size for entry in entries) != version.size_bytes:
        raise Invalid("archive", "a version must be as large as its files", shown)
    return {version.digest, *(entry.blob for entry in entries)}
