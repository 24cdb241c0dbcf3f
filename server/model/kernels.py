"""Kernels: the one place that chooses between native code and pure torch, and says which it chose and why.

Knows no adapters and no requests. Every native kernel has a torch twin, so a server without a compiler is slower, never
different.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..methods.base import Rows, Run
from ..methods.bottleneck import Kernel as BottleneckKernel
from ..methods.lora import Kernel as LoraKernel
from ..methods.maps import LinearMap, MakeLinear
from . import cuda
from .attention import MakeCaches, PagedAttention, WriteKV, torch_attention, torch_caches, torch_write
from .fused import fuse_model
from .fused_layer import fuse_layers
from .linear import pack_model
from .native import NativeKernels, NativeUnavailable, make_caches, open_library
from .quantized import quantize_model
from .sampling import FindPeaks, torch_peaks
from .step import Step


@dataclass(frozen=True)
class Kernels:
    """What a step is computed with."""

    name: str  # for the log and /info: "native" or "torch (why)"
    attention: PagedAttention = torch_attention
    write: WriteKV = torch_write
    caches: MakeCaches = torch_caches
    lora: LoraKernel | None = None  # None: LoRA's own torch arithmetic
    linear: MakeLinear | None = None  # of matrices that adapters bring; None: torch's products
    bottleneck: BottleneckKernel | None = None  # None: torch's products
    peaks: FindPeaks = torch_peaks
    prepare: Callable[..., None] | None = None  # (model): swaps modules of the base for packed and fused ones
    graphable: bool = False  # whether a CUDA graph can hold a step of decodes
    int8: bool = False  # whether `prepare` rounds the base's linear layers to eight bits
    splits_prompts: bool = False  # whether the base may compute prompts in another order of sums than what is generated


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    wanted: bool,
    home: Path,
    say: Callable[[str], None],
    block_size: int = 16,
    int8: bool = False,
) -> Kernels:
    """Native kernels on a CPU in fp32 and a GPU's own on CUDA, if wanted and possible; else pure torch."""
    chosen = _choose(device, dtype, wanted, home, say, block_size)
    return with_int8(chosen, dtype) if int8 else chosen


def with_int8(kernels: Kernels, dtype: torch.dtype) -> Kernels:
    """The same, but for the base's linear layers, which are rounded to eight bits as they are packed."""
    prepare = kernels.prepare
    if prepare is None:
        return replace(kernels, prepare=partial(quantize_model, dtype=dtype), int8=True)
    return replace(kernels, prepare=partial(prepare, int8=True), int8=True)


def _choose(
    device: torch.device, dtype: torch.dtype, wanted: bool, home: Path, say: Callable[[str], None], block_size: int
) -> Kernels:
    if not wanted:
        return Kernels("torch (--no-native)")
    if device.type == "cuda":
        chosen = cuda.choose(device, dtype, block_size)
        return Kernels(chosen.name, chosen.attention, lora=chosen.lora, graphable=chosen.graphable)
    if device.type != "cpu" or dtype is not torch.float32:
        return Kernels(f"torch ({device.type}, {dtype})")
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
        return native.lora_over(a, b, rows.index, rows.slot, rows.prompt)

    def linear(weight: Tensor, bias: Tensor | None) -> LinearMap:
        return native.packed_linear(weight if weight.dtype is torch.bfloat16 else weight.float(), bias)

    def bottleneck(activation: str, weights: Sequence[Tensor], rows: Rows, own: bool) -> Run:
        return native.bottleneck_over(activation, weights, rows.index, rows.slot, own=own)

    def prepare(model: nn.Module, int8: bool = False) -> None:
        pack_model(model, native, int8)
        fuse_model(model, native)
        fuse_layers(model, native)

    return Kernels(
        "native",
        attention,
        native.write_kv,
        make_caches,
        lora,
        linear,
        bottleneck,
        native.peaks,
        prepare,
        splits_prompts=native.has_tiles,
    )
