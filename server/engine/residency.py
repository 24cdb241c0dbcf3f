"""Residency: which adapters are on the device, in which slot of which pool, and who still needs them.

A pure state machine over digests; it moves no tensors and starts no loads (the engine does, as told here).

              want()           loaded()          place()            evicted by place() / unload()
    absent ----------> loading --------> loaded --------> resident --------------------------> absent
       ^                  | failed()     in host memory   refs > 0: pinned by running sequences
       +------------------+
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapters_store.digest import Digest

from ..tenancy.holdings import Held, Holder, Holdings
from ..tenancy.policy import TenantPolicy
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
    holder: Holder  # who used it last
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


_Placing = tuple[Digest, frozenset[Digest], str]  # what, beside what, for whom
RETRY: float = 1.0  # seconds after which a placement that failed is tried again whatever has happened


class Residency:
    """At most `capacity` adapters, and `budget` bytes of them, resident.

    Invariant: an adapter with refs > 0 is never evicted. Whose adapters leave for whose is in `holdings`.
    """

    def __init__(self, capacity: int, budget: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`budget` in bytes of device memory; None sets no limit. `clock` in seconds."""
        self.capacity = capacity
        self.budget = budget
        self._resident: OrderedDict[Digest, _Resident] = OrderedDict()  # least recently used first
        self._loading: set[Digest] = set()
        self._loaded: dict[Digest, AdapterFacts] = {}  # in host memory, waiting for a slot
        self._failed: OrderedDict[Digest, str] = OrderedDict()
        self._device = _Device()
        self._clock = clock
        self._holders: dict[str, Holder] = {}  # by tenant; those that hold something
        self._stuck: set[_Placing] = set()  # placements known to fail until something is freed
        self._stuck_until = 0.0  # or until time has made somebody idle

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

    def is_needed(self, digest: Digest) -> bool:
        """On its way, or pinned."""
        entry = self._resident.get(digest)
        return digest in self._loading or digest in self._loaded or (entry is not None and entry.refs > 0)

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

    def is_stuck(self, digest: Digest, keep: Iterable[Digest], tenant: str = "") -> bool:
        """Whether the same placement has failed, and nothing has been freed since."""
        return bool(self._stuck) and (digest, frozenset(keep), tenant) in self._stuck and self._clock() < self._stuck_until

    def place(
        self, digest: Digest, keep: Iterable[Digest] = (), tenant: str = "", policy: TenantPolicy | None = None
    ) -> Placement | None:
        """Give a loaded adapter its slots, evicting others if need be, in the order that `holdings` tells.

        Those in `keep` (the other adapters of the same request) are spared, unless only their high slots keep pools large
        and nothing runs that could end: then they go too, and come back lower. `policy` None: the tenant's as it is known.
        None while the adapters that may be evicted are too few or too small.
        """
        kept = frozenset(keep)
        if self.is_stuck(digest, kept, tenant):
            return None
        holder = self._holder(tenant, policy)
        victims = self._victims(self._loaded[digest], kept, holder)
        if victims is None:
            self._stuck_until = self._clock() + RETRY
            self._stuck.add((digest, kept, tenant))
            return None
        evicted = tuple((victim, self._remove(victim)) for victim in victims)
        facts = self._loaded.pop(digest)
        slots = self._device.take(facts)
        self._resident[digest] = _Resident(facts, slots, holder)
        self._holders[tenant] = holder
        return Placement(slots, evicted)

    def _holder(self, tenant: str, policy: TenantPolicy | None) -> Holder:
        """Who asks now, so is not idle; the newest policy counts."""
        holder = self._holders.get(tenant) or Holder(tenant)
        holder.policy = policy or holder.policy
        holder.used_at = self._clock()
        return holder

    def needed(self, digests: Sequence[Digest]) -> int:
        """Bytes that available adapters take together, whichever of them comes first."""
        found = [self._resident[d].facts if d in self._resident else self._loaded[d] for d in digests]
        footprints = [facts.footprint for facts in found]
        return max(together(footprints), together(reversed(footprints)))

    def _victims(self, facts: AdapterFacts, kept: frozenset[Digest], holder: Holder) -> list[Digest] | None:
        """Who has to go for an adapter to fit; None when it cannot now."""
        holdings = Holdings(self._held(), self.capacity, self.budget)
        if not holdings.capped(holder) and self._fits(self._device, len(self._resident), facts):
            return []
        victims: list[Digest] = []
        device = self._device.copy()
        for digest in self._evictable(facts, kept, holder, holdings):
            victims.append(digest)
            device.give_back(self._resident[digest])
            if not holdings.capped(holder) and self._fits(device, len(self._resident) - len(victims), facts):
                return victims
        return None

    def _evictable(
        self, facts: AdapterFacts, kept: frozenset[Digest], holder: Holder, holdings: Holdings[Digest]
    ) -> Iterator[Digest]:
        """Those that nothing runs on and nobody keeps; behind them, where all could go, those that are kept."""
        unpinned = [digest for digest, entry in self._resident.items() if not entry.refs]
        kept_here = [digest for digest in unpinned if digest in kept]
        others = [digest for digest in unpinned if digest not in kept]
        yield from holdings.order(others, holder, facts.footprint.single, self._clock())
        if len(unpinned) == len(self._resident) and len(kept_here) < self.capacity:
            for digest in kept_here:
                holdings.remove(digest)
                yield digest

    def _held(self) -> dict[Digest, Held]:
        return {d: Held(e.holder, e.facts.footprint.single, bool(e.refs)) for d, e in self._resident.items()}

    def pinned_share(self, tenant: str) -> float:
        """What a tenant's running sequences keep on the device: the larger of its shares of slots and bytes, by weight."""
        holder = self._holders.get(tenant)
        if holder is None:
            return 0.0
        pinned = {d: held for d, held in self._held().items() if held.pinned}
        return Holdings(pinned, self.capacity, self.budget).share(holder)

    def _fits(self, device: _Device, used: int, facts: AdapterFacts) -> bool:
        return used < self.capacity and (self.budget is None or device.bytes_with(facts) <= self.budget)

    def facts(self, digest: Digest) -> AdapterFacts:
        """Of a resident adapter."""
        return self._resident[digest].facts

    def acquire(self, digests: Sequence[Digest], tenant: str = "", policy: TenantPolicy | None = None) -> None:
        """Pin resident adapters for one sequence. One that nobody else runs is its tenant's from now on."""
        if not digests:
            return
        holder = self._holder(tenant, policy)
        for digest in digests:
            entry = self._resident[digest]
            if not entry.refs and entry.holder is not holder and not self._capped(holder):
                former, entry.holder = entry.holder, holder
                self._holders[tenant] = holder
                self._forget_holder(former)
            entry.refs += 1
            self._resident.move_to_end(digest)

    def release(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            entry = self._resident[digest]
            entry.refs -= 1
            if not entry.refs:
                entry.holder.used_at = self._clock()
        self._stuck.clear()

    def _capped(self, holder: Holder) -> bool:
        most = holder.policy.max_slots
        return most is not None and sum(1 for entry in self._resident.values() if entry.holder is holder) >= most

    def _forget_holder(self, holder: Holder) -> None:
        if not any(entry.holder is holder for entry in self._resident.values()):
            self._holders.pop(holder.tenant, None)

    def slots(self, digest: Digest) -> Mapping[str, int]:
        return self._resident[digest].slots

    def unload(self, digest: Digest) -> Mapping[str, int] | None:
        """Drop an unpinned adapter; None when it is not resident or still in use."""
        entry = self._resident.get(digest)
        return None if entry is None or entry.refs else self._remove(digest)

    def _remove(self, digest: Digest) -> Mapping[str, int]:
        entry = self._resident.pop(digest)
        self._device.give_back(entry)
        self._forget_holder(entry.holder)
        self._stuck.clear()
        return entry.slots
