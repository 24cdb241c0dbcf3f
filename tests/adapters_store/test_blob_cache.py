import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters_store.blob_cache import IN_USE, BlobCache
from adapters_store.digest import Digest
from adapters_store.drafts import Drafts


@pytest.fixture
def drafts(root: Path) -> Drafts:
    root.mkdir()
    return Drafts(root)


def taken(cache: BlobCache, drafts: Drafts, data: bytes, *, age: float = 0.0) -> Digest:
    """A copy of `data`, last used `age` seconds ago."""
    draft = drafts.new()
    draft.write(data)
    draft.finish()
    cache.take(draft)
    moment = time.time() - age
    os.utime(cache.path(draft.digest), (moment, moment))
    return draft.digest


def held(cache: BlobCache, *digests: Digest) -> list[bool]:
    """Without marking them as used."""
    return [cache.path(digest).exists() for digest in digests]


def test_what_was_taken_is_found(root: Path, drafts: Drafts) -> None:
    cache = BlobCache(root, 1 << 20)
    digest = taken(cache, drafts, b"weights")
    assert cache.find(digest)
    assert cache.path(digest).read_bytes() == b"weights"
    assert not cache.find(Digest.of(b"other"))
    cache.drop(digest)
    cache.drop(digest)
    assert not cache.find(digest)


def test_the_longest_unused_go_first_and_only_as_many_as_must(root: Path, drafts: Drafts) -> None:
    cache = BlobCache(root, 30)
    old = [taken(cache, drafts, bytes([number]) * 10, age=1000 - number) for number in range(3)]
    assert cache.find(old[0])  # which makes it the youngest
    new = taken(cache, drafts, b"n" * 10)
    assert held(cache, *old, new) == [True, False, True, True]


def test_a_copy_that_may_be_about_to_be_opened_stays_whatever_the_limit(root: Path, drafts: Drafts) -> None:
    cache = BlobCache(root, 0)
    young = taken(cache, drafts, b"young", age=IN_USE / 2)
    old = taken(cache, drafts, b"old", age=2 * IN_USE)
    newest = taken(cache, drafts, b"newest")
    assert held(cache, young, old, newest) == [True, False, True]


@pytest.mark.parametrize("damage", [b"", b"weightz", b"weights and more"])
def test_a_copy_damaged_between_two_runs_is_dropped(root: Path, drafts: Drafts, damage: bytes) -> None:
    digest = taken(BlobCache(root, 1 << 20), drafts, b"weights")
    path = BlobCache(root, 1 << 20).path(digest)
    path.write_bytes(damage)
    cache = BlobCache(root, 1 << 20)
    assert not cache.find(digest)
    assert not path.exists()


def test_a_copy_that_lost_bytes_while_it_was_watched_is_dropped(root: Path, drafts: Drafts) -> None:
    cache = BlobCache(root, 1 << 20)
    digest = taken(cache, drafts, b"weights")
    os.truncate(cache.path(digest), 3)
    assert not cache.find(digest)


def test_two_caches_on_one_directory_bound_it_together(root: Path, drafts: Drafts) -> None:
    one, two = BlobCache(root, 25), BlobCache(root, 25)
    first = taken(one, drafts, b"1" * 10, age=900)
    second = taken(two, drafts, b"2" * 10, age=800)
    third = taken(one, drafts, b"3" * 10)
    assert held(two, first, second, third) == [False, True, True]
    assert two.find(third)


def test_a_copy_that_was_found_is_still_there_to_be_opened_however_many_evict(root: Path, drafts: Drafts) -> None:
    caches = [BlobCache(root, 0) for _ in range(4)]
    contents = [bytes([number]) * 100 for number in range(8)]

    def work(thread: int) -> None:
        cache = caches[thread % 4]
        for data in contents * 3:
            digest = taken(cache, drafts, data)
            if cache.find(digest):
                assert cache.path(digest).read_bytes() == data

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
