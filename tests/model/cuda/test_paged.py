"""The Triton paged attention, in Triton's interpreter, against the pure-torch one, with what others left in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from server.model.attention import torch_attention
from server.model.step import Step

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")

from server.model.cuda.paged import triton_attention

NAN = float("nan")


def step_of(rows: Sequence[tuple[int, int]], size: int) -> Step:
    """rows: (tokens now, context); blocks are dealt out backwards, the null block is 0."""
    starts = torch.tensor([0, *torch.tensor([n for n, _ in rows]).cumsum(0)], dtype=torch.int32)
    needed = [-(-context // size) for _, context in rows]
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32)
    free = sum(needed)
    for row, blocks in enumerate(needed):
        tables[row, :blocks] = torch.arange(free, free - blocks, -1)
        free -= blocks
    spans = tuple((int(starts[i]), int(starts[i + 1]), context) for i, (_, context) in enumerate(rows))
    contexts = torch.tensor([context for _, context in rows], dtype=torch.int32)
    decodes = sum(n == 1 for n, _ in rows)
    return Step(tables=tables, starts=starts, contexts=contexts, spans=spans, decodes=decodes)


def cached(step: Step, size: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values that are NaN wherever no row of the step may look."""
    shape = (int(step.tables.max()) + 1, size, heads, dim)
    keys, values = torch.full(shape, NAN), torch.full(shape, NAN)
    generator = torch.Generator().manual_seed(1)
    for row, (_, _, context) in enumerate(step.spans):
        for cache in (keys, values):
            flat = torch.full((step.tables.shape[1] * size, heads, dim), NAN)
            flat[:context] = torch.randn(context, heads, dim, generator=generator)
            used = -(-context // size)
            cache[step.tables[row, :used].long()] = flat[: used * size].view(used, size, heads, dim)
    return keys.to(dtype), values.to(dtype)


ROWS = {
    "decodes": [(1, 1), (1, 17), (1, 40)],
    "a decode beside prefills": [(1, 33), (40, 40), (3, 20)],
    "one long chunk": [(70, 100)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "softcap"), [(6, 2, 0, 0.0), (4, 4, 7, 0.0), (8, 1, 0, 5.0), (6, 2, 20, 3.0)]
)
def test_it_is_the_torch_attention(rows: list[tuple[int, int]], heads: int, kv_heads: int, window: int, softcap: float) -> None:
    step = step_of(rows, 16)
    keys, values = cached(step, 16, kv_heads, 24)
    q = torch.randn(heads, int(step.starts[-1]), 24, generator=torch.Generator().manual_seed(2)).transpose(0, 1)
    got = triton_attention(q, keys, values, step, 0.2, window, softcap)
    torch.testing.assert_close(got, torch_attention(q, keys, values, step, 0.2, window, softcap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 256])
def test_any_block_size(size: int) -> None:
    step = step_of([(1, 9), (5, 12)], size)
    keys, values = cached(step, size, 2, 16)
    q = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(2))
    got = triton_attention(q, keys, values, step, 0.25, 0, 0.0)
    torch.testing.assert_close(got, torch_attention(q, keys, values, step, 0.25, 0, 0.0), rtol=1e-4, atol=1e-5)


def test_bf16() -> None:
    step = step_of([(1, 9), (5, 12)], 16)
    keys, values = cached(step, 16, 2, 64, torch.bfloat16)
    q = torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    got = triton_attention(q, keys, values, step, 0.125, 0, 0.0)
    assert got.dtype is torch.bfloat16
    expected = torch_attention(q.float(), keys.float(), values.float(), step, 0.125, 0, 0.0)
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=1e-2)


def test_a_row_is_the_same_whoever_is_beside_it() -> None:
    alone, beside = step_of([(1, 40)], 16), step_of([(1, 40), (1, 5)], 16)
    keys, values = cached(beside, 16, 2, 16)
    q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    alone.tables = beside.tables[:1]
    got = triton_attention(q, keys, values, beside, 0.25, 0, 0.0)
    assert torch.equal(triton_attention(q[:1], keys, values, alone, 0.25, 0, 0.0), got[:1])
