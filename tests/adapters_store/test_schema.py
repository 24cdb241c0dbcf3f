from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from adapters_store.catalog import Catalog
from adapters_store.database import file_url
from adapters_store.errors import Corrupt
from adapters_store.schema import UtcTime, metadata
from adapters_store.store import Store, utc_now


def test_a_file_that_is_no_database_is_corrupt(root: Path) -> None:
    root.mkdir()
    (root / "catalog.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(Corrupt, match="file is not a database"):
        Store.open(root)


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    odd = tmp_path / "a b%20?mode=memory#ü.sqlite3"
    Catalog(file_url(odd), utc_now).close()
    assert odd.exists()


def test_every_table_compiles_for_both_databases() -> None:
    for table in metadata.sorted_tables:
        for dialect in (sqlite.dialect(), postgresql.dialect()):
            assert table.name in str(CreateTable(table).compile(dialect=dialect))


@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()])
def test_times_come_back_aware_and_in_utc(dialect: sqlite.dialect) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, timezone(timedelta(hours=2)))
    column = UtcTime()
    back = column.process_result_value(column.process_bind_param(moment, dialect), dialect)
    assert back == moment
    assert back.tzinfo is UTC
