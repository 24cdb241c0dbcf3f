"""BitFit (Ben Zaken et al., 2021) and every other bias-only delta: y + d, also on modules whose base has no bias.

Owns the "bitfit" pool and the step from stored biases to deltas. Never reads files.

    Checkpoint.sites[module] = {"bias": [out]}    as trained: the delta is bias - base bias (or 0)
                            or {"delta": [out]}   used as it is
    Part.sites[module] = {"delta": [out]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, Op, Part, Rows, Run, Tensors, check_shape, site_shape
from .grouped import AddRows, Pool, RunsOp


class BitFit(Method):
    """Bias deltas on Linear, Conv1D and norm modules."""

    name: ClassVar[str] = "bitfit"
    also: ClassVar[str] = "`bias` of PEFT `LORA`, `ADALORA` and `VERA`"
    served: ClassVar[str] = "a delta on any linear or norm, also one without a bias"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        if not checkpoint.sites:
            raise AdapterError("bitfit", "the upload holds no bias tensors")
        sites = {module: {"delta": _delta(module, tensors, base)} for module, tensors in checkpoint.sites.items()}
        return Part(self.name, pool="bitfit", sites=sites)

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        return BitFitOp(base.modules[module].out_features, device, dtype)


def _delta(module: str, tensors: Tensors, base: BaseShape) -> Tensor:
    shape = site_shape(base, module, f"{module}.bias", ("linear", "conv1d", "norm"), head=True)
    (tensor,) = tensors.values()
    check_shape(f"{module}.bias", tensor, (shape.out_features,))
    if "delta" in tensors or shape.bias is None:
        return tensor
    return tensor.float() - shape.bias.float()


class BitFitOp(RunsOp):
    """Semantics: y[t] += d[s] for each row t of the pool, s its slot. d [slots, out], zero where unused."""

    order: ClassVar[int] = 20

    def __init__(self, out_features: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.delta = Pool((out_features,), 0.0, device, dtype)

    @property
    def nbytes(self) -> int:
        return self.delta.nbytes

    def grow(self, capacity: int) -> None:
        self.delta.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.delta.put(slot, tensors["delta"])
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        self.delta.clear(slot)

    def prepare(self, rows: Rows) -> Sequence[Run]:
        return (AddRows(self.delta.tensor, rows),)
