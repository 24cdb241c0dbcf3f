"""Whoever made the tables, an opened catalog has those of this release; SQLite and PostgreSQL alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, String, create_engine, inspect, text
from sqlalchemy.engine import URL

import adapters_store
from adapters_store.catalog import Catalog
from adapters_store.database import Database, file_url, postgresql_url
from adapters_store.errors import Conflict, Unavailable
from adapters_store.migrations import REVISION, UNVERSIONED, configuration, upgrade
from adapters_store.names import MAX_NAME
from adapters_store.schema import metadata
from adapters_store.store import utc_now
from tests.servers import PostgreSQL

#: What the release before migrations made of an empty SQLite file, as `.schema` prints it.
BEFORE_MIGRATIONS = """
CREATE TABLE adapters (
    tenant VARCHAR(128) NOT NULL, name VARCHAR(128) NOT NULL, last_version INTEGER NOT NULL, PRIMARY KEY (tenant, name)
);
CREATE TABLE contents (digest VARCHAR(64) NOT NULL, blob VARCHAR(64) NOT NULL, PRIMARY KEY (digest, blob));
CREATE TABLE schema (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE users (
    tenant VARCHAR(128) NOT NULL, user_id VARCHAR(128) NOT NULL, adapter_id VARCHAR(128) NOT NULL, updated_at DATETIME NOT NULL,
    PRIMARY KEY (tenant, user_id), FOREIGN KEY(tenant, adapter_id) REFERENCES adapters (tenant, name)
);
CREATE TABLE versions (
    tenant VARCHAR(128) NOT NULL, name VARCHAR(128) NOT NULL, version INTEGER NOT NULL, digest VARCHAR(64) NOT NULL,
    method VARCHAR(64) NOT NULL, parts JSON NOT NULL, size_bytes BIGINT NOT NULL, created_at DATETIME NOT NULL,
    details JSON NOT NULL, deleted_at DATETIME, PRIMARY KEY (tenant, name, version),
    FOREIGN KEY(tenant, name) REFERENCES adapters (tenant, name)
);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE INDEX versions_by_age ON versions (tenant, created_at, name);
INSERT INTO schema VALUES (1);
"""

#: What its users had stored.
ROWS = f"""
INSERT INTO adapters VALUES ('acme', 'support', 3);
INSERT INTO contents VALUES ('{"a" * 64}', '{"b" * 64}');
INSERT INTO versions VALUES ('acme', 'support', 3, '{"a" * 64}', 'lora', '["lora"]', 7, '2026-01-02 03:04:05.000006',
    '{{"rank": 8}}', NULL);
INSERT INTO users VALUES ('acme', 'ann', 'support', '2026-01-02 03:04:05.000006');
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """An empty database."""
    if request.param == "sqlite":
        return file_url(tmp_path / "catalog.sqlite3")
    return postgresql_url(request.getfixturevalue("postgresql").database())


@contextmanager
def written(url: URL) -> Iterator[Connection]:
    database = Database(url)
    with database.write() as db:
        yield db
    database.close()


def execute(db: Connection, script: str) -> None:
    for statement in script.split(";"):
        if statement.strip():
            db.exec_driver_sql(statement)


def differences(url: URL) -> list[object]:
    """Between the tables in the database and those of the code."""
    engine = create_engine(url)
    with engine.connect() as db:
        found: list[object] = compare_metadata(MigrationContext.configure(db, opts={"compare_type": True}), metadata)
    engine.dispose()
    return found


def open_and_close(url: URL) -> None:
    Catalog(url, utc_now).close()


def make_old(url: URL) -> None:
    """The database of a release before migrations."""
    with written(url) as db:
        if db.dialect.name == "sqlite":
            execute(db, BEFORE_MIGRATIONS)
        else:
            upgrade(db, UNVERSIONED)
            db.execute(text("DROP TABLE alembic_version"))
        execute(db, ROWS)


def test_the_steps_lead_to_the_tables_of_the_code(url: URL) -> None:
    open_and_close(url)
    assert differences(url) == []
    with written(url) as db:
        db.execute(text("ALTER TABLE users ADD COLUMN extra INTEGER"))
    assert differences(url) != []  # they are looked for


@pytest.mark.slow
def test_names_are_ordered_by_bytes_whatever_the_language_of_the_database(postgresql: PostgreSQL) -> None:
    url = postgresql_url(postgresql.database())
    open_and_close(url)
    query = (
        "SELECT table_name, column_name, collation_name FROM information_schema.columns WHERE character_maximum_length = 128"
    )
    with written(url) as db:
        found = db.execute(text(query)).all()
    names = {(table.name, column.name) for table in metadata.sorted_tables for column in table.columns if is_name(column)}
    assert {(table, column) for table, column, collation in found if collation == "C"} == names


def is_name(column: Column[object]) -> bool:
    return isinstance(column.type, String) and column.type.length == MAX_NAME


def test_the_newest_step_is_the_one_the_code_asks_for(tmp_path: Path) -> None:
    with written(file_url(tmp_path / "x")) as db:
        script = ScriptDirectory.from_config(configuration(db))
    assert script.get_heads() == [REVISION]
    assert script.get_bases() == [UNVERSIONED]


def test_a_database_of_before_migrations_is_adopted_with_all_it_holds(url: URL) -> None:
    make_old(url)
    catalog = Catalog(url, utc_now)
    record = catalog.get("acme", "support")
    assert (record.version, record.digest, record.details) == (3, "a" * 64, {"rank": 8})
    assert catalog.get_user("acme", "ann").adapter_id == "support"
    assert catalog.tenants.put("acme", {"weight": 2}).policy == {"weight": 2}
    catalog.close()
    assert differences(url) == []
    open_and_close(url)


def test_a_step_that_fails_leaves_the_database_as_it_was(url: URL) -> None:
    make_old(url)
    with written(url) as db:
        db.execute(text("CREATE TABLE keys (mine INTEGER)"))
        before = sorted(inspect(db).get_table_names())
    with pytest.raises(Unavailable):
        open_and_close(url)
    with written(url) as db:
        assert sorted(inspect(db).get_table_names()) == before
        db.execute(text("DROP TABLE keys"))
    open_and_close(url)
    assert differences(url) == []


def test_a_database_of_a_newer_release_is_refused_by_both_numbers(url: URL) -> None:
    open_and_close(url)
    with written(url) as db:
        db.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Conflict, match=f"schema revision 9999, this release knows revisions up to {REVISION}"):
        open_and_close(url)


