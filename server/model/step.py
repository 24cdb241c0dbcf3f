"""Step: one forward pass as tensors. Written by the batch builder, read by attention, sites and ops by reference.

A model's modules get no extra arguments: what they need for the current step they read here. One writer (the runner,
between forward passes), many readers (hooks and attention, during one).

    three rows:  decode (41 done)   prefill of 4    decode (12 done)
    ids          [ 9                1 5 7 2         3 ]      T = 6 tokens
    positions    [ 41               0 1 2 3         12]
    starts       [ 0                1               5  6]
    contexts     [ 42               4               13]
    key_starts   [ 0                42              46  59]
    keep         [ 0                      4         5 ]      positions in T whose logits are wanted
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..methods.base import Rows


def _empty(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


@dataclass
class Step:
    """`T` tokens of `R` rows. All index tensors live on the model's device."""

    ids: Tensor = field(default_factory=lambda: _empty(torch.int64))  # [T]
    positions: Tensor = field(default_factory=lambda: _empty(torch.int64))  # [T]
    write: Tensor = field(default_factory=lambda: _empty(torch.int64))  # [T], block * block_size + offset
    tables: Tensor = field(default_factory=lambda: _empty(torch.int32))  # [R, blocks]
    starts: Tensor = field(default_factory=lambda: _empty(torch.int32))  # [R + 1]
    contexts: Tensor = field(default_factory=lambda: _empty(torch.int32))  # [R]
    key_starts: Tensor = field(default_factory=lambda: _empty(torch.int32))  # [R + 1], sums of contexts; CUDA alone reads it
    keep: Tensor = field(default_factory=lambda: _empty(torch.int64))  # [K]
    spans: tuple[tuple[int, int, int], ...] = ()  # (start, stop, context) of each row, on the host
    decodes: int = 0  # the first `decodes` rows have exactly one token each
    prompt: int = 0  # tokens from this one on are of prompts, those before it were generated
    rows: dict[str, Rows] = field(default_factory=dict)  # pool -> its tokens in this step
    kept_rows: dict[str, Rows] = field(default_factory=dict)  # pool -> its places in `keep`: what the output head sees
    memo: dict[object, object] = field(default_factory=dict)  # for what depends on the composition (`rows`) alone
    taps: dict[str, Tensor] = field(default_factory=dict)  # module name -> its input [T, in], where an op asks for it
