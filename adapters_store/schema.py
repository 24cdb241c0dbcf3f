"""The catalog's tables, and the row that says which version of them a database holds. Runs no query about adapters.

adapters  (tenant, name) -> last_version                        kept for ever, so that no version number returns
versions  (tenant, name, version) -> digest, method, ...        immutable but for deleted_at
contents  (digest, blob)                                        which blobs a manifest needs, itself included
users     (tenant, user_id) -> adapter_id
schema    one row: version
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    DateTime,
    Dialect,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    insert,
    select,
)

from .digest import Digest
from .errors import Conflict
from .names import MAX_NAME

SCHEMA_VERSION = 1


class UtcTime(TypeDecorator[datetime]):
    """Aware UTC datetimes, also in SQLite, which keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class DigestText(TypeDecorator[Digest]):
    """A Digest in, a Digest out: what comes from the catalog can be made a path."""

    impl = String(64)
    cache_ok = True

    def process_bind_param(self, value: Digest | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Digest | None:
        return None if value is None else Digest(value)


metadata = MetaData()

adapters = Table(
    "adapters",
    metadata,
    Column("tenant", String(MAX_NAME), primary_key=True),
    Column("name", String(MAX_NAME), primary_key=True),
    Column("last_version", Integer, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("tenant", String(MAX_NAME), primary_key=True),
    Column("name", String(MAX_NAME), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", DigestText, nullable=False, index=True),
    Column("method", String(64), nullable=False),
    Column("parts", JSON, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("details", JSON, nullable=False),
    Column("deleted_at", UtcTime),  # null while the version is live
    ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
)
Index("versions_by_age", versions.c.tenant, versions.c.created_at, versions.c.name)

contents = Table(
    "contents",
    metadata,
    Column("digest", DigestText, primary_key=True),
    Column("blob", DigestText, primary_key=True),
)

users = Table(
    "users",
    metadata,
    Column("tenant", String(MAX_NAME), primary_key=True),
    Column("user_id", String(MAX_NAME), primary_key=True),
    Column("adapter_id", String(MAX_NAME), nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    ForeignKeyConstraint(["tenant", "adapter_id"], ["adapters.tenant", "adapters.name"]),
)

schema = Table("schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False))


def prepare(db: Connection) -> None:
    """Creates the tables in an empty database, all or none: `db` is in a transaction.

    Raises: Conflict when the database was written by newer code.
    """
    metadata.create_all(db)
    found = db.execute(select(schema.c.version)).scalar_one_or_none()
    if found is None:
        db.execute(insert(schema).values(version=SCHEMA_VERSION))
    elif found > SCHEMA_VERSION:
        raise Conflict(
            f"the store's catalog has schema version {found}, this release reads versions up to {SCHEMA_VERSION}: "
            "run the newer release, or restore a backup from before the upgrade"
        )
