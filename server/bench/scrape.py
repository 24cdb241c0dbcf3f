"""One reading of a server's /metrics, and what happened between two of them. Knows metric names, not how to fetch them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

from prometheus_client.parser import text_string_to_metric_families

from .results import Histogram, StepReport

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """Every sample of one exposition, by name and labels."""

    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def parse(cls, exposition: str) -> Scrape:
        """Raises: ValueError for what is no Prometheus text."""
        families = text_string_to_metric_families(exposition)
        samples = (sample for family in families for sample in family.samples)
        return cls({(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples})

    def total(self, name: str) -> float | None:
        """The sum over all labels; None where nothing of that name is exported."""
        values = [value for _, value in self._of(name)]
        return sum(values) if values else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums by one label's value."""
        sums: dict[str, float] = {}
        for labels, value in self._of(name):
            key = dict(labels).get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return sums

    def _of(self, name: str) -> Iterator[tuple[Labels, float]]:
        return ((labels, value) for (sample, labels), value in self.samples.items() if sample == name)

    @property
    def resident_bytes(self) -> int | None:
        return _whole(self.total("process_resident_memory_bytes"))

    @property
    def cpu_seconds(self) -> float | None:
        return self.total("process_cpu_seconds_total")

    @property
    def adapter_slots_bytes(self) -> int | None:
        """Device memory allocated for adapters: every pool at its full size."""
        return _whole(self.total("adapterd_adapter_slots_bytes"))


def steps_between(before: Scrape, after: Scrape) -> StepReport | None:
    """What the engine did between two scrapes; None for a server without step metrics."""
    steps = _grown(before, after, "adapterd_step_rows_count")
    if steps is None:
        return None
    return StepReport(
        steps=int(steps),
        rows=_histogram(before, after, "adapterd_step_rows"),
        distinct_adapters=_histogram(before, after, "adapterd_step_distinct_adapters"),
        distinct_families=_histogram(before, after, "adapterd_step_distinct_families"),
        adapter_loads=int(_grown(before, after, "adapterd_adapter_loads_total") or 0),
        adapter_evictions=int(_grown(before, after, "adapterd_adapter_evictions_total") or 0),
        preemptions=int(_grown(before, after, "adapterd_preemptions_total") or 0),
        prefix_hit_tokens=int(_grown(before, after, "adapterd_prefix_cache_hits_total") or 0),
    )


def mean_step_seconds(before: Scrape, after: Scrape) -> float:
    """Of the steps between two scrapes; 0 when there were none or the server does not tell."""
    count, total = (_grown(before, after, f"adapterd_step_seconds_{part}") for part in ("count", "sum"))
    return total / count if total is not None and count else 0.0


def _grown(before: Scrape, after: Scrape, name: str) -> float | None:
    """A labelled counter does not exist before it first counts."""
    end = after.total(name)
    return None if end is None else end - (before.total(name) or 0.0)


def _histogram(before: Scrape, after: Scrape, name: str) -> Histogram | None:
    count, total = _grown(before, after, f"{name}_count"), _grown(before, after, f"{name}_sum")
    if not count or total is None:
        return None
    return Histogram(mean=total / count, most=_edge(before, after, f"{name}_bucket", count))


def _edge(before: Scrape, after: Scrape, bucket: str, count: float) -> float:
    """The least upper edge below which all `count` new observations lie."""
    old = before.by(bucket, "le")
    full = [float(edge) for edge, value in after.by(bucket, "le").items() if value - old.get(edge, 0.0) >= count]
    return min(full, default=inf)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
