"""Prefixes: whose shared prefixes and cached blocks make room for others. No model, no torch."""

from __future__ import annotations

from adapters_store.digest import Digest
from server.engine.residency import AdapterFacts
from tests.engine.test_scheduler import FACTS, Bench


def prefix(name: str) -> Digest:
    digest = Digest.of(name.encode())
    FACTS[digest] = AdapterFacts((), virtual=8)
    return digest


def test_a_tenant_that_floods_with_prefixes_flushes_no_other_tenants_cache() -> None:
    bench = Bench(blocks=41, slots=40, max_running=1)
    prompt = list(range(3, 16))
    bench.submit("v", prompt, tenant="victim", max_new_tokens=1)
    bench.run()
    for n in range(60):
        bench.submit(f"a{n}", [1, 3, 4], prefix(f"a{n}"), tenant="attacker", max_new_tokens=1)
    bench.run()
    bench.submit("v2", prompt, tenant="victim", max_new_tokens=1)
    bench.run()
    assert bench.events[-1].cached_tokens == 12
    bench.scheduler.check_idle()


def test_nor_does_it_drop_another_tenants_prefix() -> None:
    bench = Bench(blocks=41, slots=40, max_running=1)
    own = prefix("v")
    bench.submit("v", [1, 3], own, tenant="victim", max_new_tokens=1)
    bench.run()
    for n in range(60):
        bench.submit(f"a{n}", list(range(3, 16)), prefix(f"a{n}"), tenant="attacker", max_new_tokens=1)
    bench.run()
    plans = len(bench.plans)
    bench.submit("v2", [1, 3], own, tenant="victim", max_new_tokens=1)
    bench.run()
    assert not any(type(change).__name__ == "Fill" for plan in bench.plans[plans:] for change in plan.changes)


def test_alone_a_tenants_cached_blocks_go_before_its_prefixes() -> None:
    bench = Bench(blocks=11, slots=4, max_running=1, max_total_tokens=36)
    own = prefix("p")
    bench.submit("p", [1, 3], own, max_new_tokens=1)
    for n in range(6):
        bench.submit(f"{n}", [n, *range(3, 15)], max_new_tokens=1)
    bench.run()
    plans = len(bench.plans)
    bench.submit("again", [1, 3], own, max_new_tokens=1)
    bench.run()
    assert not any(type(change).__name__ == "Fill" for plan in bench.plans[plans:] for change in plan.changes)
