"""Adapters, versions, contents, users: what releases before migrations created, and counted as version 1 in `schema`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NAME = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("name", NAME, primary_key=True),
        sa.Column("last_version", sa.Integer, nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("name", NAME, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("method", sa.String(64), nullable=False),
        sa.Column("parts", sa.JSON, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("deleted_at", TIME),
        sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])
    op.create_index("versions_by_age", "versions", ["tenant", "created_at", "name"])
    op.create_table(
        "contents",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("blob", sa.String(64), primary_key=True),
    )
    op.create_table(
        "users",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("user_id", NAME, primary_key=True),
        sa.Column("adapter_id", NAME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["tenant", "adapter_id"], ["adapters.tenant", "adapters.name"]),
    )
    counted = op.create_table("schema", sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
    op.bulk_insert(counted, [{"version": 1}])
