"""What the two databases do differently: URLs, failures, and PostgreSQL's locks that keep publishers and collectors apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters_store.database import Database, postgresql_url
from adapters_store.errors import Invalid, NotFound, Unavailable
from adapters_store.store import Store, open_store
from tests.servers import PostgreSQL

from .conftest import Upload


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_way_to_write_a_postgresql_url_means_the_driver_that_is_here(scheme: str) -> None:
    url = postgresql_url(f"{scheme}://me:hush@host:5433/name")
    assert url.render_as_string(hide_password=False) == "postgresql+psycopg://me:hush@host:5433/name"


@pytest.mark.parametrize(
    "url", ["", "hush", "mysql://me:hush@host/name", "sqlite:///hush", "postgresql://me:hush@host:port/name"]
)
def test_another_url_is_refused_without_repeating_it(url: str, root: Path) -> None:
    with pytest.raises(Invalid, match=r"^catalog_url: must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE") as refused:
        open_store(root, url)
    assert "hush" not in str(refused.value)


def test_a_postgresql_that_cannot_be_reached_is_unavailable_without_saying_where(root: Path) -> None:
    with pytest.raises(Unavailable, match=r"^the store's catalog failed: \w+$") as failed:
        open_store(root, "postgresql://me:hush@127.0.0.1:1/name")
    assert not any(word in str(failed.value) for word in ("127.0.0.1", "hush", "name"))
    assert "hush" not in repr(failed.value.__cause__)


@pytest.fixture
def url(postgresql: PostgreSQL) -> str:
    return postgresql.database()


@pytest.fixture
def both(url: str, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """Two stores as two machines would have them: one catalog, blobs in one place, nothing else in common but that."""
    with open_store(tmp_path, url) as one, open_store(tmp_path, url) as two:
        yield one, two


@pytest.mark.slow
def test_a_collector_waits_for_publishers_and_is_not_overtaken(both: tuple[Store, Store], url: str) -> None:
    publisher, collector = (store._catalog.exclusion for store in both)
    assert publisher is not None
    assert collector is not None
    order: list[str] = []

    def collect() -> None:
        with collector.collecting():
            order.append("collector")

    def publish() -> None:
        with publisher.publishing():
            order.append("later publisher")

    threads = [threading.Thread(target=collect), threading.Thread(target=publish)]
    with publisher.publishing():
        for number, thread in enumerate(threads, start=1):
            thread.start()
            until_waiting(url, number)
        order.append("first publisher")
    for thread in threads:
        thread.join(60)
    assert order == ["first publisher", "collector", "later publisher"]


def until_waiting(url: str, count: int) -> None:
    """Until so many sessions wait for an advisory lock."""
    database = Database(postgresql_url(url))
    query = text(
        "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database "
        "WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"
    )
    found = 0
    while found < count:
        with database.read() as db:
            found = db.execute(query).scalar_one()
    database.close()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before keep", "after keep"])
def test_who_loses_the_lock_while_publishing_publishes_nothing(
    both: tuple[Store, Store], url: str, postgresql: PostgreSQL, upload: Upload, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its session is cut; from then on a collector may run, and take what the row would name."""
    store, other = both
    real = store._blobs.keep

    def keep(drafts: object) -> None:
        if when == "after keep":
            real(drafts)  # type: ignore[arg-type]
        postgresql.stop_sessions(url)
        if when == "before keep":
            real(drafts)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(store._blobs, "keep", keep)
        with pytest.raises(Unavailable):
            upload(store, "acme", "support", a=b"1")
    with pytest.raises(NotFound):
        other.get("acme", "support")
    assert other.gc(0).blobs == 2
    assert upload(store, "acme", "support", a=b"1")[0].version == 1


@pytest.mark.slow
def test_who_loses_the_lock_while_collecting_stops(
    both: tuple[Store, Store], url: str, postgresql: PostgreSQL, upload: Upload
) -> None:
    exclusion = both[0]._catalog.exclusion
    assert exclusion is not None
    with exclusion.collecting():
        exclusion.confirm()
        postgresql.stop_sessions(url)
        with pytest.raises(Unavailable):
            exclusion.confirm()
    with exclusion.collecting():
        exclusion.confirm()


@pytest.mark.slow
def test_a_restart_of_postgresql_is_noticed_by_nobody_who_comes_after_it(
    both: tuple[Store, Store], url: str, postgresql: PostgreSQL, upload: Upload
) -> None:
    record, _ = upload(both[0], "acme", "support", a=b"1")
    assert both[1].get("acme", "support") == record
    assert postgresql.stop_sessions(url) > 0
    for store in both:
        assert store.get("acme", "support") == record
        store.bind_user("acme", "ann", "support")


@pytest.mark.slow
def test_more_threads_than_connections_publish_and_none_starves(both: tuple[Store, Store], upload: Upload) -> None:
    """A publisher holds one connection, never two: so many of them cannot wait for each other's second."""

    def work(number: int) -> int:
        return upload(both[number % 2], "acme", f"adapter-{number}", a=b"%d" % number)[0].version

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(work, range(40))) == [1] * 40
    assert both[0].count("acme") == 40


@pytest.mark.slow
def test_what_only_reads_begins_no_transaction(both: tuple[Store, Store]) -> None:
    catalog = both[0]._catalog
    for _ in range(2):  # a connection that wrote is given back as it was
        with catalog._read() as db:
            assert db.connection.driver_connection.autocommit
        with catalog._write() as db:
            assert not db.connection.driver_connection.autocommit
            assert db.get_isolation_level() == "READ COMMITTED"
