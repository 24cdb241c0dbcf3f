"""Holdings: whose adapter leaves for whose."""

from __future__ import annotations

from server.tenancy.holdings import IDLE, Held, Holder, Holdings
from server.tenancy.policy import TenantPolicy

NOW = 1000.0


def holder(name: str, weight: float = 1.0, used_at: float = NOW, max_slots: int | None = None) -> Holder:
    return Holder(name, TenantPolicy(weight=weight, max_slots=max_slots), used_at)


def holdings(
    *held: tuple[str, Holder], capacity: int = 4, pinned: str = "", budget: int | None = None, **nbytes: int
) -> Holdings[str]:
    """`held` least recently used first; `pinned` names keys."""
    entries = {key: Held(owner, nbytes.get(key, 0), key in pinned) for key, owner in held}
    return Holdings(entries, capacity, budget)


def order(made: Holdings[str], newcomer: Holder, nbytes: int = 0) -> list[str]:
    free = [key for key, held in made._held.items() if not held.pinned]
    return list(made.order(free, newcomer, nbytes, NOW))


def test_alone_a_tenant_loses_its_least_recently_used() -> None:
    one = holder("a")
    assert order(holdings(("p", one), ("q", one), ("r", one)), one) == ["p", "q", "r"]


def test_who_holds_its_share_gives_its_own() -> None:
    attacker, victim = holder("attacker"), holder("victim")
    made = holdings(("v", victim), ("p", attacker), ("q", attacker), ("r", attacker))
    assert order(made, attacker)[0] == "p"


def test_who_comes_back_takes_from_whoever_holds_most() -> None:
    borrower, owner, third = holder("borrower"), holder("owner"), holder("third")
    made = holdings(("t", third), ("p", borrower), ("q", borrower), ("r", borrower))
    assert order(made, owner)[0] == "p"


def test_weights_count() -> None:
    """Three of four slots are a's share, so b takes its own second."""
    a, b = holder("a", weight=3), holder("b")
    made = holdings(("p", a), ("q", a), ("r", a), ("s", b))
    assert order(made, b)[0] == "s"
    assert order(holdings(("p", a), ("s", b), ("t", b), ("u", b)), a)[0] == "s"


def test_the_adapters_of_an_idle_tenant_go_first_least_recently_used_first() -> None:
    here, gone, away = holder("here"), holder("gone", used_at=NOW - IDLE - 1), holder("away", used_at=NOW - 2 * IDLE)
    made = holdings(("h", here), ("g", gone), ("a", away), ("g2", gone))
    assert order(made, here) == ["g", "a", "g2", "h"]


def test_a_tenant_whose_requests_run_is_not_idle() -> None:
    here, long = holder("here"), holder("long", used_at=NOW - 2 * IDLE)
    made = holdings(("l", long), ("p", long), ("h", here), ("h2", here), pinned="p")
    assert order(made, here)[0] == "h"


def test_what_runs_of_ones_own_is_waited_for_rather_than_taken_from_another() -> None:
    attacker, victim = holder("attacker"), holder("victim")
    made = holdings(("v", victim), ("p", attacker), ("q", attacker), ("r", attacker), pinned="pqr")
    assert order(made, attacker) == []


def test_more_tenants_than_slots_take_turns() -> None:
    one, other = holder("one"), holder("other")
    assert order(holdings(("p", one), capacity=1), other) == ["p"]


def test_who_is_capped_gives_its_own_even_beside_idle_ones() -> None:
    capped, gone = holder("capped", max_slots=2), holder("gone", used_at=0)
    made = holdings(("g", gone), ("p", capped), ("q", capped))
    assert made.capped(capped)
    assert order(made, capped)[0] == "p"
    assert not made.capped(capped)


def test_bytes_are_shared_as_slots_are() -> None:
    """One large adapter is more of the device than three small ones."""
    large, small, third = holder("large"), holder("small"), holder("third")
    held = (("l", large), ("p", small), ("q", small), ("r", small))
    made = holdings(*held, capacity=8, budget=100, l=70, p=5, q=5, r=5)
    assert order(made, third, nbytes=20)[0] == "l"
    assert order(holdings(*held, capacity=8, budget=100, l=70, p=5, q=5, r=5), large, nbytes=40)[0] == "l"
