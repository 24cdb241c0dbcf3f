"""Quotas on a real engine: places, tokens and waiting times are those of what was really computed."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import OverloadedError
from server.requests import FinishReason
from server.tenancy.policy import TenantPolicy
from server.tenancy.quotas import Admission, AdmissionLimits

from ..lab import Lab
from ..tiny import tiny_model
from .test_quotas import Clock

PROMPT = [3, 9, 4, 1, 7, 7, 2, 8, 5, 6]
MINUTE = TenantPolicy(tokens_per_minute=100)


def new_lab(clock: Clock, *, max_running: int = 8, timeout: float | None = None, **options: Any) -> tuple[Lab, Admission]:
    admission = Admission(AdmissionLimits(max_running, 100, queue_timeout=timeout), clock)
    return Lab(tiny_model("llama"), {}, max_running=max_running, admission=admission, **options), admission


def left(lab: Lab) -> int:
    """Tokens in the bucket of tenant t, as its refusal names them."""
    with pytest.raises(OverloadedError, match=r"tokens are left") as refused:
        lab.submit("too much", PROMPT * 9, policy=MINUTE, max_new_tokens=10)
    return int(str(refused.value).split()[3])


def test_what_was_computed_is_what_is_paid() -> None:
    """The second time, eight of the ten positions (two whole blocks) come from the prefix cache."""
    lab, _ = new_lab(Clock())
    lab.submit("a", PROMPT, policy=MINUTE, max_new_tokens=20)
    assert left(lab) == 100 - 30
    lab.run()
    assert left(lab) == 100 - 30
    lab.submit("b", PROMPT, policy=MINUTE, max_new_tokens=20)
    assert left(lab) == 70 - 30
    lab.run()
    assert left(lab) == 70 - 22


def test_an_end_of_its_own_gives_the_rest_back() -> None:
    lab, _ = new_lab(Clock())
    lab.submit("a", PROMPT, policy=MINUTE, max_new_tokens=20)
    lab.run()
    first = lab.tokens("a")
    lab.scheduler._eos = frozenset({first[2]})
    at = first.index(first[2])
    before = left(lab)
    lab.submit("b", PROMPT, policy=MINUTE, max_new_tokens=20, ignore_eos=False)
    lab.run()
    assert lab.ending("b").finish is FinishReason.EOS
    assert left(lab) == before - 2 - (at + 1)


def test_aborted_work_is_paid_as_far_as_it_went() -> None:
    lab, _ = new_lab(Clock(), max_batch_tokens=4)
    lab.submit("in its prompt", PROMPT, policy=MINUTE, max_new_tokens=40)
    lab.turn()
    lab.engine.cancel("in its prompt")
    lab.turn()
    assert left(lab) == 100 - 4
    lab.submit("in its answer", [11, *PROMPT], policy=MINUTE, max_new_tokens=40)
    while len(lab.tokens("in its answer")) < 5:
        lab.turn()
    lab.engine.cancel("in its answer")
    lab.run()
    assert lab.ending("in its answer").computed_tokens == 11 + 5
    assert left(lab) == 96 - 16


def test_what_never_began_is_given_back_whole() -> None:
    lab, admission = new_lab(Clock(), max_running=1)
    lab.submit("other", PROMPT, tenant="other", max_new_tokens=30)
    lab.turn()
    lab.submit("a", PROMPT, policy=MINUTE, max_new_tokens=20)
    lab.turn()
    assert admission.waiting() == {"t": 1} == lab.engine.stats().waiting_of
    lab.engine.cancel("a")
    lab.turn()
    assert admission.waiting() == {}
    lab.submit("all of a minute's", PROMPT * 9, policy=MINUTE, max_new_tokens=10)


def test_preemption_is_not_paid_twice() -> None:
    lab, _ = new_lab(Clock(), blocks=9, max_batch_tokens=6)
    policy = TenantPolicy(tokens_per_minute=1000)
    for id in ("a", "b", "c"):
        lab.submit(id, [*PROMPT[:5], ord(id) % 30], policy=policy, max_new_tokens=14)
    lab.run()
    assert lab.observer.preemptions > 0
    assert [lab.ending(id).computed_tokens for id in ("a", "b", "c")] == [20, 20, 20]


def test_who_waits_too_long_is_told_and_leaves_its_place() -> None:
    clock = Clock()
    lab, admission = new_lab(clock, max_running=1, timeout=5.0)
    lab.submit("runs", PROMPT, max_new_tokens=30)
    lab.submit("waits", PROMPT, tenant="u", policy=MINUTE)
    lab.turn()
    clock.now += 4
    lab.turn()
    assert lab.engine.pending == 2
    clock.now += 1
    lab.turn()
    ending = lab.ending("waits")
    assert isinstance(ending.error, OverloadedError)
    assert (ending.error.limit, lab.observer.refusals) == ("queue_timeout", ["queue_timeout"])
    assert lab.engine.pending == 1
    lab.run()
    assert lab.finished("runs")
    assert admission.pending == 0


def test_a_tenant_at_its_max_running_waits_while_others_begin() -> None:
    lab, admission = new_lab(Clock(), max_batch_tokens=100)
    two = TenantPolicy(max_running=2)
    for n in range(6):
        lab.submit(f"busy {n}", PROMPT, tenant="busy", policy=two, max_new_tokens=8)
    for n in range(3):
        lab.submit(f"calm {n}", PROMPT, tenant="calm", max_new_tokens=8)
    most = 0
    while lab.engine.pending:
        lab.turn()
        running = [s.request.tenant for s in lab.scheduler.running if s.request is not None]
        most = max(most, running.count("busy"))
        if lab.tokens("calm 0") and not lab.tokens("busy 2"):
            assert admission.waiting() == {"busy": 4}
    assert most == 2
    assert all(lab.finished(f"busy {n}") for n in range(6))


def test_counts_agree_with_the_scheduler_at_every_step() -> None:
    lab, admission = new_lab(Clock(), max_running=3)
    for n in range(12):
        lab.submit(str(n), PROMPT[n % 5 :], tenant="abc"[n % 3], max_new_tokens=3 + n)
    while lab.engine.pending:
        lab.turn()
        if lab.engine.pending > 4:
            lab.engine.cancel(str(lab.engine.pending))
        admission.check()
        assert sum(admission.waiting().values()) <= lab.engine.stats().waiting
    assert lab.scheduler.idle
