"""Prefill: a tenant's flood of prompts neither fills the steps of others nor the batch. No model, no torch."""

from __future__ import annotations

import math
from collections import Counter

from server.engine.budget import SETTLED, SETTLED_TOGETHER
from server.engine.plan import Row, Sequence
from server.engine.prefill import FLOOD, RECENT, UNSTREAMED, Prefill
from server.requests import Request, Sampling
from tests.engine.test_scheduler import Bench, counts

TOKENS, SHARE = 512, 10


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def sequences(*lengths: int, tenant: str) -> list[Sequence]:
    return [Sequence(None, (), b"", 0, [0] * length, length, tenant=tenant) for length in lengths]


def stream(tenant: str) -> Sequence:
    """Of seven tokens."""
    sequence = Sequence(None, (), b"", 0, [0] * 9, 2, tenant=tenant)
    sequence.done = 8
    return sequence


def test_one_tenant_has_a_share_for_each_prompt_and_floods_nobody() -> None:
    prefill = Prefill(TOKENS, SHARE)
    prefill.came("a")
    prompts = sequences(*[100] * 5, tenant="a")
    assert prefill.floods(Counter(a=10**6)) == set()
    assert prefill.budget(prompts).extra == TOKENS  # nothing streams
    assert prefill.rooms(prompts, 50, lambda tenant: 1.0) == {"a": 50}


def test_a_prompt_that_was_there_before_a_stream_began_may_hold_it_up_and_a_prefix_that_is_built_may_not() -> None:
    """Several requests may wait for the prefix, so nobody knows when it came."""
    prefill, (prompt,), streaming = Prefill(TOKENS, SHARE), sequences(900, tenant="a"), stream("a")
    prefill.came("a")
    streaming.began_at = 5.0
    extra = []
    for request in (
        None,
        Request("r", "a", (), (1,), Sampling(1), arrival=4.0),
        Request("r", "a", (), (1,), Sampling(1), arrival=6.0),
    ):
        prompt.request = request
        budget = prefill.budget([prompt, streaming])
        budget.add(Row(streaming, streaming.done, 1))
        extra.append(budget.extra)
    assert extra == [SHARE, TOKENS - 1, SHARE]


def test_who_has_much_in_progress_floods_while_others_are_there_or_were_lately() -> None:
    clock = Clock()
    prefill = Prefill(TOKENS, SHARE, clock)
    prefill.came("b")
    prefill.came("a")
    assert prefill.floods(Counter(a=FLOOD * SHARE, b=FLOOD * SHARE - 1)) == {"a"}
    clock.now += RECENT
    prefill.came("a")
    assert prefill.floods(Counter(a=FLOOD * SHARE)) == {"a"}
    clock.now += 1
    assert prefill.floods(Counter(a=FLOOD * SHARE)) == set()
    assert prefill.floods(Counter(a=FLOOD * SHARE, b=1)) == {"a"}, "b has not asked lately, but its prompt is in progress"


def test_of_two_tenants_the_flood_gets_an_eighth_of_a_share_and_all_that_the_other_leaves() -> None:
    prefill = Prefill(TOKENS, SHARE)
    flood, few = sequences(*[100] * 9, tenant="flood"), sequences(15, 15, tenant="few")
    assert prefill.rooms(flood + few, 22, lambda tenant: 1.0) == {"flood": 1, "few": 21}
    assert prefill.rooms(flood + few, 80, lambda tenant: 1.0) == {"flood": 50, "few": 30}
    assert prefill.rooms(flood, 10, lambda tenant: 1.0) == {"flood": 10}


def test_floods_share_what_is_left_to_them_by_weight() -> None:
    prefill = Prefill(TOKENS, SHARE)
    floods = sequences(900, tenant="a") + sequences(900, tenant="b")
    given = Counter[str]()
    for _ in range(40):
        given.update(prefill.rooms(floods + sequences(100, tenant="few"), 12, {"a": 1.0, "b": 3.0, "few": 1.0}.__getitem__))
    assert given == {"a": 10, "b": 30, "few": 440}


def test_a_step_of_several_tenants_is_short_though_nothing_streams() -> None:
    prefill = Prefill(TOKENS, SHARE)
    prefill.came("gone")
    assert prefill.budget(sequences(500, tenant="a")).extra == UNSTREAMED * SHARE
    assert prefill.budget(sequences(*[20] * 7, tenant="a")).extra == 7 * SHARE
    assert prefill.budget([*sequences(500, tenant="a"), stream("a")]).extra == UNSTREAMED * SHARE + 1


