"""A finished contest for people (rich) and for machines (JSON). Owns words and layout; the arithmetic is entrants.py's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from server.bench.machine import Machine
from server.bench.provenance import Provenance
from server.bench.report import make_table, plain, spread_cells

from .contest import Round, counted
from .entrants import Found, Turn, figures, speeds


@dataclass(frozen=True)
class Report:
    """Everything one contest found."""

    provenance: Provenance
    machine: Machine
    model: str
    rows: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    versions: Mapping[str, str]  # entrant -> what it says it is
    missing: Mapping[str, str]  # entrant that was asked for -> why it is not there
    rounds: Sequence[Round]

    @property
    def figures(self) -> list[Found]:
        return figures(self._speeds)

    @property
    def _speeds(self) -> list[dict[Turn, float]]:
        return [round.speeds for round in counted(self.rounds)]


def to_json(report: Report) -> str:
    """Tokens are left out: rounds hold speeds, foreign CPUs, and the share of rows that came out as Hugging Face's or ours."""
    plain_fields = ("model", "rows", "prompt_tokens", "new_tokens", "seed", "versions", "missing")
    found = {
        "provenance": asdict(report.provenance),
        "machine": asdict(report.machine),
        **{name: getattr(report, name) for name in plain_fields},
        "rounds": [_round(round) for round in report.rounds],
        "figures": [_figure(found) for found in report.figures],
    }
    return json.dumps(plain(found), indent=2)


def _round(round: Round) -> dict[str, Any]:
    plays = {
        label(turn): {"tokens_per_second": play.tokens_per_second, "foreign_cpu": play.foreign_cpu}
        for turn, play in round.plays.items()
    }
    return {"disturbed": round.disturbed, "plays": plays, "same_tokens": agreement(round)}


def _figure(found: Found) -> dict[str, Any]:
    goals = {"least": found.figure.least, "aim": found.figure.aim, "verdict": found.verdict}
    return {"name": found.figure.name, "side": found.side, "rounds": found.rounds, "ratio": asdict(found.spread), **goals}


def label(turn: Turn) -> str:
    return " ".join(turn)


def agreement(round: Round) -> dict[str, float]:
    """Turn -> share of rows with the tokens of the first turn of its mode that was played."""
    reference: dict[str, Turn] = {}
    for turn in sorted(round.plays):
        reference.setdefault(turn[1], turn)
    pairs = [(turn, reference[turn[1]]) for turn in round.plays]
    return {f"{label(turn)} = {label(first)}": round.same_rows(turn, first) for turn, first in pairs if turn != first}


def blocks(report: Report) -> Iterator[RenderableType]:
    yield _header(report)
    yield _speeds(report)
    yield _figures(report)
    for name, reason in report.missing.items():
        yield Text(f"not there: {name}: {reason}", style="red")


def _header(report: Report) -> Text:
    machine, source = report.machine, report.provenance
    speed = f"reads {machine.read_gb_per_second:.1f} GB/s, fp32 GEMM {machine.gemm_gflop_per_second:.0f} GFLOP/s"
    return Text(
        f"{report.model}: {report.rows} rows, prompt {report.prompt_tokens}, {report.new_tokens} new tokens, greedy, "
        f"fp32, seed {report.seed}\n"
        f"commit {source.commit or 'unknown'}; {source.date}; {machine.cpus} CPUs ({source.cpu or 'unknown'}), {speed}"
    )


def _speeds(report: Report) -> Table:
    rounds = counted(report.rounds)
    table = make_table(f"tokens/s, {len(rounds)} of {len(report.rounds)} rounds count: median (least..most)", 1)
    table.add_column("who")
    table.add_column("rows through")
    for name in ("tokens/s", "foreign CPUs"):
        table.add_column(name, justify="right")
    table.add_column("version")
    for turn, spread in speeds([round.speeds for round in rounds]).items():
        told = [play.foreign_cpu for round in rounds if (play := round.plays[turn]).foreign_cpu is not None]
        foreign = f"{max(told):.2f} at most" if told else "-"
        table.add_row(turn[0], turn[1], spread_cells(spread, ".1f"), foreign, report.versions[turn[0]])
    if all(round.disturbed for round in report.rounds):
        table.caption = "Other programs disturbed every round."
    return table


def _figures(report: Report) -> Table:
    table = make_table("ratios within a round: median (least..most)", 1)
    table.add_column("figure")
    table.add_column("ours is")
    for name in ("ratio", "at least", "aim"):
        table.add_column(name, justify="right")
    table.add_column("")
    for found in report.figures:
        goals = (f"{found.figure.least:g}", f"{found.figure.aim:g}")
        table.add_row(found.figure.name, found.side, spread_cells(found.spread, ".2f"), *goals, found.verdict)
    return table
