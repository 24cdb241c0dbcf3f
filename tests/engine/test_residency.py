"""Residency: single-flight loading, least-recently-used eviction, pins, slot numbers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.digest import Digest
from server.engine.residency import AdapterFacts, Residency

A, B, C = (Digest(letter * 64) for letter in "abc")


def ready(residency: Residency, digest: Digest, *pools: str) -> None:
    assert residency.want(digest)
    residency.loaded(digest, AdapterFacts(pools))


def test_a_second_want_does_not_load_again() -> None:
    residency = Residency(2)
    assert residency.want(A)
    assert not residency.want(A)
    assert residency.state(A) == ("loading", None)
    residency.loaded(A, AdapterFacts(("ia3",)))
    assert not residency.want(A)
    residency.place(A)
    assert residency.state(A) == ("resident", None)
    assert not residency.want(A)


def test_a_failed_load_keeps_its_reason_until_it_is_wanted_again() -> None:
    residency = Residency(2)
    residency.want(A)
    residency.failed(A, "unreadable")
    assert residency.state(A) == ("failed", "unreadable")
    assert residency.want(A)
    assert residency.state(A) == ("loading", None)


def test_the_least_recently_used_unpinned_adapter_leaves() -> None:
    residency = Residency(2)
    for digest in (A, B):
        ready(residency, digest, "lora:16")
        residency.place(digest)
    residency.acquire([A])
    residency.release([A])  # A was used after B
    ready(residency, C, "lora:16")
    placement = residency.place(C)
    assert placement is not None
    assert placement.evicted == ((B, {"lora:16": 2}),)
    assert placement.slots == {"lora:16": 2}


def test_pinned_adapters_are_never_evicted() -> None:
    residency = Residency(1)
    ready(residency, A, "ia3")
    residency.place(A)
    residency.acquire([A])
    ready(residency, B, "ia3")
    assert residency.place(B) is None
    assert residency.unload(A) is None
    residency.release([A])
    assert residency.place(B) is not None


def test_the_other_adapters_of_a_request_are_kept() -> None:
    residency = Residency(1)
    ready(residency, A, "ia3")
    residency.place(A)
    ready(residency, B, "ia3")
    assert residency.place(B, keep=(A, B)) is None


def test_pools_number_their_slots_on_their_own_lowest_first() -> None:
    residency = Residency(3)
    ready(residency, A, "lora:16", "bias")
    ready(residency, B, "lora:8")
    assert residency.place(A) is not None
    placement = residency.place(B)
    assert placement is not None
    assert residency.slots(A) == {"lora:16": 1, "bias": 1}
    assert placement.slots == {"lora:8": 1}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["want", "place", "acquire", "release", "unload"]), st.integers(0, 5)), max_size=60))
def test_slots_are_never_shared_and_capacity_never_passed(operations: list[tuple[str, int]]) -> None:
    residency = Residency(3)
    digests = [Digest(f"{n:064x}") for n in range(6)]
    pins: dict[Digest, int] = {}
    for what, n in operations:
        digest = digests[n]
        if what == "want" and residency.want(digest):
            residency.loaded(digest, AdapterFacts(("p",) if n % 2 else ("p", "q")))
        elif what == "place" and digest in residency.loaded_only:
            residency.place(digest)
        elif what == "acquire" and residency.is_resident(digest):
            residency.acquire([digest])
            pins[digest] = pins.get(digest, 0) + 1
        elif what == "release" and pins.get(digest):
            residency.release([digest])
            pins[digest] -= 1
        elif what == "unload":
            assert (residency.unload(digest) is None) or not pins.get(digest)
        assert residency.used <= 3
        assert all(residency.is_resident(d) for d, count in pins.items() if count)
        for pool in ("p", "q"):
            used = [residency.slots(d)[pool] for d in residency.resident if pool in residency.slots(d)]
            assert len(used) == len(set(used))
            assert all(1 <= slot <= 3 for slot in used)