def flood(bench: Bench, prompts: int) -> None:
    for n in range(prompts):
        bench.submit(f"flood{n}", list(range(3 + n, 33 + n)), tenant="attacker", max_new_tokens=1)


def test_beside_another_tenants_stream_a_flood_has_one_share_and_a_short_prompt_its_own() -> None:
    bench = Bench(blocks=200, max_prefill_tokens=4)
    bench.submit("stream", [1, 3], tenant="victim", max_new_tokens=40)
    bench.settle()
    flood(bench, 4)
    assert counts(bench.step()) == {"stream": 1, "flood0": 4}
    bench.submit("short", list(range(3, 8)), tenant="victim", max_new_tokens=1)
    assert counts(bench.step()) == {"stream": 1, "short": 4, "flood0": 1}
    assert counts(bench.step()) == {"stream": 1, "short": 1, "flood0": 4}
    bench.run()


def test_of_a_flood_no_more_is_admitted_than_is_computed_soon() -> None:
    """16 shares are three prompts of 30 tokens, though 8 may run; the others keep their turn and end all the same."""
    bench = Bench(blocks=200, max_prefill_tokens=4)
    bench.submit("stream", [1, 3], tenant="victim", max_new_tokens=90, ignore_eos=True)
    bench.settle()
    flood(bench, 9)
    admitted = []
    while not bench.finish("flood8"):
        bench.step()
        admitted.append(sum(s.tenant == "attacker" and s.remaining > 1 for s in bench.scheduler.running))
    assert max(admitted) == 3
    assert admitted[-8] > 0, "the next is there before the last one is done"
    order = [event.request_id for event in bench.events if event.finish and event.request_id != "stream"]
    assert order == [f"flood{n}" for n in range(9)]


def test_alone_a_tenant_fills_the_batch() -> None:
    bench = Bench(blocks=200, max_prefill_tokens=4)
    flood(bench, 8)
    bench.step()
    assert len(bench.scheduler.running) == 8


# -- one tenant: chunks beside streams


def test_a_prompt_beside_streams_comes_in_small_chunks_and_alone_in_large_ones() -> None:
    bench = Bench(max_prefill_tokens=3)
    bench.submit("stream", [1, 3], max_new_tokens=SETTLED_TOGETHER + 5)
    bench.settle()
    bench.submit("long", list(range(3, 33)), max_new_tokens=1)
    assert [counts(bench.step()) for _ in range(4)] == [{"stream": 1, "long": 3}] * 4
    assert counts(bench.step()) == {"long": 16}


def test_every_prompt_has_its_share_beside_streams() -> None:
    bench = Bench(max_prefill_tokens=3)
    bench.submit("stream", [1, 3], max_new_tokens=SETTLED_TOGETHER + 9)
    bench.settle()
    for id in ("first", "second"):
        bench.submit(id, list(range(3, 11)), max_new_tokens=1)
    assert counts(bench.step()) == {"stream": 1, "first": 6}
    assert counts(bench.step()) == {"stream": 1, "first": 2, "second": 4}
    assert counts(bench.step()) == {"stream": 1, "second": 3}


def test_requests_that_come_together_get_their_first_tokens_together() -> None:
    """16 tokens a step: the second prompt is not held back by the first one's stream, which has just begun."""
    bench = Bench(max_prefill_tokens=1)
    for id in "ab":
        bench.submit(id, list(range(3, 17)), max_new_tokens=9)
    assert counts(bench.step()) == {"a": 14, "b": 2}
    assert counts(bench.step()) == {"a": 1, "b": 12}


def test_a_request_that_comes_later_holds_up_a_stream_for_its_first_tokens_alone() -> None:
    """With prompts that were there before it, a stream of so few tokens waits for both."""
    bench = Bench(max_prefill_tokens=1)
    bench.submit("stream", [1, 3], max_new_tokens=30)
    for _ in range(SETTLED + 1):
        bench.step()
    bench.submit("together", list(range(3, 25)), max_new_tokens=1)
    assert counts(bench.step()) == {"stream": 1, "together": 15}
    bench.submit("later", list(range(3, 25)), max_new_tokens=1, arrival=math.inf)
    assert counts(bench.step()) == {"stream": 1, "together": 2}
    for _ in range(SETTLED_TOGETHER - SETTLED):
        bench.step()
    assert counts(bench.step()) == {"stream": 1, "later": 1}
