"""Whole modules trained and stored (PEFT's `modules_to_save`): a Linear, Conv1D, output head or embedding of one's own.

Owns the "full" pool: a matrix per slot, within `Limits.max_full_bytes` per upload. Never reads files.

    Checkpoint.sites[module] = {"weight": as the base stores it, "bias": [out] where the base has one}
    Part.sites[module] = {"weight": [out, in] or an embedding's [V, H], optionally "bias"}; modules equal to the base's
    are left out
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, ModuleShape, Op, Part, Rows, Tensors, site_shape
from .grouped import PooledOp
from .ln_tuning import checked_pair
from .maps import MakeLinear, Maps, indices


class Full(Method):
    """Replaced Linear, Conv1D and Embedding modules; `linear` replaces the torch product where one is given."""

    name: ClassVar[str] = "full"
    also: ClassVar[str] = "linears, embeddings and the output head in `modules_to_save` of any PEFT file, up to `--max-full-mb`"
    served: ClassVar[str] = "a matrix per slot; what equals the base is dropped"

    def __init__(self, linear: MakeLinear | None = None) -> None:
        self.linear = linear

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        sites: dict[str, Tensors] = {}
        for module, tensors in checkpoint.sites.items():
            if site := _module(module, tensors, base):
                sites[module] = site
                check_size(module, sum(t.nbytes for kept in sites.values() for t in kept.values()), limits)
        return Part(self.name, pool="full", sites=sites)

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        shape = base.modules[module]
        if shape.kind == "embedding":
            return TableOp(shape, device, dtype)
        return FullOp(Maps(self.linear, device, dtype))


def check_size(name: str, nbytes: int, limits: Limits) -> None:
    """Raises: AdapterError naming the module with which an upload's whole matrices exceed the limit."""
    if nbytes > limits.max_full_bytes:
        raise AdapterError(name, f"brings the whole matrices to {nbytes} bytes, over the limit of {limits.max_full_bytes}")


def _module(module: str, tensors: Tensors, base: BaseShape) -> dict[str, Tensor]:
    """The module the right way round; empty where it is the base's own."""
    shape = site_shape(base, module, f"{module}.weight", ("linear", "conv1d", "embedding"), head=True)
    checked_pair(module, tensors, base)
    weight, bias = tensors["weight"], tensors.get("bias")
    if shape.kind == "conv1d":
        weight = weight.T.contiguous()
    if torch.equal(weight.float(), base.weight(module)) and (bias is None or torch.equal(bias.float(), _own_bias(shape))):
        return {}
    if shape.gain is None:
        raise AdapterError(f"{module}.weight", f"{module!r} is not a plain table of rows; it cannot be replaced")
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _own_bias(shape: ModuleShape) -> Tensor:
    return torch.zeros(shape.out_features) if shape.bias is None else shape.bias


class FullOp(PooledOp):
    """Semantics: y[t] = W[s] x[t] + b[s] for each row t of the pool, s its slot: what the base gave is dropped."""

    order: ClassVar[int] = 1

    def __init__(self, maps: Maps) -> None:
        super().__init__()
        self.maps = maps

    @property
    def nbytes(self) -> int:
        return self.maps.nbytes

    def grow(self, capacity: int) -> None:
        """A slot takes its memory when it is put."""

    def put(self, slot: int, tensors: Tensors) -> None:
        self.maps.put(slot, tensors["weight"], tensors.get("bias"))
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        self.maps.clear(slot)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        for slot, index in indices(self.held(rows)):
            y[index] = self.maps.product(slot, x, index)
        return y


class TableOp(PooledOp):
    """Semantics: y[t] = gain * table[s][x[t]] for each row t of the pool, s its slot; x [T] ids."""

    order: ClassVar[int] = 1

    def __init__(self, shape: ModuleShape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._gain = shape.gain or 1.0
        self._device = device
        self._dtype = dtype
        self._tables: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    def grow(self, capacity: int) -> None:
        """A slot takes its memory when it is put."""

    def put(self, slot: int, tensors: Tensors) -> None:
        stored = tensors["weight"]
        narrow = stored.dtype is torch.bfloat16 or self._dtype is torch.bfloat16
        self._tables[slot] = stored.to(self._device, torch.bfloat16 if narrow else self._dtype, copy=True)
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        self._tables.pop(slot, None)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        for slot, index in indices(self.held(rows)):
            y[index] = self._tables[slot][x[index]].to(y.dtype) * self._gain
        return y
