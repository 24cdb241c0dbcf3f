"""The catalog's tables as this release knows them. Runs no query; `migrations` makes them, and a test compares the two.

adapters  (tenant, name) -> last_version                        kept for ever, so that no version number returns
versions  (tenant, name, version) -> digest, method, ...        immutable but for deleted_at
contents  (digest, blob)                                        which blobs a manifest needs, itself included
users     (tenant, user_id) -> adapter_id
tenants   name -> policy                                        who may own keys, and what each may have
keys      id -> tenant, sha256, scopes, note, ...               immutable but for revoked_at; no key, only its hash
schema    one row: 2                                            stops releases before migrations, which counted here
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
)

from .digest import Digest
from .names import MAX_NAME

_NAME = String(MAX_NAME).with_variant(String(MAX_NAME, collation="C"), "postgresql")  # ordered by bytes, as in SQLite


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
    Column("tenant", _NAME, primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("last_version", Integer, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("name", _NAME, primary_key=True),
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
    Column("tenant", _NAME, primary_key=True),
    Column("user_id", _NAME, primary_key=True),
    Column("adapter_id", _NAME, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    ForeignKeyConstraint(["tenant", "adapter_id"], ["adapters.tenant", "adapters.name"]),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("policy", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", _NAME, nullable=False, index=True),  # not a foreign key: revoked keys outlive their tenant
    Column("sha256", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("note", String(200), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("revoked_at", UtcTime),  # null while the key works
)

schema = Table("schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False))
