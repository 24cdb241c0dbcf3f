"""Every number the server exports, in one registry of its own.

Owns names, buckets and label cardinality. The engine's thread calls `observe_step` and its like; gauges that mirror the
engine's state are read at scrape time, so a step never pays for them. Knows no engine, no store and no HTTP.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from adapters_store.digest import Digest

from .tenancy.policy import INPUT_PRICE, OUTPUT_PRICE

BASE_LABEL = "__base_model__"  # LoRAX's name for "no adapter"
OTHER_LABEL = "other"

# Seconds; the edges are vLLM's, so that dashboards made for it fit.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_INTER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_LOAD = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_DISTINCT = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's state at one instant, as cheap to take as a few attribute reads."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    slots_used: int = 0
    slots_total: int = 0
    resident: tuple[Digest, ...] = ()
    waiting_for: tuple[Digest, ...] = ()  # adapters that queued requests name
    device_bytes: int = 0  # of the resident adapters' pools
    device_budget: int = 0  # that those may take
    host_cache_bytes: int = 0  # of parsed adapters kept in host memory
    last_step_age: float = 0.0  # seconds since the engine's loop last came round; at most about 1 when it is idle
    waiting_of: Mapping[str, int] = field(default_factory=dict)  # tenant -> its queued requests, where there are any


class TopK:
    """The first K distinct keys keep a label of their own, everyone after them shares `other`. Any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: set[object] = set()
        self._lock = Lock()

    def admits(self, key: object) -> bool:
        with self._lock:
            if key not in self._seen and len(self._seen) < self._size:
                self._seen.add(key)
            return key in self._seen


class Metrics:
    """All counters and histograms of one server. Every method may be called from any thread.

    Usage:
        metrics = Metrics(model_name="smollm2", top_k=100)
        metrics.mirror(engine.stats, running=names_of_resident_adapters, waiting=names_waited_for)
        body, content_type = metrics.render()
    """

    def __init__(self, model_name: str, top_k: int = 100) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._model_name = model_name
        self._tenants = TopK(top_k)
        self._adapters = TopK(top_k)
        ProcessCollector(registry=self.registry)
        self._declare_requests()
        self._declare_steps()
        self._declare_adapters()

    # -- requests (event loop) ---------------------------------------------------------------------------------------

    def finished(self, outcome: str) -> None:
        """One request ended, or was refused; `outcome` is success, cancelled, timeout or an error's `error_type`."""
        self._requests.labels(outcome).inc()

    def refused(self, limit: str) -> None:
        """A request or an upload was over a limit, or waited too long; `limit` is a setting or a field of a policy."""
        self._refusals.labels(limit).inc()

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def request_seconds(self, seconds: float) -> None:
        self._e2e.observe(seconds)

    def tokens(self, tenant: str, adapters: Iterable[str], prompt: int, generated: int, cached: int = 0) -> None:
        """Count one finished request's tokens, in all and under each adapter (or the base) that it used.

        `cached` of its `prompt` tokens were not computed, so they are no service.
        """
        service = max(0, prompt - cached) * INPUT_PRICE + generated * OUTPUT_PRICE
        self._tenant_service.labels(tenant if self._tenants.admits(tenant) else OTHER_LABEL).inc(service)
        self._prompt_tokens.inc(prompt)
        self._generated_tokens.inc(generated)
        for adapter in tuple(adapters) or (BASE_LABEL,):
            labels = self._labels(tenant, adapter)
            self._adapter_requests.labels(*labels).inc()
            self._adapter_tokens.labels(*labels, "prompt").inc(prompt)
            self._adapter_tokens.labels(*labels, "generated").inc(generated)

    def uploaded(self, outcome: str) -> None:
        """`outcome` is created, unchanged or an error's `error_type`."""
        self._uploads.labels(outcome).inc()

    # -- steps and residency (engine's thread and its loaders) -------------------------------------------------------

    def observe_step(self, rows: int, tokens: int, adapters: int, families: int, seconds: float) -> None:
        """One forward pass over `tokens` of `rows` requests through `adapters` adapters of `families` families."""
        self._step_rows.observe(rows)
        self._step_tokens.observe(tokens)
        self._step_adapters.observe(adapters)
        self._step_families.observe(families)
        self._step_seconds.observe(seconds)

    def pass_failed(self, kind: str) -> None:
        """A forward pass raised; `kind` is memory or error. Smaller ones take its place."""
        self._failed_passes.labels(kind).inc()

    def adapter_loaded(self, seconds: float, outcome: str) -> None:
        """One load from the store to the device took `seconds`; `outcome` is ok or an error's `error_type`."""
        self._loads.labels(outcome).inc()
        self._load_seconds.observe(seconds)

    def evicted(self) -> None:
        self._evictions.inc()

    def preempted(self) -> None:
        self._preemptions.inc()

    def prefix_cache(self, queried: int, hit: int) -> None:
        """`hit` of `queried` prompt positions came from the prefix cache."""
        self._prefix_queries.inc(queried)
        self._prefix_hits.inc(hit)

    def speculated(self, guessed: int, right: int) -> None:
        """One step verified `guessed` guessed tokens, of which `right` were."""
        self._guessed_tokens.inc(guessed)
        self._accepted_tokens.inc(right)

    # -- scraping ----------------------------------------------------------------------------------------------------

    def mirror(
        self,
        stats: Callable[[], EngineStats],
        *,
        running: Callable[[Iterable[Digest]], Iterable[str]],
        waiting: Callable[[], Iterable[str]],
    ) -> None:
        """Export gauges read from `stats` at scrape time. Call once.

        `running` names resident digests; `waiting` names the adapters that queued requests want.
        """
        self.registry.register(_Mirror(self._model_name, stats, running, waiting, self._tenants))

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    # -- declarations ------------------------------------------------------------------------------------------------

    def _declare_requests(self) -> None:
        self._requests = self._counter("requests", "Requests by how they ended.", "outcome")
        self._refusals = self._counter("refusals", "Requests and uploads over a limit, by which.", "limit")
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self._inter_token = self._histogram("inter_token_latency_seconds", "Between a request's tokens.", _INTER_TOKEN)
        self._e2e = self._histogram("request_seconds", "Arrival to last token.", _REQUEST)
        self._queue = self._histogram("queue_seconds", "Arrival to first step.", _TTFT)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self._adapter_requests = self._counter("adapter_requests", "Requests by adapter.", "tenant", "adapter")
        self._tenant_service = self._counter(
            "tenant_service", "Service by tenant: 1 per computed prompt token, 2 per generated one.", "tenant"
        )
        self._adapter_tokens = self._counter("adapter_tokens", "Tokens by adapter.", "tenant", "adapter", "kind")

    def _declare_steps(self) -> None:
        self._step_rows = self._histogram("step_rows", "Requests per step.", _ROWS)
        self._step_tokens = self._histogram("step_tokens", "Tokens computed per step.", _TOKENS)
        self._step_adapters = self._histogram("step_distinct_adapters", "Different adapters in one step.", _DISTINCT)
        self._step_families = self._histogram("step_distinct_families", "Different families in one step.", _DISTINCT)
        self._step_seconds = self._histogram("step_seconds", "Time of one step.", _STEP)
        self._failed_passes = self._counter("pass_failures", "Forward passes that raised, to be done again in parts.", "kind")
        self._preemptions = self._counter("preemptions", "Requests put back because KV blocks ran out.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt positions looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt positions found in the prefix cache.")
        self._guessed_tokens = self._counter("speculated_tokens", "Tokens guessed ahead and verified.")
        self._accepted_tokens = self._counter("speculated_tokens_accepted", "Of these, how many were right.")

    def _declare_adapters(self) -> None:
        self._loads = self._counter("adapter_loads", "Adapter loads onto the device.", "outcome")
        self._load_seconds = self._histogram("adapter_load_seconds", "Time of one adapter load.", _LOAD)
        self._evictions = self._counter("adapter_evictions", "Adapters dropped to make room for others.")
        self._uploads = self._counter("uploads", "Adapter uploads by how they ended.", "outcome")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"adapterd_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"adapterd_{name}", text, buckets=buckets, registry=self.registry)

    def _labels(self, tenant: str, adapter: str) -> tuple[str, str]:
        if not self._tenants.admits(tenant):
            return OTHER_LABEL, OTHER_LABEL
        known = adapter == BASE_LABEL or self._adapters.admits((tenant, adapter))
        return tenant, adapter if known else OTHER_LABEL


