"""Many registered adapters: what it costs that most of them are in the store and nowhere else.

Owns this scenario's order of events and its figures. Both sides of a ratio are of the same round.

    A many     requests over all adapters, Zipf popularity         tokens/s, answers that are checked afterwards
    B few      the same over the first `adapters` of them          tokens/s
    C quiet    streams through those few                           gaps between their tokens
    D loads    the same, and the others loaded one after another   gaps between their tokens
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import count
from random import Random
from typing import Final

import numpy as np

from .figures import Figure, Verdict
from .interference import gaps_in, steady
from .load import measure
from .machine import is_disturbed
from .results import OK, Load, Outcome
from .scenarios import Findings, play_rounds
from .session import Session
from .traffic import check, quiet
from .workload import Order, choose, make_orders

THROUGHPUT: Final = 0.8
GAP_RATIO: Final = 1.3

_CHECKED: Final = 16  # answers that are asked for again, alone
_STREAM_PROMPT: Final = 16  # tokens; streams are to run, not to be read
_STREAM_TOKENS: Final = 128


@dataclass(frozen=True)
class Round:
    """Generated tokens per second of A and B; 99th percentiles of the gaps in C and D, in seconds; loads during D."""

    many: float
    few: float
    quiet_p99: float
    loads_p99: float
    loads: int
    foreign_cpu: float | None

    @property
    def disturbed(self) -> bool:
        return is_disturbed(self.foreign_cpu)

    @property
    def throughput_ratio(self) -> float:
        return self.many / self.few if self.few else 0.0

    @property
    def gap_ratio(self) -> float:
        return self.loads_p99 / self.quiet_p99 if self.quiet_p99 else 0.0


async def many_registered(session: Session) -> Findings:
    """Uploads `registered` adapters, or finds them where a run with `keep` left them."""
    fleet = session.fleet(max(session.options.registered, session.options.adapters))
    async with nullcontext() if session.options.keep else fleet.cleanup():
        await fleet.upload_missing()
        few = fleet.names[: session.options.adapters]
        await session.warm_up(few)
        course = _Course(session, fleet.names, few)
        rounds = await play_rounds(session.options.repeats, course.play)
        checked, equal, unlike_base = await course.check_answers()
    figures = _figures(tuple(round for round in rounds if not round.disturbed) or rounds)
    refused = [int(status) for load in course.runs for status in _statuses(load) if status.isdecimal()]
    figures += (
        Figure("answers of 5xx", sum(status >= 500 for status in refused), "count", most=0),
        Figure("failed requests in all", sum(load.requests - load.completed for load in course.runs), "count", most=0),
        Figure("answers asked for again alone: same tokens", equal / checked if checked else 0.0, "share", least=1.0),
        Figure("of these, unlike the base's answer", unlike_base / checked if checked else 0.0, "share"),
    )
    title = f"{len(fleet.names)} registered adapters ({'+'.join(session.options.families)}) against {len(few)}, Zipf popularity"
    notes = (f"{checked} answers were asked for again; loads went on throughout the streams' time with loads",)
    return Findings(tuple(course.runs), verdict=Verdict(title, figures, notes, tuple(asdict(round) for round in rounds)))


class _Course:
    """Plays rounds, and keeps every run's report and the answers of the many."""

    def __init__(self, session: Session, many: Sequence[str], few: Sequence[str]) -> None:
        self._session, self._many, self._few = session, many, few
        self._random = Random(session.seed)
        self._cold = count(len(few))  # numbers of adapters to be loaded beside streams
        self._answers: list[tuple[Order, Outcome]] = []
        self.runs: list[Load] = []

    async def play(self, index: int) -> Round:
        """Every other round B goes before A."""
        rates: dict[bool, float] = {}
        for all_of_them in (True, False) if index % 2 == 0 else (False, True):
            rates[all_of_them] = await self._throughput(all_of_them, index)
        quiet_p99, _ = await self._streams(f"streams, round {index + 1}", loads=False)
        loads_p99, loads = await self._streams(f"streams beside loads, round {index + 1}", loads=True)
        foreign = max((load.foreign_cpu for load in self.runs[-4:] if load.foreign_cpu is not None), default=None)
        return Round(rates[True], rates[False], quiet_p99, loads_p99, loads, foreign)

    async def _throughput(self, all_of_them: bool, index: int) -> float:
        options, names = self._session.options, self._many if all_of_them else self._few
        prompts = await self._session.prompts(options.requests)
        orders = make_orders(prompts, choose("zipf", names, len(prompts), self._random), options.max_new_tokens)
        label = f"{len(names)} adapters, round {index + 1}"
        load, outcomes = await measure(self._session.target, orders, options.concurrency, label)
        self.runs.append(load)
        if all_of_them:
            self._answers += zip(orders, outcomes, strict=True)
        return load.tokens_per_second

    async def _streams(self, label: str, *, loads: bool) -> tuple[float, int]:
        """(p99 of the gaps while all streams run, adapters loaded meanwhile). Raises: BenchError when a stream fails."""
        session, streams = self._session, self._session.options.concurrency
        prompts = await session.prompts(streams, _STREAM_PROMPT)
        orders = make_orders(prompts, choose("distinct", self._few, streams, self._random), _STREAM_TOKENS)
        await quiet(session.target)
        async with self._loading(loads) as done:
            load, outcomes = await measure(session.target, orders, streams, label)
        check(outcomes, label)
        self.runs.append(load)
        return float(np.percentile(gaps_in(outcomes, steady(outcomes)), 99)), len(done)

    @asynccontextmanager
    async def _loading(self, wanted: bool) -> AsyncIterator[list[str]]:
        """Cold adapters go to the device one right after the other, meanwhile; yields the names of those that got there."""
        done: list[str] = []
        task = asyncio.create_task(self._load_on(done)) if wanted else None
        try:
            yield done
        finally:
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _load_on(self, done: list[str]) -> None:
        others = len(self._many) - len(self._few)
        while others:
            name = self._many[len(self._few) + (next(self._cold) - len(self._few)) % others]
            await self._session.target.load(name)
            done.append(name)

    async def check_answers(self) -> tuple[int, int, int]:
        """(answers of as many adapters as may be, those that come out the same alone, those that the base gives not)."""
        good = [(order, outcome) for order, outcome in self._answers if outcome.status == OK]
        self._random.shuffle(good)
        sample = list({order.adapter: (order, outcome) for order, outcome in good}.values())[:_CHECKED]
        equal = unlike = 0
        for order, outcome in sample:
            equal += await self._session.target.answer(order) == outcome.token_ids
            base = Order(order.prompt, None, order.max_new_tokens)
            unlike += await self._session.target.answer(base) != outcome.token_ids
        return len(sample), equal, unlike


def _statuses(load: Load) -> list[str]:
    return [status for status, times in load.errors.items() for _ in range(times)]


def _figures(rounds: Sequence[Round]) -> tuple[Figure, ...]:
    return (
        Figure.over("throughput, all", [round.many for round in rounds], "tokens/s"),
        Figure.over("throughput, few", [round.few for round in rounds], "tokens/s"),
        Figure.over("all / few", [round.throughput_ratio for round in rounds], "ratio", least=THROUGHPUT),
        Figure.over("inter-token p99 of streams, no loads", [round.quiet_p99 for round in rounds], "s"),
        Figure.over("inter-token p99 of streams, beside loads", [round.loads_p99 for round in rounds], "s"),
        Figure.over("beside loads / no loads", [r.gap_ratio for r in rounds], "ratio", most=GAP_RATIO),
        Figure.over("adapters loaded beside the streams", [float(round.loads) for round in rounds], "count"),
    )
