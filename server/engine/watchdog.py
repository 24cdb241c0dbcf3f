"""Watchdog: whether the engine's loop still comes round. One number written by the loop, read by any thread.

Knows no request and no step; it never ends anything. `/livez` asks, and whoever supervises the process restarts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: What the first step may take of the time that later ones are given: kernels are compiled and graphs recorded in it.
FIRST_STEP: Final = 10


class Pulse:
    """When the loop last came round in good order. A loop that only fails to recover does not beat."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds."""
        self._clock = clock
        self._last = clock()
        self._stepped = False

    def beat(self) -> None:
        self._last = self._clock()

    def stepped(self) -> None:
        """A step is done, so whatever only the first one pays for has been paid."""
        self._stepped = True

    @property
    def age(self) -> float:
        """Seconds since the last beat."""
        return max(0.0, self._clock() - self._last)

    def late(self, seconds: float) -> bool:
        """Whether the last beat is longer ago than `seconds`, or FIRST_STEP times that before the first step is done."""
        return self.age > seconds * (1 if self._stepped else FIRST_STEP)
