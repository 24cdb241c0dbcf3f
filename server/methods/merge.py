"""Merging LoRAs (task arithmetic; TIES: Yadav et al., 2023; DARE: Yu et al., 2024) as PEFT's `add_weighted_adapter` does.

Owns the arithmetic. Knows no names and no tenants: a source is called by its place in the request.

    A, B are merged each on its own. With w = weight * the adapter's LoRA scale, A goes in times sign(w) sqrt|w|, B times
    sqrt|w|; the merged adapter's scale is 1 (with rsLoRA PEFT gives it sqrt(r) by oversight, which is not copied).
    A module that only some sources adapt is merged over those.

Random masks (dare_*) are drawn from the recipe's digest, the module, the matrix and the source's place: a merge is
the same whenever and wherever it is computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ValidationError
from ..recipes import Merge, SignMethod
from .base import Adapter, Part, Tensors
from .lora import pooled


@dataclass(frozen=True)
class _Trained:
    """One source's matrices at one module, as trained: the LoRA scale is not in B."""

    index: int  # in the recipe's sources
    a: Tensor  # [r, in] fp32
    b: Tensor  # [out, r] fp32
    scale: float


def merge(recipe: Merge, adapters: Sequence[Adapter]) -> Part:
    """One LoRA part out of the sources' LoRAs. Raises: ValidationError naming the source that cannot be merged."""
    modules: dict[str, list[_Trained]] = {}
    for index, adapter in enumerate(adapters):
        for part in adapter.parts:
            _check_part(index, part)
            for module, tensors in part.sites.items():
                modules.setdefault(module, []).append(_as_trained(index, module, tensors, part.scale))
    return pooled({module: _merged(recipe, module, found) for module, found in modules.items()})


def _check_part(index: int, part: Part) -> None:
    if part.method != "lora":
        raise ValidationError(f"{_source(index)} holds {part.method}; only LoRA can be merged")


def _as_trained(index: int, module: str, tensors: Tensors, scales: Mapping[str, float]) -> _Trained:
    if "bias" in tensors:
        raise ValidationError(f"{_source(index)} has a LoRA bias at {module}, which merging would lose")
    scale = scales.get(module, 1.0)
    if scale == 0:
        raise ValidationError(f"{_source(index)} has a LoRA scale (alpha) of 0 at {module}")
    return _Trained(index, tensors["A"].float(), tensors["B"].float() / scale, scale)


def _merged(recipe: Merge, module: str, found: Sequence[_Trained]) -> dict[str, Tensor]:
    ranks = sorted({len(each.a) for each in found})
    if len(ranks) > 1:
        raise ValidationError(f"`merged_adapters` have different ranks ({', '.join(map(str, ranks))}) at {module}")
    weights = [recipe.weights[each.index] * each.scale for each in found]
    roots = torch.tensor([math.sqrt(abs(weight)) for weight in weights])
    signed = torch.tensor([math.copysign(math.sqrt(abs(weight)), weight) for weight in weights])
    site = {
        "A": _combine(recipe, f"{module}.A", [(each.index, each.a) for each in found], signed),
        "B": _combine(recipe, f"{module}.B", [(each.index, each.b) for each in found], roots),
    }
    if not all(bool(torch.isfinite(tensor).all()) for tensor in site.values()):
        raise ValidationError(f"`merged_adapters` overflow at {module}; use smaller weights")
    return site


def _combine(recipe: Merge, name: str, found: Sequence[tuple[int, Tensor]], factors: Tensor) -> Tensor:
    """Equal shapes in, one tensor of that shape out; factors [k]."""
    # With one adapter named there is nothing to agree on: PEFT merges it linearly whatever was asked for.
    strategy = recipe.strategy if len(recipe.sources) > 1 else "linear"
    stack = torch.stack([tensor for _, tensor in found])
    if recipe.density < 1 and strategy == "ties":
        stack = torch.stack([keep_largest(tensor, recipe.density) for tensor in stack])
    elif recipe.density < 1 and strategy.startswith("dare"):
        kept = [random_mask(recipe, name, index, tensor) for index, tensor in found]
        stack = stack * torch.stack(kept) / recipe.density
    weighted = stack * factors.view(-1, *[1] * (stack.ndim - 1))
    if not strategy.endswith("ties"):
        return weighted.sum(0)
    agrees = stack.sign() == majority_sign(stack, recipe.majority_sign_method)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the `density` share of values that are largest in size."""
    flat = tensor.flatten()
    kept = torch.zeros_like(flat)
    top = flat.abs().topk(int(density * flat.numel())).indices
    kept[top] = flat[top]
    return kept.view_as(tensor)


def random_mask(recipe: Merge, name: str, index: int, tensor: Tensor) -> Tensor:
    """0 or 1 for each value of `tensor`, 1 with probability `density`; depends on the arguments before it alone."""
    seed = hashlib.sha256(f"{recipe.digest} {name} {index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") >> 1)
    return (torch.rand(tensor.shape, generator=generator) < recipe.density).to(tensor)


def majority_sign(stack: Tensor, method: SignMethod) -> Tensor:
    """[k, ...] -> [...] of 1 and -1: the sign of the values' sum (total) or of most values (frequency)."""
    votes = stack.sum(0) if method == "total" else stack.sign().sum(0)
    return torch.where(votes >= 0, 1.0, -1.0)


def _source(index: int) -> str:
    return f"`merged_adapters.ids[{index}]`"
