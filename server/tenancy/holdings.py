"""Holdings: what each tenant holds of the device's adapter slots and bytes, and whose adapter leaves for whose.

Counts and orders only: it evicts nothing and knows no pools. Built for one placement, dropped after it.

    unused slots may be borrowed          an idle tenant's adapters leave first
    who comes back gets them again        then those of whoever holds most by weight, if that is more than the newcomer would
    nobody shrinks others by wanting more a tenant that holds its share evicts its own, or waits for its own
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from .policy import OPEN, TenantPolicy

IDLE: Final = 60.0  # seconds after a tenant's last use of an adapter in which its share is kept for it

K = TypeVar("K", bound=Hashable)


@dataclass(eq=False)
class Holder:
    """A tenant that holds adapters."""

    tenant: str
    policy: TenantPolicy = OPEN
    used_at: float = 0.0  # seconds


@dataclass(frozen=True)
class Held:
    """One adapter on the device."""

    holder: Holder
    nbytes: int
    pinned: bool  # something runs on it


@dataclass
class _Sum:
    count: int = 0
    nbytes: int = 0
    pinned: int = 0


class Holdings(Generic[K]):
    """Sums per tenant. A tenant's share is that of slots or of bytes, whichever is larger, divided by its weight."""

    def __init__(self, held: Mapping[K, Held], capacity: int, budget: int | None) -> None:
        """`capacity` in adapters, `budget` in bytes."""
        self._held = held
        self._capacity = capacity
        self._budget = budget
        self._sums: dict[Holder, _Sum] = {}
        for each in held.values():
            total = self._sums.setdefault(each.holder, _Sum())
            total.count += 1
            total.nbytes += each.nbytes
            total.pinned += each.pinned

    def capped(self, holder: Holder) -> bool:
        """Whether its policy lets it have no more slots."""
        most = holder.policy.max_slots
        return most is not None and self._sum(holder).count >= most

    def share(self, holder: Holder, more: int = 0, nbytes: int = 0) -> float:
        """With so many adapters more, of so many bytes together."""
        total = self._sum(holder)
        slots = (total.count + more) / self._capacity
        size = (total.nbytes + nbytes) / self._budget if self._budget else 0.0
        return max(slots, size) / holder.policy.weight

    def remove(self, key: K) -> None:
        """It is to be evicted."""
        total = self._sums[self._held[key].holder]
        total.count -= 1
        total.nbytes -= self._held[key].nbytes

    def order(self, candidates: Sequence[K], newcomer: Holder, nbytes: int, now: float) -> Iterator[K]:
        """Of `candidates`, least recently used first, those that may leave for one of `newcomer`'s, each removed."""
        lines: dict[Holder, deque[K]] = {}
        for key in candidates:
            lines.setdefault(self._held[key].holder, deque()).append(key)
        own = lines.pop(newcomer, deque())
        age = {key: at for at, key in enumerate(candidates)}
        while (line := self._next(own, lines, age, newcomer, nbytes, now)) is not None:
            key = line.popleft()
            lines = {holder: rest for holder, rest in lines.items() if rest}
            self.remove(key)
            yield key

    def _next(
        self, own: deque[K], lines: Mapping[Holder, deque[K]], age: Mapping[K, int], newcomer: Holder, nbytes: int, now: float
    ) -> deque[K] | None:
        """Whose turn it is to lose one."""
        if self.capped(newcomer) or not lines:
            return own or None
        idle = [line for holder, line in lines.items() if self._is_idle(holder, now)]
        if idle:
            return min(idle, key=lambda line: age[line[0]])
        most = max(lines, key=self.share)
        if self.share(most) > self.share(newcomer, 1, nbytes):
            return lines[most]
        # Who runs nothing and has nothing to give gets one all the same: more tenants than slots take turns.
        return own or (None if self._sum(newcomer).pinned else lines[most])

    def _is_idle(self, holder: Holder, now: float) -> bool:
        return not self._sum(holder).pinned and now - holder.used_at > IDLE

    def _sum(self, holder: Holder) -> _Sum:
        return self._sums.get(holder) or _Sum()
