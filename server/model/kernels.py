"""Kernels: the one place that chooses between native code and pure torch, and says which it chose and why.

Knows no adapters and no requests. Every native kernel has a torch twin, so a server without a compiler is slower, never
different.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..methods.base import Rows
from ..methods.lora import Kernel as LoraKernel
from ..methods.maps import LinearMap, MakeLinear
from .attention import PagedAttention, WriteKV, torch_attention, torch_write
from .fused import fuse_model
from .fused_layer import fuse_layers
from .linear import pack_model
from .native import NativeKernels, NativeUnavailable, open_library
from .step import Step


@dataclass(frozen=True)
class Kernels:
    """What a step is computed with."""

    name: str  # for the log and /info: "native" or "torch (why)"
    attention: PagedAttention = torch_attention
    write: WriteKV = torch_write
    lora: LoraKernel | None = None  # None: LoRA's own torch arithmetic
    linear: MakeLinear | None = None  # of matrices that adapters bring; None: torch's products
    prepare: Callable[[nn.Module], None] | None = None  # swaps modules of the base for packed and fused ones


def choose_kernels(device: torch.device, dtype: torch.dtype, wanted: bool, home: Path, say: Callable[[str], None]) -> Kernels:
    """Native kernels on a CPU in fp32, if wanted and possible; else pure torch."""
    if device.type != "cpu" or dtype is not torch.float32:
        return Kernels(f"torch ({device.type}, {dtype})")
    if not wanted:
        return Kernels("torch (--no-native)")
    try:
        return native_kernels(open_library(home, say))
    except NativeUnavailable as reason:
        return Kernels(f"torch ({reason})")


def native_kernels(native: NativeKernels) -> Kernels:
    def attention(q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, window: int, softcap: float) -> Tensor:
        return native.attention(
            q, keys, values, step.tables, step.starts, step.contexts, scale=scale, window=window, softcap=softcap
        )

    def lora(a: Tensor, b: Tensor, rows: Rows) -> Callable[[Tensor, Tensor], None]:
        return native.lora_over(a, b, rows.index, rows.slot)

    def linear(weight: Tensor, bias: Tensor | None) -> LinearMap:
        return native.packed_linear(weight if weight.dtype is torch.bfloat16 else weight.float(), bias)

    def prepare(model: nn.Module) -> None:
        pack_model(model, native)
        fuse_model(model, native)
        fuse_layers(model, native)

    return Kernels("native", attention, native.write_kv, lora, linear, prepare)
