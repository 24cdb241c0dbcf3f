"""Prefill: whose prompts the next step computes, and how much of them, so that no tenant sets the pace of the others.

    tenants with prompts in progress      beside streams                             behind whom
    one alone                             a share of each of its prompts             admission
    of several, little to compute         the same; divided by weight                -
    of several, a flood                   one share, an eighth while others have     its own: no more are admitted,
                                          prompts; divided by weight                 what waits keeps its turn

A share is `max_prefill_tokens`. Decides nothing about blocks, slots or who runs. Never imports torch.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Final

from ..tenancy.shares import Demand, Shares
from .budget import StepBudget
from .plan import Sequence

#: Shares of prompt positions in progress from which a tenant floods: they would not be computed sooner if they were more.
FLOOD: Final = 16
#: Shares that a step without streams takes at least: nobody's next token waits, but somebody may come.
UNSTREAMED: Final = 2
#: Of a share, what floods get while others have prompts.
LEFT_TO_FLOODS: Final = 0.125
#: Seconds after its last request for which a tenant may be expected to come again.
RECENT: Final = 60.0


class Prefill:
    """Divides what steps have room for. With one tenant it only counts its prompts."""

    def __init__(self, tokens: int, share: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`tokens` of a step; `share` = of each prompt in steps with streams, 0 = as many as the step takes."""
        self._tokens = tokens
        self._share = share
        self._clock = clock
        self._came: OrderedDict[str, float] = OrderedDict()  # by tenant: when its last request did, longest ago first
        self._few, self._floods = Shares(), Shares()

    def came(self, tenant: str) -> None:
        """It has a request."""
        self._came[tenant] = self._clock()
        self._came.move_to_end(tenant)

    def floods(self, backlog: Counter[str]) -> set[str]:
        """Tenants that have enough in progress; `backlog` = prompt positions in progress of each."""
        if not self._several(backlog):
            return set()
        most = FLOOD * (self._share or self._tokens)
        return {tenant for tenant, positions in backlog.items() if positions >= most}

    def budget(self, running: Collection[Sequence]) -> StepBudget:
        """What a step of these has room for."""
        prompts = [sequence for sequence in running if sequence.remaining > 1]
        backlog = backlog_of(prompts)
        floods = self.floods(backlog)
        few = sum(sequence.tenant not in floods for sequence in prompts)
        beside = self._share * max(1, few) + (self._left(few) if few and floods else 0)
        latest = max(map(_came_at, prompts), default=math.inf)
        if not self._share or not self._several(backlog):
            return StepBudget(self._tokens, beside, latest)
        tokens = len(running) - len(prompts) + max(beside, UNSTREAMED * self._share)
        return StepBudget(min(self._tokens, tokens), beside, latest)

    def rooms(self, prompts: Collection[Sequence], extra: int, weight: Callable[[str], float]) -> dict[str, int]:
        """Positions of each tenant, of `extra` that the step has room for."""
        backlog = backlog_of(prompts)
        floods = self.floods(backlog)
        few = {tenant: Demand(weight(tenant), most) for tenant, most in backlog.items() if tenant not in floods}
        rest = {tenant: Demand(weight(tenant), most) for tenant, most in backlog.items() if tenant in floods}
        kept = min(extra, self._left(len(few))) if rest else 0
        rooms = self._few.divide(extra - kept, few)
        return rooms | self._floods.divide(extra - sum(rooms.values()), rest)

    def _several(self, present: Iterable[str]) -> bool:
        """Whether these, and who came lately, are more than one tenant."""
        limit = self._clock() - RECENT
        while self._came and next(iter(self._came.values())) < limit:
            self._came.popitem(last=False)
        return len(self._came) > 1 or len(self._came.keys() | set(present)) > 1

    def _left(self, few: int) -> int:
        """What floods get beside so many prompts of others: never nothing."""
        share = self._share or self._tokens
        return max(1, int(LEFT_TO_FLOODS * share)) if few else share


def backlog_of(sequences: Iterable[Sequence]) -> Counter[str]:
    """Prompt positions in progress, by tenant."""
    backlog: Counter[str] = Counter()
    for sequence in sequences:
        if sequence.remaining > 1:
            backlog[sequence.tenant] += sequence.remaining
    return backlog


def _came_at(sequence: Sequence) -> float:
    """Of a prefix that is being built it is not known, as several requests may wait for it."""
    return math.inf if sequence.request is None else sequence.request.arrival
