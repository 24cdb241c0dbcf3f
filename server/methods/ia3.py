"""IA3 (Liu et al., 2022): a learned vector that scales a module's output (its bias included) or its input.

Owns the "ia3" pool. Never reads files and never decides which rows it runs on.

    Checkpoint.sites[module] = Part.sites[module] = {"out": [out]} or {"in": [in]} (feed-forward modules)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, Op, Part, Rows, Run, Tensors, check_shape, site_shape
from .grouped import MulRows, Pool, RunsOp


class IA3(Method):
    """IA3 on Linear and Conv1D modules."""

    name: ClassVar[str] = "ia3"
    served: ClassVar[str] = "a vector per slot on a module's input or output"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        if not checkpoint.sites:
            raise AdapterError("ia3", "the upload holds no IA3 tensors")
        for module, tensors in checkpoint.sites.items():
            shape = site_shape(base, module, f"{module}.ia3_l", ("linear", "conv1d"), head=True)
            sizes = {"in": shape.in_features, "out": shape.out_features}
            for side, tensor in tensors.items():
                check_shape(f"{module}.ia3_l", tensor, (sizes[side],))
        return Part(self.name, pool="ia3", sites=checkpoint.sites)

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        shape = base.modules[module]
        return IA3Op(shape.in_features, shape.out_features, device, dtype)


class IA3Op(RunsOp):
    """Semantics: x'[t] = x[t] * l_in[s], y'[t] = y[t] * l_out[s] for each row t of the pool, s its slot.

    Adapters may disagree on which side of one module they scale, so a site has both; each is allocated by its first
    adapter and is all ones elsewhere.
    """

    order: ClassVar[int] = 30

    def __init__(self, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._capacity = 0
        self._unused = {
            "in": Pool((in_features,), 1.0, device, dtype),
            "out": Pool((out_features,), 1.0, device, dtype),
        }
        self._used: dict[str, Pool] = {}

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._used.values())

    @property
    def acts_before(self) -> bool:
        return "in" in self._used

    def grow(self, capacity: int) -> None:
        self._capacity = max(self._capacity, capacity)
        for pool in self._used.values():
            pool.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.clear(slot)
        for side, tensor in tensors.items():
            self._pool(side).put(slot, tensor)
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        for pool in self._used.values():
            pool.clear(slot)

    def before(self, x: Tensor, rows: Rows) -> Tensor:
        scales = self.runs_before(rows)
        if scales:
            x = x.clone()
        for scale in scales:
            scale(x, x)
        return x

    def runs_before(self, rows: Rows) -> Sequence[Run]:
        kept = rows.scratch.get((self, "in"))
        if kept is None:
            kept = rows.scratch[self, "in"] = self._scales("in", self.held(rows))
        return cast("Sequence[Run]", kept)

    def prepare(self, rows: Rows) -> Sequence[Run]:
        return self._scales("out", rows)

    def _scales(self, side: str, rows: Rows) -> tuple[Run, ...]:
        return (MulRows(self._used[side].tensor, rows),) if side in self._used and rows.groups else ()

    def _pool(self, side: str) -> Pool:
        if side in self._unused:
            self._used[side] = self._unused.pop(side)
            self._used[side].grow(self._capacity)
        return self._used[side]
