"""Migrations: brings a catalog's tables to what this release knows, whoever made them. Runs no query about adapters.

A new step is a file in `versions/` and its name in `REVISION`; a test compares what the steps lead to with `schema.py`.
Alembic is imported only where there is something to do: a database that is up to date costs one SELECT.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, select, text

from ..database import Database
from ..errors import Conflict, Unavailable
from ..schema import schema

if TYPE_CHECKING:
    from alembic.config import Config

REVISION = "0002"  # the newest step
UNVERSIONED = "0001"  # what releases before migrations made, which counted in the table `schema`

_TURN = threading.Lock()  # alembic keeps what it is doing in globals of its module

_STAMP = text("SELECT version_num FROM alembic_version")


def prepare(database: Database) -> None:
    """Makes the tables, or changes them, all or none. Any number of processes may do so at once.

    Raises: Conflict when newer code wrote the database; Corrupt; Unavailable.
    """
    if _stamp(database) != REVISION:
        with database.alone() as db:
            upgrade(db)


def upgrade(db: Connection, target: str = REVISION) -> None:
    """`db` is in a transaction that nobody else is in. Raises: Conflict."""
    from alembic import command
    from alembic.script import ScriptDirectory

    config = configuration(db)
    script = ScriptDirectory.from_config(config)
    found = _revision(db)
    if found is not None and found not in {step.revision for step in script.walk_revisions()}:
        raise Conflict(
            f"the store's catalog has schema revision {found}, this release knows revisions up to {REVISION}: "
            "run the newer release, or restore a backup from before the upgrade"
        )
    with _TURN:
        if found == UNVERSIONED and not inspect(db).has_table("alembic_version"):
            command.stamp(config, UNVERSIONED)
        command.upgrade(config, target)


def configuration(db: Connection) -> Config:
    """Alembic's, for the steps in this directory on that connection."""
    from alembic.config import Config

    config = Config(attributes={"connection": db})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _stamp(database: Database) -> str | None:
    """The revision of a database that has one; None where the question itself fails, which has more than one cause."""
    try:
        with database.read() as db:
            stamp: str | None = db.execute(_STAMP).scalar_one_or_none()
            return stamp
    except Unavailable:
        return None


def _revision(db: Connection) -> str | None:
    """None for an empty database."""
    tables = inspect(db)
    if tables.has_table("alembic_version"):
        return str(db.execute(_STAMP).scalar_one())
    if not tables.has_table(schema.name):
        return None
    version = db.execute(select(schema.c.version)).scalar_one()
    return UNVERSIONED if version == 1 else f"0000+{version}"
