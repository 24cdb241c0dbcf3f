"""Paged attention on a GPU through `torch.nn.attention.varlen`: FlashAttention 2 over the block tables.

Owns what that kernel can do and cannot: half precision, head sizes in eights up to 256, blocks of a multiple of 256 positions,
no softcap. Whoever calls has something else for the rest (`server/model/cuda/__init__.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ..step import Step

BLOCK_MULTIPLE = 256  # of a block's positions; FlashAttention 2 refuses other block tables
LARGEST_HEAD = 256
HALF = (torch.bfloat16, torch.float16)


def varlen_takes(dim: int, dtype: torch.dtype, block_size: int, softcap: float) -> bool:
    """Whether the kernel computes attention of this form."""
    fits = dim % 8 == 0 and dim <= LARGEST_HEAD and block_size % BLOCK_MULTIPLE == 0
    return fits and dtype in HALF and not softcap


def varlen_attention(q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, window: int, softcap: float) -> Tensor:
    """A `PagedAttention` of what `varlen_takes`: q [T, Hq, D] against caches [blocks, size, Hkv, D] -> [T, Hq, D].

    Nothing is read back from the device: the bounds that the kernel wants are the tables' width and the host's spans.
    """
    longest = 1 if step.decodes == len(step.spans) else max(stop - start for start, stop, _ in step.spans)
    out = varlen_attn(
        q,
        keys,
        values,
        step.starts,
        step.key_starts,
        longest,
        step.tables.shape[1] * keys.shape[1],
        scale=scale,
        # A window counts the query's own position, FlashAttention the positions to its left.
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=True,
        seqused_k=step.contexts,
        block_table=step.tables,
        # Splitting a context among programs makes a row's bits depend on its batch mates.
        num_splits=1,
    )
    if not isinstance(out, Tensor):
        raise TypeError("varlen_attn gave more than the output")
    return out
