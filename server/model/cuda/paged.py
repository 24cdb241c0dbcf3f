"""Paged attention on a GPU as one Triton kernel: any block size and dtype, decode and prefill, GQA, window, softcap.

One program per row of the step, tile of its queries and KV head; it walks the row's own blocks with a running softmax
(Milakov and Gimelshein, 2018). It reads nothing back to the host, so it can be captured in a CUDA graph, and loads only
positions that the row has written, so no other request's numbers can reach it. Runs in Triton's interpreter too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..step import Step
from .dtypes import product_dtype

_TILE_BYTES = 16 << 10  # of queries, keys or values that a program holds at once: fits the shared memory of any GPU


@dataclass(frozen=True)
class _Blocks:
    """A program's share: `queries` positions x `group` heads of `rows` rows of a tile (padded), `keys` positions at once."""

    queries: int
    rows: int
    keys: int


def triton_attention(q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, window: int, softcap: float) -> Tensor:
    """The `PagedAttention` of a GPU: q [T, Hq, D] against caches [blocks, size, Hkv, D] -> [T, Hq, D]."""
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    heads, dim = q.shape[1:]
    size, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    longest = 1 if step.decodes == len(step.spans) else max(stop - start for start, stop, _ in step.spans)
    blocks = _blocks(longest, group, dim, q.element_size())
    _attend[(len(step.spans), triton.cdiv(longest, blocks.queries), kv_heads)](
        q, keys, values, out, step.tables, step.starts, step.contexts, scale, softcap, q.stride(0), q.stride(1),
        q.stride(2), out.stride(0), out.stride(1), keys.stride(1), step.tables.stride(0), size=size, group=group, dim=dim,
        window=window, capped=softcap != 0, block_q=blocks.queries, block_m=blocks.rows, block_n=blocks.keys,
        block_d=max(16, triton.next_power_of_2(dim)), dtype=product_dtype(q.dtype), num_stages=2,
    )  # fmt: skip
    return out


def _blocks(longest: int, group: int, dim: int, itemsize: int) -> _Blocks:
    """`longest`: most queries of a row."""
    fitting = max(16, min(64, _TILE_BYTES // (max(16, int(triton.next_power_of_2(dim))) * itemsize)))
    queries = min(longest, max(1, fitting // group))
    return _Blocks(queries, max(16, int(triton.next_power_of_2(queries * group))), fitting)


# Inside a kernel every argument is a pointer or a number of Triton's; fp32 inputs are multiplied in full fp32 ("ieee").


@triton.jit
def _attend(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, out: tl.tensor, tables: tl.tensor, starts: tl.tensor,
    contexts: tl.tensor, scale: tl.tensor, softcap: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, q_dim: tl.tensor,
    out_token: tl.tensor, out_head: tl.tensor, position_stride: tl.tensor, table_row: tl.tensor, size: tl.constexpr,
    group: tl.constexpr, dim: tl.constexpr, window: tl.constexpr, capped: tl.constexpr, block_q: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, dtype: tl.constexpr,
) -> None:  # fmt: skip
    row, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end, context = tl.load(starts + row), tl.load(starts + row + 1), tl.load(contexts + row)
    if begin + tile * block_q >= end:
        return
    m, d = tl.arange(0, block_m), tl.arange(0, block_d)
    place = tile * block_q + m // group  # of the query within the row
    token = (begin + place).to(tl.int64)
    held = ((m < block_q * group) & (token < end))[:, None] & (d < dim)[None, :]
    lane = head * group + m % group
    at = token[:, None] * q_token + lane[:, None] * q_head + d[None, :] * q_dim
    queries = tl.load(q + at, mask=held, other=0.0).to(dtype)
    offset = context - (end - begin)  # the row's first query's position
    last = tl.minimum(context, offset + (tile + 1) * block_q)
    first = 0
    if window > 0:
        first = tl.maximum(0, offset + tile * block_q - window + 1) // block_n * block_n
    peak = tl.full((block_m,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((block_m,), dtype=tl.float32)
    total = tl.zeros((block_m, block_d), dtype=tl.float32)
    for start in range(first, last, block_n):
        n = start + tl.arange(0, block_n)
        block = tl.load(tables + row * table_row + n // size, mask=n < last, other=0).to(tl.int64)
        where = ((block * size + n % size) * position_stride + head * dim)[:, None] + d[None, :]
        inside = (n < last)[:, None] & (d < dim)[None, :]
        key = tl.load(keys + where, mask=inside, other=0.0).to(dtype)
        value = tl.load(values + where, mask=inside, other=0.0).to(dtype)
        scores = _capped(tl.dot(queries, tl.trans(key), input_precision="ieee") * scale, softcap, capped)
        scores = tl.where(_seen(n, last, offset + place, window), scores, float("-inf"))
        peak, mass, total = _mixed(peak, mass, total, scores, value)
    total = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
    at = token[:, None] * out_token + lane[:, None] * out_head + d[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=held)


@triton.jit
def _mixed(peak: tl.tensor, mass: tl.tensor, total: tl.tensor, scores: tl.tensor, value: tl.tensor) -> tl.tensor:
    """The running softmax after some more keys: highest score [M], sum of weights [M], weighted values [M, D]."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: no -inf minus -inf
    weight, kept = tl.exp(scores - level[:, None]), tl.exp(peak - level)
    mass = mass * kept + tl.sum(weight, 1)
    total = total * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return higher, mass, total


@triton.jit
def _capped(scores: tl.tensor, softcap: tl.tensor, capped: tl.constexpr) -> tl.tensor:
    if capped:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
    return scores


@triton.jit
def _seen(n: tl.tensor, last: tl.tensor, position: tl.tensor, window: tl.constexpr) -> tl.tensor:
    """Which of the keys n [N] queries at `position` [M] see: [M, N]."""
    seen = (n < last)[None, :] & (n[None, :] <= position[:, None])
    if window > 0:
        seen = seen & (n[None, :] > position[:, None] - window)
    return seen
