"""Fairness: the bound of virtual token counters over random schedules, and what may never block or be lost."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tenancy.fairness import FairQueue
from server.tenancy.policy import INPUT_PRICE, OPEN, OUTPUT_PRICE, TenantPolicy

LONGEST = 24  # prompt tokens of a request, at most
CAPACITY = 96  # positions of the KV cache


@dataclass(eq=False)
class Job:
    tenant: str
    prompt: int
    new: int
    given: int = 0

    @property
    def held(self) -> int:
        """Positions of the KV cache, reserved whole."""
        return self.prompt + self.new


@dataclass
class Machine:
    """A server in a few lines: reserves a request's positions on admission and gives every running one a token a step."""

    policies: dict[str, TenantPolicy]
    queue: FairQueue[Job] = field(default_factory=FairQueue)
    running: dict[Job, None] = field(default_factory=dict)
    service: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # price of what each was given
    done: list[Job] = field(default_factory=list)
    waiting: Counter[str] = field(default_factory=Counter)  # requests by tenant
    held: int = 0

    def submit(self, tenant: str, prompt: int, new: int) -> Job:
        job = Job(tenant, prompt, new)
        self.queue.add(job, tenant, self.policies[tenant])
        self.waiting[tenant] += 1
        return job

    def admit(self) -> None:
        while (job := self.queue.head()) is not None and self.held + job.held <= CAPACITY:
            due = 0 if job.given else job.prompt  # one that was preempted has paid
            self.queue.admit(job, due)
            self.running[job] = None
            self.held += job.held
            self.waiting[job.tenant] -= 1
            self.service[job.tenant] += due * INPUT_PRICE

    def step(self) -> None:
        self.admit()
        for job in list(self.running):
            job.given += 1
            self.queue.generated(job, 1)
            self.service[job.tenant] += OUTPUT_PRICE
            if job.given == job.new:
                self.leave(job)
                self.queue.remove(job)
                self.done.append(job)

    def leave(self, job: Job) -> None:
        del self.running[job]
        self.held -= job.held

    def preempt(self) -> None:
        job = next(reversed(self.running))
        self.leave(job)
        self.queue.put_back(job)
        self.waiting[job.tenant] += 1

    def cancel(self, job: Job) -> None:
        if job in self.running:
            self.leave(job)
        else:
            self.waiting[job.tenant] -= 1
        self.queue.remove(job)

    def normalised(self, tenant: str) -> float:
        return self.service[tenant] / self.policies[tenant].weight


def machine(**weights: float) -> Machine:
    return Machine({tenant: TenantPolicy(weight=weight) for tenant, weight in weights.items()})


def backlog(made: Machine, tenants: str, rng: random.Random, size: int = 3) -> None:
    """As many requests of each as it takes to be waiting at the next admission, too."""
    for tenant in tenants:
        for _ in range(size - made.waiting[tenant]):
            made.submit(tenant, *sizes(tenant, rng))


def sizes(tenant: str, rng: random.Random) -> tuple[int, int]:
    """Tenants differ in kind: long prompts, long answers, both at random."""
    if tenant == "a":
        return LONGEST, rng.randint(1, 3)
    if tenant == "b":
        return rng.randint(1, 3), 40
    return rng.randint(1, LONGEST), rng.randint(1, 40)


def worst_gap(made: Machine, one: str, other: str, steps: int, before: Iterator[None]) -> float:
    """The largest difference of service over any stretch of steps."""
    low = high = 0.0
    for _ in range(steps):
        next(before)
        made.step()
        gap = made.normalised(one) - made.normalised(other)
        low, high = min(low, gap), max(high, gap)
    return high - low


BOUND = 2 * max(INPUT_PRICE * LONGEST, OUTPUT_PRICE * CAPACITY)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["ab", "ac", "bc"]), st.integers(2, 9))
def test_two_backlogged_tenants_are_served_alike_over_any_stretch_of_time(seed: int, pair: str, size: int) -> None:
    rng, made = random.Random(seed), machine(a=1, b=1, c=1)

    def before() -> Iterator[None]:
        while True:
            backlog(made, pair, rng, size)
            if rng.random() < 0.2:  # a third one comes and goes
                made.submit(next(iter(set("abc") - set(pair))), *sizes("c", rng))
            yield

    assert worst_gap(made, pair[0], pair[1], 250, before()) <= BOUND


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_bound_holds_by_weight(seed: int, one: float, other: float) -> None:
    rng, made = random.Random(seed), machine(a=one, b=other)

    def before() -> Iterator[None]:
        while True:
            backlog(made, "ab", rng)
            yield

    assert worst_gap(made, "a", "b", 80, before()) <= BOUND / min(one, other)


