"""What the stored weight of a norm or an embedding means, found by trying small tables of our own in the module's place.

    norm        y = n(x) * (offset + weight) (+ bias)      offset 0, or 1 where the distance from 1 is stored (gemma)
    embedding   y = gain * weight[id]                       gain 1, or a scale inside the module (gemma 3)

Knows no class by name. Never touches the module's own tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ROWS = 4


def norm_offset(module: nn.Module, width: int) -> float | None:
    """None when the module is not a norm with a scale of that form."""
    x = torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(0))
    outputs = _tried(module, x, [torch.full((width,), scale) for scale in (0.0, 1.0, 3.0)])
    if outputs is None:
        return None
    zero, one, three = outputs
    unit = one - zero
    power = float((unit * unit).sum())
    if not power or not torch.allclose(three - zero, 3 * unit, rtol=1e-4, atol=1e-5):
        return None
    offset = round(float((zero * unit).sum()) / power, 4)
    return offset if torch.allclose(zero, offset * unit, rtol=1e-4, atol=1e-5) else None


def embedding_gain(module: nn.Module, width: int) -> float | None:
    """None when the module is not a table whose rows come out as they are, or scaled."""
    table = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0))
    outputs = _tried(module, torch.arange(_ROWS)[None], [torch.ones(_ROWS, width), table])
    if outputs is None:
        return None
    gain = float(outputs[0][0, 0, 0])
    return gain if torch.allclose(outputs[1][0], gain * table, rtol=1e-5, atol=1e-6) else None


def _tried(module: nn.Module, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor] | None:
    """The module's outputs with each weight in place of its own and no bias; None where it cannot be run like that."""
    device = next(module.parameters()).device
    try:
        with torch.no_grad():
            found = [_stand_in(module, weight.to(device))(x.to(device)) for weight in weights]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    shape = (*x.shape[:2], weights[0].shape[-1])
    return [y.float().cpu() for y in found] if all(isinstance(y, Tensor) and y.shape == shape for y in found) else None


def _stand_in(module: nn.Module, weight: Tensor) -> nn.Module:
    """A shallow copy with parameters of its own: it shares what else the module is made of."""
    twin = copy.copy(module)
    twin._parameters = dict.fromkeys(module._parameters)
    twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if isinstance(twin, nn.Embedding):
        twin.padding_idx = None  # it may lie outside the small table
    return twin
