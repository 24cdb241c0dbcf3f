"""The catalog: which tenant's name means which content, in a SQL database. Owns every query; touches no file.

Every statement is plain SQLAlchemy Core that SQLite and PostgreSQL run alike (`database.py` knows what differs). One
transaction per method, so a method's effect is all there or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from hashlib import sha256
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    RowMapping,
    Select,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.engine import URL

from .database import AdvisoryExclusion, Database
from .digest import Digest
from .errors import NotFound, clip
from .exclusion import Exclusion
from .keys import ApiKeys
from .migrations import prepare
from .names import SHARED
from .quota import UNLIMITED, Quota, Usage
from .records import JSON, AdapterRecord, UserBinding
from .schema import UtcTime, adapters, contents, users, versions
from .sql import upsert
from .tenants import Tenants
from .transfer import Transfer

MAX_VERSION = 2**31 - 1

Clock = Callable[[], datetime]
Keys = list[tuple[str, str, int]]  # tenant, name, version

_RECORD = (
    versions.c.tenant,
    versions.c.name,
    versions.c.version,
    versions.c.digest,
    versions.c.method,
    versions.c.parts,
    versions.c.size_bytes,
    versions.c.created_at,
    versions.c.details,
)
_live = versions.c.deleted_at.is_(None)


class Catalog:
    """Names, versions and users. Thread-safe; any number of instances and processes may share one database.

    Invariant: a name's version numbers only rise, and a version never changes but for being deleted.
    """

    def __init__(self, url: URL, clock: Clock) -> None:
        """Raises: Conflict when newer code wrote the database; Corrupt, Unavailable when it cannot be read."""
        self._clock = clock
        self._database = Database(url)
        self.tenants = Tenants(self._read, self._write, clock)
        self.keys = ApiKeys(self._read, self._write, clock)
        self.transfer = Transfer(self._read, self._write)
        try:
            prepare(self._database)
        except BaseException:
            self.close()
            raise

    @property
    def exclusion(self) -> Exclusion | None:
        """Keeps publishers and collectors apart on every machine that uses this database; None for SQLite, which is local."""
        return AdvisoryExclusion(self._database) if self._database.is_postgresql else None

    def close(self) -> None:
        self._database.close()

    def add(
        self,
        *,
        tenant: str,
        name: str,
        digest: Digest,
        blobs: Set[Digest],
        method: str,
        parts: tuple[str, ...],
        size_bytes: int,
        details: Mapping[str, JSON],
        quota: Quota = UNLIMITED,
    ) -> tuple[AdapterRecord, bool]:
        """A new version, and True; or the newest one, and False, when that has this digest. `blobs` is all it needs.

        Raises: OverQuota for a new version that is more than the tenant may keep.
        """
        with self._write() as db:
            if quota != UNLIMITED:
                _alone(db, tenant)
            last = self._claim(db, tenant, name)
            newest = _first(db, _versions_of(tenant, name))
            if newest is not None and newest.digest == digest:
                return newest, False
            _check_quota(db, tenant, name, size_bytes, quota)
            record = AdapterRecord(tenant, name, last + 1, digest, method, parts, size_bytes, self._clock(), dict(details))
            db.execute(update(adapters).where(_is(adapters, tenant, name)).values(last_version=record.version))
            db.execute(insert(versions).values({**asdict(record), "parts": list(parts)}))
            rows = [{"digest": digest, "blob": blob} for blob in sorted(blobs)]
            db.execute(upsert(db, contents).on_conflict_do_nothing(), rows)
            return record, True

    def get(self, tenant: str, name: str, version: int | None = None) -> AdapterRecord:
        """One live version; the newest by default. Raises: NotFound."""
        with self._read() as db:
            record = _first(db, _versions_of(tenant, name, version))
        if record is None:
            raise _no_adapter(name, version)
        return record

    def versions(self, tenant: str, name: str) -> tuple[AdapterRecord, ...]:
        """Every live version, newest first. Raises: NotFound when there is none."""
        with self._read() as db:
            records = tuple(map(_record, db.execute(_versions_of(tenant, name)).mappings()))
        if not records:
            raise _no_adapter(name, None)
        return records

    def list(
        self, tenant: str, limit: int, after: tuple[datetime, str] | None, beside: str | None = None
    ) -> tuple[AdapterRecord, ...]:
        """The newest live version of up to `limit` names, newest first, starting behind `after` (its time and name).

        Names under which the tenant `beside` has an adapter of its own are left out. Walks the index by age and skips what a
        newer live version hides, so a page costs what it shows.
        """
        newer = versions.alias()
        hidden = select(newer.c.version).where(
            _is(newer, tenant, versions.c.name), newer.c.version > versions.c.version, newer.c.deleted_at.is_(None)
        )
        own = select(newer.c.version).where(_is(newer, beside or "", versions.c.name), newer.c.deleted_at.is_(None))
        age = tuple_(versions.c.created_at, versions.c.name)
        query = select(*_RECORD).where(versions.c.tenant == tenant, _live, ~hidden.exists())
        if beside is not None:
            query = query.where(~own.exists())
        if after is not None:
            query = query.where(age < tuple_(literal(after[0], UtcTime), literal(after[1])))
        query = query.order_by(versions.c.created_at.desc(), versions.c.name.desc()).limit(limit)
        with self._read() as db:
            return tuple(map(_record, db.execute(query).mappings()))

    def check_quota(self, tenant: str, name: str, digest: Digest, size_bytes: int, quota: Quota) -> None:
        """Whether `add` would take it now. Raises: OverQuota."""
        with self._read() as db:
            newest = _first(db, _versions_of(tenant, name))
            if newest is None or newest.digest != digest:
                _check_quota(db, tenant, name, size_bytes, quota)

    def usage(self, tenant: str) -> Usage:
        with self._read() as db:
            return _usage(db, tenant)

    def count(self, tenant: str | None) -> int:
        """Names with a live version; of every tenant when `tenant` is None."""
        names = select(versions.c.tenant, versions.c.name).where(_live).distinct()
        if tenant is not None:
            names = names.where(versions.c.tenant == tenant)
        with self._read() as db:
            return db.execute(select(func.count()).select_from(names.subquery())).scalar_one()

    def delete(self, tenant: str, name: str, version: int | None) -> frozenset[Digest]:
        """Hides one version, or all of them; `collect` forgets them later. Returns the contents that no live version has now.

        Raises: NotFound when none is live.
        """
        now, which = self._clock(), [_is(versions, tenant, name), *_numbered(version)]
        twin = versions.alias()
        named = select(twin.c.version).where(twin.c.digest == versions.c.digest, twin.c.deleted_at.is_(None))
        gone = select(versions.c.digest).where(*which, versions.c.deleted_at == now, ~named.exists())
        with self._write() as db:
            done = db.execute(update(versions).where(*which, _live).values(deleted_at=now))
            if not done.rowcount:
                raise _no_adapter(name, version)
            return frozenset(db.execute(gone).scalars())

    def collect(self, before: datetime) -> None:
        """Forgets versions deleted at or before `before`, and which blobs they needed. Their numbers stay used."""
        with self._write() as db:
            db.execute(delete(versions).where(versions.c.deleted_at <= before))
            needed = select(versions.c.digest).where(versions.c.digest == contents.c.digest)
            db.execute(delete(contents).where(~needed.exists()))

    def needed(self, before: datetime) -> set[Digest]:
        """Every blob of every version but those that `collect(before)` forgets."""
        query = select(contents.c.blob).join(versions, versions.c.digest == contents.c.digest).distinct()
        with self._read() as db:
            return set(db.execute(query.where(_live | (versions.c.deleted_at > before))).scalars())

    def knows(self, digest: Digest) -> bool:
        """Whether `digest` is the manifest of some version that `collect` has not forgotten."""
        query = select(contents.c.blob).where(contents.c.digest == digest).limit(1)
        with self._read() as db:
            return db.execute(query).first() is not None

    def dependents(self) -> dict[Digest, Keys]:
        """Blob -> the live versions that need it."""
        query = select(contents.c.blob, versions.c.tenant, versions.c.name, versions.c.version)
        query = query.join(versions, versions.c.digest == contents.c.digest).where(_live)
        found: dict[Digest, Keys] = {}
        with self._read() as db:
            for blob, *key in db.execute(query.order_by(*query.selected_columns)):
                found.setdefault(blob, []).append((key[0], key[1], key[2]))
        return found

    def bind_user(self, tenant: str, user_id: str, adapter_id: str) -> UserBinding:
        """The adapter is the tenant's own or a shared one. Raises: NotFound when it has no live version."""
        binding = UserBinding(tenant, user_id, adapter_id, self._clock())
        change = {"adapter_id": adapter_id, "updated_at": binding.updated_at}
        with self._write() as db:
            if _first(db, _versions_of(tenant, adapter_id)) is None:
                if _first(db, _versions_of(SHARED, adapter_id)) is None:
                    raise _no_adapter(adapter_id, None)
                self._claim(db, tenant, adapter_id)  # the name that the row below refers to, without a version
            row = upsert(db, users).values(asdict(binding))
            db.execute(row.on_conflict_do_update(index_elements=["tenant", "user_id"], set_=change))
        return binding

    def get_user(self, tenant: str, user_id: str) -> UserBinding:
        """Raises: NotFound."""
        with self._read() as db:
            row = db.execute(select(users).where(users.c.tenant == tenant, users.c.user_id == user_id)).mappings().first()
        if row is None:
            raise NotFound("user", user_id)
        return _binding(row)

    def list_users(self, tenant: str, limit: int, after: str | None) -> tuple[UserBinding, ...]:
        """Up to `limit` bindings in the order of their user ids, starting behind `after`."""
        query = select(users).where(users.c.tenant == tenant).order_by(users.c.user_id).limit(limit)
        if after is not None:
            query = query.where(users.c.user_id > after)
        with self._read() as db:
            return tuple(map(_binding, db.execute(query).mappings()))

    def delete_user(self, tenant: str, user_id: str) -> None:
        """Raises: NotFound."""
        with self._write() as db:
            if not db.execute(delete(users).where(users.c.tenant == tenant, users.c.user_id == user_id)).rowcount:
                raise NotFound("user", user_id)

    def _read(self) -> AbstractContextManager[Connection]:
        """For one SELECT."""
        return self._database.read()

    def _write(self) -> AbstractContextManager[Connection]:
        return self._database.write()

    @staticmethod
    def _claim(db: Connection, tenant: str, name: str) -> int:
        """The last version number given out. Until the transaction ends nobody else can publish under this name:
        SQLite has one writer at a time, PostgreSQL locks the row.
        """
        db.execute(upsert(db, adapters).values(tenant=tenant, name=name, last_version=0).on_conflict_do_nothing())
        query = select(adapters.c.last_version).where(_is(adapters, tenant, name)).with_for_update()
        return int(db.execute(query).scalar_one())


