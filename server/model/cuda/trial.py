"""Trials: a GPU's kernels on small random numbers against pure torch, before anybody depends on them.

A kernel that raises or computes something else is not used, and the reason is told. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...methods.base import Rows
from ...methods.grouped import lora_loop, rows_of
from ..attention import PagedAttention, torch_attention
from ..step import Step

LoraKernel = Callable[[Tensor, Tensor, Rows], Callable[[Tensor, Tensor], None]]

_HEADS, _KV_HEADS, _DIM = 6, 2, 64
_ROWS = ((1, 1), (1, 40), (20, 20), (3, 30))  # tokens now, context: decodes, a prefill, a chunk of one
_WIDTH, _OUT, _RANK, _SLOTS = 96, 160, 16, 5


def failing(trial: Callable[[], None]) -> str:
    """Why the trial failed, in a line; empty where it passed. Whatever a driver or compiler raises is a reason."""
    try:
        with torch.inference_mode():
            trial()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def try_attention(kernel: PagedAttention, device: torch.device, dtype: torch.dtype, block_size: int, softcap: float) -> None:
    """Raises: ValueError when the kernel differs from the pure-torch one, with a window or without."""
    step = _step(block_size, device)
    shape = (2, 1 + len(_ROWS) * step.tables.shape[1], block_size, _KV_HEADS, _DIM)
    keys, values = _random(shape, device, dtype)
    q = _random((_HEADS, int(step.starts[-1]), _DIM), device, dtype).transpose(0, 1)
    for window in (0, 7):
        got = kernel(q, keys, values, step, 0.125, window, softcap)
        expected = torch_attention(q.float(), keys.float(), values.float(), step, 0.125, window, softcap)
        _check(got, expected, dtype)


def try_lora(kernel: LoraKernel, device: torch.device, dtype: torch.dtype) -> None:
    """Raises: ValueError when the kernel differs from the plain loop, for rows in runs and alone."""
    for slots in ([1, 2, 3, 4, 0], [2] * 70 + [0, 1]):
        rows = rows_of(slots, device)
        x, y = (_random((len(slots), width), device, dtype) for width in (_WIDTH, _OUT))
        a, b = (_random((_SLOTS, _RANK, width), device, dtype) for width in (_WIDTH, _OUT))
        expected = y.to(torch.float32, copy=True)
        lora_loop(x.float(), expected, a.float(), b.float(), rows)
        kernel(a, b, rows)(x, y)
        _check(y, expected, dtype)


def _step(block_size: int, device: torch.device) -> Step:
    """`_ROWS` in blocks of their own: row i has blocks 1 + i * width and on."""
    counts, contexts = zip(*_ROWS, strict=True)
    width = -(-max(contexts) // block_size)
    tables = torch.arange(1, 1 + len(_ROWS) * width, dtype=torch.int32, device=device).view(len(_ROWS), width)
    starts = [sum(counts[:i]) for i in range(len(_ROWS) + 1)]
    ends = [sum(contexts[:i]) for i in range(len(_ROWS) + 1)]
    return Step(
        tables=tables,
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        contexts=torch.tensor(contexts, dtype=torch.int32, device=device),
        key_starts=torch.tensor(ends, dtype=torch.int32, device=device),
        spans=tuple((starts[i], starts[i + 1], context) for i, context in enumerate(contexts)),
        decodes=counts.count(1),
    )


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _check(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of `dtype`, which is far less than what a wrong index or mask makes."""
    allowed = (1e-3 if dtype is torch.float32 else 3e-2) * float(expected.abs().max())
    off = float((got.float() - expected).abs().max())
    if not off <= allowed:
        raise ValueError(f"differs from pure torch by {off:.3g}, more than {allowed:.3g}")
