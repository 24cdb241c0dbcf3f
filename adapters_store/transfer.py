"""Transfer: snapshots out of a catalog and into one. Owns the queries of both; reads and writes no blob.

What is restored joins what is there: nothing is taken away, and nobody else's version is replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Column, Connection, Row, Select, insert, select, update

from .digest import Digest
from .errors import Conflict
from .records import AdapterRecord, UserBinding
from .schema import adapters, contents, tenants, users, versions
from .snapshot import TenantSnapshot
from .sql import Transaction, upsert

Needs = Mapping[Digest, Set[Digest]]  # digest of a version -> every blob it needs, its manifest included

Key = tuple[Column[Any], ...]

_RECORD = [versions.c[name] for name in AdapterRecord.__dataclass_fields__]


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` changed: versions that were not live before, and users bound anew."""

    versions: int = 0
    users: int = 0

    def __add__(self, other: Restored) -> Restored:
        return Restored(self.versions + other.versions, self.users + other.users)


class Transfer:
    """Snapshots of one catalog's tenants. One transaction per method."""

    def __init__(self, read: Transaction, write: Transaction) -> None:
        self._read = read
        self._write = write

    def take(self, only: Collection[str] | None) -> tuple[TenantSnapshot, ...]:
        """The tenants that have anything, in order; among `only` these, unless None."""
        with self._read() as db:
            return _take(db, only)

    def restore(self, snapshots: Iterable[TenantSnapshot], needs: Needs) -> Restored:
        """Makes every version of the snapshots live, binds their users unless a newer binding is there, and sets tenants up
        that are not: the settings of those that are stay as they are here.

        Raises: Conflict when a version number stands for other content here.
        """
        done = Restored()
        with self._write() as db:
            for tenant in snapshots:
                _set_up(db, tenant)
                _count_on(db, tenant)
                done += Restored(_restore_versions(db, tenant, needs), sum(_bind(db, user) for user in tenant.users))
        return done


def _take(db: Connection, only: Collection[str] | None) -> tuple[TenantSnapshot, ...]:
    """What refers is read before what it refers to, so that also where statements see different moments nothing dangles."""
    bound = _grouped(db, select(users), tuple(users.primary_key), only)
    live = _grouped(db, select(*_RECORD).where(versions.c.deleted_at.is_(None)), tuple(versions.primary_key), only)
    named = _grouped(db, select(adapters), tuple(adapters.primary_key), only)
    set_up = {tenant: row for tenant, (row,) in _grouped(db, select(tenants), tuple(tenants.primary_key), only).items()}
    return tuple(
        TenantSnapshot(
            tenant=tenant,
            policy=set_up[tenant].policy if tenant in set_up else None,
            created_at=set_up[tenant].created_at if tenant in set_up else None,
            last_versions={row.name: row.last_version for row in named.get(tenant, [])},
            versions=tuple(_record(row) for row in live.get(tenant, [])),
            users=tuple(UserBinding(**row._mapping) for row in bound.get(tenant, [])),
        )
        for tenant in sorted(named.keys() | set_up.keys())
    )


def _set_up(db: Connection, tenant: TenantSnapshot) -> None:
    if tenant.policy is not None:
        values = {"name": tenant.tenant, "policy": dict(tenant.policy), "created_at": tenant.created_at}
        db.execute(upsert(db, tenants).values(values).on_conflict_do_nothing())


def _count_on(db: Connection, tenant: TenantSnapshot) -> None:
    """Numbers are given from the higher of the two counts. Holds every name until the transaction ends."""
    for name, last in sorted(tenant.last_versions.items()):
        row = upsert(db, adapters).values(tenant=tenant.tenant, name=name, last_version=last)
        higher = adapters.c.last_version < row.excluded.last_version
        change = {"last_version": row.excluded.last_version}
        db.execute(row.on_conflict_do_update(index_elements=["tenant", "name"], set_=change, where=higher))


def _restore_versions(db: Connection, tenant: TenantSnapshot, needs: Needs) -> int:
    query = select(versions.c.name, versions.c.version, versions.c.digest, versions.c.deleted_at)
    here = {(row.name, row.version): row for row in db.execute(query.where(versions.c.tenant == tenant.tenant))}
    added = 0
    for record in tenant.versions:
        found = here.get((record.name, record.version))
        if found is not None and found.digest != record.digest:
            raise Conflict(f"import: {record.tenant} {record.name}@{record.version} is another adapter here")
        if found is None:
            db.execute(insert(versions).values({**asdict(record), "parts": list(record.parts)}))
        elif found.deleted_at is not None:
            db.execute(update(versions).where(*_is(record)).values(deleted_at=None))
        added += found is None or found.deleted_at is not None
        rows = [{"digest": record.digest, "blob": blob} for blob in sorted(needs[record.digest])]
        db.execute(upsert(db, contents).on_conflict_do_nothing(), rows)
    return added


def _bind(db: Connection, user: UserBinding) -> bool:
    row = upsert(db, users).values(asdict(user))
    change = {"adapter_id": row.excluded.adapter_id, "updated_at": row.excluded.updated_at}
    newer = users.c.updated_at < row.excluded.updated_at
    done = db.execute(row.on_conflict_do_update(index_elements=["tenant", "user_id"], set_=change, where=newer))
    return done.rowcount > 0


def _grouped(db: Connection, query: Select[Any], key: Key, only: Collection[str] | None) -> dict[str, list[Row[Any]]]:
    """Tenant -> its rows, in the order of `key`, which the tenant is the first column of.

    Sorted here: databases order text by their own ideas.
    """
    tenant, *_ = key
    if only is not None:
        query = query.where(tenant.in_(only))
    found: dict[str, list[Row[Any]]] = {}
    for row in sorted(db.execute(query), key=lambda row: [row._mapping[column] for column in key]):
        found.setdefault(row._mapping[tenant], []).append(row)
    return found


def _record(row: Row[Any]) -> AdapterRecord:
    return AdapterRecord(**{**row._mapping, "parts": tuple(row.parts)})


def _is(record: AdapterRecord) -> tuple[Any, ...]:
    key = (versions.c.tenant, versions.c.name, versions.c.version)
    return tuple(column == value for column, value in zip(key, (record.tenant, record.name, record.version), strict=True))
