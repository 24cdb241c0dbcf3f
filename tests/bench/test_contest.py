from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from server.bench.machine import CpuClock, Machine
from server.bench.options import BenchError
from server.bench.provenance import Provenance
from server.bench.workload import Prompt
from tests.bench.peers import contest as module
from tests.bench.peers.contest import Contest, Play, Round, counted
from tests.bench.peers.entrants import ENTRANTS, FIGURES, Mode, Turn, figures, speeds
from tests.bench.peers.summary import Report, blocks, to_json

PROMPT = Prompt("a text", (1, 2, 3))


@dataclass
class Scripted:
    """Says its own token; `shorten` ends a row early."""

    seconds: float
    token: int = 7
    shorten: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, op: str, **values: Any) -> Mapping[str, Any]:
        self.asked.append(values)
        rows = [[self.token] * values["new"] for _ in values["prompts"]]
        return {"seconds": self.seconds, "tokens": [row[self.shorten :] for row in rows]}

    def cpu_seconds(self) -> float:
        return 0.0


def _contest(players: Mapping[str, Scripted], *turns: Turn) -> Contest:
    adapters: dict[Mode, list[str | None]] = {"base": [None, None], "lora": ["a", "b"], "families": ["c", "d"]}
    return Contest(players, turns, adapters, lambda: [PROMPT, PROMPT], new=4)


def _quiet(monkeypatch: pytest.MonkeyPatch, *foreign: float) -> None:
    """Turn after turn, this many CPUs are somebody else's."""
    told = iter(foreign)
    monkeypatch.setattr(module, "foreign_cpus", lambda start, end: next(told, 0.0))


def test_every_turn_is_played_each_round_and_none_always_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _quiet(monkeypatch)
    players = {"engine": Scripted(1.0), "peft": Scripted(4.0)}
    rounds = _contest(players, ("engine", "base"), ("engine", "lora"), ("peft", "lora")).play(3)
    assert [next(iter(round.plays)) for round in rounds] == [("engine", "base"), ("engine", "lora"), ("peft", "lora")]
    assert rounds[0].speeds == {("engine", "base"): 8.0, ("engine", "lora"): 8.0, ("peft", "lora"): 2.0}
    assert players["peft"].asked[0]["adapters"] == ["a", "b"]
    assert players["peft"].asked[0]["prompts"] == [[1, 2, 3]] * 2


def test_disturbed_rounds_are_played_again_and_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _quiet(monkeypatch, 9.0)
    contest = _contest({"engine": Scripted(1.0)}, ("engine", "base"))
    told: list[Round] = []
    rounds = contest.play(2, told.append)
    assert [round.disturbed for round in rounds] == [True, False, False]
    assert told == rounds
    assert counted(rounds) == rounds[1:]


def test_patience_ends_and_then_all_rounds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _quiet(monkeypatch, *[9.0] * 10)
    rounds = _contest({"engine": Scripted(1.0)}, ("engine", "base")).play(2)
    assert len(rounds) == 4
    assert counted(rounds) == rounds


def test_who_ends_early_is_found_out() -> None:
    contest = _contest({"peft": Scripted(1.0, shorten=1)}, ("peft", "lora"))
    with pytest.raises(BenchError, match="peft generated"):
        contest.play(1)


def test_foreign_time_is_what_the_player_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([CpuClock(0.0, 0.0, 0.0, 0.0), CpuClock(1.0, 2.0, 0.0, 1.95)])
    monkeypatch.setattr(CpuClock, "read", lambda server: next(clocks))
    (round,) = _contest({"engine": Scripted(1.0)}, ("engine", "base")).play(1)
    assert round.plays["engine", "base"].foreign_cpu == pytest.approx(0.05)


def _round(disturbed: bool = False, **speeds: float) -> Round:
    """served_lora=65 is the speed of that turn; the row tells who played it."""
    plays = {}
    for name, speed in speeds.items():
        entrant, _, mode = name.rpartition("_")
        turn: Turn = (entrant.replace("_", "-"), mode)  # type: ignore[assignment]  # a mode by its name
        plays[turn] = Play(speed, 9.0 if disturbed else 0.0, ((1,), (2 if mode == "base" else 3,)))
    return Round(plays)


def test_figures_are_ratios_within_rounds() -> None:
    rounds = [
        _round(served_base=80, served_lora=72, peft_lora=10).speeds,
        _round(served_base=40, served_lora=38, peft_lora=4).speeds,
        _round(served_base=60, served_lora=60, peft_lora=5).speeds,
    ]
    found = {each.figure.name: each for each in figures(rounds)}
    assert set(found) == {"distinct LoRA vs PEFT, mixed batch", "distinct LoRA / own base"}
    against_peft = found["distinct LoRA vs PEFT, mixed batch"]
    assert (against_peft.spread.least, against_peft.spread.median, against_peft.spread.most) == (7.2, 9.5, 12.0)
    assert against_peft.verdict == "met"
    assert found["distinct LoRA / own base"].verdict == "aim"
    assert found["distinct LoRA / own base"].rounds == 3


def test_a_goal_that_was_missed_is_said_to_be() -> None:
    (found,) = figures([_round(engine_base=100, engine_lora=60).speeds])
    assert (found.side, found.verdict) == ("engine", "missed")


def test_every_figure_has_a_rival_that_can_play() -> None:
    for figure in FIGURES:
        if figure.rival is not None:
            name, mode = figure.rival
            assert mode in ENTRANTS[name].modes


def test_speeds_are_listed_fastest_first() -> None:
    found = speeds([_round(peft_lora=10, served_lora=70).speeds, _round(peft_lora=12, served_lora=60).speeds])
    assert list(found) == [("served", "lora"), ("peft", "lora")]


def _report(*rounds: Round) -> Report:
    provenance = Provenance("2026-01-01T00:00:00+00:00", "c0ffee", "a cpu", "linux", "3.11", {})
    versions = {"served": "adapterd 0", "peft": "peft 0"}
    return Report(provenance, Machine(2, 15.6, 250.0, 0.1), "m", 2, 8, 4, 1, versions, {"openvino": "install it"}, rounds)


def test_the_report_holds_goals_commit_and_agreement() -> None:
    kept = json.loads(to_json(_report(_round(served_base=80, served_lora=72, peft_lora=10))))
    assert kept["provenance"]["commit"] == "c0ffee"
    assert kept["figures"][0]["ratio"]["median"] == pytest.approx(7.2)
    assert kept["figures"][0]["least"] == 7.0
    assert kept["rounds"][0]["same_tokens"] == {"served lora = peft lora": 1.0}
    assert kept["missing"] == {"openvino": "install it"}


def test_the_table_says_who_is_missing_and_when_nothing_was_quiet() -> None:
    console = Console(file=StringIO(), width=200, record=True)
    console.print(*blocks(_report(_round(disturbed=True, served_base=80, served_lora=72, peft_lora=10))), sep="\n")
    text = console.export_text()
    assert "7.20 (7.20..7.20)" in text
    assert "not there: openvino: install it" in text
    assert "disturbed every round" in text
