"""Scheduler: the one rule, and that every request ends exactly once whatever happens to it. No model, no torch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.digest import Digest
from server.engine.budget import SETTLED_TOGETHER
from server.engine.pages import Pages
from server.engine.plan import Copy, Evict, Fill, Plan, Put, Row, Sample, Sequence
from server.engine.residency import AdapterFacts, Residency
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.errors import GenerationError, ValidationError
from server.requests import Event, FinishReason, Request, Sampling, Task, Token
from server.tenancy.policy import OPEN, TenantPolicy

BASE = Digest("0" * 64)
EOS = 2
LORA, PREFIX, PROMPT, UNMOVED = (Digest(letter * 64) for letter in "abcd")
LAST, EVERY = (Digest(letter * 64) for letter in "ef")
FACTS = {
    LORA: AdapterFacts(("lora:16",)),
    PREFIX: AdapterFacts((), virtual=5),
    UNMOVED: AdapterFacts((), virtual=5, shift=5),
    PROMPT: AdapterFacts((), virtual=6, embedded=True),
    LAST: AdapterFacts(("head",), head="last"),
    EVERY: AdapterFacts(("head",), head="every"),
}


class Bench:
    """A scheduler with an instant loader and a model that says what `choose` says."""

    def __init__(
        self,
        blocks: int = 33,
        block_size: int = 4,
        slots: int = 4,
        choose: Callable[[Sequence], int | None] = lambda seq: 50 + seq.generated,
        **limits: int,
    ) -> None:
        defaults = {"max_batch_tokens": 16, "max_running": 8, "max_waiting": 16, "max_total_tokens": 100}
        self.pages = Pages(blocks, block_size)
        self.residency = Residency(slots)
        self.scheduler = Scheduler(self.pages, self.residency, SchedulerLimits(**{**defaults, **limits}), BASE, [EOS])
        self.choose = choose
        self.events: list[Event] = []
        self.plans: list[Plan] = []

    def submit(
        self,
        id: str,
        prompt: list[int],
        *adapters: Digest,
        tenant: str = "t",
        policy: TenantPolicy = OPEN,
        arrival: float = 0.0,
        **sampling: object,
    ) -> None:
        """`arrival` 0: before every stream began; infinity: after."""
        params = Sampling(**{"max_new_tokens": 3, **sampling})  # type: ignore[arg-type]
        self.scheduler.submit(Request(id, tenant, adapters, tuple(prompt), params, arrival, policy=policy))

    def ask(self, task: Task, id: str, prompt: list[int], *adapters: Digest, **more: object) -> None:
        self.scheduler.submit(Request(id, "t", adapters, tuple(prompt), Sampling(0), task=task, **more))  # type: ignore[arg-type]

    def step(self, *, load: bool = True) -> Plan:
        plan = self.scheduler.plan()
        self.plans.append(plan)
        if load:
            for digest in plan.loads:
                self.residency.loaded(digest, FACTS.get(digest, AdapterFacts()))
        samples = {row.sequence: self._sample(row) for row in plan.rows if row.samples or EVERY in row.sequence.adapters}
        self.scheduler.advance(plan.rows, samples)
        self.events += self.scheduler.take_events()
        return plan

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            if self.scheduler.idle:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def settle(self) -> None:
        """Until a stream that was submitted just before is not to be held up any more."""
        for _ in range(SETTLED_TOGETHER + 1):
            self.step()

    def tokens(self, id: str) -> list[int]:
        return [t.id for event in self.events if event.request_id == id for t in event.tokens]

    def finish(self, id: str) -> list[FinishReason]:
        return [event.finish for event in self.events if event.request_id == id and event.finish is not None]

    def scores(self, id: str) -> tuple[tuple[float, ...], ...]:
        (event,) = [event for event in self.events if event.request_id == id]
        return event.scores

    def _sample(self, row: Row) -> Sample:
        """Of a head that reads every position, a row of scores for each: the position itself."""
        sequence = row.sequence
        if sequence.request is None or sequence.request.task == "generate":
            return Sample(self._token(sequence))
        if self.choose(sequence) is None:
            return Sample(None, scores=None)
        reached = range(row.start, row.start + row.count)
        return Sample(None, scores=tuple((float(n),) for n in (reached if EVERY in sequence.adapters else reached[-1:])))

    def _token(self, sequence: Sequence) -> Token | None:
        id = self.choose(sequence)
        return None if id is None else Token(id, -1.0)


def counts(plan: Plan) -> dict[str, int]:
    return {row.sequence.request.id: row.count for row in plan.rows if row.sequence.request is not None}


def test_a_request_runs_to_its_length() -> None:
    bench = Bench()
    bench.submit("a", [1, 3, 4])
    bench.run()
    assert bench.tokens("a") == [50, 51, 52]
    assert bench.finish("a") == [FinishReason.LENGTH]
    bench.scheduler.check_idle()


def test_eos_ends_a_request_and_ignore_eos_does_not() -> None:
    bench = Bench(choose=lambda seq: EOS)
    bench.submit("a", [1, 3])
    bench.submit("b", [1, 3], ignore_eos=True)
    bench.run()
    assert bench.finish("a") == [FinishReason.EOS]
    assert bench.tokens("a") == [EOS]
    assert bench.tokens("b") == [EOS] * 3


def test_prefill_is_cut_into_chunks_and_decode_goes_first() -> None:
    bench = Bench(max_batch_tokens=4)
    bench.submit("a", [1, 3])
    bench.step()
    bench.submit("long", list(range(3, 13)))
    plan = bench.step()
    assert [(row.sequence.request and row.sequence.request.id, row.count) for row in plan.rows] == [("a", 1), ("long", 3)]
    bench.run()
    assert all(plan.tokens <= 4 for plan in bench.plans)
    assert bench.tokens("long") == [50, 51, 52]


def test_full_blocks_are_shared_within_one_tenant_and_adapter_only() -> None:
    bench = Bench()
    prompt = list(range(3, 12))
    bench.submit("first", prompt, LORA)
    bench.run()
    for id, tenant, adapters in [("same", "t", [LORA]), ("foreign", "u", [LORA]), ("base", "t", [])]:
        bench.submit(id, prompt, *adapters, tenant=tenant)
        bench.run()
    cached = {event.request_id: event.cached_tokens for event in bench.events}
    assert cached == {"first": 0, "same": 8, "foreign": 0, "base": 0}


def test_values_that_are_not_finite_end_the_request_and_are_never_cached() -> None:
    bench = Bench(choose=lambda seq: None if seq.adapters else 9)
    bench.submit("nan", list(range(3, 12)), LORA)
    bench.submit("fine", list(range(3, 12)))
    bench.run()
    assert bench.finish("nan") == [FinishReason.ERROR]
    assert isinstance(next(e.error for e in bench.events if e.error), GenerationError)
    assert bench.finish("fine") == [FinishReason.LENGTH]
    bench.submit("again", list(range(3, 12)), LORA)
    bench.run()
    assert all(event.cached_tokens == 0 for event in bench.events if event.request_id == "again")


def test_a_task_that_generates_nothing_ends_with_its_prefill() -> None:
    bench = Bench(max_batch_tokens=4)
    bench.ask("classify", "last", list(range(3, 13)), LAST)
    bench.ask("classify", "every", list(range(3, 13)), EVERY)
    bench.ask("embed", "embedded", [3, 4])
    bench.ask("score", "scored", [3, 4], choices=(1, 2))
    bench.run()
    assert bench.scores("last") == ((9.0,),)
    assert bench.scores("every") == tuple((float(n),) for n in range(10))  # three chunks, one event
    assert [bench.finish(id) for id in ("last", "every", "embedded", "scored")] == [[FinishReason.SCORED]] * 4
    bench.scheduler.check_idle()


def test_what_reads_every_position_takes_none_from_the_prefix_cache_and_leaves_them_there() -> None:
    bench = Bench()
    prompt = list(range(3, 16))
    cached = {}
    for adapter in (EVERY, LAST):
        for n in range(2):
            bench.ask("classify", f"{adapter[0]}{n}", prompt, adapter)
            bench.run()
            cached[f"{adapter[0]}{n}"] = bench.events[-1].cached_tokens
        bench.submit(f"{adapter[0]} generated", prompt, adapter)
        bench.run()
        cached[f"{adapter[0]} generated"] = bench.events[-1].cached_tokens
    for id, pooling in (("mean", "mean"), ("pooled", "last"), ("again", "last")):
        bench.ask("embed", id, prompt, pooling=pooling)
        bench.run()
        cached[id] = bench.events[-1].cached_tokens
    assert cached == {
        "f0": 0,
        "f1": 0,
        "f generated": 12,
        "e0": 0,
        "e1": 12,
        "e generated": 12,
        "mean": 0,
        "pooled": 12,
        "again": 12,
    }


def test_scores_begin_again_after_a_preemption() -> None:
    bench = Bench(max_batch_tokens=4)
    bench.ask("classify", "a", list(range(3, 13)), EVERY)
    bench.step()
    bench.step()
    (sequence,) = bench.scheduler.running
    assert 0 < len(sequence.scores) < 10
    bench.scheduler._preempt(sequence)
    bench.run()
    assert len(bench.scores("a")) == 10


def test_scores_that_are_not_finite_end_the_request_and_are_never_cached() -> None:
    bench = Bench(choose=lambda seq: None)
    bench.ask("classify", "a", list(range(3, 13)), LAST)
    bench.run()
    assert "not finite" in str(bench.events[0].error)
    bench.choose = lambda seq: 5
    bench.ask("classify", "b", list(range(3, 13)), LAST)
    bench.run()
    assert bench.events[-1].cached_tokens == 0


def test_classifying_without_a_head_is_refused() -> None:
    bench = Bench()
    bench.ask("classify", "base", [3, 4])
    bench.ask("classify", "lora", [3, 4], LORA)
    bench.ask("classify", "with", [3, 4], LORA, LAST)
    bench.run()
    for id in ("base", "lora"):
        (event,) = [event for event in bench.events if event.request_id == id]
        assert "`adapter_id` must name an adapter with a head" in str(event.error)
    assert bench.finish("with") == [FinishReason.SCORED]


def test_a_stored_prefix_is_filled_once_and_its_partial_block_copied() -> None:
    bench = Bench()
    bench.submit("a", [1, 3, 4], PREFIX)
    bench.submit("b", [7, 8], PREFIX)
    bench.run()
    changes = [change for plan in bench.plans for change in plan.changes]
    assert sum(isinstance(change, Fill) for change in changes) == 1
    assert sum(isinstance(change, Copy) for change in changes) == 2  # 5 positions: one full block, one partial
    first = next(row for plan in bench.plans for row in plan.rows)
    assert first.start == 5
    assert first.sequence.ids[:6] == [-1, -1, -1, -1, -1, 1]


def test_a_prefix_without_positions_shifts_the_text_behind_it_also_when_it_is_recomputed() -> None:
    bench = Bench(blocks=10, choose=lambda seq: 9)
    for id, adapter in [("a", UNMOVED), ("b", PREFIX), ("c", UNMOVED)]:
        bench.submit(id, [1, 3, 4, 5], adapter, max_new_tokens=8)
    bench.run()
    assert sum(plan.preempted for plan in bench.plans) > 0
    shifts = {(row.sequence.request.id, row.sequence.shift) for p in bench.plans for row in p.rows if row.sequence.request}
    assert shifts == {("a", 5), ("b", 0), ("c", 5)}


def test_a_soft_prompt_is_computed_once_and_then_shared() -> None:
    bench = Bench()
    bench.submit("a", [1, 3, 4], PROMPT)
    bench.submit("b", [7, 8], PROMPT)
    bench.run()
    builds = [row for plan in bench.plans for row in plan.rows if row.sequence.request is None]
    assert sum(row.count for row in builds) == 6
    starts = {row.sequence.request.id: row.start for plan in reversed(bench.plans) for row in plan.rows if row.sequence.request}
    assert starts == {"a": 6, "b": 6}
    assert bench.tokens("a") == bench.tokens("b") == [50, 51, 52]


def test_two_prefixes_cannot_be_composed() -> None:
    bench = Bench()
    bench.submit("a", [1, 3], PREFIX, PROMPT)
    bench.run()
    assert isinstance(bench.events[-1].error, ValidationError)


def test_two_adapters_of_one_pool_cannot_be_composed() -> None:
    bench = Bench()
    twin = Digest("d" * 64)
    FACTS[twin] = AdapterFacts(("lora:16",))
    bench.submit("a", [1, 3], LORA, twin)
    bench.run()
    assert "one family and size" in str(bench.events[-1].error)
    bench.scheduler.check_idle()


def test_running_out_of_blocks_preempts_the_youngest_and_loses_nothing() -> None:
    bench = Bench(blocks=9, block_size=2)
    for id in "abcd":
        bench.submit(id, [3, 4], max_new_tokens=8)
    bench.run()
    assert sum(plan.preempted for plan in bench.plans) > 0
    for id in "abcd":
        assert bench.tokens(id) == list(range(50, 58))
        assert bench.finish(id) == [FinishReason.LENGTH]
    bench.scheduler.check_idle()


def test_prefixes_of_idle_adapters_make_room() -> None:
    bench = Bench(blocks=5, block_size=4)
    bench.submit("a", [1], PREFIX)
    bench.run()
    bench.submit("b", list(range(3, 14)), max_new_tokens=4)
    bench.run()
    assert bench.finish("b") == [FinishReason.LENGTH]


def test_a_prefix_that_fills_the_cache_is_dropped_for_its_own_tail() -> None:
    bench = Bench(blocks=4, block_size=4)
    bench.submit("a", [1, 3], PREFIX, max_new_tokens=2)
    bench.run()
    bench.submit("b", [1, 3], PROMPT, max_new_tokens=2)
    bench.run()
    assert bench.finish("a") == bench.finish("b") == [FinishReason.LENGTH]


def test_more_adapters_than_slots_take_turns() -> None:
    bench = Bench(slots=1)
    for id, adapter in [("a", LORA), ("b", PREFIX), ("c", LORA), ("d", PROMPT)]:
        bench.submit(id, [1, 3, 4], adapter)
    bench.run()
    for id in "abcd":
        assert bench.finish(id) == [FinishReason.LENGTH]
    changes = [change for plan in bench.plans for change in plan.changes]
    assert sum(isinstance(change, Put) for change in changes) - 1 == sum(isinstance(change, Evict) for change in changes)


def test_a_request_whose_adapter_loads_slowly_delays_nobody() -> None:
    bench = Bench()
    bench.submit("slow", [1, 3], LORA)
    bench.submit("fast", [1, 3])
    for _ in range(3):
        bench.step(load=False)
    assert bench.finish("fast") == [FinishReason.LENGTH]
    assert bench.finish("slow") == []
    bench.residency.loaded(LORA, FACTS[LORA])
    bench.run()
    assert bench.finish("slow") == [FinishReason.LENGTH]


def test_a_request_waiting_for_a_slot_is_not_overtaken_for_ever() -> None:
    bench = Bench(slots=1, max_running=2)
    bench.submit("other", [1, 3], PREFIX, max_new_tokens=1)
    served_after = None
    for n in range(300):
        if len(bench.scheduler.waiting) < 4:
            bench.submit(f"hot{n}", [1, 3], LORA, max_new_tokens=2)
        bench.step()
        if bench.finish("other"):
            served_after = n
            break
    assert served_after is not None


def test_a_failed_load_tells_everyone_who_waits_for_it() -> None:
    bench = Bench()
    bench.submit("a", [1, 3], LORA)
    bench.submit("b", [1, 3])
    bench.step(load=False)
    bench.residency.failed(LORA, "gone")
    bench.scheduler.fail_adapter(LORA, GenerationError("gone"))
    bench.run()
    assert bench.finish("a") == [FinishReason.ERROR]
    assert bench.finish("b") == [FinishReason.LENGTH]


def test_a_broken_soft_prompt_fails_whoever_waits_for_it() -> None:
    bench = Bench()
    bench.submit("a", [1, 3], PROMPT)
    bench.submit("b", [1, 3])
    while not any(sequence.request is None for sequence in bench.scheduler.running):
        bench.step()
        bench.scheduler.plan()
    build = next(sequence for sequence in bench.scheduler.running if sequence.request is None)
    bench.scheduler.fail_sequence(build, GenerationError("boom"))
    bench.run()
    assert bench.finish("a") == [FinishReason.ERROR]
    assert bench.finish("b") == [FinishReason.LENGTH]
    bench.scheduler.check_idle()


def test_cancelling_frees_everything_at_once() -> None:
    bench = Bench()
    bench.submit("running", [1, 3, 4], LORA)
    bench.step()
    bench.step()
    bench.submit("waiting", [1, 3], LORA)
    bench.scheduler.cancel("running")
    bench.scheduler.cancel("waiting")
    bench.scheduler.cancel("unknown")
    bench.events += bench.scheduler.take_events()
    assert bench.finish("running") == bench.finish("waiting") == [FinishReason.CANCELLED]
    bench.scheduler.check_idle()


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    bench = Bench(max_total_tokens=10)
    with pytest.raises(ValidationError, match=r"must be <= 10\. Given: 8 `inputs` tokens and 3"):
        bench.submit("a", [1] * 8)
    bench.submit("b", [1] * 7, PROMPT)
    bench.run()
    assert "Given: 13 `inputs` tokens" in str(bench.events[-1].error)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(6, 40), st.integers(1, 12), st.integers(1, 3))
def test_random_traffic_ends_every_request_exactly_once(seed: int, blocks: int, budget: int, slots: int) -> None:
    rng = random.Random(seed)
    bench = Bench(
        blocks=blocks,
        block_size=2,
        slots=slots,
        choose=lambda seq: None if rng.random() < 0.02 else rng.choice([EOS, 7, 8, 9]),
        max_batch_tokens=budget,
        max_running=5,
        max_waiting=100,
        max_total_tokens=(blocks - 2) * 2,
    )
    accepted, pending = [], []
    for n in range(20):
        adapters = rng.sample([LORA, PREFIX, PROMPT], rng.choice([0, 0, 1, 1, 2]))
        prompt = [rng.choice([3, 4]) for _ in range(rng.randint(1, 6))]
        try:
            bench.submit(str(n), prompt, *adapters, tenant=rng.choice("tu"), max_new_tokens=rng.randint(1, 5))
            accepted.append(str(n))
        except ValidationError:
            pass
        for _ in range(rng.randint(0, 3)):
            plan = bench.step(load=False)
            assert plan.tokens <= budget
            pending += plan.loads
        rng.shuffle(pending)
        while pending and rng.random() < 0.6:
            bench.residency.loaded(digest := pending.pop(), FACTS[digest])
        if accepted and rng.random() < 0.2:
            bench.scheduler.cancel(rng.choice(accepted))
        bench.pages.check()
    for digest in pending:
        bench.residency.loaded(digest, FACTS[digest])
    bench.run()
    ends = Counter(event.request_id for event in bench.events if event.finish)
    assert ends == Counter(accepted)
    bench.scheduler.check_idle()


# -- loads


def test_a_plan_that_breaks_has_promised_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.submit("base", [1, 3])
    bench.submit("a", [1, 3], LORA)
    with monkeypatch.context() as broken:
        broken.setattr(bench.pages, "allocate", lambda count, owner: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.scheduler.plan()
    assert bench.residency.state(LORA) == ("stored", None)
    bench.run()
    assert bench.tokens("a") == [50, 51, 52]
