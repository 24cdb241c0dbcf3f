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
from numpy.typing import NDArray
from torch import Tensor

from ..requests import Sampling, Token
from .drawing import Draw, draw

Ids = Callable[[], Sequence[int]]

#: logits [K, V] fp32 contiguous -> of each row the id of its first largest, [K] int64, and log(sum of e^x), [K] fp64: NaN for
#: a row that holds NaN or +infinity.
FindPeaks = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SampleRow:
    """One row to sample: its parameters, and the ids that penalties count, asked for only when a penalty needs them."""

    sampling: Sampling
    index: int  # which generated token this is, from 0; with the seed it fixes the draw
    prompt: Ids
    generated: Ids


def torch_peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What `FindPeaks` says, on any device."""
    best = _argmax(logits)
    most = logits.gather(1, best[:, None])
    return best, (logits - most).exp_().sum(-1).double().log() + most[:, 0]


def sample(logits: Tensor, rows: Sequence[SampleRow], find_peaks: FindPeaks = torch_peaks) -> list[Token | None]:
    """logits [K, V] of the rows' last positions -> one token each, None where the logits are not finite."""
    logits = logits.float().contiguous()
    largest, log_sums = find_peaks(logits)
    penalised = _penalised(logits, rows)
    chosen = _choose(penalised, rows, largest if penalised is logits else None)
    # A NaN anywhere in a row makes all of its logprobs NaN; +inf does too. One look at the chosen score suffices.
    sums = log_sums[:, None]
    picked = _logprobs(logits.gather(1, chosen[:, None]), sums)[:, 0]
    asked = {i: at for at, i in enumerate(i for i, row in enumerate(rows) if row.sampling.top_n)}
    if not asked:
        ids, scores = _fetch(chosen, picked)
        return [_token(int(id), score) for id, score in zip(ids, scores, strict=True)]
    widest = max(rows[i].sampling.top_n for i in asked)
    of_asked = slice(None) if len(asked) == len(rows) else list(asked)
    top = torch.topk(logits[of_asked], widest, dim=-1)
    ids, scores, best_ids, best = _fetch(chosen, picked, top.indices.flatten(), _logprobs(top.values, sums[of_asked]).flatten())
    tokens: list[Token | None] = []
    for i, (id, score) in enumerate(zip(ids, scores, strict=True)):
        of_row = slice(asked[i] * widest, asked[i] * widest + rows[i].sampling.top_n) if i in asked else slice(0)
        tokens.append(_token(int(id), score, tuple(zip(map(int, best_ids[of_row]), best[of_row], strict=True))))
    return tokens


def _logprobs(logits: Tensor, sums: Tensor) -> Tensor:
    """logits [K, n] of some tokens, sums [K, 1] fp64 -> their log-softmax in fp32."""
    return (logits - sums).float()


def _fetch(*vectors: Tensor) -> list[list[float]]:
    """Vectors of ids or fp32 numbers as lists: the step's one wait for the device. A double holds either exactly."""
    if vectors[0].device.type == "cpu":
        return [vector.tolist() for vector in vectors]
    joined = torch.cat([vector.double() for vector in vectors]).tolist()
    ends = np.cumsum([len(vector) for vector in vectors]).tolist()
    return [joined[end - len(vector) : end] for vector, end in zip(vectors, ends, strict=True)]


def _token(id: int, logprob: float, alternatives: tuple[tuple[int, float], ...] = ()) -> Token | None:
    return Token(id, logprob, alternatives) if _is_finite(logprob) else None


def _choose(scores: Tensor, rows: Sequence[SampleRow], best: Tensor | None) -> Tensor:
    """scores [K, V] -> token ids [K]; `best` are the ids of the largest, if they are known."""
    drawn = [i for i, row in enumerate(rows) if row.sampling.do_sample]
    draws = [Draw(rows[i].sampling, rows[i].index) for i in drawn]
    if len(drawn) == len(rows):
        return draw(scores, draws)
    chosen = _argmax(scores) if best is None else best
    if drawn:
        chosen[drawn] = draw(scores[drawn], draws)
    return chosen


def _argmax(scores: Tensor) -> Tensor:
    """The first of the best, [K]. On the CPU numpy's is several times as fast as torch's."""
    return torch.from_numpy(scores.numpy().argmax(-1)) if scores.device.type == "cpu" else scores.argmax(-1)


def score_prompt(logits: Tensor, targets: Tensor, find_peaks: FindPeaks = torch_peaks) -> list[float]:
    """logits [n, V], targets [n]: the logprob each position gives to the prompt token that follows it."""
    logits = logits.float().contiguous()
    _, sums = find_peaks(logits)
    scores: list[float] = _logprobs(logits.gather(1, targets[:, None]), sums[:, None])[:, 0].tolist()
    return scores


def _is_finite(value: float) -> bool:
    return value == value and value not in (float("inf"), float("-inf"))


def _penalised(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Repetition over prompt and output (Keskar et al., 2019), frequency and presence over the output alone (OpenAI)."""
    repeated = [row.sampling.repetition_penalty != 1 for row in rows]
    counted = [bool(row.sampling.frequency_penalty or row.sampling.presence_penalty) for row in rows]
    if not any(repeated) and not any(counted):
        return logits
    scores = logits.clone(memory_format=torch.contiguous_format)
    flat = scores.view(-1)
    if any(repeated):
        histories = [[*row.prompt(), *row.generated()] if wanted else () for row, wanted in zip(rows, repeated, strict=True)]
        at, row_of, _ = _tally(histories, scores)
        penalty = scores.new_tensor([row.sampling.repetition_penalty for row in rows])[row_of]
        old = flat[at]
        flat[at] = torch.where(old > 0, old / penalty, old * penalty)
    if any(counted):
        at, row_of, counts = _tally(
            [row.generated() if wanted else () for row, wanted in zip(rows, counted, strict=True)], scores
        )
        frequency = torch.tensor([row.sampling.frequency_penalty for row in rows], dtype=torch.float64, device=scores.device)
        presence = torch.tensor([row.sampling.presence_penalty for row in rows], dtype=torch.float64, device=scores.device)
        flat[at] -= (frequency[row_of] * counts + presence[row_of]).to(scores.dtype)
    return scores


def _tally(histories: Sequence[Sequence[int]], scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every row's distinct ids: their places in the flattened scores [K * V], their rows, how often each occurs."""
    vocabulary = scores.shape[-1]
    lengths = [len(history) for history in histories]
    ids: NDArray[np.int64] = np.concatenate([np.asarray(history, np.int64) for history in histories])
    places, counts = np.unique(ids + np.repeat(np.arange(len(lengths)) * vocabulary, lengths), return_counts=True)
    at = torch.from_numpy(places).to(scores.device)
    return at, at // vocabulary, torch.from_numpy(counts).to(scores.device)
