"""Memory: the heap is trimmed once enough has passed through, and not before."""

from __future__ import annotations

import ctypes

import pytest

from server.memory import Reclaimer, out_of_memory


class Counting(Reclaimer):
    trims = 0

    def trim(self) -> None:
        self.trims += 1


def test_the_heap_is_trimmed_each_time_enough_has_passed() -> None:
    reclaimer = Counting(every=100)
    for nbytes in (60, 30):
        reclaimer.passed(nbytes)
    assert reclaimer.trims == 0
    reclaimer.passed(10)
    assert reclaimer.trims == 1
    reclaimer.passed(99)
    assert reclaimer.trims == 1
    reclaimer.passed(500)
    assert reclaimer.trims == 2


def test_trimming_works_here_and_where_there_is_nothing_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    Reclaimer().trim()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    Reclaimer().trim()


def test_allocations_that_failed_are_told_from_other_failures() -> None:
    exhausted = ("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes", "CUDA out of memory.", "std::bad_alloc")
    assert all(out_of_memory(RuntimeError(words)) for words in exhausted)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert not out_of_memory(ValueError("out of memory"))
