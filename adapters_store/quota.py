"""Quota: how much one tenant may keep, and how much it keeps. Plain arithmetic: the catalog counts, in its transaction.

Usage:
    store.publish(staged, tenant="acme", name="support", ..., quota=Quota(adapters=10, size_bytes=1 << 30))
    store.usage("acme").size_bytes
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import OverQuota


@dataclass(frozen=True, slots=True)
class Usage:
    """What one tenant keeps. Equal files count as often as there are live versions with them."""

    adapters: int  # names with a live version
    size_bytes: int  # of all live versions
    largest: int  # bytes of its largest live version


@dataclass(frozen=True, slots=True)
class Quota:
    """How much one tenant may keep; None = no limit of that kind."""

    adapters: int | None = None  # names with a live version
    size_bytes: int | None = None  # of all live versions

    def check(self, adapters: int, size_bytes: int) -> None:
        """Raises: OverQuota for more names or more bytes than may be kept."""
        for name, limit, value in (
            ("max_adapters", self.adapters, adapters),
            ("max_adapter_bytes", self.size_bytes, size_bytes),
        ):
            if limit is not None and value > limit:
                raise OverQuota(name, limit, value)

    def check_incoming(self, size_bytes: int, usage: Usage) -> None:
        """Refuse an upload of at least that size before it is received, unless it may turn out to be one that is kept already.

        Raises: OverQuota.
        """
        if size_bytes > usage.largest:
            self.check(0, usage.size_bytes + size_bytes)


UNLIMITED = Quota()
