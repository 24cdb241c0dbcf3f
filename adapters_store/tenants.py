"""Tenants: who may own keys, and what each may have. Owns the queries of that table; a policy is JSON and never read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from sqlalchemy import RowMapping, delete, select, update

from .digest import Digest
from .errors import Conflict, NotFound
from .records import JSON, TenantRecord
from .schema import keys, tenants, users, versions
from .sql import Transaction, upsert


class Tenants:
    """The tenants of one catalog."""

    def __init__(self, read: Transaction, write: Transaction, clock: Callable[[], datetime]) -> None:
        self._read = read
        self._write = write
        self._clock = clock

    def get(self, name: str) -> TenantRecord:
        """Raises: NotFound."""
        with self._read() as db:
            row = db.execute(select(tenants).where(tenants.c.name == name)).mappings().first()
        if row is None:
            raise NotFound("tenant", name)
        return tenant_of(row)

    def put(self, name: str, policy: Mapping[str, JSON]) -> TenantRecord:
        """A new tenant, or another policy for one that there is."""
        row = {"name": name, "policy": dict(policy), "created_at": self._clock()}
        with self._write() as db:
            made = upsert(db, tenants).values(row)
            db.execute(made.on_conflict_do_update(index_elements=["name"], set_={"policy": row["policy"]}))
            return tenant_of(db.execute(select(tenants).where(tenants.c.name == name)).mappings().one())

    def list(self) -> tuple[TenantRecord, ...]:
        """In the order of their names."""
        with self._read() as db:
            return tuple(map(tenant_of, db.execute(select(tenants).order_by(tenants.c.name)).mappings()))

    def delete(self, name: str, *, adapters: bool) -> frozenset[Digest]:
        """Revokes its keys, unbinds its users, hides its adapters, all at once; the digests that were hidden.

        Raises: NotFound; Conflict when it has adapters and `adapters` does not say that they may go.
        """
        now = self._clock()
        live = (versions.c.tenant == name, versions.c.deleted_at.is_(None))
        with self._write() as db:
            if not db.execute(delete(tenants).where(tenants.c.name == name)).rowcount:
                raise NotFound("tenant", name)
            digests = frozenset(db.execute(select(versions.c.digest).where(*live)).scalars())
            if digests and not adapters:
                raise Conflict(f"tenant {name!r} has adapters; delete them first, or with it")
            db.execute(update(keys).where(keys.c.tenant == name, keys.c.revoked_at.is_(None)).values(revoked_at=now))
            db.execute(delete(users).where(users.c.tenant == name))
            db.execute(update(versions).where(*live).values(deleted_at=now))
        return digests


def tenant_of(row: RowMapping) -> TenantRecord:
    return TenantRecord(row["name"], row["policy"], row["created_at"])