def _alone(db: Connection, tenant: str) -> None:
    """Until the transaction ends nobody else adds under this tenant's quota: SQLite has one writer at a time."""
    if db.dialect.name == "postgresql":
        key = int.from_bytes(sha256(tenant.encode()).digest()[:8], signed=True)
        db.execute(select(func.pg_advisory_xact_lock(key)))


def _check_quota(db: Connection, tenant: str, name: str, size_bytes: int, quota: Quota) -> None:
    """Whether a new version of `name` may be kept beside the others. Raises: OverQuota."""
    if quota == UNLIMITED:
        return
    usage, known = _usage(db, tenant), _first(db, _versions_of(tenant, name)) is not None
    # A tenant whose quota was lowered may still replace what it has, as far as the bytes allow.
    quota.check(0 if known else usage.adapters + 1, usage.size_bytes + size_bytes)


def _usage(db: Connection, tenant: str) -> Usage:
    counts = (
        func.count(versions.c.name.distinct()),
        func.coalesce(func.sum(versions.c.size_bytes), 0),
        func.coalesce(func.max(versions.c.size_bytes), 0),
    )
    adapters, size_bytes, largest = db.execute(select(*counts).where(versions.c.tenant == tenant, _live)).one()
    return Usage(int(adapters), int(size_bytes), int(largest))


def _is(table: FromClause, tenant: str, name: str | ColumnElement[str]) -> ColumnElement[bool]:
    return (table.c.tenant == tenant) & (table.c.name == name)


def _numbered(version: int | None) -> tuple[ColumnElement[bool], ...]:
    """No condition for None. A number that no column can hold matches nothing, as any other unknown number."""
    if version is None:
        return ()
    return (versions.c.version == (version if 1 <= version <= MAX_VERSION else 0),)


def _versions_of(tenant: str, name: str, version: int | None = None) -> Select[Any]:
    query = select(*_RECORD).where(_is(versions, tenant, name), _live, *_numbered(version))
    return query.order_by(versions.c.version.desc())


def _first(db: Connection, query: Select[Any]) -> AdapterRecord | None:
    row = db.execute(query.limit(1)).mappings().first()
    return None if row is None else _record(row)


def _record(row: RowMapping) -> AdapterRecord:
    return AdapterRecord(**{**row, "parts": tuple(row["parts"])})


def _binding(row: RowMapping) -> UserBinding:
    return UserBinding(**row)


def _no_adapter(name: str, version: int | None) -> NotFound:
    return NotFound("adapter", name if version is None else f"{name} version {clip(version)}")
