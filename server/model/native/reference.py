"""The kernels' pure-torch twins: what each one computes, said as plainly as torch allows.

The tests and the self-check compare the native kernels with these; a server without a compiler uses torch's own modules
instead. Same names and arguments as `NativeKernels`, no speed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K] fp32 or bf16, bias [N] -> x W^T + b [..., N] in fp32."""
    return F.linear(x, weight.float(), None if bias is None else bias.float())


def lora(x: Tensor, y: Tensor, a: Tensor, b: Tensor, index: Tensor, slot: Tensor) -> None:
    """y[index[i]] += (x[index[i]] @ a[slot[i]].T) @ b[slot[i]], in place.

    x [T, in], y [T, out], a [S, r, in], b [S, r, out] (B transposed), index and slot [n] int64.
    """
    low = torch.einsum("ni,nri->nr", x[index], a[slot].float())
    y[index] += torch.einsum("nr,nro->no", low, b[slot].float())


def bottleneck(
    x: Tensor,
    y: Tensor,
    activation: Callable[[Tensor], Tensor],
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Tensor,
    slot: Tensor,
) -> None:
    """y[i] += act(x[i] @ down[s].T + down_bias[s]) @ up[s] + up_bias[s] for i of index and s its slot, in place.

    x, y [T, H]; weights: down [S, b, H], down_bias [S, b], up [S, b, H] (transposed), up_bias [S, H]; index, slot [n] int64.
    """
    down, down_bias, up, up_bias = (tensor[slot] for tensor in weights)
    low = activation(torch.einsum("ni,nbi->nb", x[index], down) + down_bias)
    y[index] += torch.einsum("nb,nbo->no", low, up) + up_bias


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q [T, Hq, D]; keys, values [blocks, block_size, Hkv, D]; tables [R, P], starts [R + 1], contexts [R] int32.

    Causal, each row over its own pages -> [T, Hq, D].
    """
    out = torch.zeros(q.shape)
    for row, context in enumerate(contexts.tolist()):
        first, last = int(starts[row]), int(starts[row + 1])
        pages = tables[row, : -(-context // keys.shape[1])].long()
        k, v = (cache[pages].flatten(0, 1)[:context] for cache in (keys, values))
        out[first:last] = _attend(q[first:last], k, v, scale, window, softcap)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """q [n, Hq, D] at the last n of C positions; k, v [C, Hkv, D]."""
    count, heads, _ = q.shape
    context, kv_heads, _ = k.shape
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("nhd,chd->hnc", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(context - count, context)[:, None]
    position = torch.arange(context)[None, :]
    hidden = position > query if not window else (position > query) | (position <= query - window)
    return torch.einsum("hnc,chd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def write_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, write: Tensor) -> None:
    """k, v [1, Hkv, T, D] -> cache rows write[t] (block * block_size + offset), in place."""
    keys.view(-1, *keys.shape[2:])[write] = k[0].transpose(0, 1)
    values.view(-1, *values.shape[2:])[write] = v[0].transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] (Gemma: 1 + w)."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def peaks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [K, V] -> [K] int64, [K] fp64."""
    return x.argmax(-1), x.double().logsumexp(-1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """q [1, Hq, T, D], k [1, Hkv, T, D], cos and sin [1, T, d], d <= D: the first d features turn, in place."""
    for x in (q, k):
        turned = x[..., : cos.shape[-1]]
        low, high = turned.chunk(2, -1)
        turned.copy_(turned * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None])
