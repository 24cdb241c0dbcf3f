"""Noisy neighbour: what a tenant that offers ten times its share does to another's time to first token and throughput.

Owns this scenario's order of events and its figures. Sends through traffic.py; A and B of a round have the same arrivals.

    capacity   victim, closed loop                     tokens/s that the server gives requests of the victim's kind
    A alone    victim, Poisson, 30% of capacity        |- lead -|----------- window -----------|
    B beside   the same, and the attacker's flood      |- lead -|----------- window -----------|
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from random import Random
from typing import Final

import numpy as np

from .figures import Figure, Verdict
from .load import around
from .machine import is_disturbed
from .results import OK, Load, Outcome, summarise
from .scenarios import Findings, play_rounds
from .session import Session
from .tenants import tenants
from .traffic import Window, arrivals, check, flood, keep_busy, offer, price, quiet, tokens_in
from .workload import Order, make_orders, rough_prompt

#: Of the measured capacity, what the victim asks for.
_DEMAND: Final = 0.3
#: Times its share of the capacity, what the attacker offers; two tenants of equal weight share by halves.
_GREED: Final = 10
_SHARE: Final = 0.5
#: Of a phase's length, what passes before figures are taken: the queues have formed by then.
_LEAD: Final = 0.25

TTFT_RATIO: Final = 1.2
THROUGHPUT_LOSS: Final = 0.05


@dataclass(frozen=True)
class Phase:
    """The victim's side of one phase, over its window. Seconds."""

    first_tokens: tuple[float, ...]  # times to first token of requests sent in the window
    gaps: tuple[float, ...]  # between tokens that arrived in it
    tokens_per_second: float
    step_seconds: float  # mean over the phase
    attacker_tokens_per_second: float = 0.0
    attacker_ended: int = 0
    attacker_refused: int = 0


@dataclass(frozen=True)
class Round:
    """A, then B."""

    alone: Phase
    beside: Phase
    loads: tuple[Load, Load]
    foreign_cpu: float | None

    @property
    def disturbed(self) -> bool:
        return is_disturbed(self.foreign_cpu)

    @property
    def loss(self) -> float:
        """Share of the victim's throughput that it lost."""
        return 1 - self.beside.tokens_per_second / self.alone.tokens_per_second if self.alone.tokens_per_second else 0.0


async def noisy_neighbour(session: Session) -> Findings:
    """Two tenants of equal weight, each with adapters of its own: the victim has one, the attacker all that were asked for."""
    async with tenants(session, (1.0, 1.0)) as (first, second):
        victim, attacker = session.under(first, adapters=1), session.under(second, adapters=session.options.adapters)
        async with victim.adapters() as mine, attacker.adapters() as theirs:
            await victim.warm_up(mine)
            duel = _Duel(session, victim, attacker, mine, theirs)
            capacity = await duel.capacity()
            rounds = await play_rounds(session.options.repeats, lambda index: duel.play(index, capacity))
    counted = tuple(round for round in rounds if not round.disturbed) or rounds
    return Findings(tuple(load for round in rounds for load in round.loads), verdict=_verdict(session, capacity, counted))


class _Duel:
    """Both tenants, and what each sends."""

    def __init__(
        self, session: Session, victim: Session, attacker: Session, mine: Sequence[str], theirs: Sequence[str]
    ) -> None:
        self._session, self._victim, self._attacker = session, victim, attacker
        self._mine, self._theirs = mine, theirs
        self._random = Random(session.seed)

    async def capacity(self) -> float:
        """Generated tokens per second of the victim's kind of request, `concurrency` at once."""
        options, length = self._session.options, self._session.options.seconds
        lead = _LEAD * length
        begun = time.perf_counter()
        target, window = self._victim.target, Window(begun + lead, begun + lead + length / 2)
        outcomes = await keep_busy(target, self._request, options.concurrency, window.end)
        check(outcomes, "the victim's capacity")
        return tokens_in(outcomes, window) / window.seconds

    async def play(self, index: int, capacity: float) -> Round:
        """Raises: BenchError when a request of the victim's fails while it is alone."""
        options = self._session.options
        lead = _LEAD * options.seconds
        times = arrivals(_DEMAND * capacity / options.max_new_tokens, lead + options.seconds, self._random)
        alone, a, first = await self._phase(times, None, f"victim alone, round {index + 1}")
        beside, b, second = await self._phase(times, self._attack_rate(capacity), f"victim beside, round {index + 1}")
        foreign = max((value for value in (first, second) if value is not None), default=None)
        return Round(alone, beside, (a, b), foreign)

    def _attack_rate(self, capacity: float) -> float:
        """Requests per second that cost ten times the attacker's share of what the server was measured to give."""
        options = self._session.options
        given = capacity / options.max_new_tokens * price(options.prompt_tokens, options.max_new_tokens)
        return _GREED * _SHARE * given / price(options.long_prompt_tokens, options.max_new_tokens)

    async def _phase(self, times: Sequence[float], rate: float | None, label: str) -> tuple[Phase, Load, float | None]:
        options, target = self._session.options, self._victim.target
        prompts = await self._victim.prompts(len(times))
        orders = make_orders(prompts, [self._mine[0]] * len(times), options.max_new_tokens)
        await quiet(self._session.target)
        theirs: list[Outcome] = []
        async with around(self._session.target) as steps:
            attack = asyncio.create_task(self._flood(rate, theirs)) if rate else None
            try:
                begun = time.perf_counter()
                outcomes = await offer(target, orders, times, begun)
            finally:
                await _ended(attack)
        window = Window(begun + _LEAD * options.seconds, begun + (1 + _LEAD) * options.seconds)
        load = summarise(label, outcomes, steps.report, steps.foreign_cpu)
        return _phase_of(outcomes, theirs, window, steps.step_seconds), load, steps.foreign_cpu

    async def _flood(self, rate: float, outcomes: list[Outcome]) -> None:
        await flood(self._attacker.target, self._attack, rate, Random(self._random.random()), outcomes)

    def _request(self) -> Order:
        options = self._session.options
        return Order(rough_prompt(options.prompt_tokens, self._random), self._mine[0], options.max_new_tokens)

    def _attack(self) -> Order:
        options = self._session.options
        prompt = rough_prompt(options.long_prompt_tokens, self._random)
        return Order(prompt, self._random.choice(self._theirs), options.max_new_tokens)


