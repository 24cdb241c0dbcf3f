from __future__ import annotations

import pytest

from server.bench.results import OK, Comparison, Memory, MemorySample, Outcome, Percentiles, Round, Spread, summarise


def test_percentiles_interpolate_between_ranks() -> None:
    found = Percentiles.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found is not None
    assert (found.p50, found.count) == (3.0, 5)
    assert found.p90 == pytest.approx(4.6)
    assert found.p99 == pytest.approx(4.96)


def test_percentiles_of_nothing_are_none() -> None:
    assert Percentiles.of([]) is None


def test_a_run_is_summed_up_from_its_good_requests() -> None:
    outcomes = [
        Outcome("a", OK, started=10.0, ended=12.0, token_times=(11.0, 11.5, 12.0), token_ids=(1, 2, 3), prompt_tokens=5),
        Outcome("b", OK, started=10.0, ended=14.0, token_times=(13.0, 14.0), token_ids=(1, 2), prompt_tokens=6),
        Outcome("c", "429", started=10.0, ended=10.1, message="Model is overloaded"),
        Outcome("c", "429", started=10.0, ended=10.1, message="again"),
    ]
    load = summarise("run", outcomes)
    assert (load.requests, load.completed, load.errors) == (4, 2, {"429": 2})
    assert load.first_error == "Model is overloaded"
    assert (load.prompt_tokens, load.generated_tokens, load.wall_seconds) == (11, 5, 4.0)
    assert load.tokens_per_second == pytest.approx(5 / 4)
    assert load.time_to_first_token is not None
    assert load.time_to_first_token.p50 == pytest.approx(2.0)
    assert load.inter_token is not None
    assert (load.inter_token.p50, load.inter_token.count) == (0.5, 3)
    assert load.inter_token.p90 == pytest.approx(0.9)
    assert load.end_to_end is not None
    assert load.end_to_end.p50 == pytest.approx(3.0)


def test_a_run_in_which_all_fails_has_no_figures() -> None:
    load = summarise("run", [Outcome(None, "ReadError", started=1.0, ended=1.0)])
    assert load.tokens_per_second == 0.0
    assert load.time_to_first_token is load.inter_token is load.end_to_end is None


def test_disturbed_rounds_do_not_count() -> None:
    calm, calmer = Round(40.0, 10.0, 0.0, False), Round(60.0, 10.0, None, False)
    comparison = Comparison("A", "B", (calm, Round(90.0, 1.0, 1.5, True), calmer))
    assert comparison.counted == (calm, calmer)
    assert comparison.ratio == Spread(median=5.0, least=4.0, most=6.0)
    assert comparison.a.median == 50.0


def test_when_every_round_was_disturbed_all_count() -> None:
    rounds = (Round(2.0, 1.0, 1.0, True), Round(4.0, 1.0, 1.0, True))
    assert Comparison("A", "B", rounds).counted == rounds


def test_memory_is_judged_by_its_peak() -> None:
    samples = tuple(MemorySample(index, size) for index, size in enumerate((100, 900, 950, 940)))
    assert Memory(samples, {"base": 500, "KV cache": 450}).within_budget is True
    assert Memory(samples, {"base": 500, "KV cache": 449}).within_budget is False
    assert Memory(samples, {"base": 5000, "KV cache": None}).within_budget is None
    assert Memory(samples).within_budget is None
    assert Memory(samples).late_growth_bytes == -10
    assert Memory(()).peak_bytes is None
