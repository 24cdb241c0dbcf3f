"""What failed is refused from memory for a while, on a clock that moves only when told."""

from __future__ import annotations

from adapters_store.digest import Digest
from server.engine.backoff import FIRST, LONGEST, Backoff
from server.errors import AdapterError

A, B = Digest("a" * 64), Digest("b" * 64)
TORN = AdapterError("lora_A", "is torn")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_failure_is_tried_again_at_once_and_later_ones_ever_later() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    backoff.failed(A, TORN)
    assert backoff.refusal(A) is None
    delays = []
    for _ in range(9):
        backoff.failed(A, TORN)
        begun = clock.now
        while backoff.refusal(A) is TORN:
            clock.now += 0.5
        delays.append(clock.now - begun)
    assert delays == [FIRST, 2, 4, 8, 16, 32, LONGEST, LONGEST, LONGEST]


def test_a_success_is_forgiven_all_at_once() -> None:
    backoff = Backoff(Clock())
    for _ in range(5):
        backoff.failed(A, TORN)
    backoff.forget(A)
    backoff.forget(B)
    assert backoff.refusal(A) is None
    backoff.failed(A, TORN)
    assert backoff.refusal(A) is None


def test_adapters_do_not_answer_for_each_other_and_only_so_many_are_remembered() -> None:
    backoff = Backoff(Clock())
    for _ in range(2):
        backoff.failed(A, TORN)
    assert backoff.refusal(B) is None
    for n in range(1000):
        backoff.failed(Digest(f"{n:064x}"), TORN)
    assert backoff.refusal(A) is None
