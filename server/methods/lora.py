"""LoRA (Hu et al., 2021), any rank per adapter and module, rsLoRA, LoRA biases: y + B A x (+ d) on the named rows.

Owns the neutral form both checkpoint dialects write, the "lora:<bucket>[:bf16]" pools and their arithmetic.
Never reads files and never decides which rows it runs on.

    Checkpoint.sites[module] = {"A": [r, in], "B": [out, r]}, an embedding's in being the vocabulary; optionally "bias"
                               [out] (scaled like B), "base" and "base_bias", copies of the base's weight and bias,
                               which have to be just that
    Checkpoint.config = {"scale": {module: float}}            alpha / r, or alpha / sqrt(r) for rsLoRA
    Part.sites[module]: A, B and bias, with the scale (and an embedding's own gain) folded into "B" and "bias"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import (
    BaseShape,
    Checkpoint,
    Limits,
    Method,
    ModuleShape,
    Op,
    Part,
    Rows,
    Run,
    Tensors,
    check_shape,
    finite,
    site_shape,
)
from .grouped import AddRows, Pool, RunsOp, split_of
from .lora_embedding import EmbeddingLoraOp

#: kernel(A, B, rows) -> run, which adds B[slot]^T A[slot] x to the pool's rows; A [S, r, in], B [S, r, out]. A run is made
#: once per composition, so that a step pays for its arithmetic alone.
Kernel = Callable[[Tensor, Tensor, Rows], Run]

SMALLEST_BUCKET = 8


def bucket_of(rank: int) -> int:
    """The pool's rank: the next power of two, so that a handful of pools hold every rank."""
    return max(SMALLEST_BUCKET, 1 << (rank - 1).bit_length())


def pooled(sites: Mapping[str, Tensors]) -> Part:
    """A part of these sites, in the pool that their largest rank and their values allow."""
    pool = f"lora:{bucket_of(max(tensors['A'].shape[0] for tensors in sites.values()))}"
    if all(_is_bf16(tensors[side]) for tensors in sites.values() for side in ("A", "B")):
        pool, sites = f"{pool}:bf16", {module: _narrow(tensors) for module, tensors in sites.items()}
    return Part(Lora.name, pool=pool, sites=sites)


class Lora(Method):
    """LoRA on Linear, Conv1D and embedding modules; `kernel` replaces the torch arithmetic where one is given."""

    name: ClassVar[str] = "lora"
    served: ClassVar[str] = "slot pools by rank bucket; bf16 storage where that is lossless"

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        scales = checkpoint.config.get("scale")
        if not isinstance(scales, Mapping) or not checkpoint.sites:
            raise AdapterError("lora", "the upload holds no LoRA tensors")
        sites = {
            module: with_gain(base, module, read_site(module, tensors, float(scales[module]), base, limits))
            for module, tensors in checkpoint.sites.items()
        }
        return replace(pooled(sites), scale={module: float(scales[module]) for module in sites})

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        shape = base.modules[module]
        _, rank, *narrow = str(part.pool).split(":")
        held = torch.bfloat16 if narrow else dtype
        return low_rank_op(shape, int(rank), device, held, self.kernel)


def low_rank_op(
    shape: ModuleShape, rank: int, device: torch.device, dtype: torch.dtype, kernel: Kernel | None
) -> LoraOp | EmbeddingLoraOp:
    """What adds B A x at a module of that shape."""
    if shape.kind != "embedding":
        return LoraOp(rank, shape.in_features, shape.out_features, device, dtype, kernel)
    product = LoraOp(rank, rank, shape.out_features, device, dtype, kernel)
    return EmbeddingLoraOp(shape.in_features, rank, product, device, dtype)


