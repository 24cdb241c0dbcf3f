"""Slots: gets adapters loaded and onto the device for those who wait for them, fairly and without starving anybody.

Owns what is warmed, who waits for a slot and how long already. Which adapter leaves for another is `Residency`'s to say.

    absent --loads()--> loaded --place()--> resident       no slot can be freed: others pass, up to `patience` of them;
                                                           from then on those who take more of the device are held back
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from adapters_store.digest import Digest

from ..requests import Request
from ..tenancy.policy import OPEN
from .plan import Evict, Plan, Put, Sequence
from .residency import Residency


class Slots:
    """Invariant: among those who wait for a slot there is always one whom nobody may pass for ever."""

    def __init__(self, residency: Residency, patience: int, prefetch: int) -> None:
        """`patience` in admissions, `prefetch` in adapters on their way at once."""
        self._residency = residency
        self._patience = patience
        self._prefetch = prefetch
        self._warming: dict[Digest, str] = {}  # with whose it is
        self._admissions = 0
        self._since: dict[Sequence, int] = {}  # who waits for a slot -> admissions there had been by then

    # -- adapters that no request waits for ----------------------------------------------------------------------

    def warm(self, digest: Digest, tenant: str) -> None:
        self._warming[digest] = tenant

    def failed(self, digest: Digest) -> None:
        """It could not be loaded."""
        self._warming.pop(digest, None)

    def place_warm(self, plan: Plan) -> None:
        for digest, tenant in list(self._warming.items()):
            if self._residency.is_resident(digest) or self._put(digest, (), tenant, None, plan):
                del self._warming[digest]

    # -- adapters of a sequence ----------------------------------------------------------------------------------

    def loaded(self, sequence: Sequence) -> bool:
        """Whether its adapters lack no more than slots."""
        return all(self._residency.is_available(digest) for digest in sequence.adapters)

    def resident(self, sequence: Sequence) -> bool:
        return all(self._residency.is_resident(digest) for digest in sequence.adapters)

    def place(self, sequence: Sequence, plan: Plan) -> bool:
        """Have a sequence's adapters resident, all at once. It waits for a slot from now on if that is not possible."""
        if self.held_back(sequence):
            return False
        for digest in [digest for digest in sequence.adapters if not self._residency.is_resident(digest)]:
            if not self._put(digest, sequence.adapters, sequence.tenant, sequence.request, plan):
                self._since.setdefault(sequence, self._admissions)
                return False
        return self.resident(sequence)  # one may have gone for another

    def _put(self, digest: Digest, keep: Collection[Digest], tenant: str, request: Request | None, plan: Plan) -> bool:
        """Move a loaded adapter into slots, if it is loaded and some are free or can be freed."""
        if not self._residency.is_available(digest):
            return False
        placement = self._residency.place(digest, keep, tenant, None if request is None else request.policy)
        if placement is None:
            return False
        plan.changes += [Evict(victim, slots) for victim, slots in placement.evicted]
        plan.changes.append(Put(digest, placement.slots))
        return True

    def acquire(self, sequence: Sequence) -> None:
        """Pin a sequence's adapters and tell it their slots."""
        policy = OPEN if sequence.request is None else sequence.request.policy
        self._residency.acquire(sequence.adapters, sequence.tenant, policy)
        slots: dict[str, int] = {}
        for digest in sequence.adapters:
            slots |= self._residency.slots(digest)
        sequence.slots = slots

    def release(self, sequence: Sequence) -> None:
        self._residency.release(sequence.adapters)
        sequence.slots = {}

    # -- patience ------------------------------------------------------------------------------------------------

    def blocked(self, sequence: Sequence) -> bool:
        """Whether it waits for an adapter to load, or for a slot that cannot be had now."""
        if not sequence.adapters:
            return False
        if not self.loaded(sequence):
            return True
        stuck = any(self._residency.is_stuck(digest, sequence.adapters, sequence.tenant) for digest in sequence.adapters)
        return stuck or self.held_back(sequence)

    def admitted(self, sequence: Sequence) -> None:
        self._admissions += 1
        self._since.pop(sequence, None)

    def ended(self, sequence: Sequence) -> None:
        self._since.pop(sequence, None)

    def held_back(self, sequence: Sequence) -> bool:
        """Whether an earlier request has waited for a slot too long to let this one pin adapters before it.

        What it may be waiting for are requests of its own tenant and of tenants that pin more, by weight. The first of the
        tenant that pins least is held back by nobody, so somebody always goes on.
        """
        if not self._since or not sequence.adapters:
            return False
        share, tenant = self._residency.pinned_share, sequence.tenant
        return any(
            claimant.number < sequence.number and (other == tenant or share(tenant) > share(other))
            for other, claimant in self._claims().items()
        )

    def _claims(self) -> dict[str, Sequence]:
        """Each tenant's first request that has waited too long."""
        claims: dict[str, Sequence] = {}
        for sequence, since in self._since.items():
            if self._admissions - since > self._patience:
                first = claims.setdefault(sequence.tenant, sequence)
                if sequence.number < first.number:
                    claims[sequence.tenant] = sequence
        return claims

    # -- loads ---------------------------------------------------------------------------------------------------

    def loads(self, waiting: Iterable[tuple[Sequence, str]], plan: Plan) -> None:
        """Have the next few adapters loaded, in the order in which they are waited for.

        Those of each tenant's first request that lacks any are loaded however many others are on their way: loads that take
        long, and adapters that find no slot, block nobody.
        """
        wanted, first = dict.fromkeys(self._warming), dict[str, Sequence]()
        for sequence, tenant in waiting:
            wanted |= dict.fromkeys(sequence.adapters)
            if not self.loaded(sequence):
                first.setdefault(tenant, sequence)
        for digest in self._residency.loaded_only:
            if digest not in wanted:
                self._residency.forget(digest)
        urgent = {digest for sequence in first.values() for digest in sequence.adapters}
        for digest in wanted:
            if (self._residency.in_flight < self._prefetch or digest in urgent) and self._residency.want(digest):
                plan.loads.append(digest)
