from __future__ import annotations

from math import inf

from prometheus_client import CollectorRegistry, generate_latest

from server.bench.results import Histogram
from server.bench.scrape import Scrape, steps_between
from server.metrics import Metrics


def _scrape(metrics: Metrics) -> Scrape:
    return Scrape.parse(metrics.render()[0].decode())


def test_only_what_happened_in_between_counts() -> None:
    metrics = Metrics("tiny")
    metrics.observe_step(rows=1, tokens=1, adapters=40, families=9, seconds=0.1)
    metrics.evicted()
    before = _scrape(metrics)
    metrics.observe_step(rows=8, tokens=8, adapters=8, families=4, seconds=0.1)
    metrics.observe_step(rows=8, tokens=40, adapters=6, families=2, seconds=0.1)
    metrics.adapter_loaded(0.1, "ok")
    metrics.adapter_loaded(0.1, "adapter")
    metrics.preempted()
    metrics.prefix_cache(queried=32, hit=16)
    steps = steps_between(before, _scrape(metrics))
    assert steps is not None
    assert (steps.steps, steps.rows) == (2, Histogram(mean=8.0, most=8.0))
    assert steps.distinct_adapters == Histogram(mean=7.0, most=8.0)
    assert steps.distinct_families == Histogram(mean=3.0, most=4.0)
    assert (steps.adapter_loads, steps.adapter_evictions, steps.preemptions, steps.prefix_hit_tokens) == (2, 0, 1, 16)


def test_beyond_the_last_edge_the_most_is_unknown() -> None:
    metrics = Metrics("tiny")
    before = _scrape(metrics)
    metrics.observe_step(rows=1, tokens=1, adapters=1000, families=1, seconds=0.1)
    steps = steps_between(before, _scrape(metrics))
    assert steps is not None
    assert steps.distinct_adapters == Histogram(mean=1000.0, most=inf)


def test_no_steps_have_no_mean() -> None:
    scrape = _scrape(Metrics("tiny"))
    steps = steps_between(scrape, scrape)
    assert steps is not None
    assert steps.rows is None


def test_a_server_without_these_metrics_tells_nothing() -> None:
    empty = Scrape.parse(generate_latest(CollectorRegistry()).decode())
    assert steps_between(empty, empty) is None
    assert empty.resident_bytes is empty.cpu_seconds is empty.adapter_slots_bytes is None


def test_process_metrics_are_read() -> None:
    scrape = Scrape.parse("process_resident_memory_bytes 1.5e+09\nprocess_cpu_seconds_total 12.5\n")
    assert (scrape.resident_bytes, scrape.cpu_seconds) == (1_500_000_000, 12.5)
