"""A linear map per slot, for families whose adapters bring whole matrices: x W^T + b by the map of the row's own slot.

Owns who holds which map. Slots share nothing and cost nothing while empty: no pool is allocated for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Rows


class LinearMap(Protocol):
    """A matrix ready to be multiplied with."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] contiguous -> [n, out]."""


#: linear(W [out, in], b [out] or None): a map that owns its memory.
MakeLinear = Callable[[Tensor, Tensor | None], LinearMap]


@dataclass(frozen=True)
class TorchLinear:
    """One torch product per group of rows: its bits may depend on how many rows share it."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Maps:
    """Slot -> its map. `native` makes maps whose rows do not depend on each other; without it torch multiplies."""

    def __init__(self, native: MakeLinear | None, device: torch.device, dtype: torch.dtype) -> None:
        self._native = native
        self._device = device
        self._dtype = dtype
        self._maps: dict[int, LinearMap] = {}

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._maps.values())

    def put(self, slot: int, weight: Tensor, bias: Tensor | None) -> None:
        if self._native is not None:
            self._maps[slot] = self._native(weight, bias)
        else:
            own = None if bias is None else bias.to(self._device, self._dtype, copy=True)
            self._maps[slot] = TorchLinear(weight.to(self._device, self._dtype, copy=True), own)

    def clear(self, slot: int) -> None:
        self._maps.pop(slot, None)

    def product(self, slot: int, x: Tensor, index: Tensor) -> Tensor:
        """The outputs [n, out] of rows `index` [n] of x [T, in]."""
        return self._maps[slot](x[index])


def indices(rows: Rows) -> list[tuple[int, Tensor]]:
    """(slot, its tokens of the step [n]) of every group."""
    return [(slot, rows.index[start:stop]) for slot, start, stop in rows.groups]
