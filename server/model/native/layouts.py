"""Layouts: the order in which the kernels read weights and caches, and the way back. Runs nothing.

What they mean is said where they are read: linear.cpp, tiles.cpp, attention.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .int8 import PANEL

#: Makes a tensor, mostly a view in another order, contiguous in memory of its own.
Place = Callable[[Tensor], Tensor]


def pack(weight: Tensor, place: Place = Tensor.contiguous) -> Tensor:
    """weight [N, K] -> panels [ceil(N / 32), K, 32], zero padded.

    fp32: columns in order. bf16: column j and column j + 16 of a panel share one 32-bit word, low half first, so that two
    integer operations widen both.

    Raises: ValueError when the weight is neither fp32 nor bf16.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.ndim != 2:
        raise ValueError(f"weight must be fp32 or bf16 with 2 dimensions, got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    count = -(-n // PANEL)
    padded = F.pad(weight.detach(), (0, 0, 0, count * PANEL - n)) if n % PANEL else weight.detach()
    if weight.dtype is torch.float32:
        return place(padded.reshape(count, PANEL, k).transpose(1, 2))
    halves = padded.reshape(count, 2, PANEL // 2, k)
    words = torch.stack((halves[:, 0], halves[:, 1]), -1).view(torch.int32)[..., 0]
    return place(words.transpose(1, 2)).view(torch.bfloat16)  # torch turns words seven times as fast as halves of them


def unpack(panels: Tensor, n: int) -> Tensor:
    """The weight [N, K] that `pack` was given, bit for bit."""
    count, k, _ = panels.shape
    if panels.dtype is torch.float32:
        return panels.transpose(1, 2).reshape(count * PANEL, k)[:n]
    return panels.view(count, k, PANEL // 2, 2).permute(0, 3, 2, 1).reshape(count * PANEL, k)[:n]


def pack_tiles(weight: Tensor, place: Place = Tensor.contiguous) -> Tensor:
    """weight [N, K] bf16 -> AMX tiles [ceil(N / 32), ceil(K / 32), 2, 16, 16, 2], zero padded; see tiles.cpp.

    Raises: ValueError when the weight is not bf16.
    """
    if weight.dtype is not torch.bfloat16 or weight.ndim != 2:
        raise ValueError(f"weight must be bf16 with 2 dimensions, got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    panels, steps = -(-n // PANEL), -(-k // PANEL)
    padded = F.pad(weight.detach(), (0, steps * PANEL - k, 0, panels * PANEL - n))
    words = padded.contiguous().view(torch.int32).view(panels, 2, 16, steps, 16)
    return place(words.permute(0, 3, 1, 4, 2)).view(torch.bfloat16).view(panels, steps, 2, 16, 16, 2)


def unpack_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """The weight [N, K] that `pack_tiles` was given, bit for bit."""
    panels, steps = tiles.shape[:2]
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, steps * PANEL)[:n, :k].contiguous()


#: blocks, block_size, kv_heads, head_dim
CacheSize = tuple[int, int, int, int]


def make_caches(zeros: Callable[[tuple[int, ...]], Tensor], size: CacheSize) -> tuple[Tensor, Tensor]:
    """Zeroed keys and values of one layer, [blocks, block_size, Hkv, D], in the order of memory that `attention` reads.

    A head's part of a block lies together, of keys with positions innermost: neither is copied or turned on its way.
    """
    blocks, block_size, kv_heads, dim = size
    keys, values = zeros((blocks, kv_heads, dim, block_size)), zeros((blocks, kv_heads, block_size, dim))
    return keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)
