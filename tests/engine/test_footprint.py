"""Footprint: bytes follow the room of the pools, and are gone with the last adapter."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.footprint import Footprint, Ledger, SiteBytes, together

Q, V = ("lora:8", "q"), ("lora:8", "v")


def lora(*sites: tuple[str, str], per_slot: int = 10, own: int = 0, loose: int = 0) -> Footprint:
    return Footprint({site: SiteBytes(per_slot, own) for site in sites}, loose)


def test_alone_an_adapter_pays_for_the_identity_too() -> None:
    assert lora(Q, V).alone == 2 * 2 * 10
    assert lora(Q, own=7, loose=100).alone == 2 * 10 + 7 + 100
    assert Footprint().alone == 0


def test_room_doubles_and_reaches_the_highest_slot() -> None:
    ledger = Ledger()
    found = []
    for slot in (1, 2, 3, 4, 11):
        cost = ledger.cost(lora(Q), {"lora:8": slot})
        before = ledger.nbytes
        ledger.add(lora(Q), {"lora:8": slot})
        assert ledger.nbytes == before + cost
        found.append(ledger.nbytes)
    assert found == [20, 40, 40, 80, 160]


def test_a_high_slot_costs_all_the_slots_below_it_at_a_module_of_its_own() -> None:
    ledger = Ledger()
    ledger.add(lora(Q), {"lora:8": 1})
    assert ledger.cost(lora(V), {"lora:8": 30}) == 31 * 10


def test_a_pool_is_freed_with_its_last_adapter() -> None:
    ledger = Ledger()
    for slot in (1, 2):
        ledger.add(lora(Q, own=3, loose=1), {"lora:8": slot})
    assert ledger.nbytes == 4 * 10 + 2 * 3 + 2 * 1
    ledger.remove(lora(Q, own=3, loose=1))
    assert ledger.nbytes == 4 * 10 + 3 + 1
    ledger.remove(lora(Q, own=3, loose=1))
    assert ledger.nbytes == 0


def test_together_they_share_pools_and_no_slots() -> None:
    assert together([lora(Q), lora(Q)]) == 4 * 10
    assert together([lora(Q), Footprint({("ia3", "q"): SiteBytes(1)})]) == 2 * 10 + 2
    assert together([]) == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50), st.integers(0, 9)), max_size=12), st.randoms())
def test_what_is_added_and_removed_leaves_nothing(added: list[tuple[int, int, int]], order: object) -> None:
    ledger, held = Ledger(), []
    for slot, per_slot, own in added:
        footprint = Footprint({("p", f"m{slot % 3}"): SiteBytes(per_slot, own)}, own)
        ledger.add(footprint, {"p": slot})
        held.append(footprint)
    copy, total = ledger.copy(), ledger.nbytes
    order.shuffle(held)  # type: ignore[attr-defined]
    for footprint in held:
        ledger.remove(footprint)
        assert ledger.nbytes >= 0
    assert ledger.nbytes == 0
    assert copy.nbytes == total
