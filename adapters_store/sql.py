"""What a query may have to say differently to SQLite and to PostgreSQL. Names no table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite

#: Opens a transaction: committed where the block ends well, undone where it raises.
Transaction = Callable[[], AbstractContextManager[Connection]]


def upsert(db: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """INSERT with ON CONFLICT: the same words in both databases, a class of its own for each in SQLAlchemy."""
    return postgresql.insert(table) if db.dialect.name == "postgresql" else sqlite.insert(table)
