"""Kernels: the one place that chooses between native code and pure torch, and says which it chose and why.

Knows no adapters and no requests. Every native kernel has a torch twin, so a server without a compiler is slower, never
different.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..methods.lora import Kernel as LoraKernel
from .attention import PagedAttention, torch_attention


@dataclass(frozen=True)
class Kernels:
    """What a step is computed with."""

    name: str  # for the log and /info: "native (...)" or "torch (why)"
    attention: PagedAttention = torch_attention
    lora: LoraKernel | None = None  # None: LoRA's own torch arithmetic
    prepare: Callable[[nn.Module], None] | None = None  # swaps modules of the base for packed or fused ones


def choose_kernels(device: torch.device, native: bool, home: Path, say: Callable[[str], None]) -> Kernels:
    """Native CPU kernels if wanted and possible, else pure torch."""
    if device.type != "cpu":
        return Kernels(f"torch ({device.type})")
    return Kernels("torch")
