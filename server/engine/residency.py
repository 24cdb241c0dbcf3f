"""Residency: which adapters are on the device, in which slot of which pool, and who still needs them.

A pure state machine over digests; it moves no tensors and starts no loads (the engine does, as told here).

              want()           loaded()          place()            evicted by place() / unload()
    absent ----------> loading --------> loaded --------> resident --------------------------> absent
       ^                  | failed()     in host memory   refs > 0: pinned by running sequences
       +------------------+
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapters_store.digest import Digest

from .footprint import Footprint, Ledger, together


@dataclass(frozen=True)
class Placement:
    """Where an adapter went, and who had to leave for it."""

    slots: Mapping[str, int]  # pool -> slot
    evicted: tuple[tuple[Digest, Mapping[str, int]], ...]  # digest and the slots it had


@dataclass(frozen=True)
class AdapterFacts:
    """What scheduling needs to know of a loaded adapter."""

    pools: tuple[str, ...] = ()
    virtual: int = 0  # prefix positions
    embedded: bool = False  # the prefix is embeddings or tokens, to be run once through the base
    shift: int = 0  # prefix positions that take no position id: the text behind them starts that much lower
    ids: tuple[int, ...] = ()  # the prefix's tokens, where it has any
    tasks: int = 0  # the prefix is one per task, and a request must name its own
    head: Literal[None, "last", "every"] = None  # which positions of a text its head reads
    footprint: Footprint = field(default_factory=Footprint)  # device memory


@dataclass
class _Resident:
    facts: AdapterFacts
    slots: dict[str, int]
    refs: int = 0


@dataclass
class _SlotHeap:
    """Slot numbers of one pool, lowest first, so that a pool grows only as far as it is used."""

    next: int = 1  # slot 0 is the identity
    freed: list[int] = field(default_factory=list)

    def take(self) -> int:
        if self.freed:
            return heapq.heappop(self.freed)
        self.next += 1
        return self.next - 1

    def give_back(self, slot: int) -> None:
        heapq.heappush(self.freed, slot)

    @property
    def lowest(self) -> int:
        """The slot that `take` would give."""
        return self.freed[0] if self.freed else self.next


@dataclass
class _Device:
    """Slots and bytes that are taken; `copy` tries out what evictions would free."""

    pools: dict[str, _SlotHeap] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)

    def bytes_with(self, facts: AdapterFacts) -> int:
        slots = {pool: self.pools[pool].lowest if pool in self.pools else 1 for pool in facts.pools}
        return self.ledger.nbytes + self.ledger.cost(facts.footprint, slots)

    def take(self, facts: AdapterFacts) -> dict[str, int]:
        slots = {pool: self.pools.setdefault(pool, _SlotHeap()).take() for pool in facts.pools}
        self.ledger.add(facts.footprint, slots)
        return slots

    def give_back(self, entry: _Resident) -> None:
        for pool, slot in entry.slots.items():
            self.pools[pool].give_back(slot)
        self.ledger.remove(entry.facts.footprint)

    def copy(self) -> _Device:
        heaps = {pool: _SlotHeap(heap.next, list(heap.freed)) for pool, heap in self.pools.items()}
        return _Device(heaps, self.ledger.copy())


class Residency:
    """At most `capacity` adapters, and `budget` bytes of them, resident.

    Invariant: an adapter with refs > 0 is never evicted.
    """

    def __init__(self, capacity: int, budget: int | None = None) -> None:
        """`budget` in bytes of device memory; None sets no limit."""
        self.capacity = capacity
        self.budget = budget
        self._resident: OrderedDict[Digest, _Resident] = OrderedDict()  # least recently used first
        self._loading: set[Digest] = set()
        self._loaded: dict[Digest, AdapterFacts] = {}  # in host memory, waiting for a slot
        self._failed: OrderedDict[Digest, str] = OrderedDict()
        self._device = _Device()
        self._stuck: set[tuple[Digest, frozenset[Digest]]] = set()  # placements known to fail until something is freed

    @property
    def used(self) -> int:
        return len(self._resident)

    @property
    def nbytes(self) -> int:
        """Device memory of the resident adapters."""
        return self._device.ledger.nbytes

    @property
    def resident(self) -> tuple[Digest, ...]:
        return tuple(self._resident)

    @property
    def idle(self) -> bool:
        """No adapter is pinned."""
        return all(not r.refs for r in self._resident.values())

    def state(self, digest: Digest) -> tuple[str, str | None]:
        """(stored | loading | resident | failed, reason)."""
        if digest in self._resident:
            return "resident", None
        if digest in self._loading or digest in self._loaded:
            return "loading", None
        reason = self._failed.get(digest)
        return ("stored", None) if reason is None else ("failed", reason)

    @property
    def in_flight(self) -> int:
        """Adapters on their way: loading, or loaded and waiting for a slot."""
        return len(self._loading) + len(self._loaded)

    @property
    def loaded_only(self) -> tuple[Digest, ...]:
        """Adapters in host memory that wait for a slot."""
        return tuple(self._loaded)

    def is_resident(self, digest: Digest) -> bool:
        return digest in self._resident

    def is_available(self, digest: Digest) -> bool:
        """Resident, or loaded and only in want of a slot."""
        return digest in self._resident or digest in self._loaded

    def want(self, digest: Digest) -> bool:
        """True when the caller should start a load; single-flight, so only the first call says so."""
        if self.is_available(digest) or digest in self._loading:
            return False
        self._failed.pop(digest, None)
        self._loading.add(digest)
        return True

    def loaded(self, digest: Digest, facts: AdapterFacts) -> None:
        """The load ended well: the adapter is in host memory."""
        self._loading.discard(digest)
        self._loaded[digest] = facts

    def forget(self, digest: Digest) -> None:
        """Nobody wants a loaded adapter any more."""
        self._loaded.pop(digest, None)

    def failed(self, digest: Digest, reason: str) -> None:
        """The load ended in an error; the next `want` tries again. The last 1,000 reasons are remembered."""
        self._loading.discard(digest)
        self._failed[digest] = reason
        while len(self._failed) > 1000:
            self._failed.popitem(last=False)

    def place(self, digest: Digest, keep: Iterable[Digest] = ()) -> Placement | None:
        """Give a loaded adapter its slots, evicting the least recently used ones if need be.

        Those in `keep` (the other adapters of the same request) are spared, unless only their high slots keep pools large
        and nothing runs that could end: then they go too, and come back lower.
        None while the adapters that may be evicted are too few or too small.
        """
        kept = frozenset(keep)
        if (digest, kept) in self._stuck:
            return None
        victims = self._victims(self._loaded[digest], kept)
        if victims is None:
            self._stuck.add((digest, kept))
            return None
        evicted = tuple((victim, self._remove(victim)) for victim in victims)
        facts = self._loaded.pop(digest)
        slots = self._device.take(facts)
        self._resident[digest] = _Resident(facts, slots)
        return Placement(slots, evicted)

    def needed(self, digests: Sequence[Digest]) -> int:
        """Bytes that available adapters take together, whichever of them comes first."""
        found = [self._resident[d].facts if d in self._resident else self._loaded[d] for d in digests]
        footprints = [facts.footprint for facts in found]
        return max(together(footprints), together(reversed(footprints)))

    def _victims(self, facts: AdapterFacts, kept: frozenset[Digest]) -> list[Digest] | None:
        """Who has to go, least recently used first, for an adapter to fit; None when it cannot now."""
        if self._fits(self._device, len(self._resident), facts):
            return []
        victims: list[Digest] = []
        device = self._device.copy()
        for digest in self._evictable(kept):
            victims.append(digest)
            device.give_back(self._resident[digest])
            if self._fits(device, len(self._resident) - len(victims), facts):
                return victims
        return None

    def _evictable(self, kept: frozenset[Digest]) -> list[Digest]:
        """Those that nothing runs on and nobody keeps; behind them, where all could go, those that are kept."""
        unpinned = [digest for digest, entry in self._resident.items() if not entry.refs]
        kept_here = [digest for digest in unpinned if digest in kept]
        others = [digest for digest in unpinned if digest not in kept]
        lower = len(unpinned) == len(self._resident) and len(kept_here) < self.capacity
        return [*others, *kept_here] if lower else others

    def _fits(self, device: _Device, used: int, facts: AdapterFacts) -> bool:
        return used < self.capacity and (self.budget is None or device.bytes_with(facts) <= self.budget)

    def facts(self, digest: Digest) -> AdapterFacts:
        """Of a resident adapter."""
        return self._resident[digest].facts

    def acquire(self, digests: Iterable[Digest]) -> None:
        """Pin resident adapters for one sequence."""
        for digest in digests:
            self._resident[digest].refs += 1
            self._resident.move_to_end(digest)

    def release(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            self._resident[digest].refs -= 1
        self._stuck.clear()

    def slots(self, digest: Digest) -> Mapping[str, int]:
        return self._resident[digest].slots

    def unload(self, digest: Digest) -> Mapping[str, int] | None:
        """Drop an unpinned adapter; None when it is not resident or still in use."""
        entry = self._resident.get(digest)
        return None if entry is None or entry.refs else self._remove(digest)

    def _remove(self, digest: Digest) -> Mapping[str, int]:
        entry = self._resident.pop(digest)
        self._device.give_back(entry)
        self._stuck.clear()
        return entry.slots
