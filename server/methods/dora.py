"""DoRA (Liu et al., 2024): LoRA whose adapted weight is brought to a learned length in every output feature.

Owns the "dora:<bucket>" pools: a factor per output beside LoRA's own arithmetic. The factor is worked out once, at load,
against the base's weight, as PEFT does in every step; its norms are those of the base and this adapter alone.

    Checkpoint.sites[module] = LoRA's, with "magnitude" [out] = m;  Checkpoint.config = LoRA's
    f = m / ||W + s B A||     a norm per output feature: over a Linear's inputs, over an embedding's vocabulary
    Part.sites[module] = {"A", "B": f s B, "factor": f [out]}, and "shift": (1 - f) b [out] where the base has a bias b
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, Op, Part, Rows, Run, Tensors, check_shape
from .grouped import AddRows, MulRows, Pool, PooledOp, RunsOp
from .lora import Kernel, bucket_of, low_rank_op, read_site, with_gain


class Dora(Method):
    """DoRA on Linear, Conv1D and embedding modules; `kernel` replaces the torch arithmetic where one is given."""

    name: ClassVar[str] = "dora"
    also: ClassVar[str] = "`use_dora` of PEFT `LORA`"
    served: ClassVar[str] = "LoRA beside a factor per output, worked out at load against the base's weight"

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        scales = checkpoint.config.get("scale")
        if not isinstance(scales, Mapping) or not checkpoint.sites:
            raise AdapterError("dora", "the upload holds no DoRA tensors")
        sites = {
            module: _read_site(module, tensors, float(scales[module]), base, limits)
            for module, tensors in checkpoint.sites.items()
        }
        return Part(self.name, pool=f"dora:{bucket_of(max(len(site['A']) for site in sites.values()))}", sites=sites)

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        shape = base.modules[module]
        rank = int(str(part.pool).split(":")[1])
        product = low_rank_op(shape, rank, device, dtype, self.kernel)
        return DoraOp(product, shape.out_features, device)


def _read_site(module: str, tensors: Tensors, scale: float, base: BaseShape, limits: Limits) -> dict[str, Tensor]:
    site = read_site(module, tensors, scale, base, limits)
    bias = base.modules[module].bias
    factor = _factor(module, site, tensors.get("magnitude"), base)
    site = with_gain(base, module, site)
    found = {"A": site["A"], "B": site["B"] * factor[:, None], "factor": factor}
    return found if bias is None else {**found, "shift": bias.float() * (1 - factor)}


def _factor(module: str, site: Tensors, magnitude: Tensor | None, base: BaseShape) -> Tensor:
    """m / ||W + s B A|| [out], in fp32; `site` holds A and s B."""
    name, shape = f"{module}.lora_magnitude_vector", base.modules[module]
    if magnitude is None:
        raise AdapterError(name, "is missing, and DoRA needs it")
    check_shape(name, magnitude, (shape.out_features,))
    a, b = site["A"].float(), site["B"]
    weight = base.weight(module)  # a copy: it may be added to
    if shape.kind == "embedding":
        norm: Tensor = torch.linalg.vector_norm(weight.addmm_(a.T, b.T), dim=0)
    else:
        norm = torch.linalg.vector_norm(weight.addmm_(b, a), dim=1)
    factor = magnitude.float() / norm
    if not bool(torch.isfinite(factor).all()):
        raise AdapterError(name, f"cannot be reached: an adapted output feature of {module!r} has length 0")
    return factor


class DoraOp(RunsOp):
    """Semantics: y[t] = (y[t] - b) * f[s] + b + f[s] * s B[s] A[s] x[t] for each row t of the pool, s its slot.

    f [slots, out], one where unused; the bias's share (1 - f) b [slots, out] once a base with a bias brought one. Runs ahead
    of LoRA, whose additions (another adapter's, on the same row) are not the base's weight and keep their length.
    """

    order: ClassVar[int] = 8

    def __init__(self, product: PooledOp, out_features: int, device: torch.device) -> None:
        super().__init__()
        self.product = product
        self.factor = Pool((out_features,), 1.0, device, torch.float32)
        self.shift: Pool | None = None

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools())

    def grow(self, capacity: int) -> None:
        for pool in self._pools():
            pool.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.clear(slot)
        self.product.put(slot, {"A": tensors["A"], "B": tensors["B"]})
        self.factor.put(slot, tensors["factor"])
        if "shift" in tensors:
            self._shift_pool().put(slot, tensors["shift"])
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        for pool in self._pools():
            pool.clear(slot)

    def prepare(self, rows: Rows) -> Sequence[Run]:
        runs: list[Run] = [MulRows(self.factor.tensor, rows)]
        if self.shift is not None:
            runs.append(AddRows(self.shift.tensor, rows))
        product = self.product.runs(rows)
        return [*runs, *product] if product is not None else [*runs, partial(self._product, rows)]

    def _product(self, rows: Rows, x: Tensor, y: Tensor) -> None:
        self.product.after(x, y, rows)

    def _pools(self) -> list[PooledOp | Pool]:
        pools: list[PooledOp | Pool] = [self.product, self.factor]
        return [*pools, self.shift] if self.shift else pools

    def _shift_pool(self) -> Pool:
        if self.shift is None:
            self.shift = Pool(self.factor.tensor.shape[1:], 0.0, self.factor.tensor.device, torch.float32)
            self.shift.grow(len(self.factor.tensor))
        return self.shift
