"""A finished offline run as data, for people (rich) and for machines (JSON). Measures nothing and imports no torch.

JSON holds seconds, bytes and tokens; tables hold milliseconds and MB (10^6 bytes).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .floor import Floor, StepBytes
from .machine import Machine
from .options import BenchOptions
from .provenance import Provenance
from .report import disturbance, make_table, plain, spread_cells
from .results import Comparison, Spread


@dataclass(frozen=True)
class Side:
    """One side of a point over its rounds."""

    step_seconds: Spread  # a decode step; median of each batch
    prefill_per_second: Spread  # tokens of the prompts

    @classmethod
    def of(cls, step_seconds: Sequence[float], prefill_per_second: Sequence[float]) -> Side:
        return cls(Spread.of(step_seconds), Spread.of(prefill_per_second))


@dataclass(frozen=True)
class Point:
    """So many rows through so many distinct adapters, against as many rows through the base."""

    rows: int
    adapters: int
    comparison: Comparison  # A: through the adapters, B: the base; tokens per second
    adapted: Side
    base: Side
    reads: StepBytes


@dataclass(frozen=True)
class OfflineReport:
    """Everything one offline run found. `machine` is the faster of two measurements, before and after."""

    options: BenchOptions
    provenance: Provenance
    seed: int
    kernels: str
    machine: Machine
    points: tuple[Point, ...]

    @property
    def failed(self) -> int:
        """A row that fails ends the run, so a report has none."""
        return 0

    def floor(self, point: Point) -> Floor:
        return Floor.of(point.reads, self.machine.read_gb_per_second)

    def fractions(self, point: Point) -> dict[str, float]:
        """Floor / measured decode step: 1 = as fast as memory allows."""
        floor = self.floor(point)
        return {
            "base": floor.base / point.base.step_seconds.median,
            "base_as_fp32": floor.base_as_fp32 / point.base.step_seconds.median,
            "adapted": floor.adapted / point.adapted.step_seconds.median,
        }


def offline_json(report: OfflineReport) -> str:
    """The report with its derived figures, as one JSON object."""
    found = asdict(report)
    found["options"].pop("api_key")
    for point, values in zip(report.points, found["points"], strict=True):
        values["comparison"] |= {name: asdict(getattr(point.comparison, name)) for name in ("a", "b", "ratio")}
        values["floor_seconds"] = asdict(report.floor(point))
        values["floor_fraction"] = report.fractions(point)
    return json.dumps(plain(found), indent=2)


def offline_blocks(report: OfflineReport) -> Iterator[RenderableType]:
    yield _header(report)
    yield _throughput(report)
    yield _steps(report)


def _header(report: OfflineReport) -> Text:
    options, machine, source = report.options, report.machine, report.provenance
    load = f"{options.prompt_tokens} prompt tokens, {options.max_new_tokens} new tokens, greedy"
    kind = f"rank {options.rank}, {options.precision}" if "lora" in options.families else options.precision
    average = "" if machine.load_average is None else f", load average {machine.load_average:.2f} before the run"
    speed = f"reads {machine.read_gb_per_second:.1f} GB/s, fp32 GEMM {machine.gemm_gflop_per_second:.0f} GFLOP/s"
    return Text(
        f"{options.model} in this process: {load}, seed {report.seed}; adapters: {'+'.join(options.families)}, {kind}\n"
        f"kernels: {report.kernels}; commit {source.commit or 'unknown'}; {source.date}\n"
        f"machine: {machine.cpus} CPUs ({source.cpu or 'unknown'}), {speed}{average}"
    )


def _throughput(report: OfflineReport) -> Table:
    found = make_table("generated tokens/s: median (least..most)", 1)
    for name in ("rows", "distinct adapters", "adapters", "base", "ratio", "rounds", "foreign CPUs"):
        found.add_column(name, justify="right")
    for point in report.points:
        comparison = point.comparison
        found.add_row(
            str(point.rows),
            str(point.adapters),
            spread_cells(comparison.a, ".1f"),
            spread_cells(comparison.b, ".1f"),
            spread_cells(comparison.ratio, ".2f"),
            str(len(comparison.counted)),
            _foreign(comparison),
        )
    found.caption = next(filter(None, (disturbance(point.comparison) for point in report.points)), None)
    return found


def _steps(report: OfflineReport) -> Table:
    """A floor's fraction of 1.00 is a step as fast as memory can give the bytes it reads."""
    found = make_table("decode step, ms, and what memory alone would take", 1)
    for name in ("rows", "distinct", "adapters ms", "of floor", "base ms", "of floor", "of fp32 floor", "prefill tok/s"):
        found.add_column(name, justify="right")
    for point in report.points:
        fraction = report.fractions(point)
        found.add_row(
            str(point.rows),
            str(point.adapters),
            _ms(point.adapted.step_seconds),
            f"{fraction['adapted']:.2f}",
            _ms(point.base.step_seconds),
            f"{fraction['base']:.2f}",
            f"{fraction['base_as_fp32']:.2f}",
            f"{point.adapted.prefill_per_second.median:.0f} / {point.base.prefill_per_second.median:.0f}",
        )
    reads = report.points[-1].reads
    found.caption = (
        f"A step reads {reads.base / 1e6:.0f} MB of the base ({reads.base_as_fp32 / 1e6:.0f} MB if it were fp32)"
        f" and, in the last line, {reads.adapters / 1e6:.0f} MB of adapters."
    )
    return found


def _ms(spread: Spread) -> str:
    return f"{spread.median * 1e3:.1f} ({spread.least * 1e3:.1f}..{spread.most * 1e3:.1f})"


def _foreign(comparison: Comparison) -> str:
    told = [round.foreign_cpu for round in comparison.counted if round.foreign_cpu is not None]
    return f"{sum(told) / len(told):.2f}" if told else "-"
