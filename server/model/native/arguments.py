"""What keeps a wrong tensor from reaching C: dtype, device, layout and shape here; index ranges in C, whose rules these are."""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import CacheSize

LORA_RULES = ("", "index names a row outside x", "slot names a slot outside the pool")
ATTENTION_RULES = (
    "",
    "starts must ascend within the tokens of q",
    "a context is shorter than its row's tokens or longer than its table",
    "tables names a block outside the cache",
    "write names a position outside the cache",
)
WRITE_RULES = ("", ATTENTION_RULES[-1])

_fp32 = torch.float32


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises: ValueError unless `tensor` is a contiguous CPU tensor of that dtype and shape."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu:
        return
    raise ValueError(
        f"{name} must be contiguous {dtype} {list(shape)} on the CPU, got {tensor.dtype} {list(tensor.shape)} "
        f"with strides {list(tensor.stride())} on {tensor.device}"
    )


def check_strided(name: str, tensor: Tensor, dims: int) -> None:
    """Raises: ValueError unless `tensor` is an fp32 CPU tensor whose last dimension is dense."""
    if tensor.dtype is _fp32 and tensor.ndim == dims and tensor.stride(-1) == 1 and tensor.is_cpu:
        return
    raise ValueError(
        f"{name} must be fp32 with {dims} dimensions on the CPU, the last one dense, got {tensor.dtype} "
        f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
    )


def check_caches(keys: Tensor, values: Tensor, size: CacheSize) -> None:
    """Raises: ValueError unless both are fp32 caches of `make_caches`."""
    for name, cache, order in (("keys", keys, (0, 2, 3, 1)), ("values", values, (0, 2, 1, 3))):
        if cache.dtype is _fp32 and cache.shape == size and cache.permute(order).is_contiguous() and cache.is_cpu:
            continue
        raise ValueError(
            f"{name} must be {_fp32} {list(size)} on the CPU as make_caches lays it out, got {cache.dtype} "
            f"{list(cache.shape)} with strides {list(cache.stride())} on {cache.device}"
        )
