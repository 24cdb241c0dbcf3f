"""Placing: carries out what a plan changes on the device, and knows what is really there. On the engine's thread.

Owns adapters on their way to a slot and evictions not done yet. Decides nothing about who gets a slot: `Residency` did.

    loaded --put--> on the device --evict--> gone       a put out of memory: idle adapters leave, and it is tried once more
                         +--unload--> at once, or once nothing needs it any more (`leaving`)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

import structlog

from adapters_store.digest import Digest

from ..errors import AdapterdError, GenerationError
from ..memory import out_of_memory
from ..methods.base import Adapter
from ..model.runner import Runner
from .leaving import Leaving, Pair
from .loading import HostCache
from .plan import Change, Copy, Evict, Fill, Put
from .scheduler import Scheduler
from .warming import Warming

log = structlog.get_logger(__name__)


class Watch(Protocol):
    """What is told of evictions; called on the engine's thread, so it must be cheap."""

    def evicted(self) -> None: ...


class Placing:
    """The device's adapters. Invariant: no step runs while a slot that was given up has not been cleared."""

    def __init__(self, runner: Runner, scheduler: Scheduler, watch: Watch, warming: Warming, cache: HostCache) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._watch = watch
        self._warming = warming
        self._cache = cache
        self._ready: dict[Digest, Adapter] = {}  # loaded, on their way to a slot
        self._families: dict[Digest, frozenset[str]] = {}  # of adapters that are on the device
        self._sources: dict[Digest, frozenset[Digest]] = {}  # of those of them that were computed from stored ones
        self._evictions: deque[Evict] = deque()  # to be done before anything else: their slots may be given out again
        self._leaving = Leaving(scheduler.residency, scheduler.awaits)

    def loaded(self, digest: Digest, adapter: Adapter) -> None:
        self._ready[digest] = adapter
        self._leaving.follow(digest, adapter.sources)

    def families(self, digests: Iterable[Digest]) -> set[str]:
        """Of those that are on the device."""
        return {family for digest in digests for family in self._families.get(digest, ())}

    def clear_slots(self) -> None:
        """Do the evictions that could not be done before. Raises: whatever the device raises."""
        self._evict()
        self._let_go()

    def apply(self, changes: Iterable[Change]) -> None:
        """In their order. Raises: whatever the device raises, but for an adapter that it does not take."""
        for change in changes:
            if isinstance(change, Fill) and not self._scheduler.residency.is_resident(change.digest):
                continue  # its adapter could not be put
            self._apply(change)
        wanted = self._scheduler.residency.loaded_only
        if len(self._ready) > len(wanted):
            self._ready = {digest: self._ready[digest] for digest in wanted}

    def _apply(self, change: Change) -> None:
        if isinstance(change, Evict):
            self._evict(change)
            self._watch.evicted()
            return
        error = self._tried(change)
        if error is not None and out_of_memory(error):
            error.__traceback__ = None  # it keeps what was allocated so far
            error = self._tried_again(change)
        if error is None:
            if isinstance(change, Put):
                self._put(change.digest)
        elif isinstance(change, Copy):
            raise error
        else:
            self._put_failed(change.digest, error)

    def _tried(self, change: Change) -> Exception | None:
        try:
            self._runner.apply([change], self._ready)
        except Exception as error:
            return error
        return None

    def _tried_again(self, change: Change) -> Exception | None:
        """Once more, with all the memory there is; an adapter that was put half way is taken off first."""
        if isinstance(change, Put):
            self._evict(Evict(change.digest, change.slots))
        self.relieve(keep=None if isinstance(change, Copy | Evict) else change.digest)
        return self._tried(change)

    def _put(self, digest: Digest) -> None:
        adapter = self._ready.pop(digest)
        self._families[digest] = frozenset(part.method for part in adapter.parts)
        if adapter.sources:
            self._sources[digest] = adapter.sources
        self._warming.told(digest)

    def relieve(self, keep: Digest | None = None) -> None:
        """Free memory at nobody's expense: the host cache, adapters that nothing runs on, what was gathered for speed."""
        self._cache.clear()
        for digest in [each for each in self._scheduler.residency.resident if each in self._families and each != keep]:
            self.withdraw(digest)
        self._runner.release_memory()

    def _evict(self, *more: Evict) -> None:
        """Clear slots on the device. One that raises stays in line, and no step runs until it has been cleared."""
        self._evictions.extend(more)
        for change in more:
            self._families.pop(change.digest, None)
            self._sources.pop(change.digest, None)
        while self._evictions:
            self._runner.apply([self._evictions[0]], {})
            self._evictions.popleft()

    def _put_failed(self, digest: Digest, error: Exception) -> None:
        """The device would not take an adapter: only those who asked for it fail."""
        log.error("adapter could not be put on the device", digest=digest.short, exc_info=error)
        told = GenerationError(f"the adapter could not be put on the device ({type(error).__name__})")
        self._ready.pop(digest, None)
        for sequence in [s for s in self._scheduler.running if digest in s.adapters]:
            self._scheduler.fail_sequence(sequence, told)
        self._scheduler.fail_adapter(digest, told)
        self.withdraw(digest)
        self._warming.told(digest, told)

    def withdraw(self, digest: Digest) -> bool:
        """Take an adapter that nobody runs with off the device, its shared prefixes included."""
        slots = self._scheduler.residency.unload(digest)
        if slots is None:
            return False
        self._scheduler.forget(digest)
        self._evict(Evict(digest, slots))
        return True

    def unload(self, digest: Digest, derived: Iterable[Digest] = (), *, grace: float = 0.0) -> bool:
        """Drop an adapter from device and host memory, and what was computed from it; false when that cannot be done now.

        What is needed (`derived`, which is made from it, may be on its way) goes later, what comes back in `grace` seconds too.
        """
        made = {each for each, sources in self._sources.items() if digest in sources}
        pairs = self._leaving.add({digest, *made, *derived}, digest, grace)
        self._cache.discard(digest)
        was_resident = self._scheduler.residency.is_resident(digest)
        if not was_resident:
            self._scheduler.forget(digest)  # it was evicted before, and its prefix stayed
        self._let_go(pairs)
        return was_resident and not self._scheduler.residency.is_resident(digest)

    def stay(self, digest: Digest) -> None:
        """What was told to leave is wanted again."""
        self._leaving.stay(digest)

    def _let_go(self, among: Iterable[Pair] | None = None) -> None:
        for digest, unloaded in self._leaving.take(among):
            self._cache.discard(unloaded)  # a load that was under way has put it there since
            self._scheduler.forget(digest)
            self.withdraw(digest)

    def undo(self, error: AdapterdError) -> None:
        """After a step that broke half way: what was planned but never reached the device is not believed to be there."""
        for digest in self._scheduler.residency.resident:
            self._scheduler.forget(digest)  # the blocks of its prefix may never have been written
            if digest not in self._families:
                self._scheduler.residency.unload(digest)  # there is nothing to clear
                self._warming.told(digest, error)
