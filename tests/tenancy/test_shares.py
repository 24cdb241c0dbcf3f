"""Shares: whole units by weight, nothing wasted, and rounding that evens out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tenancy.shares import Demand, Shares

DEMANDS = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0.001, 1000), st.integers(1, 500)), min_size=1)


def test_who_wants_little_gets_it_and_the_others_share_the_rest() -> None:
    demands = {"a": Demand(1, 5000), "b": Demand(1, 10), "c": Demand(1, 5000)}
    assert Shares().divide(100, demands) == {"b": 10, "a": 45, "c": 45}


def test_weights_divide() -> None:
    assert Shares().divide(70, {"a": Demand(1, 999), "b": Demand(2, 999), "c": Demand(4, 999)}) == {"a": 10, "b": 20, "c": 40}


@pytest.mark.parametrize("total", [1, 2, 5])
def test_what_is_too_little_for_all_goes_round(total: int) -> None:
    shares, given_ = Shares(), Counter[str]()
    for _ in range(21):
        given_.update(shares.divide(total, {"a": Demand(1, 999), "b": Demand(1, 999), "c": Demand(1, 999)}))
    assert set(given_.values()) == {7 * total}


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 600), DEMANDS)
def test_no_more_than_there_is_or_is_wanted_and_nothing_wasted(total: int, wanted: dict[str, tuple[float, int]]) -> None:
    shares, demands = Shares(), {tenant: Demand(*pair) for tenant, pair in wanted.items()}
    for _ in range(3):
        found = shares.divide(total, demands)
        assert all(0 <= found[tenant] <= demand.most for tenant, demand in demands.items())
        assert sum(found.values()) == min(total, sum(demand.most for demand in demands.values()))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 50), st.lists(st.sampled_from([0.25, 1.0, 2.0, 4.0]), min_size=2, max_size=6))
def test_over_time_everybody_gets_what_its_weight_says(total: int, weights: list[float]) -> None:
    shares, given_ = Shares(), Counter[int]()
    demands = {str(n): Demand(weight, 10**6) for n, weight in enumerate(weights)}
    for _ in range(50):
        for tenant, count in shares.divide(total, demands).items():
            given_[int(tenant)] += count
    for n, weight in enumerate(weights):
        assert abs(given_[n] - 50 * total * weight / sum(weights)) <= len(weights)
