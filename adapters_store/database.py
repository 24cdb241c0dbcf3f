"""The database under the catalog: SQLite in a file, or PostgreSQL. Owns connections, transactions and locks; knows no table.

The only place that knows what the two do differently: how a transaction begins, who may wait for whom, what a failure says.
"""

from __future__ import annotations

import select
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DisconnectionError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from .errors import Corrupt, Invalid, Unavailable

BUSY_TIMEOUT = 30_000  # milliseconds a transaction waits for another one's write before it fails

_CONNECT_TIMEOUT = 5  # seconds to reach PostgreSQL
_DEAD_AFTER = 20_000  # milliseconds without an answer from PostgreSQL's machine until it counts as gone
_SESSIONS = 8  # that hold or want a lock at once; more publishers than that wait for a turn
_BLOBS_LOCK = 0x61646170_7465726C  # pg_advisory_lock: publishers share it, the collector of blobs has it alone
_SCHEMA_LOCK = 0x61646170_7465726D  # pg_advisory_xact_lock: one process at a time changes the tables


class Database:
    """Thread-safe. A thread that holds a lock of `exclusion` has one connection, and all it does goes through that one."""

    def __init__(self, url: URL) -> None:
        self.is_postgresql = url.get_backend_name() == "postgresql"
        self.engine = create_engine(url, hide_parameters=True, **_options(url))
        event.listen(self.engine, "connect", _connected)
        if self.is_postgresql:
            event.listen(self.engine, "checkout", _checked_out)
        event.listen(self.engine, "begin", _begun)
        self._reader = self.engine.execution_options(isolation_level="AUTOCOMMIT") if self.is_postgresql else self.engine
        self._writer = self.engine.execution_options(writes=True)
        self._locks = create_engine(url, hide_parameters=True, poolclass=NullPool, **_connect_options(url))
        self._turns = threading.BoundedSemaphore(_SESSIONS)
        self._own = threading.local()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """For one SELECT: on PostgreSQL no transaction is begun, which saves two round trips. Raises: Corrupt, Unavailable."""
        with database_errors():
            if held := self._held:
                with held.begin():
                    yield held
            else:
                with self._reader.begin() as db:
                    yield db

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction; on PostgreSQL at READ COMMITTED. Raises: Corrupt, Unavailable."""
        with database_errors():
            if held := self._held:
                with held.begin():
                    yield held
            else:
                with self._writer.begin() as db:
                    yield db

    @contextmanager
    def alone(self) -> Iterator[Connection]:
        """`write`, one process at a time: for changes to the tables."""
        with self.write() as db:
            if self.is_postgresql:
                db.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
            yield db

    def close(self) -> None:
        self.engine.dispose()
        self._locks.dispose()

    @property
    def _held(self) -> Connection | None:
        """This thread's session with a lock. Raises: Unavailable when it broke: SQLAlchemy would open another, without it."""
        held: Connection | None = getattr(self._own, "connection", None)
        if held is not None and held.invalidated:
            raise Unavailable("the store's catalog failed: the session that held the lock was lost")
        return held

    @contextmanager
    def locked(self, *, shared: bool) -> Iterator[None]:
        """PostgreSQL: a session's advisory lock, on a connection that this thread uses until it lets go of it.

        What is written meanwhile goes through that session, so that nobody commits who lost the lock with it.
        Not from the pool: who waits for the lock keeps no connection from those who only read.
        """
        suffix = "_shared" if shared else ""
        with self._turns, database_errors(), self._locks.connect() as db:
            with db.begin():
                db.execute(text("SET lock_timeout = 0"))
                db.execute(text(f"SELECT pg_advisory_lock{suffix}(:key)"), {"key": _BLOBS_LOCK})
                db.execute(text(f"SET lock_timeout = {BUSY_TIMEOUT}"))
            self._own.connection = db
            try:
                yield  # closing the session frees the lock
            finally:
                self._own.connection = None


class AdvisoryExclusion:
    """Publishers and the collector of blobs, on any number of machines that share one PostgreSQL.

    A collector that waits is not overtaken: PostgreSQL queues who asks for a lock behind who waits for it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def publishing(self) -> Iterator[None]:
        with self._database.locked(shared=True):
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        with self._database.locked(shared=False):
            yield

    def confirm(self) -> None:
        with self._database.read() as db:
            db.execute(text("SELECT 1"))


def file_url(path: Path) -> URL:
    """The SQLite database in that file, whatever characters its path has."""
    return URL.create("sqlite", database=str(path))


def postgresql_url(url: str) -> URL:
    """`postgresql://...` for the driver that is installed. Raises: Invalid, without what could be a password."""
    rule = "must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise Invalid("catalog_url", rule, "something else") from None
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise Invalid("catalog_url", rule, f"{parsed.drivername}://...")
    return parsed.set(drivername="postgresql+psycopg")


@contextmanager
def database_errors() -> Iterator[None]:
    """Raises: Corrupt when the file is not (or no longer) a database, else Unavailable."""
    try:
        yield
    except SQLAlchemyError as error:
        kind = Corrupt if type(error) is DatabaseError else Unavailable
        raise kind(f"the store's catalog failed: {_reason(error)}") from error


def _reason(error: SQLAlchemyError) -> str:
    """SQLite's words. Of PostgreSQL's only the kind: its words may name hosts, users and values."""
    cause = getattr(error, "orig", None)
    return str(cause) if isinstance(cause, sqlite3.Error) else type(cause or error).__name__


def _options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "postgresql":
        return {"pool_size": 8, "max_overflow": 8, **_connect_options(url)}
    return {"pool_size": 8, "max_overflow": 56}


def _connect_options(url: URL) -> dict[str, Any]:
    """Timeouts by which a PostgreSQL that is gone, or stuck, is an error instead of a hang."""
    if url.get_backend_name() != "postgresql":
        return {}
    alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2, "tcp_user_timeout": _DEAD_AFTER}
    session = f"-c lock_timeout={BUSY_TIMEOUT} -c client_min_messages=warning"
    return {"connect_args": {"connect_timeout": _CONNECT_TIMEOUT, "application_name": "adapterd", "options": session, **alive}}


def _connected(connection: object, _record: object) -> None:
    """SQLite: durable commits, and transactions begun by `_begun` instead of by the driver's guesses."""
    if not isinstance(connection, sqlite3.Connection):
        return
    connection.isolation_level = None
    for pragma in (f"busy_timeout={BUSY_TIMEOUT}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _checked_out(connection: Any, _record: object, _proxy: object) -> None:
    """PostgreSQL: a session that its server ended is replaced. It has something to read then; asking it takes no round trip."""
    if not connection.closed:
        waiting = select.poll()
        waiting.register(connection.fileno(), select.POLLIN)
        if not waiting.poll(0):
            return
    raise DisconnectionError


def _begun(db: Connection) -> None:
    """SQLite: a writer takes its lock at once. At its first write its snapshot may be outdated, which fails."""
    if db.dialect.name == "sqlite":
        db.exec_driver_sql("BEGIN IMMEDIATE" if db.get_execution_options().get("writes") else "BEGIN")