async def _ended(task: asyncio.Task[None] | None) -> None:
    """Cancels what is still in flight, and raises what went wrong in it."""
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _phase_of(outcomes: Sequence[Outcome], theirs: Sequence[Outcome], window: Window, step_seconds: float) -> Phase:
    good = [outcome for outcome in outcomes if outcome.token_times]
    gaps = ((a, b) for outcome in good for a, b in pairwise(outcome.token_times))
    return Phase(
        first_tokens=tuple(o.token_times[0] - o.started for o in good if window.holds(o.started)),
        gaps=tuple(b - a for a, b in gaps if window.holds(b)),
        tokens_per_second=tokens_in(good, window) / window.seconds,
        step_seconds=step_seconds,
        attacker_tokens_per_second=tokens_in(theirs, window) / window.seconds,
        attacker_ended=sum(outcome.status == OK for outcome in theirs),
        attacker_refused=sum(outcome.status != OK for outcome in theirs),
    )


def _verdict(session: Session, capacity: float, rounds: Sequence[Round]) -> Verdict:
    """Percentiles are over the requests of all rounds together."""
    alone, beside = [round.alone for round in rounds], [round.beside for round in rounds]
    step = float(np.mean([phase.step_seconds for phase in beside]))
    limit = TTFT_RATIO * _percentile([phase.first_tokens for phase in alone], 99) + step
    figures = (
        Figure("capacity, generated", capacity, "tokens/s"),
        *_percentiles("TTFT alone", [phase.first_tokens for phase in alone]),
        *_percentiles("TTFT beside", [phase.first_tokens for phase in beside], most=limit),
        *_percentiles("inter-token alone", [phase.gaps for phase in alone]),
        *_percentiles("inter-token beside", [phase.gaps for phase in beside]),
        Figure.over("one step alone, mean", [phase.step_seconds for phase in alone], "s"),
        Figure.over("one step beside, mean", [phase.step_seconds for phase in beside], "s"),
        Figure.over("throughput alone", [phase.tokens_per_second for phase in alone], "tokens/s"),
        Figure.over("throughput beside", [phase.tokens_per_second for phase in beside], "tokens/s"),
        Figure.over("throughput lost", [round.loss for round in rounds], "share", most=THROUGHPUT_LOSS),
        Figure.over("the attacker's throughput", [phase.attacker_tokens_per_second for phase in beside], "tokens/s"),
    )
    ended, refused = (sum(getattr(phase, name) for phase in beside) for name in ("attacker_ended", "attacker_refused"))
    notes = (
        f"{sum(len(phase.first_tokens) for phase in alone)} requests of the victim alone and beside; of the attacker's, "
        f"{ended} were served and {refused} refused",
        f"the goal of p99 beside is {TTFT_RATIO} x p99 alone + one step beside",
    )
    title = (
        f"a victim at {_DEMAND:.0%} of capacity, alone and beside an attacker at {_GREED} times its share "
        f"({len(rounds)} rounds of {session.options.seconds:.0f} s)"
    )
    raw = tuple({"alone": asdict(round.alone), "beside": asdict(round.beside)} for round in rounds)
    return Verdict(title, figures, notes, raw)


def _percentiles(name: str, samples: Sequence[Sequence[float]], most: float | None = None) -> tuple[Figure, Figure]:
    return (
        Figure(f"{name}, p50", _percentile(samples, 50), "s"),
        Figure(f"{name}, p99", _percentile(samples, 99), "s", most=most),
    )


def _percentile(samples: Sequence[Sequence[float]], rank: float) -> float:
    """Of all samples together; no number without any."""
    values = [value for sample in samples for value in sample]
    return float(np.percentile(values, rank)) if values else float("nan")
