"""Fused norms and gated activations for the CPU, put in only where they prove to compute the same.

A module is recognised by its shape (attributes), never by its class; each replacement is tried on random numbers against
the original and dropped where it differs. Knows no adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .native import NativeKernels
from .sites import Extension

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RMSNorm:
    """A norm's forward over one scale per feature."""

    native: NativeKernels
    owner: nn.Module  # carries the `extension`: what adapters do here
    scale: Tensor  # [H]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        y = self.native.rms_norm(x.contiguous(), self.scale, self.eps)
        extension: Extension | None = getattr(self.owner, "extension", None)
        return y if extension is None else extension(x, y)


@dataclass(frozen=True)
class GatedMLP:
    """A feed-forward's: down(act(gate(x)) * up(x)). The projections are called as modules, so that adapters keep acting."""

    native: NativeKernels
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    kernel: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.down(self.kernel(self.gate(x), self.up(x))))


#: Inputs a replacement is tried on, one row each: an epsilon tells formulas apart near zero, an activation far from it.
_MAGNITUDES = (1e-4, 1e-2, 1.0, 10.0, 100.0)


def fuse_model(model: nn.Module, native: NativeKernels) -> int:
    """Give norms and gated feed-forwards a fused forward; returns how many modules got one."""
    fused = 0
    for module in model.modules():
        found = next((f for f, width in _candidates(module, native) if _agrees(module, f, width)), None)
        if found is not None:
            module.forward = found
            if isinstance(found, RMSNorm):
                module.extension = None  # type: ignore[assignment]  # nn.Module's annotation knows tensors and modules only
            fused += 1
    return fused


def _candidates(module: nn.Module, native: NativeKernels) -> Iterator[tuple[Forward, int]]:
    """(fused forward, width of its input) that may be equal to the module's own."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) == 1:
            yield _layer_norm(module, native), module.normalized_shape[0]
    elif isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(eps, float):
        for scale in (weight.data, 1.0 + weight.data):  # Gemma stores the scale's distance from 1
            yield RMSNorm(native, module, scale.contiguous(), eps), len(weight)
    elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        gate, up, down = (cast("nn.Module", getattr(module, name)) for name in ("gate_proj", "up_proj", "down_proj"))
        for kernel in (native.silu_mul, native.gelu_tanh_mul):
            yield GatedMLP(native, gate, up, down, kernel), cast("int", gate.in_features)


def _layer_norm(module: nn.LayerNorm, native: NativeKernels) -> Forward:
    return lambda x: native.layer_norm(x.contiguous(), module.weight, module.bias, module.eps)


def _agrees(module: nn.Module, fused: Forward, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, len(_MAGNITUDES), width, generator=generator) * torch.tensor(_MAGNITUDES)[:, None]
    try:
        expected, got = module(x), fused(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    allowed = 1e-4 * expected.abs() + 1e-5 * expected.abs().amax(-1, keepdim=True)
    return bool(((expected - got).abs() <= allowed).all())