def test_a_count_that_no_release_ever_reached_is_refused(url: URL) -> None:
    make_old(url)
    with written(url) as db:
        db.execute(text("UPDATE schema SET version = 3"))
    with pytest.raises(Conflict, match="run the newer release"):
        open_and_close(url)


def test_releases_before_migrations_find_a_count_beyond_theirs(url: URL) -> None:
    make_old(url)
    open_and_close(url)
    with written(url) as db:
        assert db.execute(text("SELECT version FROM schema")).scalars().all() == [2]


@pytest.mark.parametrize("make", [lambda url: None, make_old], ids=["empty", "old"])
def test_many_that_open_a_database_at_once_change_it_once(url: URL, make: Callable[[URL], None]) -> None:
    make(url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_and_close, [url] * 8))
    assert differences(url) == []


SECOND_OPENING = """
import sys
from sqlalchemy import Engine, event, make_url
from adapters_store.catalog import Catalog
from adapters_store.store import utc_now
event.listen(Engine, "before_cursor_execute", lambda c, cu, statement, *_: print(statement))
Catalog(make_url(sys.argv[1]), utc_now).close()
print(sorted({"alembic", "mako", "obstore"} & sys.modules.keys()))
"""


def test_a_database_that_is_up_to_date_costs_one_select_and_no_import(url: URL) -> None:
    open_and_close(url)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SECOND_OPENING, url.render_as_string(hide_password=False)],
        cwd=Path(adapters_store.__file__).parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if not line.startswith("BEGIN")]
    assert said == ["SELECT version_num FROM alembic_version", "[]"], done.stderr