def test_the_bound_can_be_broken_by_a_queue_that_is_not_fair() -> None:
    """The same load through one FIFO: who asks for more gets more, without end."""
    served: Counter[str] = Counter()
    for _ in range(2000):
        served["a"] += LONGEST + 2 * 40
        served["b"] += 3 + 2 * 2
    assert served["a"] - served["b"] > BOUND


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_1_2_4_are_kept_to_within_5_percent(seed: int) -> None:
    rng, made = random.Random(seed), machine(a=1, b=2, c=4)
    for _ in range(6000):
        backlog(made, "abc", rng)
        made.step()
    shares = [made.normalised(tenant) for tenant in "abc"]
    assert max(shares) <= 1.05 * min(shares)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_nothing_is_lost_nobody_idles_and_no_counter_is_left(seed: int, tenants: int) -> None:
    rng, names = random.Random(seed), [f"t{n}" for n in range(tenants)]
    made = Machine({name: TenantPolicy(weight=rng.choice([0.5, 1, 4])) for name in names})
    jobs, cancelled = [], 0
    for _ in range(60):
        coming = range(rng.choice([0, 0, 1, 3]))
        jobs += [made.submit(rng.choice(names), rng.randint(1, LONGEST), rng.randint(1, 8)) for _ in coming]
        if rng.random() < 0.1 and (alive := [*made.queue, *made.running]):
            made.cancel(rng.choice(alive))
            cancelled += 1
        if rng.random() < 0.1 and made.running:
            made.preempt()
        made.step()
        made.admit()
        head = made.queue.head()
        # Work-conserving: whoever waits, waits for room.
        assert len(made.queue) == 0 if head is None else made.held + head.held > CAPACITY
    while made.running or len(made.queue):
        made.step()
    assert len(made.done) + cancelled == len(jobs)
    assert made.queue.tenants == 0


# -- single moves


def queue_of(*items: tuple[str, str], **policies: TenantPolicy) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for item, tenant in items:
        queue.add(item, tenant, policies.get(tenant, OPEN))
    return queue


def order(queue: FairQueue[str], tokens: int = 10) -> list[str]:
    found = []
    while (item := queue.head()) is not None:
        queue.admit(item, tokens)
        found.append(item)
    return found


def test_one_tenant_is_a_fifo() -> None:
    queue = queue_of(*((str(n), "default") for n in range(9)))
    assert order(queue) == [str(n) for n in range(9)]


def test_tenants_take_turns_and_each_is_served_in_order() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b"))
    assert order(queue) == ["a1", "b1", "a2", "b2", "a3"]


def test_who_comes_late_is_not_owed_what_it_never_asked_for() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("a3", "a"))
    queue.admit("a1", 1000)
    queue.add("b1", "b", OPEN)
    assert queue.counter("b") == 1000
    queue.admit("a2", 10)
    queue.add("b2", "b", OPEN)
    assert order(queue) == ["b1", "a3", "b2"]


def test_with_nobody_waiting_a_newcomer_starts_where_the_last_one_left() -> None:
    queue = queue_of(("a1", "a"))
    queue.admit("a1", 500)
    queue.generated("a1", 4)
    queue.add("b1", "b", OPEN)
    assert queue.counter("b") == 500 + 4 * OUTPUT_PRICE


def test_a_parked_request_blocks_nobody_and_comes_back_in_its_old_place() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"))
    queue.park("a1")
    assert queue.head() == "a2"
    queue.wake(lambda item: True)
    assert queue.head() == "a2"
    queue.wake(lambda item: False)
    assert order(queue) == ["a1", "b1", "a2", "a3"]


def test_who_is_parked_saves_up_nothing() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("b1", "b"))
    queue.park("b1")
    queue.admit("a1", 700)
    queue.wake(lambda item: False)
    assert queue.counter("b") == 700


def test_a_tenant_at_max_running_blocks_nobody_and_goes_on_when_one_ends() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("b1", "b"), a=TenantPolicy(max_running=1))
    assert order(queue) == ["a1", "b1"]
    assert len(queue) == 1
    queue.remove("a1")
    assert queue.head() == "a2"


def test_the_newest_policy_counts() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), a=TenantPolicy(max_running=0))
    assert queue.head() is None
    queue.add("a3", "a", TenantPolicy(weight=4))
    assert order(queue) == ["a1", "a2", "a3"]
    assert queue.counter("a") == 30 / 4


def test_what_was_not_served_is_given_back_and_the_order_follows() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"))
    queue.admit("a1", 100)
    queue.admit("b1", 60)
    assert queue.head() == "b2"
    queue.remove("a1", unserved=80)
    assert queue.counter("a") == 20
    assert queue.head() == "a2"


def test_a_preempted_request_is_first_in_its_line_and_pays_nothing_again() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("a3", "a"))
    queue.admit("a1", 5)
    queue.admit("a2", 5)
    queue.put_back("a2")
    queue.put_back("a1")
    assert queue.counter("a") == 10
    assert order(queue, tokens=0) == ["a1", "a2", "a3"]
    assert queue.counter("a") == 10


def test_loads_are_asked_for_in_turn() -> None:
    queue = queue_of(("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"))
    queue.park("a1")
    assert list(queue.in_turn()) == [("a1", "a"), ("b1", "b"), ("a2", "a"), ("a3", "a")]


def test_counters_of_idle_tenants_are_collected_while_others_go_on() -> None:
    """A thousand tenants come once each beside one that stays: hardly any is remembered."""
    queue: FairQueue[str] = FairQueue()
    most = 0
    queue.add("stay", "s", OPEN)
    for n in range(1000):
        queue.add(f"once{n}", f"t{n}", OPEN)
        queue.add(f"next{n}", "s", OPEN)
        for _ in range(2):
            item = queue.head()
            assert item is not None
            queue.admit(item, 10)
            queue.remove(item)
        most = max(most, queue.tenants)
    assert most <= 8


def test_a_debt_is_remembered_while_others_wait_behind_it() -> None:
    queue = queue_of(("a1", "a"), ("b1", "b"), ("b2", "b"))
    queue.admit("a1", 100)
    queue.remove("a1")
    queue.add("a2", "a", OPEN)
    assert queue.counter("a") == 100
    assert order(queue) == ["b1", "b2", "a2"]
