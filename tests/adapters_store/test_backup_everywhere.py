"""What one store exports every other imports, whatever keeps its catalog and its blobs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.store import Store

from .changes import CHANGES, seen, upload
from .conftest import HandClock

EVERYWHERE = True


@pytest.fixture
def files(directory: Path, clock: HandClock) -> Iterator[Store]:
    """A store in a directory, beside the one that is tested everywhere."""
    with Store.open(directory / "files", clock=clock) as opened:
        yield opened


def fill(store: Store) -> None:
    upload(store, "acme", "support", "one")
    upload(store, "acme", "support", "two")
    upload(store, "zeta", "org/sales", "two")
    upload(store, "zeta", "gone", "three")
    store.delete("zeta", "gone")
    store.bind_user("acme", "ann@example.org", "support")
    store.put_tenant("acme", {"weight": 2.0})


def copied(source: Store, target: Store) -> bytes:
    archive = io.BytesIO()
    source.export_to(archive)
    target.import_from(io.BytesIO(archive.getvalue()))
    return archive.getvalue()


@pytest.mark.parametrize("there", [True, False], ids=["to files", "from files"])
def test_everything_comes_over_and_the_copy_exports_the_same(store: Store, files: Store, there: bool) -> None:
    source, target = (store, files) if there else (files, store)
    fill(source)
    archive = copied(source, target)
    assert seen(target) == seen(source)
    assert (target.verify(), target.gc(0).blobs) == ((), 0)
    again = io.BytesIO()
    target.export_to(again)
    assert again.getvalue() == archive
    assert target.import_from(io.BytesIO(archive)).new_versions == 0


def test_a_newer_binding_and_a_higher_count_stay(store: Store, files: Store) -> None:
    fill(files)
    copied(files, store)
    upload(store, "acme", "support", "three")
    upload(store, "acme", "sales", "four")
    store.bind_user("acme", "ann@example.org", "sales")
    store.put_tenant("acme", {"weight": 5.0})
    was = seen(store)
    copied(files, store)
    assert seen(store) == was


@pytest.mark.parametrize("change", CHANGES)
def test_a_dry_run_frees_nothing_and_says_what_the_next_run_frees(store: Store, clock: HandClock, change: str) -> None:
    fill(store)
    CHANGES[change](store)
    for grace in (3600, 0):
        clock.advance(1)
        was, blobs = seen(store), set(store._blobs)
        said = store.gc(grace, dry_run=True)
        assert (seen(store), set(store._blobs)) == (was, blobs)
        done = store.gc(grace)
        assert (done.blobs, done.size_bytes) == (said.blobs, said.size_bytes)
        assert store.verify() == ()
