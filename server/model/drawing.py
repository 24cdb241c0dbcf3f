"""Drawing: from scores to one random token per row, each with its own rules and its own seed.

Pure functions of (scores, rules, seed, index). A row's token depends on nothing but its own row: which of the three ways
below it goes is decided by its own numbers.

    no rule             inverts the cumulative distribution as it lies, nothing is sorted
    top-k, top-p        sorts the best few only, if what the rules keep is certainly among them
    typical-p, others   sorts the vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..requests import Sampling

HEAD = 512  # tokens that are looked at instead of the vocabulary, where they are enough


@dataclass(frozen=True)
class Draw:
    """One row's rules, and which generated token this is, from 0."""

    sampling: Sampling
    index: int

    @property
    def top_k(self) -> int:
        """0 = off."""
        return self.sampling.top_k or 0

    @property
    def top_p(self) -> float:
        """1 = off."""
        return 1.0 if self.sampling.top_p is None else self.sampling.top_p

    @property
    def typical_p(self) -> float:
        """1 = off."""
        return 1.0 if self.sampling.typical_p is None else self.sampling.typical_p

    @property
    def is_free(self) -> bool:
        """Whether any token may be drawn."""
        return not self.top_k and self.top_p >= 1 and self.typical_p >= 1

    @property
    def is_short(self) -> bool:
        """Whether the best few are likely to be all that the rules keep."""
        return 0 < self.top_k < HEAD or (not self.top_k and self.top_p < 1 and self.typical_p >= 1)


def draw(scores: Tensor, rows: Sequence[Draw]) -> Tensor:
    """scores [n, V] -> token ids [n], by inverting each row's cumulative distribution."""
    scores = scores / scores.new_tensor([row.sampling.temperature for row in rows])[:, None]
    chosen = torch.zeros(len(rows), dtype=torch.int64, device=scores.device)
    free = [i for i, row in enumerate(rows) if row.is_free]
    # An accelerator sorts a vocabulary faster than the host learns whether the best few were enough.
    few = scores.device.type == "cpu" and scores.shape[-1] > HEAD
    short = [i for i, row in enumerate(rows) if few and row.is_short]
    if free:
        chosen[free] = _invert(scores[free].softmax(-1), [rows[i] for i in free])
    if short:
        chosen[short], enough = _draw_head(scores[short], [rows[i] for i in short])
        short = [i for i, served in zip(short, enough, strict=True) if served]
    rest = sorted({*range(len(rows))} - {*free, *short})
    if rest:
        chosen[rest] = _draw_sorted(scores[rest], [rows[i] for i in rest])
    return chosen


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: SplitMix64 (Steele et al., OOPSLA 2014), 53 bits."""
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return float(((z ^ (z >> 31)) >> 11) * 2.0**-53)


def _invert(probs: Tensor, rows: Sequence[Draw]) -> Tensor:
    """probs [n, V], not necessarily of sum 1 -> places [n]."""
    mass = probs.cumsum(-1, dtype=torch.float64)
    drawn = mass.new_tensor([uniform(row.sampling.seed, row.index) for row in rows])[:, None]
    return torch.searchsorted(mass, drawn * mass[:, -1:], right=True).clamp_(max=probs.shape[-1] - 1)[:, 0]


def _draw_head(scores: Tensor, rows: Sequence[Draw]) -> tuple[Tensor, list[bool]]:
    """Token ids [n] from the best few alone, and for which rows these were enough."""
    values, ids = _head(scores)
    count = (values > float("-inf")).sum(-1)  # certain to be the best `count`, in their order
    normaliser = scores.logsumexp(-1, keepdim=True)
    k = torch.tensor([row.top_k for row in rows], device=scores.device)
    kept = _top_k(values, [row.top_k for row in rows])
    limited = (k > 0)[:, None]
    normaliser = torch.where(limited, kept.logsumexp(-1, keepdim=True), normaliser)
    probs = (kept - normaliser).exp()
    reached = probs.sum(-1) >= torch.tensor([row.top_p for row in rows], device=scores.device)
    enough = torch.where(k > 0, k <= count, reached)
    kept = _cut(kept, probs, [row.top_p for row in rows])
    kept = _typical_p(kept, [row.typical_p for row in rows])
    return ids.gather(1, _invert(kept.softmax(-1), rows)[:, None])[:, 0], enough.tolist()


def _head(scores: Tensor) -> tuple[Tensor, Tensor]:
    """scores [n, V] -> the best fewer than HEAD of each row, best first, equals by id, padded with -inf; and their ids.

    What equals the last of the best HEAD is left out: which of the equals a selection takes is not certain.
    """
    values, ids = scores.topk(HEAD, sorted=False)
    ids = ids.sort(-1).values
    values = scores.gather(1, ids)
    values = values.masked_fill(values <= values.amin(-1, keepdim=True), float("-inf"))
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _draw_sorted(scores: Tensor, rows: Sequence[Draw]) -> Tensor:
    """Token ids [n] with the whole vocabulary in order."""
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    ordered = _top_k(ordered, [row.top_k for row in rows])
    ordered = _top_p(ordered, [row.top_p for row in rows])
    ordered = _typical_p(ordered, [row.typical_p for row in rows])
    return ids.gather(1, _invert(ordered.softmax(-1), rows)[:, None])[:, 0]


def _top_k(ordered: Tensor, k: list[int]) -> Tensor:
    """ordered [n, V] descending; 0 = off."""
    if not any(k):
        return ordered
    limit = torch.tensor([n or ordered.shape[-1] for n in k], device=ordered.device)[:, None]
    return ordered.masked_fill(torch.arange(ordered.shape[-1], device=ordered.device) >= limit, float("-inf"))


def _top_p(ordered: Tensor, p: list[float]) -> Tensor:
    """Nucleus sampling (Holtzman et al., 2020): the smallest head whose mass reaches p; 1 = off, the best always stays."""
    return ordered if all(value >= 1 for value in p) else _cut(ordered, ordered.softmax(-1), p)


def _cut(ordered: Tensor, probs: Tensor, p: list[float]) -> Tensor:
    """`ordered` [n, V] without what lies behind mass p of `probs`."""
    before = probs.cumsum(-1) - probs
    limit = torch.tensor([value if value < 1 else 2.0 for value in p], device=ordered.device)[:, None]
    drop = before >= limit
    drop[:, 0] = False
    return ordered.masked_fill(drop, float("-inf"))


def _typical_p(ordered: Tensor, p: list[float]) -> Tensor:
    """Locally typical sampling (Meister et al., 2022): the tokens whose surprise is nearest the entropy, up to mass p."""
    if all(value >= 1 for value in p):
        return ordered
    logprobs = ordered.log_softmax(-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs).nan_to_num(0).sum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    order = distance.argsort(dim=-1, stable=True)
    mass = probs.gather(1, order).cumsum(-1)
    limit = torch.tensor([value if value < 1 else 2.0 for value in p], device=ordered.device)[:, None]
    drop_sorted = (mass - probs.gather(1, order)) >= limit
    drop_sorted[:, 0] = False
    drop = torch.zeros_like(drop_sorted).scatter(1, order, drop_sorted)
    return ordered.masked_fill(drop, float("-inf"))
