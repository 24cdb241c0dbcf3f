"""A GPU's kernels, each tried before it is used: attention and LoRA. The one place that chooses among them.

    attention   varlen_attn (FlashAttention 2) where it fits > Triton > pure torch
    LoRA        Triton > LoRA's own torch arithmetic

Triton comes with torch's CUDA builds; without it, or where a trial fails, torch does the work and the name says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..attention import PagedAttention, torch_attention
from ..step import Step
from .trial import LoraKernel, failing, try_attention, try_lora
from .varlen import varlen_attention, varlen_takes

_TRIAL_DIM = 64  # heads of a size that every kernel takes


@dataclass(frozen=True)
class CudaKernels:
    """What was chosen."""

    name: str  # for the log and /info
    attention: PagedAttention
    lora: LoraKernel | None  # None: LoRA's own torch arithmetic
    graphable: bool  # whether none of them waits for the device or looks at the host, so that a CUDA graph can hold them


def choose(device: torch.device, dtype: torch.dtype, block_size: int) -> CudaKernels:
    """The fastest kernels that pass their trials for activations of this dtype and blocks of this size."""
    general, general_name = _general_attention(device, dtype, block_size)
    attention, attention_name = _attention(device, dtype, block_size, general, general_name)
    lora, lora_name = _lora(device, dtype)
    name = f"cuda (attention: {attention_name}; LoRA: {lora_name})"
    return CudaKernels(name, attention, lora, general is not torch_attention and lora is not None)


def _general_attention(device: torch.device, dtype: torch.dtype, block_size: int) -> tuple[PagedAttention, str]:
    """One that takes every form, softcap and all."""
    try:
        from .paged import triton_attention
    except ImportError as error:
        return torch_attention, f"torch, {error}"
    reason = "".join(
        failing(partial(try_attention, triton_attention, device, dtype, block_size, softcap)) for softcap in (0.0, 5.0)
    )
    return (torch_attention, f"torch, {reason}") if reason else (triton_attention, "triton")


def _attention(
    device: torch.device, dtype: torch.dtype, block_size: int, general: PagedAttention, general_name: str
) -> tuple[PagedAttention, str]:
    if not varlen_takes(_TRIAL_DIM, dtype, block_size, softcap=0.0):
        return general, general_name
    reason = failing(partial(try_attention, varlen_attention, device, dtype, block_size, 0.0))
    if reason:
        return general, f"{general_name}, varlen_attn failed: {reason}"
    return varlen_or(general), f"varlen_attn, {general_name} for softcap"


def varlen_or(general: PagedAttention) -> PagedAttention:
    """`varlen_attention` where it fits the layer, else `general`."""

    def attention(q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, window: int, softcap: float) -> Tensor:
        fits = varlen_takes(q.shape[-1], q.dtype, keys.shape[1], softcap)
        return (varlen_attention if fits else general)(q, keys, values, step, scale, window, softcap)

    return attention


def _lora(device: torch.device, dtype: torch.dtype) -> tuple[LoraKernel | None, str]:
    try:
        from .lora import triton_lora
    except ImportError as error:
        return None, f"torch, {error}"
    reason = failing(partial(try_lora, triton_lora, device, dtype))
    return (None, f"torch, {reason}") if reason else (triton_lora, "triton")
