"""What keeps a store healthy and takes it elsewhere, as `Store` offers it: collecting, verifying, export and import."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import BinaryIO

from .backup import CheckPolicy, Exported, Imported, export_to, import_from
from .blobs import Blobs
from .catalog import Catalog, Clock, Keys
from .digest import Digest
from .errors import Invalid
from .names import check_name
from .records import Collected, Damage


class Upkeep:
    """The half of `Store` that is about the whole of it, whoever owns what."""

    _blobs: Blobs
    _catalog: Catalog
    _clock: Clock

    def gc(self, grace_seconds: float, *, dry_run: bool = False) -> Collected:
        """Frees what versions deleted at least `grace_seconds` ago held, blobs of that age that no version ever came
        to need (a crash between rename and commit), and uploads of dead processes. A dry run only counts, and no uploads.

        The grace must cover the longest time between looking an adapter up and having it loaded. Publishing waits.

        Raises: Invalid for a negative grace; Unavailable, and what was not freed yet is left to the next time.
        """
        if grace_seconds < 0:
            raise Invalid("grace_seconds", "must be at least 0", grace_seconds)
        uploads = 0 if dry_run else self._blobs.sweep()
        before = self._clock() - timedelta(seconds=grace_seconds)
        blobs = size_bytes = 0
        with self._blobs.collecting():
            if not dry_run:
                self._catalog.collect(before)
            needed = self._catalog.needed(before)
            for blob in self._blobs:
                written = None if blob in needed else self._blobs.modified(blob)
                if written is not None and written <= before:
                    size_bytes += self._blobs.size(blob) or 0
                    blobs += 1
                    if not dry_run:
                        self._blobs.delete(blob)
        return Collected(blobs, size_bytes, uploads)

    def verify(self) -> tuple[Damage, ...]:
        """Reads every byte of every live version; what is missing or damaged. Empty when all is well.

        Uploading the same files again, under any name, repairs them; so does importing an export that has them.
        """
        suspects = [blob for blob in self._catalog.dependents() if not self._blobs.intact(blob)]
        with self._blobs.publishing():  # look again while nothing is collected: a suspect may just have been deleted
            needed = self._catalog.dependents()
            faults = [blob for blob in suspects if blob in needed and not self._blobs.intact(blob)]
            return tuple(self._damage(blob, needed[blob]) for blob in faults)

    def export_to(self, target: BinaryIO, tenants: Collection[str] | None = None) -> Exported:
        """Writes all that `tenants` (every one by default) have, but their keys, as one tar file that `import_from` reads.

        Every byte is compared with its sha256 on the way. Other processes go on; a `gc` without grace may fail it.

        Raises: NotFound for a tenant that has nothing; Corrupt for content that is missing or damaged; Unavailable.
        """
        for tenant in tenants or ():
            check_name("tenant", tenant)
        return export_to(self._blobs, self._catalog, target, tenants)

    def import_from(self, source: BinaryIO, check_policy: CheckPolicy = dict) -> Imported:
        """Adds what an export holds, under the same tenants, names, versions and digests. All of it, or nothing.

        Idempotent. Versions that were deleted here come back; users stay bound where a newer binding is here, tenants'
        policies where there are any; nothing else is replaced. `check_policy` may refuse a policy by raising.

        Raises: Invalid for what is no export; Corrupt for a byte that its sha256 does not cover; Conflict when a version
            number stands for other content here; Unavailable.
        """
        return import_from(self._blobs, self._catalog, source, check_policy)

    def _damage(self, blob: Digest, keys: Keys) -> Damage:
        names = tuple(f"{tenant} {name}@{version}" for tenant, name, version in keys)
        return Damage(blob, "missing" if self._blobs.size(blob) is None else "damaged", names)
