"""A finished bench run for people (rich) and for machines (JSON). Owns words, units and layout, and no arithmetic.

JSON holds seconds, bytes and tokens; tables hold milliseconds and MB (10^6 bytes).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, isinf
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .figures import Figure, Unit, Verdict
from .interference import Interference
from .machine import Machine
from .options import BenchOptions
from .provenance import Provenance
from .results import Comparison, Histogram, Load, Memory, Percentiles, Spread, StepReport, Uploads

_SHOWN_LOADS = 8  # a run of many batches shows its last ones; JSON has all
_SHOWN_SAMPLES = 12


@dataclass(frozen=True)
class BenchReport:
    """Everything one run found."""

    options: BenchOptions
    provenance: Provenance  # of the bench; the server may be another build on another machine
    seed: int  # gives the same prompts and adapters again
    model: str
    machine: Machine | None  # None where the server is not on this machine
    uploads: Uploads
    loads: tuple[Load, ...]
    comparison: Comparison | None = None
    memory: Memory | None = None
    interference: Interference | None = None
    verdict: Verdict | None = None

    @property
    def failed(self) -> int:
        """Requests that got no complete answer."""
        return sum(load.requests - load.completed for load in self.loads)


def bench_json(report: BenchReport) -> str:
    """The report with its derived figures, as one JSON object. API keys are left out."""
    found = asdict(report)
    for secret in ("api_key", "api_keys"):
        found["options"].pop(secret)
    found["failed"] = report.failed
    for load, values in zip(report.loads, found["loads"], strict=True):
        values["tokens_per_second"] = load.tokens_per_second
    if report.comparison:
        found["comparison"] |= {name: asdict(getattr(report.comparison, name)) for name in ("a", "b", "ratio")}
    if report.memory:
        names = ("budget_bytes", "peak_bytes", "within_budget", "late_growth_bytes")
        found["memory"] |= {name: getattr(report.memory, name) for name in names}
    if report.interference:
        ratios = {name: asdict(report.interference.spread(name)) for name in ("first_token_ratio", "gap_ratio")}
        found["interference"] |= ratios
    if report.verdict:
        found["verdict"]["met"] = report.verdict.met
        for figure, values in zip(report.verdict.figures, found["verdict"]["figures"], strict=True):
            values["met"] = figure.met
    return json.dumps(plain(found), indent=2)


def plain(value: object) -> object:
    """JSON has no infinity (the last bucket of a histogram), no NaN (a percentile of nothing) and no paths."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def blocks(report: BenchReport) -> Iterator[RenderableType]:
    yield _header(report)
    if report.comparison:
        yield _comparison(report.comparison)
    if report.interference:
        yield _interference(report.interference)
    if report.verdict:
        yield _verdict(report.verdict)
    yield _loads(report.loads)
    steps = [(load.label, load.steps) for load in report.loads[-_SHOWN_LOADS:] if load.steps]
    if steps:
        yield _steps(steps)
    if report.memory and report.memory.samples:
        yield _memory(report.memory)
    for load in report.loads:
        if load.errors:
            yield Text(f"{load.label}: errors {dict(load.errors)}, the first: {load.first_error}", style="red")


def _header(report: BenchReport) -> Text:
    options, machine, uploads = report.options, report.machine, report.uploads
    load = f"{options.concurrency} at once, {options.prompt_tokens} prompt tokens, {options.max_new_tokens} new tokens"
    lines = [f"{report.model} at {options.url}: {load}, seed {report.seed}"]
    if uploads.count and uploads.seconds:
        kinds = ", ".join(f"{count} {family}" for family, count in uploads.families.items())
        lines.append(f"adapters: {kinds}; {_mb(uploads.bytes)} in all; upload p50 {_ms(uploads.seconds.p50)} ms")
    if machine:
        average = "" if machine.load_average is None else f", load average {machine.load_average:.2f}"
        speed = f"reads {machine.read_gb_per_second:.1f} GB/s, fp32 GEMM {machine.gemm_gflop_per_second:.0f} GFLOP/s"
        lines.append(f"machine: {machine.cpus} CPUs, {speed}{average}")
    return Text("\n".join(lines))


def _comparison(comparison: Comparison) -> Table:
    table = make_table(f"tokens/s, medians of {len(comparison.counted)} rounds", 1)
    table.add_column("")
    for name in ("median", "least", "most"):
        table.add_column(name, justify="right")
    table.add_row(f"A {comparison.a_label}", *_spread(comparison.a, ".1f"))
    table.add_row(f"B {comparison.b_label}", *_spread(comparison.b, ".1f"))
    table.add_row("A / B", *_spread(comparison.ratio, ".2f"), style="bold")
    if comparison.same_tokens is not None:
        table.add_row("rows with the same tokens", f"{comparison.same_tokens:.0%}", "", "")
    table.caption = disturbance(comparison)
    return table


def disturbance(comparison: Comparison) -> str | None:
    if all(round.disturbed for round in comparison.rounds):
        return "Other programs disturbed every round."
    left_out = len(comparison.rounds) - len(comparison.counted)
    return f"Left out: {left_out} rounds that other programs disturbed." if left_out else None


