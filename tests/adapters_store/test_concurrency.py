"""Many threads, two stores at one place: what each of them was told stays true for all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from adapters_store.errors import NotFound
from adapters_store.records import AdapterRecord
from adapters_store.store import Store

from .places import Place

Upload = Callable[..., tuple[AdapterRecord, bool]]

EVERYWHERE = True
THREADS = 8
S = TypeVar("S")
T = TypeVar("T")


@pytest.fixture
def stores(store: Store, place: Place) -> Iterator[list[Store]]:
    """One store object per thread, two in all."""
    with place.open() as second:
        yield [store, second] * (THREADS // 2)


def test_publishing_one_name_from_many_threads_gives_every_upload_its_own_version(stores: list[Store], upload: Upload) -> None:
    def work(thread: int, store: Store) -> list[AdapterRecord]:
        return [upload(store, "acme", "support", a=b"%d %d" % (thread, n))[0] for n in range(5)]

    records = [record for found in at_once(work, stores) for record in found]
    total = 5 * THREADS
    assert sorted(record.version for record in records) == list(range(1, total + 1))
    assert sorted(records, key=lambda r: -r.version) == list(stores[0].versions("acme", "support"))
    assert stores[1].verify() == ()


def test_publishing_equal_content_from_many_threads_makes_one_version(stores: list[Store], upload: Upload) -> None:
    results = at_once(lambda _, store: upload(store, "acme", "support", a=b"same", b=b"again"), stores)
    assert [created for _, created in results].count(True) == 1
    assert {record for record, _ in results} == set(stores[0].versions("acme", "support"))
    assert len(stores[0].versions("acme", "support")) == 1


def test_collecting_never_takes_a_blob_that_is_being_published(stores: list[Store], upload: Upload) -> None:
    """Half of the threads publish and delete the same content over and over, the others collect without grace."""
    done = [threading.Event() for _ in range(THREADS // 2)]

    def publish(thread: int, store: Store) -> None:
        for _ in range(10):
            assert upload(store, "acme", f"adapter-{thread}", weights=b"the same for all")[1]
            store.delete("acme", f"adapter-{thread}")
        upload(store, "acme", f"adapter-{thread}", weights=b"the same for all")

    def work(thread: int, store: Store) -> int:
        if thread >= len(done):
            return collect_until(done, store)
        try:
            publish(thread, store)
        finally:
            done[thread].set()
        return 0

    at_once(work, stores)  # whether a collector found something is a matter of luck; that it took nothing needed is not
    assert stores[0].count("acme") == len(done)
    assert stores[0].verify() == ()


def collect_until(done: list[threading.Event], store: Store) -> int:
    blobs = 0
    while not all(event.is_set() for event in done):
        blobs += store.gc(0).blobs
    return blobs


def test_a_delete_that_races_is_won_once(stores: list[Store], upload: Upload) -> None:
    for number in range(5):
        upload(stores[0], "acme", "support", a=b"%d" % number)

        def work(_: int, store: Store) -> bool:
            try:
                store.delete("acme", "support")
            except NotFound:
                return False
            return True

        assert at_once(work, stores).count(True) == 1


def test_opening_a_new_place_from_many_threads_gives_one_store(place: Place, upload: Upload) -> None:
    def work(thread: int, _: None) -> AdapterRecord:
        with place.open() as store:
            return upload(store, "acme", f"adapter-{thread}", a=b"1")[0]

    records = at_once(work, [None] * THREADS)
    with place.open() as store:
        assert {record.name for record in records} == {record.name for record in store.list("acme")[0]}
        assert store.count() == THREADS


def test_stores_opened_and_closed_beside_each_other_do_not_meet(store: Store, place: Place) -> None:
    def work(_: int, __: None) -> None:
        for _ in range(10):
            place.open().close()

    at_once(work, [None] * THREADS)
    assert store.gc(0).uploads == 0


def at_once(work: Callable[[int, S], T], stores: list[S]) -> list[T]:
    """`work(thread, store)` in one thread per store, all released together; raises what a thread raised."""
    start = threading.Barrier(len(stores))

    def run(thread: int, store: S) -> T:
        start.wait(timeout=60)
        return work(thread, store)

    with ThreadPoolExecutor(len(stores)) as pool:
        return list(pool.map(run, range(len(stores)), stores))
