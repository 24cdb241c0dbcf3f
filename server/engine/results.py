"""Results: what a step said, taken into a sequence and put into events. Decides no order and frees nothing.

Sample(token, more)  ->  ids grow, `done` is all but the last  ->  Event(tokens, finish)
"""

from __future__ import annotations

import time
from collections.abc import Collection

from ..requests import Event, FinishReason, Request, Token
from .plan import Row, Sample, Sequence

NOT_FINITE = "the adapter produced values that are not finite"


def append(
    sequence: Sequence, tokens: tuple[Token, ...], eos: Collection[int]
) -> tuple[tuple[Token, ...], FinishReason | None]:
    """Take tokens up to the one that ends the sequence, if one does; the last one taken is still to be computed."""
    taken: list[Token] = []
    finish = None
    for token in tokens:
        sequence.ids.append(token.id)
        taken.append(token)
        finish = _finish_reason(sequence, token, eos)
        if finish is not None:
            break
    sequence.done = len(sequence.ids) - 1
    return tuple(taken), finish


def _finish_reason(sequence: Sequence, token: Token, eos: Collection[int]) -> FinishReason | None:
    sampling = sequence.sampling
    if token.id in eos and not sampling.ignore_eos:
        return FinishReason.EOS
    if sequence.generated >= sampling.max_new_tokens:
        return FinishReason.LENGTH
    return None


def token_event(sequence: Sequence, request: Request, tokens: tuple[Token, ...], finish: FinishReason | None) -> Event:
    """The first one of a sequence says how long it was queued."""
    first = not sequence.began_at
    if first:
        sequence.began_at = time.monotonic()
    return Event(
        request.id,
        tokens=tokens,
        finish=finish,
        cached_tokens=sequence.cached,
        queue_seconds=sequence.admitted_at - request.arrival if first else None,
    )


def add_scores(sequence: Sequence, scores: tuple[tuple[float, ...], ...], row: Row) -> None:
    """Of one chunk of a task that generates nothing."""
    if row.start == sequence.virtual:
        sequence.scores.clear()  # it was preempted and starts again
    sequence.scores += scores


def scores_event(sequence: Sequence, request: Request) -> Event:
    return Event(
        request.id,
        finish=FinishReason.SCORED,
        cached_tokens=sequence.cached,
        queue_seconds=sequence.admitted_at - request.arrival,
        scores=tuple(sequence.scores),
    )


def prompt_event(sequence: Sequence, request: Request, sample: Sample) -> Event:
    """The scores of a chunk's prompt tokens."""
    sequence.scored += len(sample.prompt)
    return Event(request.id, prompt=sample.prompt)
