"""Cold start: time to first token through an adapter that is in the store alone, against the same when it is resident.

Owns this scenario's order of events and its figures. The store's files may be in the system's page cache: what is cold is
the server, not the disk.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from .figures import Figure, Verdict
from .load import around
from .machine import is_disturbed
from .options import BenchError
from .results import Load, Outcome, summarise
from .scenarios import Findings, play_rounds
from .session import Session
from .target import Target
from .traffic import check, quiet
from .workload import make_orders

#: Seconds that a cold adapter may add to the time to first token.
ADDED: Final = 0.5
#: Rounds of which the medians are taken, at the least.
_ROUNDS: Final = 7


@dataclass(frozen=True)
class Round:
    """Times to first token in seconds, one request right after the other."""

    resident: float
    cold: float
    foreign_cpu: float | None

    @property
    def disturbed(self) -> bool:
        return is_disturbed(self.foreign_cpu)


async def cold_start(session: Session) -> Findings:
    """The adapters in turn: one request when resident, unloaded from device and host memory, and one request again."""
    loads: list[Load] = []
    async with session.adapters() as names:
        await session.warm_up(names)

        async def play(index: int) -> Round:
            round, load = await _play(session, names[index % len(names)], index)
            loads.append(load)
            return round

        rounds = await play_rounds(max(_ROUNDS, session.options.repeats), play)
    counted = tuple(round for round in rounds if not round.disturbed) or rounds
    return Findings(tuple(loads), verdict=_verdict(session, counted))


async def _play(session: Session, name: str, index: int) -> tuple[Round, Load]:
    """Raises: BenchError when a request fails."""
    target = session.target
    orders = make_orders(await session.prompts(2), [name, name], session.options.max_new_tokens)
    await quiet(target)
    await target.load(name)
    async with around(target) as meanwhile:
        resident = await target.generate(orders[0])
        await quiet(target)
        await _make_cold(target, name)
        cold = await target.generate(orders[1])
    check((resident, cold), f"round {index + 1}")
    load = summarise(f"resident, then cold, round {index + 1}", (resident, cold), meanwhile.report, meanwhile.foreign_cpu)
    return Round(_first_token(resident), _first_token(cold), meanwhile.foreign_cpu), load


async def _make_cold(target: Target, name: str) -> None:
    """Raises: BenchError when the server keeps the adapter, so that its next request would not be a cold one."""
    state = await target.unload(name)
    if state != "stored":
        raise BenchError(f"{name} is {state} after its unload, so there is no cold start to measure")


def _first_token(outcome: Outcome) -> float:
    return outcome.token_times[0] - outcome.started


def _verdict(session: Session, rounds: tuple[Round, ...]) -> Verdict:
    uploads = session.uploads
    figures = (
        Figure.over("TTFT, resident", [round.resident for round in rounds], "s"),
        Figure.over("TTFT, cold", [round.cold for round in rounds], "s"),
        Figure.over("added by the cold start", [round.cold - round.resident for round in rounds], "s", most=ADDED),
    )
    size = uploads.bytes / max(1, uploads.count) / 1e6
    title = f"cold start of {'+'.join(session.options.families)} adapters of {size:.1f} MB, medians of {len(rounds)} rounds"
    return Verdict(title, figures, rounds=tuple(asdict(round) for round in rounds))
