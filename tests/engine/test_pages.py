"""Pages: allocation, the prefix cache, and the invariant that no block is lost or in two states."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.pages import Owner, Pages, chain_key, chain_seed


def test_block_zero_is_never_given_out() -> None:
    pages = Pages(5, 4)
    blocks = pages.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert pages.allocate(1) is None


def test_a_failed_allocation_changes_nothing() -> None:
    pages = Pages(4, 4)
    assert pages.allocate(4) is None
    assert pages.available == 3


def test_released_full_blocks_are_found_again_and_unkeyed_ones_are_not() -> None:
    pages = Pages(8, 2)
    seed = chain_seed("t", "base")
    k0 = chain_key(seed, [1, 2])
    k1 = chain_key(k0, [3, 4])
    blocks = pages.allocate(3)
    assert blocks is not None
    pages.publish(blocks[0], k0)
    pages.publish(blocks[1], k1)
    pages.release(blocks)
    assert pages.used == 0
    assert pages.match([k0, k1, chain_key(k1, [5, 6])]) == blocks[:2]
    assert pages.used == 2
    pages.check()


def test_reuse_takes_the_end_of_the_least_recently_used_sequence_first() -> None:
    pages = Pages(4, 2)
    k0 = chain_key(b"s", [1, 2])
    k1 = chain_key(k0, [3, 4])
    k2 = chain_key(k1, [5, 6])
    blocks = pages.allocate(3)
    assert blocks is not None
    for block, key in zip(blocks, (k0, k1, k2), strict=True):
        pages.publish(block, key)
    pages.release(blocks)
    assert pages.allocate(1) == [blocks[2]]
    held = pages.match([k0, k1, k2])
    assert held == blocks[:2]


def test_an_equal_block_published_earlier_stays_the_one_that_is_found() -> None:
    pages = Pages(4, 2)
    blocks = pages.allocate(2)
    assert blocks is not None
    key = chain_key(b"s", [1, 2])
    pages.publish(blocks[0], key)
    pages.publish(blocks[1], key)
    pages.release(blocks)
    assert pages.match([key]) == [blocks[0]]
    assert pages.available == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a", "bc"), ("ab", "c")), (("t1", "d", "b"), ("t2", "d", "b")), (("t", "d1", "b"), ("t", "d2", "b"))],
)
def test_seeds_differ_with_tenant_adapter_and_boundaries(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert chain_seed(*one) != chain_seed(*other)


def test_keys_depend_on_everything_before_them() -> None:
    assert chain_key(chain_key(b"s", [1, 2]), [3, 4]) != chain_key(chain_key(b"s", [1, 5]), [3, 4])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "release", "publish", "match"]), st.integers(0, 7))))
def test_no_block_is_ever_lost(operations: list[tuple[str, int]]) -> None:
    pages = Pages(9, 2)
    holds: list[list[int]] = []
    keys = [chain_key(b"s", [n, n]) for n in range(8)]
    for what, n in operations:
        if what == "allocate":
            blocks = pages.allocate(n)
            if blocks:
                holds.append(blocks)
        elif what == "release" and holds:
            pages.release(holds.pop(n % len(holds)))
        elif what == "publish" and holds:
            pages.publish(holds[n % len(holds)][0], keys[n])
        elif what == "match":
            found = pages.match([keys[n]])
            if found:
                holds.append(found)
        pages.check()
        assert pages.used == len({block for hold in holds for block in hold})
    for hold in holds:
        pages.release(hold)
    assert pages.available == pages.total


# -- owners


def cached(pages: Pages, owner: Owner, count: int, first: int = 0) -> list[bytes]:
    """Keys of so many idle blocks of one owner."""
    blocks = pages.allocate(count, owner)
    assert blocks is not None
    keys = [chain_key(owner.name.encode(), [n, n]) for n in range(first, first + count)]
    for block, key in zip(blocks, keys, strict=True):
        pages.publish(block, key)
    pages.release(blocks)
    pages.check()
    return keys


def test_a_flood_reuses_its_own_blocks_before_anothers() -> None:
    pages = Pages(21, 2)
    victim = cached(pages, Owner("victim"), 6)
    for n in range(50):
        cached(pages, Owner("attacker"), 10, first=10 * n)
    assert len(pages.match(victim)) == 6


def test_what_an_owner_has_running_counts_too() -> None:
    """The attacker's own blocks go first although only two of its twelve are idle."""
    pages = Pages(21, 2)
    victim = cached(pages, Owner("victim"), 8)
    assert pages.allocate(10, Owner("attacker")) is not None
    cached(pages, Owner("attacker"), 2)
    assert pages.allocate(2, Owner("attacker")) is not None
    assert len(pages.match(victim)) == 8


def test_blocks_that_nobody_claims_are_lent_and_who_comes_back_gets_them_again() -> None:
    pages = Pages(13, 2)
    cached(pages, Owner("attacker"), 12)
    cached(pages, Owner("victim"), 5)
    assert pages.shares == {"attacker": 7, "victim": 5}
    cached(pages, Owner("third"), 4)
    assert pages.shares == {"attacker": 4, "victim": 4, "third": 4}


def test_what_an_owner_may_keep_goes_by_its_weight() -> None:
    pages = Pages(13, 2)
    cached(pages, Owner("heavy", 3.0), 9)
    cached(pages, Owner("light"), 3)
    assert pages.allocate(4, Owner("other", 1000.0)) is not None
    assert {name: round(share, 2) for name, share in pages.shares.items()} == {"heavy": 2.0, "light": 2.0, "other": 0.0}
