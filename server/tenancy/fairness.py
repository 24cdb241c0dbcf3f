"""Fairness: whose request is admitted next, by virtual token counters. Knows no adapters, no blocks, no steps.

    tenant   counter   ready: FIFO   parked: wait for more than their turn   running
    a        812.0     r7 r9         r3 (its adapter loads)                  r1 r2
    b        640.5     r8                                                    r4        -> r8 is the head

Virtual token counters with weights: Sheng et al., Fairness in Serving Large Language Models, OSDI'24, algorithms 2 and 4.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain, count, zip_longest
from typing import Generic, TypeVar

from .policy import INPUT_PRICE, OUTPUT_PRICE, TenantPolicy

T = TypeVar("T", bound=Hashable)


class _State(Enum):
    READY = auto()
    PARKED = auto()
    RUNNING = auto()


@dataclass(eq=False)
class _Line(Generic[T]):
    """One tenant. It *waits* while something is ready and it may run one more: only then is it a competitor."""

    tenant: str
    policy: TenantPolicy
    counter: float = 0.0  # service charged, in tokens of price 1 per weight 1
    ready: list[tuple[int, T]] = field(default_factory=list)  # heap by ticket
    running: int = 0
    requests: int = 0  # ready, parked and running
    ranked: float | None = None  # the counter that it is ranked by while it waits
    listed: bool = False  # among those that may be collected
    held: bool = False  # it may start nothing now

    @property
    def waits(self) -> bool:
        most = self.policy.max_running
        return bool(self.ready) and not self.held and (most is None or self.running < most)


@dataclass(eq=False)
class _Place(Generic[T]):
    line: _Line[T]
    ticket: int
    state: _State


class FairQueue(Generic[T]):
    """Requests that have not ended. Invariant: each one added is ready, parked or running, until it is removed.

    Two tenants that both wait all the time are served alike (by weight) to within 2 max(input price * longest prompt,
    output price * positions of the KV cache). With one tenant it is a FIFO.

    Usage:
        queue.add(request, "a", policy)
        while room and (request := queue.head()) is not None:
            queue.admit(request, tokens)  or  queue.park(request)
        queue.generated(request, 1) ... queue.remove(request)
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._places: dict[T, _Place[T]] = {}  # in order of arrival
        self._parked: dict[T, None] = {}
        self._tickets = count()
        self._ranking: list[tuple[float, int, int, _Line[T]]] = []  # heap; an entry that is not its line's is skipped
        self._entries = count()
        self._idle: list[tuple[float, str]] = []  # heap of lines that may be collected
        self._last: _Line[T] | None = None  # the last that ceased to wait
        self._held: frozenset[str] = frozenset()
        self._running = 0

    def __len__(self) -> int:
        """Requests that wait, for whatever it is."""
        return len(self._places) - self._running

    def __iter__(self) -> Iterator[T]:
        """Those, in order of arrival."""
        return (item for item, place in self._places.items() if place.state is not _State.RUNNING)

    def __contains__(self, item: T) -> bool:
        place = self._places.get(item)
        return place is not None and place.state is not _State.RUNNING

    @property
    def tenants(self) -> int:
        """Tenants that have a counter."""
        return len(self._lines)

    def counter(self, tenant: str) -> float | None:
        """What a tenant was charged; None when nothing of it needs to be remembered."""
        line = self._lines.get(tenant)
        return None if line is None else line.counter

    def weight(self, tenant: str) -> float:
        """As its newest policy says."""
        line = self._lines.get(tenant)
        return 1.0 if line is None else line.policy.weight

    # -- who comes and goes --------------------------------------------------------------------------------------

    def add(self, item: T, tenant: str, policy: TenantPolicy, *, ready: bool = True) -> None:
        """A request has come. The newest policy of a tenant counts."""
        line = self._lines.setdefault(tenant, _Line(tenant, policy, held=tenant in self._held))
        line.policy = policy
        place = self._places[item] = _Place(line, next(self._tickets), _State.PARKED)
        line.requests += 1
        self._parked[item] = None
        if ready:
            self._make_ready(item, place)
        self._settle(line)

    def remove(self, item: T, unserved: int = 0) -> None:
        """A request has ended, wherever it was; `unserved` = prompt tokens that were charged and never computed."""
        place = self._places.pop(item)
        line = place.line
        self._leave(item, place)
        line.requests -= 1
        line.counter -= unserved * INPUT_PRICE / line.policy.weight
        self._settle(line)
        self._collect(line)

    def _leave(self, item: T, place: _Place[T]) -> None:
        line = place.line
        if place.state is _State.RUNNING:
            line.running -= 1
            self._running -= 1
        elif place.state is _State.PARKED:
            del self._parked[item]
        elif line.ready[0][1] is item:
            heapq.heappop(line.ready)
        else:
            line.ready.remove((place.ticket, item))
            heapq.heapify(line.ready)

    def _make_ready(self, item: T, place: _Place[T]) -> None:
        self._leave(item, place)
        place.state = _State.READY
        heapq.heappush(place.line.ready, (place.ticket, item))

    # -- admission -----------------------------------------------------------------------------------------------

    def head(self) -> T | None:
        """The oldest ready request of the tenant with the least counter."""
        line = self._first()
        return None if line is None else line.ready[0][1]

    def admit(self, item: T, tokens: int) -> None:
        """A ready request runs; `tokens` = those of its prompt that will be computed and were not charged before."""
        place = self._places[item]
        self._leave(item, place)
        place.state = _State.RUNNING
        place.line.running += 1
        self._running += 1
        place.line.counter += tokens * INPUT_PRICE / place.line.policy.weight
        self._settle(place.line)

    def park(self, item: T) -> None:
        """A ready request waits for something else than its turn: nobody waits for it."""
        place = self._places[item]
        self._leave(item, place)
        place.state = _State.PARKED
        self._parked[item] = None
        self._settle(place.line)

    def wake(self, blocked: Callable[[T], bool]) -> None:
        """Parked requests that are no longer `blocked` are ready again, in their old place."""
        for item in [item for item in self._parked if not blocked(item)]:
            self._make_ready(item, self._places[item])
            self._settle(self._places[item].line)

    def hold(self, tenants: Collection[str]) -> None:
        """Tenants that may start nothing until they are not named here any more; they compete with nobody."""
        changed = self._held ^ (held := frozenset(tenants))
        self._held = held
        for line in (self._lines[tenant] for tenant in sorted(changed) if tenant in self._lines):
            line.held = line.tenant in held
            self._settle(line)

    def put_back(self, item: T) -> None:
        """A running request was preempted: it is ready again, in its old place."""
        place = self._places[item]
        self._make_ready(item, place)
        self._settle(place.line)

    # -- charges -------------------------------------------------------------------------------------------------

    def generated(self, item: T, tokens: int) -> None:
        """A running request was given so many tokens."""
        line = self._places[item].line
        line.counter += tokens * OUTPUT_PRICE / line.policy.weight

    def charge(self, tenant: str, tokens: int) -> None:
        """Prompt tokens computed for a tenant beside its requests."""
        line = self._lines.get(tenant)
        if line is None:
            return
        line.counter += tokens * INPUT_PRICE / line.policy.weight
        self._settle(line)

    # -- the order of tenants ------------------------------------------------------------------------------------

    def in_turn(self) -> Iterator[tuple[T, str]]:
        """All that wait, with their tenants: each tenant's oldest, then each one's next; least counter first."""
        if not len(self):
            return iter(())
        waiting: dict[_Line[T], list[T]] = {}
        for item in self:
            waiting.setdefault(self._places[item].line, []).append(item)
        lines = sorted(waiting, key=lambda line: line.counter)
        rounds = zip_longest(*([(item, line.tenant) for item in waiting[line]] for line in lines))
        return (pair for pair in chain.from_iterable(rounds) if pair is not None)

    def _first(self) -> _Line[T] | None:
        """The waiting line with the least counter. Amortised O(log tenants): counters of those that wait mostly grow."""
        while self._ranking:
            counter, _, _, line = self._ranking[0]
            if line.ranked != counter:
                heapq.heappop(self._ranking)
            elif line.counter > counter:
                heapq.heappop(self._ranking)
                self._rank(line)
            else:
                return line
        return None

    def _rank(self, line: _Line[T]) -> None:
        """Among equals, who came first."""
        line.ranked = line.counter
        heapq.heappush(self._ranking, (line.counter, line.ready[0][0], next(self._entries), line))

    def _settle(self, line: _Line[T]) -> None:
        """After any change. A line that begins to wait is lifted, so that nobody saves up service by not asking for it."""
        if not line.waits:
            if line.ranked is not None:
                line.ranked = None
                self._last = line
        elif line.ranked is None:
            line.counter = max(line.counter, self._level())
            self._rank(line)
        elif line.counter < line.ranked:  # it was given something back
            self._rank(line)

    def _level(self) -> float:
        """Where a newcomer starts: the least counter of those that wait, or that of the last that did."""
        first = self._first() or self._last
        return 0.0 if first is None else first.counter

    # -- forgetting ----------------------------------------------------------------------------------------------

    def _collect(self, line: _Line[T]) -> None:
        """Forget tenants without requests whose return would lift them above what they are remembered for."""
        if not self._places:
            self._lines.clear()
            self._ranking.clear()
            self._idle.clear()
            self._last = None
            return
        if not line.requests and not line.listed:
            self._list(line)
        level = self._level()
        while self._idle and self._idle[0][0] <= level:
            found = self._lines[heapq.heappop(self._idle)[1]]
            found.listed = False
            if not found.requests and found.counter <= level:
                del self._lines[found.tenant]
            elif not found.requests:
                self._list(found)

    def _list(self, line: _Line[T]) -> None:
        line.listed = True
        heapq.heappush(self._idle, (line.counter, line.tenant))
