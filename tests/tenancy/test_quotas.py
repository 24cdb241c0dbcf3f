"""Admission on a clock that is set by hand: every limit, what is told, and counts that always add up."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.errors import ConflictError, OverloadedError, QuotaError
from server.requests import Request, Sampling
from server.tenancy.policy import TenantPolicy
from server.tenancy.quotas import Admission, AdmissionLimits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def request(id: str, tenant: str = "acme", *, prompt: int = 10, new: int = 10, **policy: Any) -> Request:
    return Request(id, tenant, (), (7,) * prompt, Sampling(new), policy=TenantPolicy(**policy))


class Desk:
    """An admission, its clock, and what the last refusal said."""

    def __init__(self, max_running: int = 4, max_waiting: int = 8, share: int | None = None, timeout: float | None = None):
        self.clock = Clock()
        self.admission = Admission(AdmissionLimits(max_running, max_waiting, share, timeout), self.clock)
        self.ids = map(str, count())

    def admit(self, tenant: str = "acme", **more: Any) -> str:
        id = next(self.ids)
        self.admission.admit(request(id, tenant, **more))
        return id

    def begin(self, *ids: str) -> None:
        self.admission.begun(ids)

    def end(self, id: str, computed: int = 0) -> None:
        self.admission.ended(id, computed)

    def refusal(self, tenant: str = "acme", **more: Any) -> OverloadedError:
        with pytest.raises(OverloadedError) as refused:
            self.admit(tenant, **more)
        self.admission.check()
        return refused.value


def test_the_queue_of_all_is_bounded_and_says_so() -> None:
    desk = Desk(max_running=2, max_waiting=3)
    ids = [desk.admit(f"tenant {n}") for n in range(5)]
    refused = desk.refusal("another")
    assert (refused.limit, refused.retry_after) == ("max_waiting", 1)
    assert str(refused) == "Model is overloaded: 5 requests are accepted, the most that max_running 2 and max_waiting 3 allow"
    desk.end(ids[0])
    desk.admit("another")


def test_one_tenant_cannot_fill_the_queue() -> None:
    desk = Desk(max_running=2, max_waiting=8, share=3)
    for _ in range(5):
        desk.admit("greedy")
    refused = desk.refusal("greedy")
    assert refused.limit == "max_waiting_per_tenant"
    assert str(refused) == "Model is overloaded: 5 of your requests are waiting, max_waiting_per_tenant is 3"
    for _ in range(5):
        desk.admit("modest")
    assert desk.admission.waiting() == {"greedy": 5, "modest": 5}


def test_a_full_batch_leaves_a_tenant_its_queue_alone() -> None:
    desk = Desk(max_running=2, max_waiting=8)
    desk.begin(desk.admit("other"), desk.admit("other"))
    for _ in range(3):
        desk.admit(max_queued=3)
    refused = desk.refusal(max_queued=3)
    assert refused.limit == "max_queued"
    assert str(refused) == "Model is overloaded: 3 of your requests are waiting, max_queued is 3"
    assert desk.admission.waiting() == {"acme": 3}


def test_a_tenant_that_may_not_queue_still_gets_what_the_batch_has_room_for() -> None:
    desk = Desk(max_running=3)
    first = desk.admit(max_queued=0)
    desk.begin(first)
    desk.admit(max_queued=0)
    desk.admit(max_queued=0)
    assert desk.refusal(max_queued=0).limit == "max_queued"
    desk.end(first)
    desk.admit(max_queued=0)


def test_max_running_of_a_tenant_bounds_what_it_has_beside_its_queue() -> None:
    desk = Desk(max_running=50, max_waiting=50)
    for _ in range(2 + 3):
        desk.admit(max_running=2, max_queued=3)
    assert desk.refusal(max_running=2, max_queued=3).limit == "max_queued"


def test_max_running_of_nothing_is_refused_for_good() -> None:
    with pytest.raises(QuotaError, match="max_running is 0") as refused:
        Desk().admit(max_running=0)
    assert refused.value.limit == "max_running"


def test_the_newest_policy_counts() -> None:
    desk = Desk(max_running=1)
    desk.begin(desk.admit())
    for _ in range(4):
        desk.admit()
    assert desk.refusal(max_queued=4).limit == "max_queued"
    desk.admit(max_queued=5)


def test_retry_after_is_measured() -> None:
    """Two requests a second end, in all the time in which there are any; then eight wait."""
    desk = Desk(max_running=4, max_waiting=8)
    for _ in range(120):
        id = desk.admit("acme")
        desk.begin(id)
        desk.clock.now += 0.5
        desk.end(id, 20)
        desk.clock.now += 7
    desk.begin(*[desk.admit() for _ in range(4)])
    for _ in range(8):
        desk.admit()
    assert desk.refusal("another").retry_after in (4, 5)
    assert desk.refusal("acme", max_queued=8).retry_after in (4, 5)


def test_what_is_cancelled_in_the_queue_is_no_drain() -> None:
    desk = Desk(max_running=0, max_waiting=8)
    for _ in range(20):
        desk.clock.now += 1
        desk.end(desk.admit())
    for _ in range(8):
        desk.admit()
    assert desk.refusal("another").retry_after == 1


def test_tokens_are_charged_at_admission_and_settled_at_the_end() -> None:
    desk = Desk()
    id = desk.admit(prompt=20, new=40, tokens_per_minute=100)
    refused = desk.refusal(prompt=20, new=30, tokens_per_minute=100)
    assert str(refused) == "tokens_per_minute is 100: 40 tokens are left, the request may take 50"
    assert (refused.limit, refused.retry_after) == ("tokens_per_minute", 6)
    desk.end(id, computed=25)
    desk.admit(prompt=20, new=55, tokens_per_minute=100)
    assert desk.refusal(prompt=1, new=0, tokens_per_minute=100).retry_after == 1


def test_what_was_never_begun_costs_nothing() -> None:
    desk = Desk()
    for _ in range(50):
        desk.end(desk.admit(prompt=60, new=40, tokens_per_minute=100))


def test_the_time_to_wait_for_tokens_is_enough() -> None:
    desk = Desk()
    desk.admit(prompt=90, new=10, tokens_per_minute=100)
    desk.clock.now += desk.refusal(prompt=33, new=0, tokens_per_minute=100).retry_after
    desk.admit(prompt=33, new=0, tokens_per_minute=100)


def test_a_request_that_no_minute_can_pay_for_is_refused_for_good() -> None:
    desk = Desk()
    with pytest.raises(QuotaError, match=r"is 100: a request of 50 prompt tokens and up to 51 new ones can") as refused:
        desk.admit(prompt=50, new=51, tokens_per_minute=100)
    assert refused.value.limit == "tokens_per_minute"
    assert desk.admission.pending == 0


def test_a_refusal_takes_no_tokens() -> None:
    desk = Desk(max_running=1, max_waiting=0)
    id = desk.admit("other")
    for _ in range(10):
        assert desk.refusal(prompt=50, new=50, tokens_per_minute=100).limit == "max_waiting"
    desk.end(id)
    desk.admit(prompt=50, new=50, tokens_per_minute=100)


def test_tenants_do_not_share_a_bucket() -> None:
    desk = Desk()
    for tenant in ("a", "b", "c"):
        desk.admit(tenant, prompt=50, new=50, tokens_per_minute=100)


def test_who_waits_too_long_is_named_until_it_has_ended() -> None:
    desk = Desk(max_running=1, timeout=5.0)
    begun, first = desk.admit(), desk.admit()
    desk.begin(begun)
    desk.clock.now += 3
    second = desk.admit()
    assert desk.admission.overdue() == []
    desk.clock.now += 2
    ((id, error),) = desk.admission.overdue()
    assert (id, error.limit, error.status) == (first, "queue_timeout", 429)
    assert str(error) == "Model is overloaded: not begun within queue_timeout of 5 seconds"
    desk.clock.now += 100
    assert [id for id, _ in desk.admission.overdue()] == [first, second]
    desk.end(first)
    desk.end(second)
    assert desk.admission.overdue() == []
    assert desk.admission.pending == 1


def test_without_a_timeout_nobody_waits_too_long() -> None:
    desk = Desk()
    desk.admit()
    desk.clock.now += 1e9
    assert desk.admission.overdue() == []


def test_an_id_counts_once() -> None:
    desk = Desk()
    desk.admission.admit(request("same"))
    with pytest.raises(ConflictError, match="request same"):
        desk.admission.admit(request("same", "another"))
    desk.admission.ended("same", 0)
    desk.admission.ended("same", 0)
    desk.admission.ended("unknown", 0)
    desk.admission.begun(["unknown"])
    assert desk.admission.pending == 0
    desk.admission.check()


def test_idle_tenants_are_forgotten_but_not_what_they_owe() -> None:
    desk = Desk(max_running=100)
    id = desk.admit("debtor", prompt=50, new=50, tokens_per_minute=100)
    desk.end(id, computed=100)
    for n in range(50):
        desk.end(desk.admit(f"tenant {n}"))
    desk.clock.now += 59.5
    assert desk.refusal("debtor", prompt=50, new=50, tokens_per_minute=100).retry_after == 1
    desk.clock.now += 60
    desk.admit("new")
    assert set(desk.admission._tenants) == {"new"}
    desk.admit("debtor", prompt=50, new=50, tokens_per_minute=100)


TENANTS = st.sampled_from(["a", "b", "c"])
POLICIES = st.fixed_dictionaries(
    {
        "max_queued": st.none() | st.integers(0, 4),
        "max_running": st.none() | st.integers(0, 3),
        "tokens_per_minute": st.none() | st.integers(0, 60),
    }
)


class Admissions(RuleBasedStateMachine):
    """Any order of arrivals, beginnings and ends: counts add up, limits hold, buckets stay within their size."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(max_running=3, max_waiting=5, share=4, timeout=30.0)
        self.waiting: dict[str, str] = {}  # id -> tenant
        self.running: dict[str, str] = {}
        self.refused = 0

    @rule(tenant=TENANTS, policy=POLICIES, prompt=st.integers(1, 30), new=st.integers(0, 30))
    def arrive(self, tenant: str, policy: dict[str, Any], prompt: int, new: int) -> None:
        before = len(self.waiting) + len(self.running)
        mine = sum(1 for each in self.waiting.values() if each == tenant)
        refused: OverloadedError | QuotaError | None = None
        try:
            id = self.desk.admit(tenant, prompt=prompt, new=new, **policy)
        except (OverloadedError, QuotaError) as error:
            refused = error
        else:
            self.waiting[id] = tenant
        if refused is None:
            assert before < 8
            assert mine < (4 if policy["max_queued"] is None else policy["max_queued"]) + 3
        elif isinstance(refused, OverloadedError):
            assert 1 <= refused.retry_after <= 60
            assert (refused.limit == "max_waiting") == (before == 8)
        else:
            assert policy["max_running"] == 0 or policy["tokens_per_minute"] < prompt + new

    @precondition(lambda self: self.waiting and len(self.running) < 3)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.waiting)))
        self.desk.begin(id, id)
        self.running[id] = self.waiting.pop(id)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data(), computed=st.integers(0, 60))
    def end(self, data: st.DataObject, computed: int) -> None:
        id = data.draw(st.sampled_from(sorted([*self.waiting, *self.running])))
        self.desk.end(id, computed)
        self.waiting.pop(id, None)
        self.running.pop(id, None)

    @rule(seconds=st.floats(0, 90))
    def wait(self, seconds: float) -> None:
        self.desk.clock.now += seconds
        assert {id for id, _ in self.desk.admission.overdue()} <= self.waiting.keys()

    @invariant()
    def adds_up(self) -> None:
        admission = self.desk.admission
        admission.check()
        assert admission.pending == len(self.waiting) + len(self.running)
        assert sum(admission.waiting().values()) == len(self.waiting)
        for tenant in "abc":
            assert admission.waiting().get(tenant, 0) == sum(1 for each in self.waiting.values() if each == tenant)

    @invariant()
    def buckets_stay_within_their_size(self) -> None:
        for tenant in self.desk.admission._tenants.values():
            if tenant.bucket is not None:
                assert 0 <= tenant.bucket.level(self.desk.clock.now) <= tenant.bucket.per_minute


TestAdmissions = Admissions.TestCase
TestAdmissions.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
