"""Rates: a token bucket, and how fast something drains. Pure arithmetic on times that are passed in; owns no clock, no lock.

Every method is O(1). Times are seconds of one monotonic clock; a time that runs backwards counts as no time.
"""

from __future__ import annotations

import math

MINUTE = 60.0
SHORTEST, LONGEST = 1.0, 60.0  # seconds a Retry-After may say
_MEMORY = 30.0  # seconds after which a finished request weighs 1/e in the measured rate


class TokenBucket:
    """`per_minute` tokens at most, refilled evenly. Invariant: 0 <= level <= per_minute."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Tokens there are now."""
        elapsed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._level = min(float(self.per_minute), self._level + elapsed * self.per_minute / MINUTE)
        return self._level

    def wait(self, tokens: int, now: float) -> float:
        """Seconds until it holds `tokens`, exactly; infinite for more than it ever holds."""
        missing = tokens - self.level(now)
        if missing <= 0:
            return 0.0
        return missing * MINUTE / self.per_minute if tokens <= self.per_minute else math.inf

    def take(self, tokens: int, now: float) -> None:
        """Raises: ValueError when it does not hold them."""
        if tokens > self.level(now):
            raise ValueError(f"{tokens} tokens asked of a bucket that holds {self._level}")
        self._level -= tokens

    def give_back(self, tokens: int, now: float) -> None:
        """Of what was taken, what was not used; what is over the brim is lost."""
        self._level = min(float(self.per_minute), self.level(now) + tokens)

    def resize(self, per_minute: int, now: float) -> None:
        """Another rate from now on; what it holds is kept as far as the new size allows."""
        self._level = min(self.level(now), float(per_minute))
        self.per_minute = per_minute


class DrainRate:
    """How many requests end per second: an exponentially weighted mean over about the last half minute."""

    def __init__(self, now: float) -> None:
        self._since = self._at = now
        self._weight = 0.0

    def ended(self, now: float) -> None:
        self._fade(now)
        self._weight += 1.0

    def idle_until(self, now: float) -> None:
        """There was nothing to drain since the last call: that time is not counted."""
        self._since += max(0.0, now - self._at)
        self._at = max(self._at, now)

    def per_second(self, now: float) -> float:
        """0 when nothing has ended yet. The mean is over the time observed while that is short."""
        self._fade(now)
        observed = 1.0 - math.exp(-max(self._at - self._since, 1.0) / _MEMORY)
        return self._weight / (_MEMORY * observed)

    def _fade(self, now: float) -> None:
        if now > self._at:
            self._weight *= math.exp((self._at - now) / _MEMORY)
            self._at = now


def retry_after(ahead: int, per_second: float) -> float:
    """Whole seconds in which `ahead` requests drain at the rate that was measured; the shortest wait when none was."""
    return bounded(max(1, ahead) / per_second) if per_second > 0 else SHORTEST


def bounded(seconds: float) -> float:
    """Rounded up, and kept within what a client can be asked to wait."""
    return float(math.ceil(min(max(seconds, SHORTEST), LONGEST)))
