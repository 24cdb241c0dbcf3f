"""Tenants in the scheduler: turns, charges, preemption and shares, and that nobody waits for ever. No model, no torch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.digest import Digest
from server.engine.plan import Sequence
from server.errors import QuotaError, ValidationError
from server.requests import FinishReason
from server.tenancy.policy import TenantPolicy
from tests.engine.test_scheduler import LORA, PREFIX, PROMPT, Bench, counts


def test_tenants_take_turns_whoever_came_first() -> None:
    bench = Bench(max_running=1)
    for n in range(4):
        bench.submit(f"a{n}", [1, 3], tenant="a", max_new_tokens=1)
    for n in range(2):
        bench.submit(f"b{n}", [1, 3], tenant="b", max_new_tokens=1)
    bench.run()
    assert [event.request_id for event in bench.events] == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_weights_decide_how_often_it_is_whose_turn() -> None:
    bench = Bench(max_running=1)
    for n in range(20):
        for tenant, weight in (("a", 1), ("b", 3)):
            bench.submit(f"{tenant}{n}", [1, 3], tenant=tenant, policy=TenantPolicy(weight=weight), max_new_tokens=1)
    for _ in range(16):
        bench.step()
    assert Counter(event.request_id[0] for event in bench.events) == {"a": 4, "b": 12}


def test_a_short_prompt_is_not_behind_the_long_ones_of_another_tenant() -> None:
    """Prompts of 90 tokens are running, 16 tokens a step: the next, of another tenant, gets all but an eighth of them."""
    bench = Bench(blocks=200)
    for n in range(4):
        bench.submit(f"long{n}", list(range(3, 93)), tenant="attacker")
    bench.step()
    bench.submit("short", list(range(3, 19)), tenant="victim", max_new_tokens=1)
    assert counts(bench.step()) == {"long0": 2, "short": 14}
    assert counts(bench.step()) == {"long0": 14, "short": 2}
    assert bench.finish("short") == [FinishReason.LENGTH]
    assert counts(bench.step()) == {"long0": 16}
    bench.run()


def test_shares_of_a_step_follow_weights() -> None:
    bench = Bench(blocks=200)
    for tenant, weight in (("a", 1), ("b", 3)):
        bench.submit(tenant, list(range(3, 83)), tenant=tenant, policy=TenantPolicy(weight=weight))
    assert counts(bench.step()) == {"a": 4, "b": 12}
    bench.run()


def test_max_running_of_a_tenant_leaves_the_rest_of_the_batch_to_others() -> None:
    bench = Bench(max_running=4)
    for n in range(6):
        bench.submit(f"a{n}", [1, 3], tenant="a", policy=TenantPolicy(max_running=2))
    bench.submit("b", [1, 3], tenant="b")
    assert counts(bench.step()).keys() == {"a0", "a1", "b"}
    for _ in range(20):
        assert sum(1 for sequence in bench.scheduler.running if sequence.tenant == "a") <= 2
        bench.step()
    bench.run()
    assert all(bench.finish(f"a{n}") == [FinishReason.LENGTH] for n in range(6))


def test_the_tenant_that_was_served_most_is_preempted_first_the_youngest_of_it() -> None:
    bench = Bench(blocks=17, block_size=2)
    for n in range(3):
        bench.submit(f"a{n}", [1, 3, 4, 5], tenant="a", max_new_tokens=8)
    bench.step()
    bench.submit("b0", [1, 3, 4, 5], tenant="b", max_new_tokens=8)
    preempted: list[Sequence] = []
    while not preempted:
        before = list(bench.scheduler.running)
        bench.step()
        preempted = [s for s in before if s in bench.scheduler.waiting]
    assert [s.request.id for s in preempted if s.request] == ["a2"]  # the youngest of all is b0
    bench.run()
    assert all(bench.tokens(id) == list(range(50, 58)) for id in ("a0", "a1", "a2", "b0"))


def charges(bench: Bench, tenant: str) -> float:
    counter = bench.scheduler.waiting.counter(tenant)
    assert counter is not None
    return counter


def test_a_prefix_hit_is_charged_at_what_was_computed() -> None:
    bench = Bench()
    prompt = list(range(3, 12))  # 9 tokens, two full blocks of 4
    bench.submit("keep", [1], tenant="other", max_new_tokens=90)
    bench.submit("first", prompt, max_new_tokens=1)
    bench.step()
    begun = charges(bench, "other")
    bench.submit("again", prompt, max_new_tokens=2)
    bench.step()
    paid = charges(bench, "t") - max(begun, 9 + 2)
    assert paid == (9 - 8) + 2


def test_a_preemption_is_not_charged_twice_and_what_was_not_computed_is_given_back() -> None:
    bench = Bench(max_batch_tokens=4)
    bench.submit("keep", [1], tenant="other", max_new_tokens=90)
    bench.submit("a", list(range(3, 13)))
    bench.step()
    (sequence,) = [s for s in bench.scheduler.running if s.tenant == "t"]
    paid = charges(bench, "t")
    assert paid == 10
    assert sequence.done == 3
    bench.scheduler._preempt(sequence)
    bench.step()
    assert charges(bench, "t") == paid
    bench.submit("b", [1, 3])
    assert bench.scheduler.limits.max_running > len(bench.scheduler.running)
    bench.scheduler.cancel("a")
    assert charges(bench, "t") == max(paid - (10 - 3), 0)


def test_a_soft_prompt_is_paid_for_by_who_asked_first_and_once() -> None:
    bench = Bench()
    bench.submit("keep", [1], tenant="other", max_new_tokens=90)
    bench.step()
    bench.submit("a", [1, 3, 4], PROMPT, max_new_tokens=90)
    lifted = charges(bench, "other")
    for _ in range(4):
        bench.step()
    generated = len(bench.tokens("a"))
    assert generated > 0
    assert charges(bench, "t") >= 6 + 3 + 2 * generated
    assert charges(bench, "t") <= lifted + 2 * 4 + 6 + 3 + 2 * generated


@pytest.mark.parametrize("budget", [1, 2, 16])
@pytest.mark.parametrize("blocks", [6, 7, 9, 12])
def test_tenants_whose_soft_prompts_do_not_fit_together_take_turns(blocks: int, budget: int) -> None:
    """If a prefix were paid for when it is begun, each would lose its turn to the other before it can use its own."""
    bench = Bench(blocks=blocks, block_size=2, max_batch_tokens=budget, max_total_tokens=8)
    ids = [f"{tenant}{n}" for n in range(3) for tenant in "tu"]
    for id in ids:
        bench.submit(id, [1], PROMPT, tenant=id[0], max_new_tokens=1)
    bench.run()
    assert Counter(event.request_id for event in bench.events if event.finish) == Counter(ids)
    bench.scheduler.check_idle()


def test_who_asks_for_a_soft_prompt_and_goes_pays_for_it() -> None:
    bench = Bench()
    bench.submit("keep", [1], tenant="other", max_new_tokens=90)
    bench.submit("stay", [1], max_new_tokens=90)
    bench.step()
    bench.submit("a", [1, 3, 4], PROMPT)
    while not any(row.sequence.request is None for row in bench.step().rows):
        pass
    paid = charges(bench, "t")
    bench.scheduler.cancel("a")
    assert charges(bench, "t") == paid + 6


def test_more_slots_than_a_policy_has_are_refused_by_name() -> None:
    bench = Bench()
    with pytest.raises(QuotaError, match=r"needs 2 adapter slots at once, max_slots is 1"):
        bench.submit("a", [1, 3], LORA, PREFIX, policy=TenantPolicy(max_slots=1))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(12, 40), st.integers(2, 12), st.integers(1, 3))
def test_hostile_tenants_leave_nobody_waiting_for_ever(seed: int, blocks: int, budget: int, slots: int) -> None:
    """Tenants of any weight and cap, more adapters than slots, a cache too small for all: everything ends, nothing is left."""
    rng = random.Random(seed)
    bench = Bench(
        blocks=blocks,
        block_size=2,
        slots=slots,
        max_batch_tokens=budget,
        max_running=4,
        max_total_tokens=(blocks - 2) * 2,
        patience=3,
        prefetch=2,
    )
    policies = {
        name: TenantPolicy(
            weight=rng.choice([0.01, 1, 5]), max_running=rng.choice([None, 1, 2]), max_slots=rng.choice([None, 1, 2])
        )
        for name in "abc"
    }
    own = {name: [Digest.of(f"{name}{n}".encode()) for n in range(4)] for name in "abc"}
    accepted = []
    for n in range(40):
        tenant = rng.choice("aaab" if n % 3 else "abc")
        most = policies[tenant].max_slots or 2
        adapters = rng.sample([*own[tenant], PROMPT, PREFIX], rng.choice([0, 1, 1, min(2, slots, most)]))
        if {PROMPT, PREFIX} <= set(adapters):
            adapters = adapters[:1]
        prompt = [rng.choice([3, 4]) for _ in range(rng.randint(1, 5))]
        try:
            bench.submit(str(n), prompt, *adapters, tenant=tenant, policy=policies[tenant], max_new_tokens=rng.randint(1, 5))
            accepted.append(str(n))
        except ValidationError:
            continue
        for _ in range(rng.randint(0, 2)):
            assert bench.step().tokens <= budget
        if rng.random() < 0.1:
            bench.scheduler.cancel(rng.choice(accepted))
        bench.pages.check()
    bench.run(2000)
    assert Counter(event.request_id for event in bench.events if event.finish) == Counter(accepted)
    bench.scheduler.check_idle()
