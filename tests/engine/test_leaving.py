"""Leaving: who was told to go goes when nothing needs it, and comes back only for as long as it may be asked for."""

from __future__ import annotations

import pytest

from adapters_store.digest import Digest
from server.engine.leaving import Leaving
from server.engine.residency import AdapterFacts, Residency

A, B, MADE = (Digest.of(name) for name in (b"a", b"b", b"made from a"))


class House:
    """A residency with room for everybody, a clock, and those who are waited for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.awaited: set[Digest] = set()
        self.residency = Residency(8)
        self.leaving = Leaving(self.residency, self.awaited.__contains__, lambda: self.now)

    def put(self, digest: Digest) -> None:
        self.residency.want(digest)
        self.residency.loaded(digest, AdapterFacts())
        self.residency.place(digest)

    def take(self) -> set[Digest]:
        """Who can go, each of which goes."""
        gone = {digest for digest, _ in self.leaving.take()}
        for digest in gone:
            self.residency.unload(digest)
        return gone


@pytest.fixture
def house() -> House:
    return House()


def test_who_is_not_needed_goes_at_once_and_is_forgotten(house: House) -> None:
    house.put(A)
    house.leaving.add([A, B], A)
    assert house.take() == {A, B}
    assert len(house.leaving) == 0


def test_who_runs_goes_when_it_no_longer_runs(house: House) -> None:
    house.put(A)
    house.residency.acquire([A])
    house.leaving.add([A], A)
    assert house.take() == set()
    house.residency.release([A])
    assert house.take() == {A}


def test_who_is_on_its_way_goes_when_nobody_took_it_or_it_has_run(house: House) -> None:
    house.residency.want(A)
    house.leaving.add([A], A)
    assert house.take() == set()
    house.residency.loaded(A, AdapterFacts())
    assert house.take() == set()
    house.residency.place(A)
    assert house.take() == {A}


@pytest.mark.parametrize("resident", [True, False])
def test_who_is_waited_for_goes_when_it_no_longer_is(house: House, resident: bool) -> None:
    if resident:
        house.put(A)
    house.awaited.add(A)
    house.leaving.add([A], A)
    assert house.take() == set()
    house.awaited.clear()
    assert house.take() == {A}


def test_who_comes_back_within_the_grace_goes_again(house: House) -> None:
    house.leaving.add([A], A, grace=10)
    for _ in range(2):
        house.put(A)
        assert house.take() == {A}
        assert house.take() == set()
    house.now = 10
    assert house.take() == {A}, "what its loads have left behind goes last"
    house.put(A)
    assert house.take() == set()


def test_who_is_still_needed_when_the_grace_is_over_goes_later(house: House) -> None:
    house.leaving.add([A], A, grace=10)
    house.put(A)
    house.residency.acquire([A])
    house.now = 60
    assert house.take() == set()
    house.residency.release([A])
    assert house.take() == {A}
    assert len(house.leaving) == 0


def test_who_stands_behind_one_that_could_not_be_taken_off_goes_the_next_time(house: House) -> None:
    for digest in (A, B):
        house.put(digest)
        house.leaving.add([digest], digest)
    assert next(house.leaving.take()) == (A, A)  # and whoever took it off raised
    assert house.take() == {B}


def test_of_some_only_those_are_looked_at(house: House) -> None:
    pairs = [pair for digest in (A, B) for pair in house.leaving.add([digest], digest)]
    assert list(house.leaving.take(pairs[1:])) == [(B, B)]
    assert house.take() == {A}


def test_what_is_made_from_who_leaves_follows_it(house: House) -> None:
    house.leaving.add([A], A, grace=10)
    house.leaving.follow(MADE, {A, B})
    house.leaving.follow(B, ())
    house.put(MADE)
    house.put(B)
    assert list(house.leaving.take()) == [(MADE, A)]


def test_who_is_wanted_again_stays_and_so_does_what_is_made_from_it(house: House) -> None:
    for digest in (A, MADE, B):
        house.put(digest)
        house.residency.acquire([digest])
    house.leaving.add([A, MADE], A)
    house.leaving.add([B], B)
    house.leaving.stay(A)
    house.residency.release([A, MADE, B])
    assert house.take() == {B}
