"""Sampling: from logits to tokens, all rows at once, each with its own parameters.

Pure functions of (logits, parameters, history): no generator state, so a seeded request draws the same token in any
company, after preemption and on any step. Knows no scheduler.

Order of the rules, as in Hugging Face and TGI: penalties, temperature, top-k, top-p, typical-p, draw. Reported logprobs
are the model's own (log-softmax of the untouched logits), as vLLM reports them by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..requests import Sampling, Token


@dataclass(frozen=True)
class SampleRow:
    """One row to sample: its parameters and the ids that penalties count."""

    sampling: Sampling
    prompt: Callable[[], Sequence[int]]  # called only when a penalty needs it
    generated: Sequence[int]

    @property
    def index(self) -> int:
        """Which generated token this is, from 0; with the seed it fixes the draw."""
        return len(self.generated)


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Token | None]:
    """logits [K, V] of the rows' last positions -> one token each, None where the logits are not finite."""
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    scores = _penalised(logits, rows)
    chosen = scores.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.sampling.do_sample]
    if drawn:
        at = torch.tensor(drawn, device=logits.device)
        chosen[at] = _draw(scores[at], [rows[i] for i in drawn])
    # A NaN anywhere in a row makes its whole log-softmax NaN; +inf does too. One look at the chosen score suffices.
    picked = logprobs.gather(1, chosen[:, None])[:, 0]
    top_n = max((row.sampling.top_n for row in rows), default=0)
    top = torch.topk(logprobs, top_n, dim=-1) if top_n else None
    ids, picked_list = chosen.tolist(), picked.tolist()  # the step's one wait for the device
    best_ids, best = (top.indices.tolist(), top.values.tolist()) if top else ([], [])
    tokens: list[Token | None] = []
    for i, row in enumerate(rows):
        n = row.sampling.top_n
        alternatives = tuple(zip(best_ids[i][:n], best[i][:n], strict=True)) if n else ()
        tokens.append(Token(ids[i], picked_list[i], alternatives) if _is_finite(picked_list[i]) else None)
    return tokens


def score_prompt(logits: Tensor, targets: Tensor) -> list[float]:
    """logits [n, V], targets [n]: the logprob each position gives to the prompt token that follows it."""
    logprobs = logits.float().log_softmax(-1)
    scores: list[float] = logprobs.gather(1, targets[:, None])[:, 0].tolist()
    return scores


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: SplitMix64 (Steele et al., OOPSLA 2014), 53 bits."""
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return float(((z ^ (z >> 31)) >> 11) * 2.0**-53)


def _is_finite(value: float) -> bool:
    return value == value and value not in (float("inf"), float("-inf"))


def _penalised(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Repetition over prompt and output (Keskar et al., 2019), frequency and presence over the output alone (OpenAI)."""
    wanted = [i for i, row in enumerate(rows) if _has_penalty(row.sampling)]
    if not wanted:
        return logits
    scores = logits.clone()
    for i in wanted:
        sampling = rows[i].sampling
        scores[i] = _penalise(scores[i], rows[i], sampling)
    return scores


def _has_penalty(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


def _penalise(scores: Tensor, row: SampleRow, sampling: Sampling) -> Tensor:
    """scores [V] -> [V]."""
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.asarray([*row.prompt(), *row.generated], dtype=np.int64))
        at = torch.from_numpy(seen).to(scores.device)
        old = scores[at]
        scores[at] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    if row.generated and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, counts = np.unique(np.asarray(row.generated, dtype=np.int64), return_counts=True)
        penalty = sampling.frequency_penalty * counts + sampling.presence_penalty
        at = torch.from_numpy(ids).to(scores.device)
        scores[at] -= torch.from_numpy(penalty).to(scores)
    return scores


def _draw(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """scores [n, V] of the rows that sample -> token ids [n], by inverting each row's cumulative distribution."""
    params = [row.sampling for row in rows]
    scores = scores / scores.new_tensor([p.temperature for p in params])[:, None]
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)  # [n, V]
    ordered = _top_k(ordered, [p.top_k or 0 for p in params])
    ordered = _top_p(ordered, [1.0 if p.top_p is None else p.top_p for p in params])
    ordered = _typical_p(ordered, [1.0 if p.typical_p is None else p.typical_p for p in params])
    probs = ordered.softmax(-1)
    mass = probs.double().cumsum(-1)
    drawn = mass.new_tensor([uniform(row.sampling.seed, row.index) for row in rows])[:, None]
    at = torch.searchsorted(mass, drawn * mass[:, -1:], right=True).clamp_(max=scores.shape[-1] - 1)
    return ids.gather(1, at)[:, 0]


def _top_k(ordered: Tensor, k: list[int]) -> Tensor:
    """ordered [n, V] descending; 0 = off."""
    if not any(k):
        return ordered
    limit = torch.tensor([n or ordered.shape[-1] for n in k], device=ordered.device)[:, None]
    return ordered.masked_fill(torch.arange(ordered.shape[-1], device=ordered.device) >= limit, float("-inf"))


def _top_p(ordered: Tensor, p: list[float]) -> Tensor:
    """Nucleus sampling (Holtzman et al., 2020): the smallest head whose mass reaches p; 1 = off, the best always stays."""
    if all(value >= 1 for value in p):
        return ordered
    probs = ordered.softmax(-1)
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
