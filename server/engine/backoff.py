"""Backoff: what failed a moment ago is refused from memory instead of being tried again. Any thread; never imports torch.

failure 1      tried again at once: it may have been a moment's trouble
failure n > 1  refused for 1, 2, 4 ... 60 seconds
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

from adapters_store.digest import Digest

from ..errors import AdapterdError

FIRST: Final = 1.0  # seconds
LONGEST: Final = 60.0  # seconds
_REMEMBERED: Final = 1000  # adapters


@dataclass
class _Failure:
    error: AdapterdError
    until: float  # on the clock
    delay: float = 0.0  # seconds, that the last failure cost


class Backoff:
    """Adapters that could not be loaded, and until when nobody tries. The last 1,000 are remembered."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[Digest, _Failure] = OrderedDict()
        self._lock = Lock()

    def refusal(self, digest: Digest) -> AdapterdError | None:
        """The last failure, while its time is not over."""
        with self._lock:
            known = self._failures.get(digest)
            return known.error if known is not None and self._clock() < known.until else None

    def failed(self, digest: Digest, error: AdapterdError) -> None:
        with self._lock:
            known = self._failures.pop(digest, None)
            delay = 0.0 if known is None else min(LONGEST, 2 * known.delay or FIRST)
            self._failures[digest] = _Failure(error, self._clock() + delay, delay)
            if len(self._failures) > _REMEMBERED:
                self._failures.popitem(last=False)

    def forget(self, digest: Digest) -> None:
        """It was loaded, or its files may be others now."""
        with self._lock:
            self._failures.pop(digest, None)
