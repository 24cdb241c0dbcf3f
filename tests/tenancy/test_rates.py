"""Token buckets and drain rates, on times that are given."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tenancy.rates import LONGEST, SHORTEST, DrainRate, TokenBucket, bounded, retry_after


def test_a_bucket_starts_full_and_refills_evenly() -> None:
    bucket = TokenBucket(600, now=0.0)
    bucket.take(600, 0.0)
    assert [bucket.level(now) for now in (0.0, 1.0, 30.0, 60.0, 90.0)] == pytest.approx([0, 10, 300, 600, 600])


def test_the_wait_is_exactly_as_long_as_it_takes() -> None:
    bucket = TokenBucket(600, now=0.0)
    bucket.take(590, 0.0)
    assert bucket.wait(10, 0.0) == 0
    assert bucket.wait(25, 0.0) == pytest.approx(1.5)
    assert bucket.wait(25, 1.5) == 0
    assert bucket.wait(601, 0.0) == math.inf


def test_more_than_there_is_cannot_be_taken() -> None:
    bucket = TokenBucket(60, now=0.0)
    with pytest.raises(ValueError, match="61 tokens"):
        bucket.take(61, 0.0)
    assert bucket.level(0.0) == 60


def test_what_is_given_back_cannot_fill_it_over_the_brim() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(50, 0.0)
    bucket.give_back(30, 0.0)
    assert bucket.level(0.0) == 40
    bucket.give_back(30, 0.0)
    assert bucket.level(0.0) == 60


def test_another_size_keeps_what_fits() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.resize(120, 0.0)
    assert (bucket.level(0.0), bucket.level(30.0)) == (60, 120)
    bucket.resize(10, 30.0)
    assert bucket.level(30.0) == 10


def test_a_bucket_of_nothing_never_holds_anything() -> None:
    bucket = TokenBucket(0, now=0.0)
    assert (bucket.level(1e6), bucket.wait(1, 0.0), bucket.wait(0, 0.0)) == (0, math.inf, 0)


@given(st.integers(1, 10**6), st.floats(0, 1e6), st.data())
def test_after_the_wait_it_can_be_taken(per_minute: int, now: float, data: st.DataObject) -> None:
    bucket = TokenBucket(per_minute, now)
    bucket.take(data.draw(st.integers(0, per_minute)), now)
    wanted = data.draw(st.integers(0, per_minute))
    bucket.take(wanted, now + bounded(bucket.wait(wanted, now)))
    assert bucket.level(now) >= 0


def test_a_clock_that_goes_back_refills_nothing() -> None:
    bucket = TokenBucket(60, now=100.0)
    bucket.take(60, 100.0)
    assert bucket.level(50.0) == bucket.level(100.0) == 0


def test_a_steady_drain_is_measured_as_what_it_is() -> None:
    drain = DrainRate(0.0)
    assert drain.per_second(0.0) == 0
    for tick in range(1, 401):
        drain.ended(tick / 4)
    assert drain.per_second(100.0) == pytest.approx(4, rel=0.05)
    assert drain.per_second(200.0) < 0.2


def test_a_short_observation_is_not_mistaken_for_a_slow_drain() -> None:
    drain = DrainRate(0.0)
    for tick in range(1, 21):
        drain.ended(tick / 10)
    assert drain.per_second(2.0) == pytest.approx(10, rel=0.1)


def test_idle_time_is_not_counted() -> None:
    drain = DrainRate(0.0)
    for tick in range(1, 101):
        drain.ended(tick / 2)
    before = drain.per_second(50.0)
    drain.idle_until(10_000.0)
    assert drain.per_second(10_000.0) == pytest.approx(before)


@pytest.mark.parametrize(
    ("ahead", "per_second", "seconds"),
    [(10, 4.0, 3), (0, 4.0, 1), (1, 0.5, 2), (256, 0.1, LONGEST), (256, 0.0, SHORTEST), (1, 1e9, SHORTEST)],
)
def test_retry_after_is_the_time_the_queue_takes(ahead: int, per_second: float, seconds: float) -> None:
    assert retry_after(ahead, per_second) == seconds
