"""Throughput against distinct adapters and against rows, as a PNG, from a kept report of `adapterd bench --offline --sweep`.

    adapterd bench --offline --sweep --adapters 32 --concurrency 32 --json tests/bench/results/sweep.json
    python -m tests.bench.plot tests/bench/results/sweep.json          # writes sweep.png beside it

Owns the picture; every number comes from the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("Agg")

_ADAPTED, _BASE = "#1f6f8b", "#8a8a8a"
_INCHES = (10.0, 4.2)


@dataclass(frozen=True)
class Line:
    """(x, median, least, most) of tokens per second, by rising x."""

    points: tuple[tuple[int, float, float, float], ...]

    @classmethod
    def of(cls, points: Sequence[Mapping[str, Any]], x: str, side: str) -> Line:
        found = ((int(point[x]), point["comparison"][side]) for point in points)
        return cls(tuple(sorted((at, s["median"], s["least"], s["most"]) for at, s in found)))

    def draw(self, axes: Axes, label: str, color: str) -> None:
        """The medians, with a band from least to most."""
        x, median, least, most = (list(column) for column in zip(*self.points, strict=True))
        axes.plot(x, median, marker="o", color=color, label=label)
        axes.fill_between(x, least, most, color=color, alpha=0.2, linewidth=0)


def along_adapters(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points with as many rows as were asked for, which differ in their adapters."""
    rows = report["options"]["concurrency"]
    return [point for point in report["points"] if point["rows"] == rows and point["adapters"]]


def along_rows(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points with as many distinct adapters as their rows can have."""
    most = report["options"]["adapters"]
    return [point for point in report["points"] if point["adapters"] == min(most, point["rows"])]


def plot(report: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    options = report["options"]
    _panel(left, along_adapters(report), "adapters", f"distinct adapters in a batch of {options['concurrency']} rows")
    _panel(right, along_rows(report), "rows", "rows, each through an adapter of its own")
    families, rank = "+".join(options["families"]), f" r={options['rank']}" if "lora" in options["families"] else ""
    figure.suptitle(f"{options['model']}, {families}{rank}: generated tokens per second", fontsize=11)
    figure.supxlabel(_small_print(report), fontsize=7, color=_BASE)
    return figure


def _panel(axes: Axes, points: Sequence[Mapping[str, Any]], x: str, label: str) -> None:
    """`a` of a comparison is through the adapters, `b` the base."""
    Line.of(points, x, "a").draw(axes, "through adapters", _ADAPTED)
    Line.of(points, x, "b").draw(axes, "base alone", _BASE)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[x] for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def _small_print(report: Mapping[str, Any]) -> str:
    options, source, machine = report["options"], report["provenance"], report["machine"]
    found = source["commit"] or "unknown"
    commit = found[:10] + ("+" if found.endswith("+") else "")
    return (
        f"prompt {options['prompt_tokens']}, {options['max_new_tokens']} new tokens, greedy, medians with least..most of "
        f"{options['repeats']} interleaved rounds; {machine['cpus']} CPUs reading {machine['read_gb_per_second']:.1f} GB/s; "
        f"kernels {report['kernels']}; commit {commit}, {source['date'][:10]}"
    )


def main(
    results: Annotated[Path, typer.Argument(help="A report of `adapterd bench --offline --sweep --json`.", exists=True)],
    out: Annotated[Path | None, typer.Option(help="Where to write; beside the report without it.")] = None,
) -> None:
    target = out or results.with_suffix(".png")
    plot(json.loads(results.read_text(encoding="utf-8"))).savefig(target, dpi=110)
    print(target)


if __name__ == "__main__":
    typer.run(main)
