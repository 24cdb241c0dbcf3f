"""LN-tuning (Zhao et al., 2023) and every other norm replaced by a trained one: y * scale + shift behind the base's norm.

Owns the "norm" pool and the step from stored weights to scale and shift. Never reads files.

    base norm   y  = n * w  + b          w = offset + weight (ModuleShape.offset: gemma stores the distance from 1)
    trained     y' = n * w' + b'  =  y * (w' / w) + b' - b * (w' / w)

    Checkpoint.sites[module] = {"weight": [H], "bias": [H] where the base has one}, as stored
    Part.sites[module] = {"scale": [H], "shift": [H]}; norms equal to the base's are left out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, ModuleShape, Op, Part, Rows, Run, Tensors, check_shape, site_shape
from .grouped import AddRows, MulRows, Pool, RunsOp

#: How often over a trained norm's own size the base's bias may appear on the way: 1024 costs 10 of fp32's 24 bits.
MOST_CANCELLED = 1024.0


class LnTuning(Method):
    """Trained weights (and biases) of LayerNorm and RMSNorm modules."""

    name: ClassVar[str] = "ln_tuning"
    also: ClassVar[str] = "norms in `modules_to_save` of any PEFT file"
    served: ClassVar[str] = "a scale and a shift behind the base's norm"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        if not checkpoint.sites:
            raise AdapterError("ln_tuning", "the upload holds no norms")
        sites = {module: _affine(module, tensors, base) for module, tensors in checkpoint.sites.items()}
        return Part(self.name, pool="norm", sites={module: site for module, site in sites.items() if site})

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        return NormOp(base.modules[module].out_features, device, dtype)


def _affine(module: str, tensors: Tensors, base: BaseShape) -> dict[str, Tensor]:
    """scale and shift in fp32; empty for a norm that is the base's own."""
    shape = base.modules.get(module)
    if shape is None or shape.kind != "norm":
        site_shape(base, module, f"{module}.weight", ("norm",))
    checked_pair(module, tensors, base)
    weight, bias = tensors["weight"].float(), tensors.get("bias")
    old = base.weight(module)
    moved = torch.zeros_like(old) if bias is None else bias.float() - _bias(base.modules[module])
    if torch.equal(weight, old) and not moved.any():
        return {}
    shape = site_shape(base, module, f"{module}.weight", ("norm",))
    if shape.offset is None:
        raise AdapterError(f"{module}.weight", f"{module!r} does not scale by its weight as a norm does; it cannot be adapted")
    scale = _ratio(module, shape.offset + weight, shape.offset + old)
    shift = _bias(shape) * (1.0 - scale) + moved
    _check_precision(module, shape, scale, shape.offset + weight, shift)
    return {"scale": scale, "shift": shift}


def checked_pair(module: str, tensors: Tensors, base: BaseShape) -> None:
    """A module's stored weight and bias are those the base has. Raises: AdapterError naming the tensor."""
    shape = base.modules[module]
    if "weight" not in tensors:
        raise AdapterError(f"{module}.weight", "is missing although the bias is there")
    if "bias" in tensors and shape.bias is None:
        raise AdapterError(f"{module}.bias", "is stored, but the base model's module has no bias")
    if "bias" not in tensors and shape.bias is not None:
        raise AdapterError(f"{module}.bias", "is missing although the weight is there")
    sizes = {
        "linear": (shape.out_features, shape.in_features),
        "norm": (shape.out_features,),
    }.get(shape.kind, (shape.in_features, shape.out_features))
    check_shape(f"{module}.weight", tensors["weight"], sizes)
    if "bias" in tensors:
        check_shape(f"{module}.bias", tensors["bias"], (shape.out_features,))


def _bias(shape: ModuleShape) -> Tensor:
    return torch.zeros(shape.out_features) if shape.bias is None else shape.bias


def _ratio(module: str, new: Tensor, old: Tensor) -> Tensor:
    """new / old, exactly 1 where they are equal. Raises: AdapterError naming a channel that the base has at zero."""
    same = new == old
    dead = (old == 0) & ~same
    if dead.any():
        at = int(dead.nonzero()[0])
        raise AdapterError(f"{module}.weight", f"channel {at} is {float(new[at]):g}, but zero in the base: it is lost there")
    return torch.where(same, 1.0, new / torch.where(same, 1.0, old))


def _check_precision(module: str, shape: ModuleShape, scale: Tensor, weight: Tensor, shift: Tensor) -> None:
    """Raises: AdapterError where a trained norm drowns in the base's bias, or is no number."""
    finite = scale.isfinite() & shift.isfinite()
    size = weight.abs() + (_bias(shape) * scale + shift).abs()
    lost = ~finite | ((scale != 1) & ((_bias(shape) * scale).abs() > MOST_CANCELLED * size))
    if lost.any():
        at = int(lost.nonzero()[0])
        raise AdapterError(f"{module}.weight", f"channel {at} is too small in the base to be scaled to {float(weight[at]):g}")


class NormOp(RunsOp):
    """Semantics: y[t] = y[t] * scale[s] + shift[s] for each row t of the pool, s its slot. Elementwise: no row moves another.

    scale, shift [slots, H], 1 and 0 where unused.
    """

    order: ClassVar[int] = 4

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = Pool((width,), 1.0, device, dtype)
        self.shift = Pool((width,), 0.0, device, dtype)

    @property
    def nbytes(self) -> int:
        return self.scale.nbytes + self.shift.nbytes

    def grow(self, capacity: int) -> None:
        self.scale.grow(capacity)
        self.shift.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.scale.put(slot, tensors["scale"])
        self.shift.put(slot, tensors["shift"])
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        self.scale.clear(slot)
        self.shift.clear(slot)

    def prepare(self, rows: Rows) -> Sequence[Run]:
        return MulRows(self.scale.tensor, rows), AddRows(self.shift.tensor, rows)
