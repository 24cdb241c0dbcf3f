"""Leaving: adapters that were told to go, until nothing needs them any more. On the engine's thread; moves nothing itself.

told to go --add--> needed: runs, loads, or is waited for --take--> gone        deleted: looked at for `GRACE` more,
                                                                                as it may have been found by name before
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from adapters_store.digest import Digest

from .residency import Residency

Pair = tuple[Digest, Digest]  # who is to go, and who was unloaded: itself, or a stored adapter that it was made from

GRACE: Final = 10.0  # seconds between a request's finding its adapters by name and its submission, at the most


class Leaving:
    """Invariant: who was told to go is in it until it has been taken, or is wanted again."""

    def __init__(
        self, residency: Residency, awaited: Callable[[Digest], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`awaited`: whether a request that waits names an adapter. `clock` in seconds."""
        self._residency = residency
        self._awaited = awaited
        self._clock = clock
        self._until: dict[Pair, float] = {}  # how long each is looked at, at the least

    def __len__(self) -> int:
        return len(self._until)

    def add(self, digests: Iterable[Digest], unloaded: Digest, grace: float = 0.0) -> list[Pair]:
        """They go at once, or with the last who needs them; and again if they come back within `grace` seconds."""
        until, pairs = self._clock() + grace, [(digest, unloaded) for digest in digests]
        self._until |= dict.fromkeys(pairs, until)
        return pairs

    def follow(self, digest: Digest, sources: Collection[Digest]) -> None:
        """An adapter made from others has arrived: it goes with those of them that are to go."""
        if sources:
            self._until |= {(digest, gone): until for (each, gone), until in self._until.items() if each in sources}

    def stay(self, digest: Digest) -> None:
        """It is wanted again, and with it what is made from it."""
        self._until = {pair: until for pair, until in self._until.items() if digest not in pair}

    def take(self, among: Iterable[Pair] | None = None) -> Iterator[Pair]:
        """Those (of `among`, or of all) that can go now, one by one: if one cannot be taken off, those behind it stay listed.

        Who has grace left is looked at again, in case it comes back.
        """
        now = self._clock()
        for pair in list(self._until if among is None else among):
            over = now >= self._until[pair]
            if self._can_go(pair[0], grace=not over):
                if over:
                    del self._until[pair]
                yield pair

    def _can_go(self, digest: Digest, *, grace: bool) -> bool:
        if grace and not self._residency.is_resident(digest):
            return False  # there is nothing to do yet
        return not self._residency.is_needed(digest) and not self._awaited(digest)
