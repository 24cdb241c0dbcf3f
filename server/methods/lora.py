"""LoRA (Hu et al., 2021), any rank per adapter and module, rsLoRA, LoRA biases: y + B A x (+ d) on the named rows.

Owns the neutral form both checkpoint dialects write, the "lora:<bucket>[:bf16]" pools and their arithmetic.
Never reads files and never decides which rows it runs on.

    Checkpoint.sites[module] = {"A": [r, in], "B": [out, r]}, optionally "bias" [out] (scaled like B)
    Checkpoint.config = {"scale": {module: float}}            alpha / r, or alpha / sqrt(r) for rsLoRA
    Part.sites[module]: the same names with the scale folded into "B" and "bias"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import (
    BaseShape,
    Checkpoint,
    Limits,
    Method,
    Op,
    Part,
    Rows,
    Tensors,
    check_shape,
    site_shape,
)
from .grouped import Pool, PooledOp, per_row, split_of

#: kernel(x, y, A, B, rows): adds B[slot]^T A[slot] x to the pool's rows of y [T, out], in place; A [S, r, in], B [S, r, out].
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Rows], None]

SMALLEST_BUCKET = 8


def bucket_of(rank: int) -> int:
    """The pool's rank: the next power of two, so that a handful of pools hold every rank."""
    return max(SMALLEST_BUCKET, 1 << (rank - 1).bit_length())


class Lora(Method):
    """LoRA on Linear and Conv1D modules; `kernel` replaces the torch arithmetic where one is given."""

    name: ClassVar[str] = "lora"

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        scales = checkpoint.config.get("scale")
        if not isinstance(scales, Mapping) or not checkpoint.sites:
            raise AdapterError("lora", "the upload holds no LoRA tensors")
        sites = {
            module: _read_site(module, tensors, float(scales[module]), base, limits)
            for module, tensors in checkpoint.sites.items()
        }
        pool = f"lora:{bucket_of(max(tensors['A'].shape[0] for tensors in sites.values()))}"
        if all(_is_bf16(tensors[side]) for tensors in sites.values() for side in ("A", "B")):
            pool, sites = f"{pool}:bf16", {module: _narrow(tensors) for module, tensors in sites.items()}
        return Part(self.name, pool=pool, sites=sites)

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        shape = base.modules[module]
        _, rank, *narrow = str(part.pool).split(":")
        held = torch.bfloat16 if narrow else dtype
        return LoraOp(int(rank), shape.in_features, shape.out_features, device, held, self.kernel)


def _read_site(module: str, tensors: Tensors, scale: float, base: BaseShape, limits: Limits) -> dict[str, Tensor]:
    a, b = (_matrix(module, side, tensors) for side in ("A", "B"))
    shape = site_shape(base, module, f"{module}.lora_A", ("linear", "conv1d"))
    rank = a.shape[0]
    if rank > limits.max_rank:
        raise AdapterError(f"{module}.lora_A", f"rank {rank} is over this server's limit of {limits.max_rank}")
    check_shape(f"{module}.lora_A", a, (rank, shape.in_features))
    check_shape(f"{module}.lora_B", b, (shape.out_features, rank))
    site = {"A": a, "B": _scaled(f"{module}.lora_B", b, scale)}
    if "bias" in tensors:
        check_shape(f"{module}.lora_B.bias", tensors["bias"], (shape.out_features,))
        site["bias"] = _scaled(f"{module}.lora_B.bias", tensors["bias"], scale)
    return site


def _is_bf16(tensor: Tensor) -> bool:
    """Whether bf16 holds every value exactly: true of adapters saved in bf16 whose scale is a power of two."""
    return torch.equal(tensor.to(torch.bfloat16).to(tensor.dtype), tensor)


