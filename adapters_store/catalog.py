"""The catalog: which tenant's name means which content, in a SQL database. Owns every query; touches no file.

SQLite by default; every statement is plain SQLAlchemy Core that PostgreSQL runs as well, and only the functions that
name a database know which it is. One transaction per method, so a method's effect is all there or not at all.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    RowMapping,
    Select,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from .digest import Digest
from .errors import Corrupt, NotFound, Unavailable, clip
from .records import JSON, AdapterRecord, UserBinding
from .schema import UtcTime, adapters, contents, prepare, users, versions

BUSY_TIMEOUT = 30_000  # milliseconds a transaction waits for another one's write before it fails
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

    def __init__(self, url: URL | str, clock: Clock) -> None:
        """Raises: Conflict when newer code wrote the database; Corrupt, Unavailable when it cannot be read."""
        self._clock = clock
        self._engine = create_engine(url, pool_size=8, max_overflow=56)
        event.listen(self._engine, "connect", _connected)
        event.listen(self._engine, "begin", _begun)
        self._writer = self._engine.execution_options(writes=True)
        try:
            with self._write() as db:
                prepare(db)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

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
    ) -> tuple[AdapterRecord, bool]:
        """A new version, and True; or the newest one, and False, when that has this digest. `blobs` is all it needs."""
        with self._write() as db:
            last = self._claim(db, tenant, name)
            newest = _first(db, _versions_of(tenant, name))
            if newest is not None and newest.digest == digest:
                return newest, False
            record = AdapterRecord(tenant, name, last + 1, digest, method, parts, size_bytes, self._clock(), dict(details))
            db.execute(update(adapters).where(_is(adapters, tenant, name)).values(last_version=record.version))
            db.execute(insert(versions).values({**asdict(record), "parts": list(parts)}))
            rows = [{"digest": digest, "blob": blob} for blob in sorted(blobs)]
            db.execute(_upsert(db, contents).on_conflict_do_nothing(), rows)
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

    def list(self, tenant: str, limit: int, after: tuple[datetime, str] | None) -> tuple[AdapterRecord, ...]:
        """The newest live version of up to `limit` names, newest first, starting behind `after` (its time and name).

        Walks the index by age and skips what a newer live version hides, so a page costs what it shows.
        """
        newer = versions.alias()
        hidden = select(newer.c.version).where(
            _is(newer, tenant, versions.c.name), newer.c.version > versions.c.version, newer.c.deleted_at.is_(None)
        )
        age = tuple_(versions.c.created_at, versions.c.name)
        query = select(*_RECORD).where(versions.c.tenant == tenant, _live, ~hidden.exists())
        if after is not None:
            query = query.where(age < tuple_(literal(after[0], UtcTime), literal(after[1])))
        query = query.order_by(versions.c.created_at.desc(), versions.c.name.desc()).limit(limit)
        with self._read() as db:
            return tuple(map(_record, db.execute(query).mappings()))

    def count(self, tenant: str | None) -> int:
        """Names with a live version; of every tenant when `tenant` is None."""
        names = select(versions.c.tenant, versions.c.name).where(_live).distinct()
        if tenant is not None:
            names = names.where(versions.c.tenant == tenant)
        with self._read() as db:
            return db.execute(select(func.count()).select_from(names.subquery())).scalar_one()

    def delete(self, tenant: str, name: str, version: int | None) -> None:
        """Hides one version, or all of them; `collect` forgets them later. Raises: NotFound when none is live."""
        which = [_is(versions, tenant, name), _live, *_numbered(version)]
        with self._write() as db:
            done = db.execute(update(versions).where(*which).values(deleted_at=self._clock()))
            if not done.rowcount:
                raise _no_adapter(name, version)

    def collect(self, before: datetime) -> None:
        """Forgets versions deleted at or before `before`, and which blobs they needed. Their numbers stay used."""
        with self._write() as db:
            db.execute(delete(versions).where(versions.c.deleted_at <= before))
            needed = select(versions.c.digest).where(versions.c.digest == contents.c.digest)
            db.execute(delete(contents).where(~needed.exists()))

    def needed(self) -> set[Digest]:
        """Every blob of every version that `collect` has not forgotten."""
        with self._read() as db:
            return set(db.execute(select(contents.c.blob).distinct()).scalars())

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
        """Raises: NotFound when the adapter has no live version."""
        binding = UserBinding(tenant, user_id, adapter_id, self._clock())
        change = {"adapter_id": adapter_id, "updated_at": binding.updated_at}
        with self._write() as db:
            if _first(db, _versions_of(tenant, adapter_id)) is None:
                raise _no_adapter(adapter_id, None)
            row = _upsert(db, users).values(asdict(binding))
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

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _database_errors(), self._engine.begin() as db:
            yield db

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with _database_errors(), self._writer.begin() as db:
            yield db

    @staticmethod
    def _claim(db: Connection, tenant: str, name: str) -> int:
        """The last version number given out. Until the transaction ends nobody else can publish under this name:
        SQLite has one writer at a time, PostgreSQL locks the row.
        """
        db.execute(_upsert(db, adapters).values(tenant=tenant, name=name, last_version=0).on_conflict_do_nothing())
        query = select(adapters.c.last_version).where(_is(adapters, tenant, name)).with_for_update()
        return int(db.execute(query).scalar_one())


def file_url(path: Path) -> URL:
    """The SQLite database in that file, whatever characters its path has."""
    return URL.create("sqlite", database=str(path))


def _connected(connection: object, _record: object) -> None:
    """SQLite: durable commits, and transactions begun by `_begun` instead of by the driver's guesses."""
    if not isinstance(connection, sqlite3.Connection):
        return
    connection.isolation_level = None
    for pragma in (f"busy_timeout={BUSY_TIMEOUT}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begun(db: Connection) -> None:
    """SQLite: a writer takes its lock at once. At its first write its snapshot may be outdated, which fails."""
    if db.dialect.name == "sqlite":
        db.exec_driver_sql("BEGIN IMMEDIATE" if db.get_execution_options().get("writes") else "BEGIN")


@contextmanager
def _database_errors() -> Iterator[None]:
    """Raises: Corrupt when the file is not (or no longer) a database, else Unavailable."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or type(error).__name__)
        kind = Corrupt if type(error) is DatabaseError else Unavailable
        raise kind(f"the store's catalog failed: {reason}") from error


def _upsert(db: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """INSERT with ON CONFLICT: the same words in both databases, a class of its own for each in SQLAlchemy."""
    return postgresql.insert(table) if db.dialect.name == "postgresql" else sqlite.insert(table)


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
