"""LoRA on a GPU, as two Triton kernels over the slot pools: x A^T into a narrow buffer, then that times B added to y.

Rows are cut into tiles of one slot each, so a product never mixes two adapters and no weight is copied or pointed to: a
tile's slot is an index into the pool. Sums are fp32. Runs in Triton's interpreter too (TRITON_INTERPRET=1).

    groups (4, 0, 3) (7, 3, 4), tiles of at most 2 rows   ->   first [0 2 3]   last [2 3 4]   slot [4 4 7]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...methods.base import Rows
from .dtypes import product_dtype

_NARROW, _WIDE = 16, 64  # rows of a tile: the least that a tensor core multiplies, and what a prefill fills


@dataclass(frozen=True)
class Tiles:
    """A composition's rows in tiles of one slot each; all [tiles] int64 on the device."""

    first: Tensor  # over the pool's rows
    last: Tensor  # one past the tile's end
    slot: Tensor
    size: int  # most rows of a tile, a power of two

    @property
    def count(self) -> int:
        return len(self.slot)


def tiles_of(rows: Rows) -> Tiles:
    """Found once per composition, shared by the pool's sites. Rows whose slots only the device knows get a tile each."""
    kept = rows.scratch.get("tiles")
    if kept is None:
        kept = rows.scratch["tiles"] = _single_tiles(rows) if rows.fixed else _group_tiles(rows)
    return cast("Tiles", kept)


def _single_tiles(rows: Rows) -> Tiles:
    first = torch.arange(len(rows.slot), device=rows.slot.device)
    return Tiles(first, first + 1, rows.slot, _NARROW)


def _group_tiles(rows: Rows) -> Tiles:
    size = _NARROW if max(stop - start for _, start, stop in rows.groups) <= _NARROW else _WIDE
    cuts = [(at, min(at + size, stop), slot) for slot, start, stop in rows.groups for at in range(start, stop, size)]
    first, last, slot = rows.slot.new_tensor(cuts).T.contiguous().unbind()
    return Tiles(first, last, slot, size)


def triton_lora(a: Tensor, b: Tensor, rows: Rows) -> Callable[[Tensor, Tensor], None]:
    """A kernel for `methods.lora`: a [slots, r, in], b [slots, r, out] -> run(x [T, in], y [T, out]), which adds in place.

    A tile whose slot is 0 or past the pool's end is left alone.
    """
    tiles, index = tiles_of(rows), rows.index

    def run(x: Tensor, y: Tensor) -> None:
        low = torch.empty((len(index), a.shape[1]), device=x.device, dtype=torch.float32)
        shrink(x, a, low, index, tiles)
        expand(low, b, y, index, tiles)

    return run


def shrink(x: Tensor, a: Tensor, low: Tensor, index: Tensor, tiles: Tiles) -> None:
    """Semantics: low[i] = A[s] @ x[index[i]] for each row i of the pool, s its slot. x [T, in], low [n, r] fp32."""
    rank, features = a.shape[1:]
    block = _rank_block(rank)
    _shrink[(tiles.count, triton.cdiv(rank, block))](
        x, a, low, index, tiles.first, tiles.last, tiles.slot, len(a), features, x.stride(0), x.stride(1), a.stride(0),
        a.stride(1), rank=rank, block_t=tiles.size, block_r=block, block_k=_depth(tiles),
        dtype=product_dtype(x.dtype),
    )  # fmt: skip


def expand(low: Tensor, b: Tensor, y: Tensor, index: Tensor, tiles: Tiles) -> None:
    """Semantics: y[index[i]] += B[s]^T @ low[i] for each row i of the pool, s its slot. y [T, out], low [n, r] fp32."""
    rank, features = b.shape[1:]
    wide = _depth(tiles)
    _expand[(tiles.count, triton.cdiv(features, wide))](
        low, b, y, index, tiles.first, tiles.last, tiles.slot, len(b), features, y.stride(0), y.stride(1), b.stride(0),
        b.stride(1), rank=rank, block_t=tiles.size, block_r=_rank_block(rank), block_n=wide,
        dtype=product_dtype(y.dtype),
    )  # fmt: skip


def _rank_block(rank: int) -> int:
    return min(64, max(16, int(triton.next_power_of_2(rank))))


def _depth(tiles: Tiles) -> int:
    """Features a program takes at once: fewer where the tile has many rows, so that it fits the registers."""
    return 128 if tiles.size == _NARROW else 64


# Inside a kernel every argument is a pointer or a number of Triton's; fp32 inputs are multiplied in full fp32 ("ieee").


@triton.jit
def _shrink(
    x: tl.tensor, a: tl.tensor, low: tl.tensor, index: tl.tensor, first: tl.tensor, last: tl.tensor, slot: tl.tensor,
    slots: tl.tensor, features: tl.tensor, x_row: tl.tensor, x_col: tl.tensor, a_slot: tl.tensor, a_rank: tl.tensor,
    rank: tl.constexpr, block_t: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr, dtype: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    own = tl.load(slot + tile)
    if (own <= 0) | (own >= slots):
        return
    at = tl.load(first + tile) + tl.arange(0, block_t)
    mine = at < tl.load(last + tile)
    token = tl.load(index + at, mask=mine, other=0)
    r = tl.program_id(1) * block_r + tl.arange(0, block_r)
    total = tl.zeros((block_t, block_r), dtype=tl.float32)
    for start in range(0, features, block_k):
        k = start + tl.arange(0, block_k)
        there = k < features
        taken = tl.load(x + token[:, None] * x_row + k[None, :] * x_col, mask=mine[:, None] & there[None, :], other=0.0)
        weight = tl.load(
            a + own * a_slot + r[None, :] * a_rank + k[:, None], mask=(r < rank)[None, :] & there[:, None], other=0.0
        )
        total += tl.dot(taken.to(dtype), weight.to(dtype), input_precision="ieee")
    tl.store(low + at[:, None] * rank + r[None, :], total, mask=mine[:, None] & (r < rank)[None, :])


@triton.jit
def _expand(
    low: tl.tensor, b: tl.tensor, y: tl.tensor, index: tl.tensor, first: tl.tensor, last: tl.tensor, slot: tl.tensor,
    slots: tl.tensor, features: tl.tensor, y_row: tl.tensor, y_col: tl.tensor, b_slot: tl.tensor, b_rank: tl.tensor,
    rank: tl.constexpr, block_t: tl.constexpr, block_r: tl.constexpr, block_n: tl.constexpr, dtype: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    own = tl.load(slot + tile)
    if (own <= 0) | (own >= slots):
        return
    at = tl.load(first + tile) + tl.arange(0, block_t)
    mine = at < tl.load(last + tile)
    token = tl.load(index + at, mask=mine, other=0)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    there = n < features
    total = tl.zeros((block_t, block_n), dtype=tl.float32)
    for start in range(0, rank, block_r):
        r = start + tl.arange(0, block_r)
        narrow = tl.load(low + at[:, None] * rank + r[None, :], mask=mine[:, None] & (r < rank)[None, :], other=0.0)
        weight = tl.load(
            b + own * b_slot + r[:, None] * b_rank + n[None, :], mask=(r < rank)[:, None] & there[None, :], other=0.0
        )
        # In the activations' dtype, as PEFT has it between its two products.
        total += tl.dot(narrow.to(dtype), weight.to(dtype), input_precision="ieee")
    place = y + token[:, None] * y_row + n[None, :] * y_col
    seen = mine[:, None] & there[None, :]
    held = tl.load(place, mask=seen, other=0.0).to(tl.float32)
    tl.store(place, (held + total).to(y.dtype.element_ty), mask=seen)