def _narrow(tensors: Tensors) -> dict[str, Tensor]:
    """A and B in half the bytes, with the same values; a LoRA bias keeps its dtype."""
    return {name: tensor if name == "bias" else tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def _matrix(module: str, side: str, tensors: Tensors) -> Tensor:
    name = f"{module}.lora_{side}"
    if side not in tensors:
        other = "B" if side == "A" else "A"
        raise AdapterError(name, f"is missing although lora_{other} is there")
    if tensors[side].ndim != 2:
        raise AdapterError(name, f"has {tensors[side].ndim} dimensions, LoRA needs 2")
    return tensors[side]


def _scaled(name: str, tensor: Tensor, scale: float) -> Tensor:
    """In fp32: a bf16 product would round what PEFT computes in fp32."""
    scaled = tensor.float() * scale
    if not bool(torch.isfinite(scaled).all()):
        raise AdapterError(name, f"overflows when multiplied by the LoRA scale {scale:g}")
    return scaled


class LoraOp(PooledOp):
    """Semantics: y[t] += B[s] @ (A[s] @ x[t]) + d[s] for each row t of the pool, s its slot.

    A [slots, r, in], B transposed [slots, r, out], zero padded from the adapter's rank to r; d [slots, out] once a LoRA
    bias came.

    Prefill rows come in long runs of one slot and decode rows one per slot, so a step's groups are split: a long one
    runs two GEMMs on its own rows, the short ones share two batched products over weights gathered once per
    composition.
    """

    order: ClassVar[int] = 10

    def __init__(
        self,
        rank: int,
        in_features: int,
        out_features: int,
        device: torch.device,
        dtype: torch.dtype,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        self.a = Pool((rank, in_features), 0.0, device, dtype)
        self.b = Pool((rank, out_features), 0.0, device, dtype)
        self.bias: Pool | None = None
        self.kernel = kernel

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (self.bias.nbytes if self.bias else 0)

    def grow(self, capacity: int) -> None:
        for pool in self._pools():
            pool.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.clear(slot)
        rank = tensors["A"].shape[0]
        self.a.tensor[slot, :rank] = tensors["A"]
        self.b.tensor[slot, :rank] = tensors["B"].T
        if "bias" in tensors:
            self._bias_pool().tensor[slot] = tensors["bias"]
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        for pool in self._pools():
            pool.clear(slot)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        rows = self.held(rows)
        if not rows.groups:
            return y
        if self.kernel is not None:
            self.kernel(x, y, self.a.tensor, self.b.tensor, rows)
        else:
            self._torch(x, y, rows)
        if self.bias is not None:
            rows.store(y, rows.take(y) + per_row(self.bias.tensor, rows, (self, "bias")))
        return y

    def _pools(self) -> list[Pool]:
        return [self.a, self.b] + ([self.bias] if self.bias else [])

    def _bias_pool(self) -> Pool:
        if self.bias is None:
            b = self.b.tensor
            self.bias = Pool((b.shape[2],), 0.0, b.device, torch.float32 if b.device.type == "cpu" else b.dtype)
            self.bias.grow(len(b))
        return self.bias

    def _torch(self, x: Tensor, y: Tensor, rows: Rows) -> None:
        split = split_of(rows)
        for slot, where in split.long:
            a, b = self.a.tensor[slot].to(x.dtype), self.b.tensor[slot].to(x.dtype)
            own = y[where]  # a view where `where` is a slice
            own.addmm_(x[where] @ a.T, b)
            _write_back(y, where, own)
        if split.short is not None:
            a, b = self._gathered(split.slots, rows, x.dtype)
            hidden = torch.bmm(a, x[split.short].unsqueeze(-1))  # [m, r, 1]
            own = y[split.short]
            own.unsqueeze(1).baddbmm_(hidden.transpose(1, 2), b)
            _write_back(y, split.short, own)

    def _gathered(self, slots: slice | Tensor, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [m, r, in] and B [m, r, out] of the short rows: the pool itself, or a copy kept with the composition."""
        kept = rows.scratch.get(self)
        if kept is None:
            kept = self.a.tensor[slots].to(dtype), self.b.tensor[slots].to(dtype)
            rows.scratch[self] = kept
        return cast("tuple[Tensor, Tensor]", kept)


def _write_back(y: Tensor, where: slice | Tensor, own: Tensor) -> None:
    if isinstance(where, Tensor):
        y[where] = own