def read_site(module: str, tensors: Tensors, scale: float, base: BaseShape, limits: Limits) -> dict[str, Tensor]:
    """A and the scaled B (and bias) of one module. Raises: AdapterError naming the tensor that does not fit the base."""
    shape = site_shape(base, module, f"{module}.lora_A", ("linear", "conv1d", "embedding"), head=True)
    if shape.kind == "embedding" and (shape.gain is None or "bias" in tensors):
        what = "a LoRA bias" if "bias" in tensors else "LoRA, for it is not a plain table of rows"
        raise AdapterError(f"{module}.lora_A", f"the embedding {module!r} cannot have {what}")
    a, b = (_matrix(module, side, tensors) for side in ("A", "B"))
    rank = a.shape[0]
    if rank > limits.max_rank:
        raise AdapterError(f"{module}.lora_A", f"rank {rank} is over this server's limit of {limits.max_rank}")
    check_shape(f"{module}.lora_A", a, (rank, shape.in_features))
    check_shape(f"{module}.lora_B", b, (shape.out_features, rank))
    site = {"A": a, "B": _scaled(f"{module}.lora_B", b, scale)}
    if "bias" in tensors:
        check_shape(f"{module}.lora_B.bias", tensors["bias"], (shape.out_features,))
        site["bias"] = _scaled(f"{module}.lora_B.bias", tensors["bias"], scale)
    if "base" in tensors:
        _check_copy(module, tensors["base"], base)
    if "base_bias" in tensors:
        _check_same(f"{module}.base_layer.bias", tensors["base_bias"], shape.bias)
    return site


def _check_copy(module: str, stored: Tensor, base: BaseShape) -> None:
    """PEFT stores an adapted embedding's own weight too, and would load it over the base's."""
    shape, name = base.modules[module], f"{module}.base_layer.weight"
    swapped = shape.kind == "linear"
    check_shape(name, stored, (shape.out_features, shape.in_features) if swapped else (shape.in_features, shape.out_features))
    weight = base.weight(module)
    _check_same(name, stored, weight.T if shape.kind == "conv1d" else weight)


def _check_same(name: str, stored: Tensor, own: Tensor | None) -> None:
    if own is None or not torch.equal(stored, own.to(stored.dtype)):
        raise AdapterError(name, "differs from the base model's; the adapter was made for another base, or trained it")


def with_gain(base: BaseShape, module: str, site: dict[str, Tensor]) -> dict[str, Tensor]:
    """An embedding that scales its rows (Gemma's) scales what is added to them too."""
    shape = base.modules[module]
    gain = shape.gain if shape.kind == "embedding" else 1.0
    return site if gain in (None, 1.0) else {**site, "B": site["B"] * gain}


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
    """In fp32: a bf16 product would round what PEFT computes in fp32. B lies in memory as pools hold it, transposed."""
    scaled = tensor.t().contiguous().float() * scale
    if not finite(scaled):
        raise AdapterError(name, f"overflows when multiplied by the LoRA scale {scale:g}")
    return scaled.t()


class LoraOp(RunsOp):
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

    @property
    def graphable(self) -> bool:
        return self.kernel is not None and self.bias is None

    def grow(self, capacity: int) -> None:
        for pool in self._pools():
            pool.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.a.put(slot, tensors["A"])
        self.b.put(slot, tensors["B"].T)
        if self.bias is not None:
            self.bias.clear(slot)
        if "bias" in tensors:
            self._bias_pool().put(slot, tensors["bias"])
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        for pool in self._pools():
            pool.clear(slot)

    def prepare(self, rows: Rows) -> Sequence[Run]:
        if self.kernel is None:
            product: Run = partial(self._torch, rows)
        else:
            product = self.kernel(self.a.tensor, self.b.tensor, rows)
        return (product,) if self.bias is None else (product, AddRows(self.bias.tensor, rows))

    def _pools(self) -> list[Pool]:
        return [self.a, self.b] + ([self.bias] if self.bias else [])

    def _bias_pool(self) -> Pool:
        if self.bias is None:
            b = self.b.tensor
            self.bias = Pool((b.shape[2],), 0.0, b.device, torch.float32 if b.device.type == "cpu" else b.dtype)
            self.bias.grow(len(b))
        return self.bias

    def _torch(self, rows: Rows, x: Tensor, y: Tensor) -> None:
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
        kept = rows.scratch.get((self, "gathered"))
        if kept is None:
            kept = rows.scratch[self, "gathered"] = self.a.tensor[slots].to(dtype), self.b.tensor[slots].to(dtype)
        return cast("tuple[Tensor, Tensor]", kept)


def _write_back(y: Tensor, where: slice | Tensor, own: Tensor) -> None:
    if isinstance(where, Tensor):
        y[where] = own
