"""What a tenant may keep: counted in the transaction that publishes, so that no race gets past it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapters_store.errors import OverQuota
from adapters_store.quota import UNLIMITED, Quota, Usage
from adapters_store.records import AdapterRecord
from adapters_store.store import Store

from .places import Place

EVERYWHERE = True
THREADS = 8


def publish(store: Store, name: str, data: bytes, quota: Quota, tenant: str = "acme") -> tuple[AdapterRecord, bool]:
    with store.stage() as staged:
        staged.write("weights", [data])
        return store.publish(staged, tenant=tenant, name=name, method="lora", parts=("lora",), details={}, quota=quota)


def test_names_are_counted_not_versions(store: Store) -> None:
    quota = Quota(adapters=2)
    for data in (b"1", b"2", b"3"):
        publish(store, "a", data, quota)
    publish(store, "b", b"1", quota)
    with pytest.raises(OverQuota, match="max_adapters is 2: with this upload it would be 3") as refused:
        publish(store, "c", b"1", quota)
    assert (refused.value.quota, refused.value.limit, refused.value.value) == ("max_adapters", 2, 3)
    store.delete("acme", "a")
    publish(store, "c", b"1", quota)


def test_bytes_of_every_live_version_count(store: Store) -> None:
    quota = Quota(size_bytes=10)
    publish(store, "a", b"1234", quota)
    publish(store, "a", b"12345", quota)
    with pytest.raises(OverQuota, match="max_adapter_bytes is 10: with this upload it would be 11"):
        publish(store, "a", b"12", quota)
    store.delete("acme", "a", 1)
    publish(store, "b", b"12", quota)
    assert store.usage("acme") == Usage(adapters=2, size_bytes=7, largest=5)


def test_equal_files_count_whatever_others_hold(store: Store) -> None:
    """Or a tenant could tell from its quota that somebody has these files."""
    publish(store, "a", b"1234", UNLIMITED, tenant="other")
    publish(store, "a", b"1234", Quota(size_bytes=8))
    publish(store, "b", b"1234", Quota(size_bytes=8))
    assert store.usage("acme").size_bytes == 8
    with pytest.raises(OverQuota):
        publish(store, "c", b"1234", Quota(size_bytes=8))


def test_the_newest_version_can_be_sent_again_whatever_the_quota(store: Store) -> None:
    record, _ = publish(store, "a", b"1234", UNLIMITED)
    assert publish(store, "a", b"1234", Quota(adapters=0, size_bytes=0)) == (record, False)


def test_a_quota_that_was_lowered_lets_what_is_there_be_replaced(store: Store) -> None:
    for name in ("a", "b", "c"):
        publish(store, name, b"1", UNLIMITED)
    assert publish(store, "b", b"2", Quota(adapters=1))[1]
    with pytest.raises(OverQuota):
        publish(store, "d", b"2", Quota(adapters=1))


def test_a_quota_of_nothing(store: Store) -> None:
    for quota in (Quota(adapters=0), Quota(size_bytes=0)):
        with pytest.raises(OverQuota):
            publish(store, "a", b"1", quota)
    assert store.usage("acme") == Usage(0, 0, 0)
    assert store.count("acme") == 0


def test_what_is_refused_leaves_no_byte_behind(store: Store, blob_files: Callable[[], int]) -> None:
    for n in range(5):
        with pytest.raises(OverQuota):
            publish(store, "a", b"%d" % n, Quota(size_bytes=0))
    assert blob_files() == 0


def test_tenants_have_quotas_of_their_own(store: Store) -> None:
    for tenant in ("a", "b"):
        publish(store, "x", b"1", Quota(adapters=1), tenant)


def test_an_upload_that_cannot_fit_is_known_before_it_is_received() -> None:
    usage = Usage(adapters=2, size_bytes=80, largest=50)
    quota = Quota(size_bytes=100)
    quota.check_incoming(50, usage)  # may be the largest version again, which is kept already
    with pytest.raises(OverQuota, match="max_adapter_bytes is 100: with this upload it would be 131"):
        quota.check_incoming(51, usage)
    UNLIMITED.check_incoming(1 << 60, usage)
    Quota(adapters=2).check_incoming(1 << 60, usage)


@pytest.mark.parametrize("quota", [Quota(adapters=3), Quota(size_bytes=3 * 4)])
def test_racing_uploads_cannot_both_have_the_last_place(store: Store, place: Place, quota: Quota) -> None:
    start = threading.Barrier(THREADS)

    def work(thread: int) -> bool:
        start.wait()
        try:
            return publish(stores[thread % 2], f"adapter-{thread}", b"%04d" % thread, quota)[1]
        except OverQuota:
            return False

    with place.open() as second, ThreadPoolExecutor(THREADS) as threads:
        stores = (store, second)
        assert sum(threads.map(work, range(THREADS))) == 3
    assert store.count("acme") == 3
