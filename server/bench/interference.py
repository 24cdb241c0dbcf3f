"""Prefill while others decode: how much a long prompt delays the streams beside it, and how much they delay its first token.

Owns this scenario's order of events and its figures. Sends through load.py; both sides of a ratio are of the same round.

    alone        |long prompt|                                        time to its first token
    undisturbed  streams ----------------------------------------->  gaps between their tokens
    together     streams -----------------|long prompt|----------->  both, while they meet
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from .load import measure
from .machine import is_disturbed
from .options import BenchError
from .results import Load, Outcome, Spread
from .session import Session
from .workload import Order, make_orders

#: Of all the streams' tokens, how many have come when the long prompt is sent.
_PATIENCE: Final = 0.25
_LOOK_SECONDS: Final = 0.005  # between two looks how many there are


@dataclass(frozen=True)
class Meeting:
    """One round, in seconds. Gaps are those between a stream's tokens, of all streams together."""

    alone: float  # time to the long prompt's first token
    beside: float  # the same while the others stream
    gap_p50: float  # undisturbed
    gap_p99: float
    met_p50: float  # while the long prompt waits for its first token
    met_p99: float
    foreign_cpu: float | None
    disturbed: bool

    @property
    def first_token_ratio(self) -> float:
        return self.beside / self.alone

    @property
    def gap_ratio(self) -> float:
        """Of the 99th percentiles."""
        return self.met_p99 / self.gap_p99


@dataclass(frozen=True)
class Interference:
    """All rounds of one run."""

    streams: int
    long_prompt_tokens: int
    rounds: tuple[Meeting, ...]

    @property
    def counted(self) -> tuple[Meeting, ...]:
        """The undisturbed rounds; all of them when none was."""
        return tuple(round for round in self.rounds if not round.disturbed) or self.rounds

    def spread(self, figure: str) -> Spread:
        """Over the rounds that count; `figure` is a field or a ratio of `Meeting`."""
        return Spread.of([getattr(round, figure) for round in self.counted])


@dataclass(frozen=True)
class Round:
    """One round's figures and the loads they come from."""

    meeting: Meeting
    loads: tuple[Load, ...]

    @property
    def disturbed(self) -> bool:
        return self.meeting.disturbed


async def play(session: Session, names: Sequence[str], index: int) -> Round:
    """One round. Raises: BenchError when a request fails, or the streams end before the long prompt's first token."""
    streams = session.orders(await session.prompts(session.options.concurrency), names)
    again = session.orders(await session.prompts(session.options.concurrency), names)
    first, second = await session.prompts(2, session.options.long_prompt_tokens)
    alone, quiet, label = make_orders([first], [names[0] if names else None], 1), streams, f"round {index + 1}"
    alone_load, (single,) = await _measure(session, alone, f"long prompt alone, {label}")
    quiet_load, undisturbed = await _measure(session, quiet, f"streams, {label}")
    long, calm = Order(second, alone[0].adapter, 1), steady(undisturbed)
    met_load, met, late = await _meet(session, again, long, f"streams with a long prompt, {label}")
    window = (late.started, late.token_times[0])
    if window[1] > min(outcome.ended for outcome in met):
        raise BenchError("`max_new_tokens`: the streams ended before the long prompt had its first token; generate more")
    gaps, met_gaps = gaps_in(undisturbed, calm), gaps_in(met, window)
    foreign = _worst(alone_load, quiet_load, met_load)
    meeting = Meeting(
        alone=_first_token(single),
        beside=_first_token(late),
        gap_p50=float(np.percentile(gaps, 50)),
        gap_p99=float(np.percentile(gaps, 99)),
        met_p50=float(np.percentile(met_gaps, 50)),
        met_p99=float(np.percentile(met_gaps, 99)),
        foreign_cpu=foreign,
        disturbed=is_disturbed(foreign),
    )
    return Round(meeting, (alone_load, quiet_load, met_load))


async def _meet(session: Session, streams: Sequence[Order], long: Order, label: str) -> tuple[Load, list[Outcome], Outcome]:
    """The streams, and the long prompt once they are well under way: not by the clock, as no round takes as long as another."""
    enough = session.target.heard + _PATIENCE * sum(order.max_new_tokens for order in streams)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(_measure(session, streams, label))
        # A look now and then costs the server's processors less than to be called for each token.
        while session.target.heard < enough and not running.done():  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)
        late = await session.target.generate(long)
        load, outcomes = await running
    _check([late], label)
    return load, outcomes, late


async def _measure(session: Session, orders: Sequence[Order], label: str) -> tuple[Load, list[Outcome]]:
    load, outcomes = await measure(session.target, orders, max(1, len(orders)), label)
    _check(outcomes, label)
    return load, outcomes


def _check(outcomes: Sequence[Outcome], label: str) -> None:
    for outcome in outcomes:
        if not outcome.token_times:
            raise BenchError(f"{label}: a request failed with {outcome.status}: {outcome.message}")


def steady(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """From the time when every stream has its second token until the first one ends. Raises: BenchError when there is none."""
    begun = max(outcome.token_times[min(1, len(outcome.token_times) - 1)] for outcome in outcomes)
    ended = min(outcome.token_times[-1] for outcome in outcomes)
    if ended <= begun:
        raise BenchError("`max_new_tokens`: the first stream ended before the last had begun; generate more")
    return begun, ended


def gaps_in(outcomes: Sequence[Outcome], window: tuple[float, float]) -> list[float]:
    """Of those gaps that lie in the window at least in part."""
    pairs = (pair for outcome in outcomes for pair in pairwise(outcome.token_times))
    return [later - earlier for earlier, later in pairs if later > window[0] and earlier < window[1]]


def _first_token(outcome: Outcome) -> float:
    return outcome.token_times[0] - outcome.started


def _worst(*loads: Load) -> float | None:
    return max((load.foreign_cpu for load in loads if load.foreign_cpu is not None), default=None)
