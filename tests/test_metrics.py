"""Names, labels and cardinality of what is exported."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from adapters_store.digest import Digest
from server.metrics import EngineStats, Metrics

Samples = dict[tuple[object, ...], float]


def scrape(metrics: Metrics) -> Samples:
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.finished("success")
    assert scrape(first)["adapterd_requests_total", ("outcome", "success")] == 1
    assert ("adapterd_requests_total", ("outcome", "success")) not in scrape(second)


def test_steps() -> None:
    metrics = Metrics("m")
    metrics.observe_step(rows=9, tokens=40, adapters=8, families=4, seconds=0.03)
    metrics.observe_step(rows=1, tokens=1, adapters=0, families=0, seconds=0.01)
    samples = scrape(metrics)
    edges = [dict(key[1:])["le"] for key in samples if key[0] == "adapterd_step_distinct_adapters_bucket"]
    assert edges == [f"{edge}.0" for edge in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)] + ["+Inf"]
    assert samples["adapterd_step_distinct_adapters_bucket", ("le", "6.0")] == 1
    assert samples["adapterd_step_distinct_adapters_bucket", ("le", "8.0")] == 2
    assert samples[("adapterd_step_distinct_families_sum",)] == 4
    assert samples[("adapterd_step_rows_sum",)] == 10
    assert samples[("adapterd_step_tokens_sum",)] == 41


def test_adapter_labels_are_bounded() -> None:
    metrics = Metrics("m", top_k=2)
    for name in ("a", "b", "c", "d", "a"):
        metrics.tokens("acme", [name], prompt=1, generated=2)
    metrics.tokens("acme", [], prompt=1, generated=2)
    metrics.tokens("two", ["z"], prompt=1, generated=2)
    for tenant in range(50):
        metrics.tokens(f"t{tenant}", [f"a{tenant}"], prompt=1, generated=2)
    requests = {
        (dict(key[1:])["tenant"], dict(key[1:])["adapter"]): value
        for key, value in scrape(metrics).items()
        if key[0] == "adapterd_adapter_requests_total"
    }
    assert requests == {
        ("acme", "a"): 2,
        ("acme", "b"): 1,
        ("acme", "other"): 2,
        ("acme", "__base_model__"): 1,
        ("two", "other"): 1,
        ("other", "other"): 50,
    }
    assert scrape(metrics)[("adapterd_prompt_tokens_total",)] == 57


def test_every_adapter_of_a_composed_request_is_counted() -> None:
    metrics = Metrics("m")
    metrics.tokens("acme", ["a", "b"], prompt=3, generated=4)
    samples = scrape(metrics)
    for name in "ab":
        assert samples["adapterd_adapter_requests_total", ("adapter", name), ("tenant", "acme")] == 1
    assert samples[("adapterd_generated_tokens_total",)] == 4


def test_service_is_counted_by_tenant_at_what_was_computed() -> None:
    metrics = Metrics("m", top_k=1)
    metrics.tokens("acme", ["a", "b"], prompt=10, generated=4, cached=7)
    for n in range(9):
        metrics.tokens(f"t{n}", [], prompt=1, generated=0)
    samples = scrape(metrics)
    assert samples["adapterd_tenant_service_total", ("tenant", "acme")] == 3 + 2 * 4
    assert samples["adapterd_tenant_service_total", ("tenant", "other")] == 9


def test_adapter_life() -> None:
    metrics = Metrics("m")
    metrics.adapter_loaded(0.02, "ok")
    metrics.adapter_loaded(0.5, "adapter")
    metrics.evicted()
    metrics.preempted()
    metrics.prefix_cache(queried=10, hit=4)
    metrics.speculated(guessed=8, right=5)
    metrics.uploaded("created")
    samples = scrape(metrics)
    assert samples["adapterd_adapter_loads_total", ("outcome", "ok")] == 1
    assert samples[("adapterd_adapter_load_seconds_count",)] == 2
    assert samples[("adapterd_adapter_evictions_total",)] == 1
    assert samples[("adapterd_preemptions_total",)] == 1
    assert samples[("adapterd_prefix_cache_hits_total",)] == 4
    assert samples[("adapterd_prefix_cache_queries_total",)] == 10
    assert samples[("adapterd_speculated_tokens_total",)] == 8
    assert samples[("adapterd_speculated_tokens_accepted_total",)] == 5
    assert samples["adapterd_uploads_total", ("outcome", "created")] == 1


def test_what_breaks_and_how_long_ago_the_engine_last_came_round() -> None:
    metrics = Metrics("m")
    for kind in ("memory", "error", "memory"):
        metrics.pass_failed(kind)
    metrics.mirror(lambda: EngineStats(last_step_age=12.5), running=lambda digests: [], waiting=list)
    samples = scrape(metrics)
    assert samples["adapterd_pass_failures_total", ("kind", "memory")] == 2
    assert samples["adapterd_pass_failures_total", ("kind", "error")] == 1
    assert samples[("adapterd_engine_last_step_age_seconds",)] == 12.5


def test_refusals_by_limit() -> None:
    metrics = Metrics("m")
    for limit in ("max_waiting", "tokens_per_minute", "max_waiting"):
        metrics.refused(limit)
    samples = scrape(metrics)
    assert samples["adapterd_refusals_total", ("limit", "max_waiting")] == 2
    assert samples["adapterd_refusals_total", ("limit", "tokens_per_minute")] == 1


def test_queues_of_tenants_beyond_the_first_are_one() -> None:
    metrics = Metrics("m", top_k=2)
    now = EngineStats(waiting_of={f"t{n}": n for n in range(1, 101)})
    metrics.mirror(lambda: now, running=lambda digests: [], waiting=list)
    shown = {dict(key[1:])["tenant"]: value for key, value in scrape(metrics).items() if key[0] == "adapterd_tenant_waiting"}
    assert shown == {"t1": 1, "t2": 2, "other": 5050 - 3}
    now = EngineStats()
    assert not [key for key in scrape(metrics) if key[0] == "adapterd_tenant_waiting"]


def test_gauges_are_read_when_scraped() -> None:
    metrics, digest = Metrics("tiny"), Digest.of(b"x")
    now = EngineStats(3, 5, kv_blocks_used=30, kv_blocks_total=40, slots_used=1, slots_total=8, resident=(digest,))
    metrics.mirror(lambda: now, running=lambda digests: [d.short for d in digests], waiting=lambda: ["a", "b"])
    samples = scrape(metrics)
    labels = (("engine", "0"), ("model_name", "tiny"))
    assert samples["vllm:num_requests_running", *labels] == samples[("adapterd_running",)] == 3
    assert samples["vllm:num_requests_waiting", *labels] == samples[("adapterd_waiting",)] == 5
    assert samples["vllm:kv_cache_usage_perc", *labels] == 0.75
    assert samples[("adapterd_kv_blocks_used",)] == 30
    assert samples[("adapterd_kv_blocks_total",)] == 40
    assert samples[("adapterd_adapter_slots_used",)] == 1
    assert samples[("adapterd_adapter_slots_total",)] == 8
    key = next(key for key in samples if key[0] == "vllm:lora_requests_info")
    assert dict(key[1:]) == {
        "max_lora": "8",
        "running_lora_adapters": digest.short,
        "waiting_lora_adapters": "a,b",
    }
    assert 0 <= time.time() - samples[key] < 60
    now = EngineStats(kv_blocks_total=0)
    assert scrape(metrics)["vllm:kv_cache_usage_perc", *labels] == 0
