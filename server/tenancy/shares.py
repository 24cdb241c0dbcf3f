"""Shares: something countable divided among tenants by weight, so that nobody gets less because others want more.

Owns only what rounding still owes to whom. Knows neither requests nor steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    weight: float
    most: int  # units that it can use


class Shares:
    """Weighted max-min fairness over whole units; nothing is left while somebody wants it.

    What rounding denies a tenant it gets the next times, so one unit among three tenants goes round.
    """

    def __init__(self) -> None:
        self._owed: dict[str, float] = {}

    def divide(self, total: int, demands: Mapping[str, Demand]) -> dict[str, int]:
        """Units of each tenant: at most what it can use, together at most `total`."""
        entitled = _water_level(total, demands)
        owed = {tenant: self._owed.get(tenant, 0.0) + share for tenant, share in entitled.items()}
        left = min(total, sum(demand.most for demand in demands.values()))
        given: dict[str, int] = {}
        for tenant, claim in owed.items():
            given[tenant] = max(0, min(demands[tenant].most, int(claim + 1e-9), left))
            left -= given[tenant]
        while left:
            tenant = max((t for t in given if given[t] < demands[t].most), key=lambda t: owed[t] - given[t])
            given[tenant] += 1
            left -= 1
        self._owed = {tenant: owed[tenant] - given[tenant] for tenant in given if given[tenant] < demands[tenant].most}
        return given


def _water_level(total: int, demands: Mapping[str, Demand]) -> dict[str, float]:
    """Exact shares: who wants least per weight is served first, what it leaves goes to the others."""
    left, weights = float(total), sum(demand.weight for demand in demands.values())
    shares: dict[str, float] = {}
    for tenant, demand in sorted(demands.items(), key=lambda pair: pair[1].most / pair[1].weight):
        shares[tenant] = min(float(demand.most), left * demand.weight / weights)
        left -= shares[tenant]
        weights -= demand.weight
    return shares
