"""StepTimes: where the time of the last steps went, for `GET /debug/step`.

Owns a ring of plain numbers. One writer, the engine's thread, pays a look at the clock per phase; any thread may read.
Knows no engine and no tensor: with CUDA a phase is what the host spent in it, so work it only started shows in the next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from adapters_store.records import JSON

#: plan     which sequences run, their blocks and slots        forward  the model
#: apply    adapters put, evicted, prefixes written            sample   from logits to tokens
#: fill     the batch's index tensors                          publish  booking the results, handing events over
Phase = Literal["plan", "apply", "fill", "forward", "sample", "publish"]
PHASES: Final[tuple[Phase, ...]] = ("plan", "apply", "fill", "forward", "sample", "publish")

SIZE: Final = 256  # steps remembered


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step: its size, and the seconds of each phase in the order of `PHASES`."""

    rows: int
    tokens: int
    seconds: tuple[float, ...]


class StepTimes:
    """Usage, each step: begin(), mark(phase) at the end of each phase (again for one that is repeated), end(rows, tokens)."""

    def __init__(self) -> None:
        self._steps: deque[StepTime] = deque(maxlen=SIZE)
        self._count = 0
        self._spent: dict[Phase, float] = {}
        self._at = 0.0

    def begin(self) -> None:
        self._spent = {}
        self._at = time.perf_counter()

    def mark(self, phase: Phase) -> None:
        """What has passed since the last call was `phase`."""
        now = time.perf_counter()
        self._spent[phase] = self._spent.get(phase, 0.0) + now - self._at
        self._at = now

    def end(self, rows: int, tokens: int) -> None:
        self._steps.append(StepTime(rows, tokens, tuple(self._spent.get(phase, 0.0) for phase in PHASES)))
        self._count += 1

    def report(self, last: int = 0) -> dict[str, JSON]:
        """Medians over the steps remembered, in milliseconds, and the `last` steps one by one, newest first.

        `decode` steps have one token per row; `mixed` ones hold prompts, or guesses to be verified.
        """
        steps = list(self._steps)
        decode = [step for step in steps if step.tokens == step.rows]
        mixed = [step for step in steps if step.tokens != step.rows]
        return {
            "steps": self._count,
            "remembered": len(steps),
            "decode": _medians(decode),
            "mixed": _medians(mixed),
            "last": [_shown(step) for step in reversed(steps[len(steps) - min(last, len(steps)) :])],
        }


def _medians(steps: Sequence[StepTime]) -> dict[str, JSON] | None:
    if not steps:
        return None
    phases = zip(PHASES, zip(*(step.seconds for step in steps), strict=True), strict=True)
    return {
        "steps": len(steps),
        "rows": median(step.rows for step in steps),
        "tokens": median(step.tokens for step in steps),
        "median_ms": {phase: _ms(median(seconds)) for phase, seconds in phases},
        "median_total_ms": _ms(median(sum(step.seconds) for step in steps)),
    }


def _shown(step: StepTime) -> dict[str, JSON]:
    milliseconds: dict[str, JSON] = {phase: _ms(seconds) for phase, seconds in zip(PHASES, step.seconds, strict=True)}
    return {"rows": step.rows, "tokens": step.tokens, "ms": milliseconds, "total_ms": _ms(sum(step.seconds))}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
