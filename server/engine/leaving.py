"""Leaving: adapters that were told to go, until nothing needs them any more. On the engine's thread; moves nothing itself.

told to go --add--> needed: runs, loads, or is waited for --take--> gone        deleted: looked at for `GRACE` more,
                                                                                as it may have been found by name before
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import Final

from adapters_store.digest import Digest

from .residency import Residency

GRACE: Final = 10.0  # seconds between a request's finding its adapters by name and its submission, at the most


class Leaving:
    """Pairs of an adapter that is to go and the one that was unloaded: itself, or a stored one that it was made from."""

    def __init__(
        self, residency: Residency, awaited: Callable[[Digest], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`awaited`: whether a request that waits names an adapter. `clock` in seconds."""
        self._residency = residency
        self._awaited = awaited
        self._clock = clock
        self._until: dict[tuple[Digest, Digest], float] = {}  # how long each is looked at, at the least

    def __len__(self) -> int:
        return len(self._until)

    def add(self, digests: Iterable[Digest], unloaded: Digest, grace: float = 0.0) -> None:
        """They go at once, or with the last who needs them; and again if they come back within `grace` seconds."""
        until = self._clock() + grace
        self._until |= {(digest, unloaded): until for digest in digests}

    def follow(self, digest: Digest, sources: Collection[Digest]) -> None:
        """An adapter made from others has arrived: it goes with those of them that are to go."""
        if sources:
            self._until |= {(digest, gone): until for (each, gone), until in self._until.items() if each in sources}

    def stay(self, digest: Digest) -> None:
        """It is wanted again, and with it what is made from it."""
        self._until = {pair: until for pair, until in self._until.items() if digest not in pair}

    def take(self) -> list[tuple[Digest, Digest]]:
        """Those that can go now. Who has grace left is looked at again, in case it comes back."""
        now, going = self._clock(), list[tuple[Digest, Digest]]()
        for pair, until in list(self._until.items()):
            if self._can_go(pair[0], grace=now < until):
                going.append(pair)
                if now >= until:
                    del self._until[pair]
        return going

    def _can_go(self, digest: Digest, *, grace: bool) -> bool:
        if grace and not self._residency.is_resident(digest):
            return False  # there is nothing to do yet
        return not self._residency.is_needed(digest) and not self._awaited(digest)