def _interference(found: Interference) -> Table:
    title = (
        f"a prompt of {found.long_prompt_tokens} tokens beside {found.streams} streams, medians of {len(found.counted)} rounds"
    )
    table = make_table(title, 1)
    for name in ("", "alone ms", "together ms", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    lines = (
        ("time to its first token", "alone", "beside", "first_token_ratio"),
        ("between their tokens, p99", "gap_p99", "met_p99", "gap_ratio"),
    )
    for name, alone, together, ratio in lines:
        cells = [f"{found.spread(figure).median * 1e3:.0f}" for figure in (alone, together)]
        table.add_row(name, *cells, spread_cells(found.spread(ratio), ".2f"), style="bold")
    left_out = len(found.rounds) - len(found.counted)
    disturbed = all(round.disturbed for round in found.rounds)
    table.caption = "Other programs disturbed every round." if disturbed else None
    if left_out:
        table.caption = f"Left out: {left_out} rounds that other programs disturbed."
    return table


def _verdict(verdict: Verdict) -> Table:
    table = make_table(verdict.title, 1)
    table.add_column("")
    for name in ("figure", "least..most of rounds", "goal"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for figure in verdict.figures:
        spread = figure.spread and f"{_shown(figure.spread.least, figure.unit)}..{_shown(figure.spread.most, figure.unit)}"
        met = {None: "", True: "met", False: "MISSED"}[figure.met]
        table.add_row(
            figure.name, _shown(figure.value, figure.unit), spread or "", _goal(figure), met, style="bold" if met else ""
        )
    table.caption = "\n".join(verdict.notes) or None
    table.caption_justify = "left"
    return table


def _goal(figure: Figure) -> str:
    least = "" if figure.least is None else f"at least {_shown(figure.least, figure.unit)}"
    most = "" if figure.most is None else f"at most {_shown(figure.most, figure.unit)}"
    return ", ".join(filter(None, (least, most)))


def _shown(value: float, unit: Unit) -> str:
    if not isfinite(value):
        return "-"
    match unit:
        case "s":
            return f"{value * 1e3:.1f} ms"
        case "share":
            return f"{value:.1%}"
        case "tokens/s":
            return f"{value:.1f} tok/s"
        case "ratio":
            return f"{value:.2f}"
        case "count":
            return f"{value:.0f}"


def spread_cells(spread: Spread, form: str) -> str:
    """All three in one cell."""
    return f"{spread.median:{form}} ({spread.least:{form}}..{spread.most:{form}})"


def _spread(spread: Spread, form: str) -> tuple[str, str, str]:
    return format(spread.median, form), format(spread.least, form), format(spread.most, form)


def _loads(loads: Sequence[Load]) -> Table:
    table = make_table("load", len(loads))
    table.add_column("run")
    for name in ("ok", "errors", "tok/s", "TTFT ms p50/p90/p99", "inter-token ms p50/p90/p99", "end to end s p50/p90/p99"):
        table.add_column(name, justify="right")
    table.add_column("foreign CPUs", justify="right")
    for load in loads[-_SHOWN_LOADS:]:
        table.add_row(
            load.label,
            str(load.completed),
            str(load.requests - load.completed),
            f"{load.tokens_per_second:.1f}",
            _percentiles(load.time_to_first_token, 1e3, ".0f"),
            _percentiles(load.inter_token, 1e3, ".1f"),
            _percentiles(load.end_to_end, 1, ".2f"),
            "-" if load.foreign_cpu is None else f"{load.foreign_cpu:.2f}",
        )
    return table


def _steps(steps: Sequence[tuple[str, StepReport]]) -> Table:
    table = make_table("steps of the server: mean (and most)", len(steps))
    table.add_column("run")
    for name in ("steps", "rows", "distinct adapters", "distinct families", "loads", "evictions", "preemptions", "prefix hits"):
        table.add_column(name, justify="right")
    for label, step in steps:
        table.add_row(
            label,
            str(step.steps),
            _histogram(step.rows),
            _histogram(step.distinct_adapters),
            _histogram(step.distinct_families),
            str(step.adapter_loads),
            str(step.adapter_evictions),
            str(step.preemptions),
            str(step.prefix_hit_tokens),
        )
    return table


def _memory(memory: Memory) -> Table:
    table = make_table("resident memory of the server", 1)
    table.add_column("after adapters", justify="right")
    table.add_column("resident", justify="right")
    stride = max(1, len(memory.samples) // _SHOWN_SAMPLES)
    for sample in reversed(memory.samples[::-1][::stride]):  # the last one always
        table.add_row(str(sample.adapters), _mb(sample.resident_bytes))
    table.add_row("peak", _mb(memory.peak_bytes or 0), style="bold")
    if memory.late_growth_bytes is not None:
        table.add_row("growth, second half", _mb(memory.late_growth_bytes))
    for part, size in memory.budget.items():
        table.add_row(f"may hold: {part}", "not told" if size is None else _mb(size))
    if memory.budget_bytes is not None:
        verdict = "within" if memory.within_budget else "OVER"
        table.add_row("may hold in all", f"{_mb(memory.budget_bytes)}, {verdict}", style="bold")
    return table


def make_table(title: str, rows: int) -> Table:
    shown = f" (the last {_SHOWN_LOADS} of {rows})" if rows > _SHOWN_LOADS else ""
    return Table(title=title + shown, title_justify="left", title_style="bold", header_style="dim")


def _percentiles(found: Percentiles | None, factor: float, form: str) -> str:
    if found is None:
        return "-"
    return " / ".join(format(value * factor, form) for value in (found.p50, found.p90, found.p99))


def _histogram(found: Histogram | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.1f}" if isinf(found.most) else f"{found.mean:.1f} (≤ {found.most:.0f})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
