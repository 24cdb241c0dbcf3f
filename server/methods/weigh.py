"""Weighing: the device memory an adapter takes, found by putting it into empty ops on torch's meta device.

Owns no numbers of its own: whatever a family's op allocates is what is counted. Runs where adapters are loaded, never in
a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from ..engine.footprint import Footprint, SiteBytes
from ..errors import AdapterError
from . import METHODS
from .base import BaseShape, Method, Part, Tensors

_META: Final = torch.device("meta")


def footprint_of(
    parts: Sequence[Part], base: BaseShape, dtype: torch.dtype, methods: Mapping[str, Method] = METHODS
) -> Footprint:
    """Of an adapter on a base held in `dtype`, as the torch ops hold it (native ones pad whole matrices to full panels)."""
    sites: dict[tuple[str, str], SiteBytes] = {}
    for part in parts:
        if part.pool is not None:
            sites |= {(part.pool, module): cost for module, cost in _sites(part, base, dtype, methods).items()}
    return Footprint(sites, sum(_loose(part) for part in parts))


def check_fits(parts: Sequence[Part], footprint: Footprint, budget: int | None) -> None:
    """Raises: AdapterError naming the largest part of an adapter that `budget` bytes cannot hold even alone."""
    if budget is not None and footprint.alone > budget:
        largest = max(parts, key=lambda part: part.nbytes)
        needed = f"the adapter needs {footprint.alone} bytes of device memory"
        raise AdapterError(largest.method, f"{needed}, over this server's {budget} (--adapter-memory-mb)")


def _loose(part: Part) -> int:
    return (part.prefix.nbytes if part.prefix else 0) + (part.head.nbytes if part.head else 0)


def _sites(part: Part, base: BaseShape, dtype: torch.dtype, methods: Mapping[str, Method]) -> dict[str, SiteBytes]:
    """Modules and tensors of one size cost the same, so each size is tried once."""
    known: dict[object, SiteBytes] = {}
    costs: dict[str, SiteBytes] = {}
    for module, tensors in part.sites.items():
        shape = base.modules[module]
        size = (shape.kind, shape.in_features, shape.out_features, *((n, t.shape, t.dtype) for n, t in tensors.items()))
        if size not in known:
            known[size] = _site(methods[part.method], part, module, tensors, base, dtype)
        costs[module] = known[size]
    return costs


def _site(method: Method, part: Part, module: str, tensors: Tensors, base: BaseShape, dtype: torch.dtype) -> SiteBytes:
    """An op with room for two slots and one with room for three, the adapter in slot 1: the difference is a slot."""
    sizes = []
    for room in (2, 3):
        op = method.op(part, module, base, _META, dtype)
        op.grow(room)
        op.put(1, tensors)
        sizes.append(op.nbytes)
    per_slot = sizes[1] - sizes[0]
    return SiteBytes(per_slot, sizes[0] - 2 * per_slot)
