"""Whoever waits for an adapter hears of its end once."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from adapters_store.digest import Digest
from server.engine.warming import Warming
from server.errors import GenerationError, UnavailableError

A, B = Digest("a" * 64), Digest("b" * 64)


def test_several_are_there_when_the_last_one_is() -> None:
    warming, future = Warming(), Future[None]()
    assert warming.add([A, B], future)
    warming.told(A)
    assert not future.done()
    warming.told(B)
    assert future.result(0) is None
    warming.told(A, GenerationError("too late to matter"))


def test_the_first_failure_ends_the_wait() -> None:
    warming, one, other = Warming(), Future[None](), Future[None]()
    warming.add([A, B], one)
    warming.add([B], other)
    warming.told(A, GenerationError("torn"))
    with pytest.raises(GenerationError, match="torn"):
        one.result(0)
    warming.told(B)
    assert other.result(0) is None


def test_nothing_missing_and_nobody_waiting() -> None:
    warming, there, gone = Warming(), Future[None](), Future[None]()
    assert not warming.add([], there)
    assert there.result(0) is None
    gone.cancel()
    assert not warming.add([A], gone)
    warming.told(A)


def test_the_end_is_told_to_everybody() -> None:
    warming, future = Warming(), Future[None]()
    warming.add([A], future)
    warming.end(UnavailableError("over"))
    with pytest.raises(UnavailableError, match="over"):
        future.result(0)
