"""Footprint: what resident adapters take of the device's memory, counted the way their pools grow.

A pure ledger over names and numbers; it never imports torch and decides nothing.

    a pool at one module      0 1 2 3 4 . . .     room for slots up to the highest it has held (0 is the identity), at
                              x   x   x           least doubling; all of it is freed with its last adapter
    bytes = room * per_slot + own of each adapter in it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class SiteBytes:
    """One adapter at one module. `per_slot` is paid for every slot there is room for, `own` once."""

    per_slot: int
    own: int = 0


@dataclass(frozen=True)
class Footprint:
    """One adapter. Vectors that only some adapters of a pool bring to a module are counted with the largest of them."""

    sites: Mapping[tuple[str, str], SiteBytes] = field(default_factory=dict)  # (pool, module)
    loose: int = 0  # what takes no slot: prefixes and heads

    @cached_property
    def single(self) -> int:
        """Bytes of its own slots alone, whatever room there is beside them: what it counts for among others."""
        return self.loose + sum(site.per_slot + site.own for site in self.sites.values())

    @property
    def alone(self) -> int:
        """Bytes with nobody else on the device: slot 1 of every pool."""
        return together([self])


@dataclass
class _Site:
    room: int = 0
    per_slot: int = 0
    users: int = 0


class Ledger:
    """The bytes of all that is resident. Invariant: a site is in it exactly while somebody uses it."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._sites: dict[tuple[str, str], _Site] = {}

    def cost(self, footprint: Footprint, slots: Mapping[str, int]) -> int:
        """What `add` would add; `slots` is pool -> slot."""
        return footprint.loose + sum(self._grown(key, site, slots)[2] for key, site in footprint.sites.items())

    def add(self, footprint: Footprint, slots: Mapping[str, int]) -> None:
        self.nbytes += footprint.loose
        for key, bytes_ in footprint.sites.items():
            room, per_slot, added = self._grown(key, bytes_, slots)
            site = self._sites.setdefault(key, _Site())
            site.room, site.per_slot, site.users = room, per_slot, site.users + 1
            self.nbytes += added

    def remove(self, footprint: Footprint) -> None:
        """What was added with the same footprint."""
        self.nbytes -= footprint.loose
        for key, bytes_ in footprint.sites.items():
            site = self._sites[key]
            site.users -= 1
            self.nbytes -= bytes_.own
            if not site.users:
                self.nbytes -= site.room * site.per_slot
                del self._sites[key]

    def copy(self) -> Ledger:
        other = Ledger()
        other.nbytes = self.nbytes
        other._sites = {key: _Site(site.room, site.per_slot, site.users) for key, site in self._sites.items()}
        return other

    def _grown(self, key: tuple[str, str], bytes_: SiteBytes, slots: Mapping[str, int]) -> tuple[int, int, int]:
        """(room, bytes per slot, bytes added) of a site that one more adapter comes to."""
        site, slot = self._sites.get(key, _Site()), slots[key[0]]
        room = site.room if slot < site.room else max(slot + 1, 2 * site.room)
        per_slot = max(site.per_slot, bytes_.per_slot)
        return room, per_slot, room * per_slot - site.room * site.per_slot + bytes_.own


def together(footprints: Iterable[Footprint]) -> int:
    """Bytes of these and no others, who come in this order and take the lowest slots."""
    ledger, taken = Ledger(), dict[str, int]()
    for footprint in footprints:
        slots = {pool: taken.get(pool, 0) + 1 for pool, _ in footprint.sites}
        taken |= slots
        ledger.add(footprint, slots)
    return ledger.nbytes
