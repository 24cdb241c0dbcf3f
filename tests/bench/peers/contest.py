"""The rounds: every entrant plays every one of its modes once a round, on the same prompts, one at a time.

Owns order, clocks and which rounds count. Starts no process and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.bench.machine import CpuClock, foreign_cpus, is_disturbed
from server.bench.options import BenchError
from server.bench.workload import Prompt

from .entrants import Mode, Turn

#: At most this many times the rounds asked for are played, while others disturb them.
_PATIENCE = 2


class Player(Protocol):
    """A loaded worker."""

    def ask(self, op: str, **values: Any) -> Mapping[str, Any]: ...
    def cpu_seconds(self) -> float: ...


@dataclass(frozen=True)
class Play:
    """One turn of one round."""

    tokens_per_second: float
    foreign_cpu: float | None  # mean CPUs that anything but this player kept busy
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Round:
    """All turns, one right after the other, on one set of prompts."""

    plays: Mapping[Turn, Play]

    @property
    def disturbed(self) -> bool:
        return any(is_disturbed(play.foreign_cpu) for play in self.plays.values())

    @property
    def speeds(self) -> dict[Turn, float]:
        return {turn: play.tokens_per_second for turn, play in self.plays.items()}

    def same_rows(self, one: Turn, other: Turn) -> float:
        """Share of rows for which two turns generated the same tokens."""
        pairs = list(zip(self.plays[one].rows, self.plays[other].rows, strict=True))
        return sum(a == b for a, b in pairs) / len(pairs)


@dataclass
class Contest:
    """`adapters` names a mode's adapter of every row; `prompts` makes the prompts of a round, new ones each time."""

    players: Mapping[str, Player]
    turns: Sequence[Turn]
    adapters: Mapping[Mode, Sequence[str | None]]
    prompts: Callable[[], Sequence[Prompt]]
    new: int

    def rehearse(self) -> None:
        """One short batch of each turn, so that nobody's first round is its slowest."""
        prompts = self.prompts()
        for turn in self.turns:
            self._ask(turn, prompts, 2)

    def play(self, rounds: int, told: Callable[[Round], None] = lambda round: None) -> list[Round]:
        """Rounds until so many were undisturbed, or patience ends; `told` hears of each."""
        played: list[Round] = []
        while len(played) < _PATIENCE * rounds and sum(not round.disturbed for round in played) < rounds:
            played.append(self._round(len(played)))
            told(played[-1])
        return played

    def _round(self, index: int) -> Round:
        """Each round starts with another turn, so that nobody always follows the same neighbour's heat."""
        first = index % len(self.turns)
        prompts = self.prompts()
        return Round({turn: self._play(turn, prompts) for turn in (*self.turns[first:], *self.turns[:first])})

    def _play(self, turn: Turn, prompts: Sequence[Prompt]) -> Play:
        """Raises: BenchError when a player ends early: it would look too fast."""
        player = self.players[turn[0]]
        start = CpuClock.read(player.cpu_seconds())
        answer = self._ask(turn, prompts, self.new)
        foreign = foreign_cpus(start, CpuClock.read(player.cpu_seconds()))
        rows = tuple(map(tuple, answer["tokens"]))
        if [len(row) for row in rows] != [self.new] * len(prompts):
            raise BenchError(f"{turn[0]} generated {[len(row) for row in rows]} tokens where {self.new} were asked of each row")
        return Play(sum(map(len, rows)) / answer["seconds"], foreign, rows)

    def _ask(self, turn: Turn, prompts: Sequence[Prompt], new: int) -> Mapping[str, Any]:
        name, mode = turn
        ids, texts = [list(prompt.ids) for prompt in prompts], [prompt.text for prompt in prompts]
        return self.players[name].ask("generate", prompts=ids, texts=texts, adapters=list(self.adapters[mode]), new=new)


def counted(rounds: Sequence[Round]) -> list[Round]:
    """The undisturbed rounds; all of them when none was."""
    return [round for round in rounds if not round.disturbed] or list(rounds)
