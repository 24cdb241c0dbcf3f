"""The scenarios: a plain load, base and adapters interleaved, one adapter after the other while memory is watched, and a
long prompt beside streams.

Owns the order of events. Sends through load.py, judges nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from . import interference
from .figures import Verdict
from .interference import Interference
from .load import measure
from .machine import is_disturbed
from .options import BenchError
from .results import Comparison, Load, Memory, MemorySample, Outcome, Round
from .session import Session
from .workload import Order, make_orders

#: A comparison measures at most this many times the rounds asked for, while others disturb them.
_PATIENCE = 2


@dataclass(frozen=True)
class Findings:
    """What a scenario gives; the fields that are not its business stay None."""

    loads: tuple[Load, ...]
    comparison: Comparison | None = None
    memory: Memory | None = None
    interference: Interference | None = None
    verdict: Verdict | None = None


class _Played(Protocol):
    @property
    def disturbed(self) -> bool: ...


_R = TypeVar("_R", bound=_Played)


async def plain_load(session: Session) -> Findings:
    """The offered load once, through the adapters asked for."""
    samples = await session.memory(0)
    async with session.adapters() as names:
        await session.warm_up(names)
        prompts = await session.prompts(session.options.requests)
        label = _label(session)
        load, _ = await measure(session.target, session.orders(prompts, names), session.options.concurrency, label)
        samples += await session.memory(len(names))
        return Findings((load,), memory=await _memory(session, samples))


async def base_versus_adapters(session: Session) -> Findings:
    """The same prompts through adapters (A) and through the base (B), in turn, round after round."""
    samples = await session.memory(0)
    async with session.adapters() as names:
        await session.warm_up(names)
        loads: list[Load] = []

        async def play(index: int) -> Round:
            prompts = await session.prompts(session.options.requests)
            sides = [session.orders(prompts, names), session.orders(prompts, ())]
            a, b = await _both(session, sides, index)
            loads.extend((a, b))
            foreign = _worse(a.foreign_cpu, b.foreign_cpu)
            return Round(a.tokens_per_second, b.tokens_per_second, foreign, is_disturbed(foreign))

        rounds = await play_rounds(session.options.repeats, play)
        samples += await session.memory(len(names))
        comparison = Comparison(_label(session), "base", rounds)
        return Findings(tuple(loads), comparison, await _memory(session, samples))


async def many_adapters(session: Session) -> Findings:
    """Upload and use every adapter, a batch of `concurrency` at a time, and read the resident set after each batch."""
    options = session.options
    samples = await session.memory(0)
    loads: list[Load] = []
    async with session.cleanup():
        for first in range(0, options.adapters, options.concurrency):
            batch = range(first, min(first + options.concurrency, options.adapters))
            for index in batch:
                await session.upload(index)
            names = [session.names[index] for index in batch]
            orders = make_orders(await session.prompts(len(names)), names, options.max_new_tokens)
            load, _ = await measure(session.target, orders, options.concurrency, f"adapters {batch[0]} to {batch[-1]}")
            loads.append(load)
            samples += await session.memory(batch[-1] + 1)
        return Findings(tuple(loads), memory=await _memory(session, samples))


async def prefill_while_decoding(session: Session) -> Findings:
    """A long prompt alone, streams alone, and both together, round after round."""
    options = session.options
    async with session.adapters() as names:
        await session.warm_up(names)
        rounds = await play_rounds(options.repeats, lambda index: interference.play(session, names, index))
    loads = tuple(load for round in rounds for load in round.loads)
    meetings = tuple(round.meeting for round in rounds)
    return Findings(loads, interference=Interference(options.concurrency, options.long_prompt_tokens, meetings))


async def play_rounds(repeats: int, play: Callable[[int], Awaitable[_R]]) -> tuple[_R, ...]:
    """Rounds until `repeats` of them were undisturbed, or patience ends."""
    rounds: list[_R] = []
    while len(rounds) < _PATIENCE * repeats and sum(not round.disturbed for round in rounds) < repeats:
        rounds.append(await play(len(rounds)))
    return tuple(rounds)


async def measure_all(session: Session, orders: Sequence[Order], label: str) -> tuple[Load, list[Outcome]]:
    """A run that counts in a comparison. Raises: BenchError when a request fails: the rest would look too fast."""
    load, outcomes = await measure(session.target, orders, session.options.concurrency, label)
    if load.errors:
        failed = load.requests - load.completed
        raise BenchError(f"{failed} of {load.requests} requests of {label} failed {dict(load.errors)}: {load.first_error}")
    return load, outcomes


async def _both(session: Session, sides: Sequence[Sequence[Order]], index: int) -> list[Load]:
    """Every other round the second side goes first, so that neither always follows the other's pause."""
    labels = (f"{_label(session)}, round {index + 1}", f"base, round {index + 1}")
    loads: dict[int, Load] = {}
    for side in (0, 1) if index % 2 == 0 else (1, 0):
        loads[side], _ = await measure_all(session, sides[side], labels[side])
    return [loads[0], loads[1]]


async def _memory(session: Session, samples: list[MemorySample]) -> Memory:
    return Memory(tuple(samples), await session.budget())


def _label(session: Session) -> str:
    options = session.options
    if not options.adapters:
        return "base"
    return f"{options.adapters} adapters ({'+'.join(options.families)}), {options.popularity}"


def _worse(*foreign: float | None) -> float | None:
    return max((value for value in foreign if value is not None), default=None)
