"""`varlen_attn` as it is asked: shapes on meta tensors, and its documented meaning computed plainly in its place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.model.attention import torch_attention
from server.model.cuda import varlen
from server.model.cuda.varlen import varlen_attention, varlen_takes
from server.model.step import Step

ROWS = [(1, 300), (1, 5), (40, 40), (3, 257)]  # tokens now, context
SIZE = 256


def step_on(device: str) -> Step:
    starts, ends = ([0], [0])
    for count, context in ROWS:
        starts.append(starts[-1] + count)
        ends.append(ends[-1] + context)
    whole = {"dtype": torch.int32, "device": device}
    return Step(
        tables=torch.tensor([[4, 2, 0], [1, 0, 0], [3, 0, 0], [6, 5, 0]], **whole),  # type: ignore[arg-type]
        starts=torch.tensor(starts, **whole),  # type: ignore[arg-type]
        contexts=torch.tensor([context for _, context in ROWS], **whole),  # type: ignore[arg-type]
        key_starts=torch.tensor(ends, **whole),  # type: ignore[arg-type]
        spans=tuple((starts[i], starts[i + 1], context) for i, (_, context) in enumerate(ROWS)),
        decodes=2,
    )


def tensors(device: str, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(heads, 45, dim, generator=generator).to(device, dtype).transpose(0, 1)
    keys, values = torch.randn(2, 7, SIZE, kv_heads, dim, generator=generator).to(device, dtype)
    return q, keys, values


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor, num_splits: int | None,
) -> Tensor:  # fmt: skip
    """What the documentation says the arguments mean, with FlashAttention's causality: the last query sees the last key."""
    assert {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert torch.equal(cu_seq_k.diff(), seqused_k)
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(seqused_k.max()) <= max_k
    assert window_size[1] == 0
    assert num_splits == 1
    out = torch.empty_like(query)
    for row, used in enumerate(seqused_k.tolist()):
        begin, end = cu_seq_q[row : row + 2].tolist()
        k, v = (cache[block_table[row].long()].flatten(0, 1)[:used].transpose(0, 1) for cache in (key, value))
        behind = torch.arange(used - (end - begin), used)[:, None] - torch.arange(used)
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        q = query[begin:end].transpose(0, 1)
        out[begin:end] = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa).transpose(0, 1)
    return out


@pytest.mark.parametrize("window", [0, 1, 9, 1000])
def test_its_arguments_mean_our_attention(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    step, (q, keys, values) = step_on("cpu"), tensors("cpu", torch.float32)
    got = varlen_attention(q, keys, values, step, 0.3, window, 0.0)
    torch.testing.assert_close(got, torch_attention(q, keys, values, step, 0.3, window, 0.0), rtol=1e-4, atol=1e-5)


def test_shapes_through_torchs_own_operator() -> None:
    q, keys, values = tensors("meta", torch.bfloat16)
    out = varlen_attention(q, keys, values, step_on("meta"), 0.3, 0, 0.0)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "meta")


@pytest.mark.parametrize(
    ("dim", "dtype", "block_size", "softcap", "taken"),
    [
        (64, torch.bfloat16, 256, 0.0, True),
        (256, torch.float16, 512, 0.0, True),
        (64, torch.float32, 256, 0.0, False),
        (64, torch.bfloat16, 16, 0.0, False),
        (64, torch.bfloat16, 256, 30.0, False),
        (60, torch.bfloat16, 256, 0.0, False),
        (320, torch.bfloat16, 256, 0.0, False),
    ],
)
def test_what_it_takes(dim: int, dtype: torch.dtype, block_size: int, softcap: float, taken: bool) -> None:
    assert varlen_takes(dim, dtype, block_size, softcap) is taken