class _Mirror(Collector):
    """Gauges computed from one `EngineStats` per scrape."""

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineStats],
        running: Callable[[Iterable[Digest]], Iterable[str]],
        waiting: Callable[[], Iterable[str]],
        tenants: TopK,
    ) -> None:
        self._model_name = model_name
        self._stats = stats
        self._running = running
        self._waiting = waiting
        self._tenants = tenants

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names alone, so that registering does not touch the engine."""
        return self._families(EngineStats(), "", "")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self._stats()
        return self._families(stats, ",".join(self._running(stats.resident)), ",".join(self._waiting()))

    def _families(self, stats: EngineStats, running: str, waiting: str) -> Iterator[GaugeMetricFamily]:
        for name, text, value in _own_gauges(stats):
            yield GaugeMetricFamily(f"adapterd_{name}", text, value=value)
        yield self._queues(stats.waiting_of)
        for name, text, share in _vllm_gauges(stats):
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
            family.add_metric([self._model_name, "0"], share)
            yield family
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Resident adapters (running), adapters waited for, and when this was so (unix time).",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        lora.add_metric([str(stats.slots_total), waiting, running], time.time())
        yield lora

    def _queues(self, waiting: Mapping[str, int]) -> GaugeMetricFamily:
        """Tenants without a label of their own are counted together."""
        shown: Tally[str] = Tally()
        for tenant, count in waiting.items():
            shown[tenant if self._tenants.admits(tenant) else OTHER_LABEL] += count
        family = GaugeMetricFamily("adapterd_tenant_waiting", "Requests in the queue, by tenant.", labels=["tenant"])
        for tenant, count in shown.items():
            family.add_metric([tenant], count)
        return family


def _own_gauges(stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("running", "Requests in the batch.", stats.running),
        ("waiting", "Requests in the queue.", stats.waiting),
        ("kv_blocks_used", "KV blocks in use.", stats.kv_blocks_used),
        ("kv_blocks_total", "KV blocks there are.", stats.kv_blocks_total),
        ("adapter_slots_used", "Adapters resident on the device.", stats.slots_used),
        ("adapter_slots_total", "Adapters that fit on the device.", stats.slots_total),
        ("adapter_slots_bytes", "Device bytes of the resident adapters' pools.", stats.device_bytes),
        ("adapter_slots_bytes_total", "Device bytes that the resident adapters' pools may take.", stats.device_budget),
        ("host_cache_bytes", "Bytes of parsed adapters kept in host memory.", stats.host_cache_bytes),
        ("engine_last_step_age_seconds", "Seconds since the engine's loop last came round.", stats.last_step_age),
    )


def _vllm_gauges(stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    return (
        ("num_requests_running", "Requests in the batch.", stats.running),
        ("num_requests_waiting", "Requests in the queue.", stats.waiting),
        ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage),
    )
