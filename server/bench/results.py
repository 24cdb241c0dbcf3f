"""What a bench run found, as plain data: seconds, bytes and tokens. Owns how raw outcomes become percentiles and ratios.

Never measures and never prints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import numpy as np

OK = "ok"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it. Times are of one monotonic clock, in seconds.

    `status` is OK, an HTTP status ("429"), an error event's `error_type`, or the name of a transport error.
    """

    adapter: str | None
    status: str
    started: float
    ended: float
    token_times: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    message: str = ""  # the server's words, for a failure


@dataclass(frozen=True)
class Percentiles:
    """Of `count` durations in seconds; linear interpolation between ranks."""

    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Percentiles | None:
        values = list(seconds)
        if not values:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(p50, p90, p99, len(values))


@dataclass(frozen=True)
class Histogram:
    """What a histogram of the server counted during a run. `most` is the upper edge of the fullest bucket reached."""

    mean: float
    most: float


@dataclass(frozen=True)
class StepReport:
    """The server's own account of the run, from the difference of two scrapes. None where it does not export it."""

    steps: int
    rows: Histogram | None
    distinct_adapters: Histogram | None
    distinct_families: Histogram | None
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    prefix_hit_tokens: int


@dataclass(frozen=True)
class Load:
    """One run of an offered load. Rates are over the time from the first request sent to the last token received."""

    label: str
    requests: int
    completed: int
    errors: Mapping[str, int]
    first_error: str
    wall_seconds: float
    prompt_tokens: int
    generated_tokens: int
    time_to_first_token: Percentiles | None
    inter_token: Percentiles | None
    end_to_end: Percentiles | None
    steps: StepReport | None = None
    foreign_cpu: float | None = None  # mean CPUs that others kept busy meanwhile

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens only."""
        return self.generated_tokens / self.wall_seconds if self.wall_seconds > 0 else 0.0


@dataclass(frozen=True)
class Round:
    """One round of a comparison: A and B, one right after the other. Generated tokens per second."""

    a: float
    b: float
    foreign_cpu: float | None
    disturbed: bool  # others used so much CPU that the round was done again

    @property
    def ratio(self) -> float:
        return self.a / self.b if self.b > 0 else 0.0


@dataclass(frozen=True)
class Spread:
    """Of the rounds that count."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """A against B, interleaved. The ratio is A / B of the same round, so that a slow minute slows both."""

    a_label: str
    b_label: str
    rounds: tuple[Round, ...]
    same_tokens: float | None = None  # share of rows for which A and B generated the same tokens

    @property
    def counted(self) -> tuple[Round, ...]:
        """The undisturbed rounds; all of them when none was."""
        return tuple(round for round in self.rounds if not round.disturbed) or self.rounds

    @property
    def a(self) -> Spread:
        return Spread.of([round.a for round in self.counted])

    @property
    def b(self) -> Spread:
        return Spread.of([round.b for round in self.counted])

    @property
    def ratio(self) -> Spread:
        return Spread.of([round.ratio for round in self.counted])


@dataclass(frozen=True)
class MemorySample:
    """The server's resident set once `adapters` adapters have been uploaded and used."""

    adapters: int
    resident_bytes: int


@dataclass(frozen=True)
class Memory:
    """The server's resident set over the run, against what it says it may hold. No samples = not exported."""

    samples: tuple[MemorySample, ...]
    budget: Mapping[str, int | None] = field(default_factory=dict)  # part -> bytes; None = the server does not tell

    @property
    def budget_bytes(self) -> int | None:
        """None unless every part is told: a sum without one of them would call a good server bad."""
        told = [size for size in self.budget.values() if size is not None]
        return sum(told) if told and len(told) == len(self.budget) else None

    @property
    def peak_bytes(self) -> int | None:
        return max((sample.resident_bytes for sample in self.samples), default=None)

    @property
    def within_budget(self) -> bool | None:
        if self.budget_bytes is None or self.peak_bytes is None:
            return None
        return self.peak_bytes <= self.budget_bytes

    @property
    def late_growth_bytes(self) -> int | None:
        """Growth over the second half of the run, when every cache should be full."""
        if len(self.samples) < 3:
            return None
        half = self.samples[len(self.samples) // 2]
        return self.samples[-1].resident_bytes - half.resident_bytes


@dataclass(frozen=True)
class Uploads:
    """The adapters that the run made and uploaded."""

    count: int
    families: Mapping[str, int]
    bytes: int
    seconds: Percentiles | None


def summarise(
    label: str, outcomes: Sequence[Outcome], steps: StepReport | None = None, foreign_cpu: float | None = None
) -> Load:
    """One run's outcomes as numbers; failed requests count as errors and in nothing else."""
    good = [outcome for outcome in outcomes if outcome.status == OK]
    bad = [outcome for outcome in outcomes if outcome.status != OK]
    begun = min((outcome.started for outcome in outcomes), default=0.0)
    done = max((outcome.ended for outcome in outcomes), default=0.0)
    return Load(
        label=label,
        requests=len(outcomes),
        completed=len(good),
        errors=dict(Counter(outcome.status for outcome in bad)),
        first_error=bad[0].message if bad else "",
        wall_seconds=done - begun,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in good),
        generated_tokens=sum(len(outcome.token_times) for outcome in good),
        time_to_first_token=Percentiles.of(o.token_times[0] - o.started for o in good if o.token_times),
        inter_token=Percentiles.of(later - earlier for o in good for earlier, later in pairwise(o.token_times)),
        end_to_end=Percentiles.of(o.ended - o.started for o in good),
        steps=steps,
        foreign_cpu=foreign_cpu,
    )
