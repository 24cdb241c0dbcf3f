"""Slots: who waits for an adapter's load or slot blocks nobody, and is not passed for ever."""

from __future__ import annotations

import pytest

from adapters_store.digest import Digest
from server.engine.plan import Plan
from server.requests import FinishReason
from server.tenancy.policy import TenantPolicy
from tests.engine.test_scheduler import Bench


def adapter(name: str) -> Digest:
    return Digest.of(name.encode())


def running(bench: Bench) -> set[str]:
    return {sequence.request.id for sequence in bench.scheduler.running if sequence.request is not None}


def pin_all(bench: Bench, slots: int, tenant: str, new: int = 60) -> None:
    """One long request on each slot."""
    for n in range(slots):
        bench.submit(f"{tenant}{n}", [1, 3], adapter(f"{tenant}{n}"), tenant=tenant, max_new_tokens=new)
    for _ in range(3):
        bench.step()
    assert bench.residency.used == slots


def test_a_wait_for_a_slot_holds_up_no_request_that_needs_none() -> None:
    """The attacker's fifth adapter finds no slot; however long it waits, others' requests for the base go through."""
    bench = Bench(blocks=200, slots=4, patience=2)
    pin_all(bench, 4, "attacker", new=90)
    bench.submit("fifth", [1, 3], adapter("more"), tenant="attacker")
    for n in range(20):
        bench.submit(f"base{n}", [1, 3], tenant="victim", max_new_tokens=1)
        bench.step()
        assert bench.finish(f"base{n}") == [FinishReason.LENGTH]
    assert bench.finish("fifth") == []


def test_a_wait_for_a_slot_holds_up_nobody_who_pins_less() -> None:
    bench = Bench(blocks=200, slots=4, patience=2)
    bench.submit("v", [1, 3], adapter("victim"), tenant="victim", max_new_tokens=90)
    bench.step()
    pin_all(bench, 4, "attacker", new=90)
    for n in range(12):
        bench.submit(f"v{n}", [1, 3], adapter("victim"), tenant="victim", max_new_tokens=1)
        bench.step()
        assert bench.finish(f"v{n}") == [FinishReason.LENGTH]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_stream_of_requests_on_hot_adapters_starves_nobody(slots: int) -> None:
    """The attacker keeps all slots pinned without a pause; the victim gets one all the same."""
    bench = Bench(blocks=200, slots=slots, patience=4)
    pin_all(bench, slots, "attacker", new=6)
    bench.submit("v", [1, 3], adapter("victim"), tenant="victim", max_new_tokens=1)
    for n in range(200):
        if len(bench.scheduler.waiting) < 2 * slots:
            bench.submit(f"more{n}", [1, 3], adapter(f"attacker{n % slots}"), tenant="attacker", max_new_tokens=6)
        bench.step()
        if bench.finish("v"):
            return
    raise AssertionError("the victim was never served")


def test_two_tenants_that_both_wait_too_long_do_not_hold_each_other_up() -> None:
    bench = Bench(blocks=200, slots=2, patience=0)
    for round_ in range(6):
        for tenant in "ab":
            bench.submit(f"{tenant}{round_}", [1, 3], adapter(f"{tenant}{round_}"), tenant=tenant, max_new_tokens=3)
    bench.run()
    assert all(bench.finish(f"{tenant}{n}") == [FinishReason.LENGTH] for tenant in "ab" for n in range(6))


def test_a_policys_slots_are_a_cap_however_many_are_free() -> None:
    bench = Bench(blocks=200, slots=8)
    policy = TenantPolicy(max_slots=2)
    for n in range(6):
        bench.submit(str(n), [1, 3], adapter(str(n)), policy=policy)
    while not bench.scheduler.idle:
        bench.step()
        assert bench.residency.used <= 2
    assert all(bench.finish(str(n)) == [FinishReason.LENGTH] for n in range(6))


def loads(bench: Bench) -> list[Digest]:
    plan: Plan = bench.step(load=False)
    return plan.loads


def test_loads_are_started_in_turn_by_tenant() -> None:
    bench = Bench(prefetch=3)
    for n in range(5):
        bench.submit(f"a{n}", [1, 3], adapter(f"a{n}"), tenant="a")
    bench.submit("b0", [1, 3], adapter("b0"), tenant="b")
    assert loads(bench) == [adapter("a0"), adapter("b0"), adapter("a1")]


def test_loads_that_hang_keep_no_other_tenant_from_loading() -> None:
    bench = Bench(prefetch=3)
    for n in range(5):
        bench.submit(f"a{n}", [1, 3], adapter(f"a{n}"), tenant="a")
    assert len(loads(bench)) == 3
    bench.submit("b0", [1, 3], adapter("b0"), tenant="b")
    bench.submit("b1", [1, 3], adapter("b1"), tenant="b")
    assert loads(bench) == [adapter("b0")]  # one beyond the limit, not two


def test_what_is_warmed_waits_for_a_slot_and_evicts_nobody_who_runs() -> None:
    bench = Bench(slots=1)
    bench.submit("a", [1, 3], adapter("a"), max_new_tokens=8)
    for _ in range(2):
        bench.step()
    bench.scheduler.warm(adapter("w"))
    for _ in range(3):
        bench.step()
    assert bench.residency.resident == (adapter("a"),)
    bench.run()
    bench.step()
    assert bench.residency.resident == (adapter("w"),)
