"""Engine: every accepted request ends once, whether it is answered, refused, cancelled or the engine stops."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from server.errors import OverloadedError, UnavailableError
from server.requests import FinishReason, Request
from server.tenancy.quotas import Admission, AdmissionLimits
from tests.engine.running import ADAPTERS, DIGESTS, PROMPT, WAIT, Gate, Running, ask, new_lab

pytestmark = pytest.mark.usefixtures("one_thread", "logs")


# ---- requests ----


def test_requests_of_all_kinds_are_answered(run: Callable[..., Running], expected: dict[str, list[int]]) -> None:
    running = run()
    for name in expected:
        running.submit(name, *([] if name == "base" else [name]))
    assert {name: running.tokens(name) for name in expected} == expected
    first = next(event for event in running.events if event.request_id == "a")
    assert first.queue_seconds is not None
    assert first.queue_seconds >= 0
    assert max(running.observer.families_per_step) >= 1


def test_requests_may_come_from_any_thread(run: Callable[..., Running], expected: dict[str, list[int]]) -> None:
    running = run()
    threads = [threading.Thread(target=running.submit, args=(f"{i}", "a")) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(running.tokens(f"{i}") == expected["a"] for i in range(12))


def test_a_request_that_can_never_fit_is_answered_with_an_error(run: Callable[..., Running]) -> None:
    running = run()
    running.submit("long", new=196)
    event = running.ending("long")
    assert "must be <= 200. Given: 5 `inputs` tokens and 196 `max_new_tokens`" in str(event.error)


def test_a_defect_while_queueing_costs_that_request_alone(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[int]]
) -> None:
    running = run()
    real = running.scheduler.submit

    def submit(request: Request) -> None:
        if request.id == "odd":
            raise RuntimeError("a defect")
        real(request)

    monkeypatch.setattr(running.scheduler, "submit", submit)
    running.submit("odd")
    running.submit("fine")
    assert str(running.ending("odd").error) == "the request failed (RuntimeError)"
    assert running.tokens("fine") == expected["base"]


def test_pending_and_stats_follow_the_requests() -> None:
    lab = new_lab(max_running=2, slots=3)
    ask(lab, "a", "base", "b")
    assert lab.engine.pending == 3
    lab.turn()
    lab.turn()
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting, lab.engine.pending) == (2, 1, 3)
    assert stats.kv_blocks_used > 0
    assert stats.kv_blocks_total == 256
    assert (stats.slots_used, stats.slots_total, stats.resident) == (1, 3, (DIGESTS["a"],))
    assert stats.waiting_for == (DIGESTS["b"],)
    assert stats.device_bytes == lab.runner.adapter_bytes > 0
    lab.run()
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, lab.engine.pending) == (0, 0, 0, 0)
    assert set(stats.resident) == {DIGESTS["a"], DIGESTS["b"]}


def test_one_too_many_is_refused_at_once_and_a_place_comes_free_again() -> None:
    lab = new_lab(admission=Admission(AdmissionLimits(max_running=2, max_waiting=3)))
    for i in range(5):
        lab.submit(f"{i}", PROMPT)
    with pytest.raises(
        OverloadedError, match="5 requests are accepted, the most that max_running 2 and max_waiting 3"
    ) as refused:
        lab.submit("one too many", PROMPT)
    assert refused.value.retry_after > 0
    assert lab.observer.refusals == ["max_waiting"]
    lab.run()
    lab.submit("later", PROMPT)
    lab.run()
    assert lab.finished("later")
    assert not [event for event in lab.events if event.request_id == "one too many"]


# ---- cancelling ----


@pytest.mark.parametrize("name", ["base", "a", "kv", "soft"])
def test_a_cancelled_request_gives_everything_back_within_one_step(name: str) -> None:
    lab = new_lab()
    lab.submit(name, PROMPT, *([] if name == "base" else [DIGESTS[name]]), max_new_tokens=50)
    for _ in range(6):
        lab.turn()
    assert lab.scheduler.running
    lab.engine.cancel(name)
    lab.turn()
    assert lab.ending(name).finish is FinishReason.CANCELLED
    assert lab.scheduler.idle
    lab.scheduler.check_idle()
    assert lab.engine.pending == 0


def test_cancelling_leaves_the_others_as_they_were(expected: dict[str, list[int]]) -> None:
    lab = new_lab()
    ask(lab, "a", "b", "soft")
    for _ in range(5):
        lab.turn()
    lab.engine.cancel("b")
    lab.run()
    assert {name: lab.tokens(name) for name in ("a", "soft")} == {name: expected[name] for name in ("a", "soft")}


def test_a_waiting_request_can_be_cancelled_too(run: Callable[..., Running]) -> None:
    gate = Gate()
    running = run(gate)
    running.submit("a", "a")
    assert gate.asked.wait(WAIT)
    running.engine.cancel("a")
    assert running.ending("a").finish is FinishReason.CANCELLED
    gate.open.set()


def test_cancelling_what_is_unknown_or_over_does_nothing(run: Callable[..., Running]) -> None:
    running = run()
    running.engine.cancel("nobody")
    running.submit("a")
    running.ending("a")
    running.engine.cancel("a")
    running.submit("b")
    assert running.tokens("b")


def test_a_cancel_between_submit_and_the_first_step_wins() -> None:
    lab = new_lab()
    ask(lab, "base")
    lab.engine.cancel("base")
    lab.run()
    assert lab.ending("base").finish is FinishReason.CANCELLED
    assert lab.tokens("base") == []


# ---- quiet moments ----


def test_what_later_steps_need_is_prepared_while_nobody_waits_and_not_while_somebody_does(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, enough = run(), threading.Event()
    idle: list[bool] = []

    def prepare() -> bool:
        idle.append(running.scheduler.idle)
        if len(idle) >= 100:  # one right after the other: a second's wait between them would take longer than WAIT
            enough.set()
        return not enough.is_set()

    monkeypatch.setattr(running.runner, "prepare", prepare)
    running.submit("base")
    assert running.ending("base").finish is FinishReason.LENGTH
    assert enough.wait(WAIT)
    assert all(idle)


def test_a_defect_while_preparing_costs_nobody_anything(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    running = run()
    monkeypatch.setattr(running.runner, "prepare", lambda: 1 // 0)
    for name in ("one", "two"):
        running.submit(name)
        assert running.ending(name).finish is FinishReason.LENGTH


# ---- stopping ----


def test_stop_ends_who_runs_who_waits_and_who_was_not_looked_at_yet(run: Callable[..., Running]) -> None:
    gate = Gate()
    running = run(gate, running=2)
    running.submit("runs", new=150)
    running.submit("loads", "a")
    running.started("runs")
    assert gate.asked.wait(WAIT)
    with running.engine._inbox.lock:  # the engine cannot look into its inbox before it is told to stop
        for i in range(5):
            running.submit(f"inbox {i}")
        running.engine._inbox.closed = True
    gate.open.set()
    running.engine.stop()
    assert running.engine.pending == 0
    for id in ("runs", "loads", *(f"inbox {i}" for i in range(5))):
        assert isinstance(running.ending(id).error, UnavailableError)


def test_after_stop_everything_is_refused_and_nothing_hangs(run: Callable[..., Running]) -> None:
    running = run()
    running.engine.warm((DIGESTS["a"],)).result(WAIT)
    running.engine.stop()
    running.engine.stop()
    with pytest.raises(UnavailableError, match="shutting down"):
        running.submit("late")
    with pytest.raises(UnavailableError, match="shutting down"):
        running.engine.warm((DIGESTS["b"],)).result(0)
    assert running.engine.unload(DIGESTS["a"]) is False
    running.engine.cancel("late")
    assert running.events == []


def test_stop_fails_those_who_wait_for_a_warm_adapter(run: Callable[..., Running]) -> None:
    gate = Gate()
    running = run(gate)
    future = running.engine.warm((DIGESTS["a"],))
    assert gate.asked.wait(WAIT)
    stopper = threading.Thread(target=running.engine.stop)
    stopper.start()
    with pytest.raises(UnavailableError):
        future.result(WAIT)
    gate.open.set()
    stopper.join(WAIT)


def test_an_engine_that_was_never_started_ends_its_requests_too(run: Callable[..., Running]) -> None:
    running = run(start=False)
    running.submit("a", "a")
    future = running.engine.warm((DIGESTS["a"],))
    running.engine.stop()
    assert isinstance(running.ending("a").error, UnavailableError)
    assert isinstance(future.exception(0), UnavailableError)


def test_many_threads_submit_and_cancel_until_the_engine_stops(run: Callable[..., Running]) -> None:
    """Accepted or refused, each request hears of its end exactly once; the fixture checks the rest."""
    running = run(running=4, waiting=20, slots=2)
    accepted: list[str] = []
    stop_at = threading.Barrier(4, timeout=WAIT)

    def client(number: int) -> None:
        choice = random.Random(number)
        for i in range(25):
            if i == 20:
                stop_at.wait()
            id = f"{number}-{i}"
            name = choice.choice(["base", *ADAPTERS])
            try:
                running.submit(id, *([] if name == "base" else [name]), new=choice.randint(1, 6))
            except (OverloadedError, UnavailableError):
                continue
            accepted.append(id)
            if choice.random() < 0.4:
                running.engine.cancel(choice.choice(accepted))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for each in clients:
        each.start()
    stop_at.wait()
    running.engine.stop()
    for each in clients:
        each.join(WAIT)
    assert {event.request_id for event in running.events} == set(accepted)
