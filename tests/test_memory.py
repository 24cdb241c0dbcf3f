"""Memory: the heap is trimmed once enough has passed through, and what a server is made of is left alone by collections."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator

import pytest

from server.memory import Reclaimer, kept, out_of_memory


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


class _Cycle:
    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_is_made_is_kept_out_of_later_collections_but_its_garbage_is_not() -> None:
    frozen = gc.get_freeze_count()
    with kept():
        assert not gc.isenabled()
        garbage = weakref.ref(_Cycle())
        assert garbage() is not None
    assert garbage() is None
    assert gc.get_freeze_count() > frozen
    assert gc.isenabled()


@pytest.mark.usefixtures("thawed")
def test_collections_go_on_when_the_making_failed() -> None:
    with pytest.raises(ValueError, match="no base"), kept():
        raise ValueError("no base")
    assert gc.isenabled()


@pytest.mark.usefixtures("thawed")
def test_where_there_is_no_garbage_to_speak_of_nobody_looks_for_it() -> None:
    frozen = gc.get_freeze_count()
    with kept(clean=True):
        garbage = weakref.ref(_Cycle())
    gc.collect()
    assert garbage() is not None
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()
    gc.collect()
    assert garbage() is None
