import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import ClauseElement, Select, event
from sqlalchemy.dialects import postgresql

from adapters_store import database as module
from adapters_store.catalog import MAX_VERSION, Catalog
from adapters_store.database import file_url, postgresql_url
from adapters_store.digest import Digest
from adapters_store.errors import NotFound, Unavailable
from adapters_store.records import AdapterRecord

Add = Callable[..., tuple[AdapterRecord, bool]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test runs on both databases, but for those of what only SQLite does."""
    if "catalog" in metafunc.fixturenames:
        postgresql = [] if "sqlite_only" in metafunc.fixturenames else [pytest.param("postgresql", marks=pytest.mark.slow)]
        metafunc.parametrize("catalog", ["sqlite", *postgresql], indirect=True)


@pytest.fixture
def sqlite_only() -> None:
    pass


@pytest.fixture
def catalog(tmp_path: Path, clock: Callable[..., object], request: pytest.FixtureRequest) -> Iterator[Catalog]:
    if request.param == "sqlite":
        url = file_url(tmp_path / "catalog.sqlite3")
    else:
        url = postgresql_url(request.getfixturevalue("postgresql").database())
    opened = Catalog(url, clock)
    yield opened
    opened.close()


@pytest.fixture
def add(catalog: Catalog) -> Add:
    def _add(name: str, text: str, tenant: str = "acme") -> tuple[AdapterRecord, bool]:
        digest, blob = Digest.of(text.encode()), Digest.of(b"blob of " + text.encode())
        return catalog.add(
            tenant=tenant,
            name=name,
            digest=digest,
            blobs={digest, blob},
            method="lora",
            parts=("lora", "head"),
            size_bytes=2**40,
            details={"targets": ["q_proj"], "rank": 8, "alpha": None},
        )

    return _add


@pytest.mark.usefixtures("sqlite_only")
def test_every_connection_is_durable_and_checked(catalog: Catalog) -> None:
    with catalog._read() as first, catalog._read() as second:
        for db in (first, second):
            found = [db.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("synchronous", "foreign_keys")]
            assert found == [2, 1]  # FULL, ON
            assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert db.exec_driver_sql("PRAGMA busy_timeout").scalar() == module.BUSY_TIMEOUT


def test_a_record_comes_back_as_it_was_given(catalog: Catalog, add: Add) -> None:
    record, created = add("support", "one")
    assert created
    assert catalog.get("acme", "support") == record
    assert (record.parts, record.size_bytes) == (("lora", "head"), 2**40)
    assert isinstance(catalog.get("acme", "support").digest, Digest)


def test_a_failed_transaction_changes_nothing(catalog: Catalog, add: Add) -> None:
    add("support", "one")

    def broken_clock() -> None:
        raise RuntimeError("no time")

    good, catalog._clock = catalog._clock, broken_clock
    for name in ("support", "other"):
        with pytest.raises(RuntimeError):
            add(name, "two")
    catalog._clock = good
    assert catalog.count(None) == 1
    assert add("support", "three")[0].version == 2
    assert add("other", "three")[0].version == 1


@pytest.mark.usefixtures("sqlite_only")
def test_a_writer_that_waits_too_long_is_unavailable(
    catalog: Catalog, add: Add, tmp_path: Path, clock: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_TIMEOUT", 1)
    impatient = Catalog(file_url(tmp_path / "catalog.sqlite3"), clock)
    add("support", "one")
    with catalog._write(), pytest.raises(Unavailable, match="database is locked"):
        impatient.delete("acme", "support", None)
    assert impatient.get("acme", "support").version == 1
    impatient.close()


@pytest.mark.usefixtures("sqlite_only")
def test_a_full_database_is_unavailable_and_stays_as_it_was(catalog: Catalog, add: Add) -> None:
    kept = add("support", "one")[0]

    def no_growth(db: sqlite3.Connection, *_: object) -> None:
        db.execute("PRAGMA max_page_count=1").close()  # SQLite clips it to the present size

    def fill() -> None:
        for number in itertools.count():
            add(f"adapter-{number}", "two")

    event.listen(catalog._database.engine, "checkout", no_growth)
    with pytest.raises(Unavailable, match="full"):
        fill()
    before = catalog.count(None)
    with pytest.raises(Unavailable, match="full"):
        add("one more", "three")
    assert catalog.get("acme", "support") == kept
    assert catalog.count(None) == before


@pytest.mark.parametrize("version", [0, -1, 2, MAX_VERSION, MAX_VERSION + 1, 2**63, 10**30])
def test_a_version_that_is_not_there_is_not_found_whatever_its_number(catalog: Catalog, add: Add, version: int) -> None:
    add("support", "one")
    for call in (catalog.get, catalog.delete):
        with pytest.raises(NotFound, match=f"'support version {version}' does not exist"):
            call("acme", "support", version)
    assert catalog.get("acme", "support", 1).version == 1


def test_collect_forgets_only_what_was_deleted_long_enough_ago(catalog: Catalog, add: Add) -> None:
    first, second = add("support", "one")[0], add("support", "two")[0]
    add("other", "one")
    catalog.delete("acme", "support", None)
    catalog.collect(first.created_at)
    assert catalog.knows(second.digest)
    catalog.collect(catalog._clock())
    assert not catalog.knows(second.digest)
    assert catalog.knows(first.digest)  # the other name has the same content
    assert catalog.needed(catalog._clock()) == {first.digest, Digest.of(b"blob of one")}


def test_dependents_are_the_live_versions(catalog: Catalog, add: Add) -> None:
    digest = add("support", "one")[0].digest
    add("support", "two")
    add("support", "one")
    add("support", "one", tenant="zeta")
    catalog.delete("acme", "support", 2)
    keys = [("acme", "support", 1), ("acme", "support", 3), ("zeta", "support", 1)]
    assert catalog.dependents() == {digest: keys, Digest.of(b"blob of one"): keys}


@pytest.mark.usefixtures("sqlite_only")
def test_a_page_is_read_from_the_index_by_age(catalog: Catalog, add: Add) -> None:
    statements: list[tuple[str, object]] = []
    event.listen(catalog._database.engine, "before_cursor_execute", lambda c, cu, sql, p, *_: statements.append((sql, p)))
    record = add("support", "one")[0]
    catalog.list("acme", 10, (record.created_at, "x"))
    sql, values = statements[-1]
    with catalog._read() as db:
        plan = " / ".join(str(row[3]) for row in db.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values))
    assert "USING INDEX versions_by_age (tenant=? AND (created_at,name)<(?,?))" in plan
    assert "TEMP B-TREE" not in plan


def test_publishing_locks_the_name_where_there_can_be_two_writers(catalog: Catalog, add: Add) -> None:
    """What `add` selects, as PostgreSQL would get it."""
    seen: list[str] = []

    def compiled(db: object, statement: ClauseElement, *_: object) -> None:
        if isinstance(statement, Select):
            seen.append(str(statement.compile(dialect=postgresql.dialect())))

    event.listen(catalog._database.engine, "before_execute", compiled)
    add("support", "one")
    assert any(sql.endswith("FOR UPDATE") and "FROM adapters" in sql for sql in seen)
