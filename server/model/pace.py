"""Pace: how long this machine takes for a step, measured at start, and how many prompt tokens may stand beside streams.

Owns the choice between the two who wait: every prompt token in a step brings one request's first token nearer and moves
everybody else's next token away. Runs real steps over scratch sequences; nothing of them is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from ..engine.plan import Row
from ..engine.plan import Sequence as Seq
from ..requests import Request, Sampling
from .runner import Runner

#: Of the time of a step of decodes, what a prompt may add to it. Streams then take 1 + SHARE times as long as without
#: the prompt, and the prompt 1 + 1 / SHARE times as long as without the streams.
SHARE: Final = 0.88

DECODES: Final = 8  # rows of the step that is measured
#: Prompt tokens beside streams, at least and in multiples: a matrix unit multiplies 16 rows in the time of one.
GRAIN: Final = 16
_FIRST = 64  # tokens of the first chunk tried
_CONTEXT = 128  # positions that a decode sees
_REPEATS = 3


def tokens_beside_streams(runner: Runner, most: int) -> int:
    """Prompt tokens that lengthen a step of `DECODES` decodes by `SHARE`; at most `most`, which fit cache and context."""
    decodes = [_decode(runner, min(_CONTEXT, most)) for _ in range(DECODES)]
    _seconds(runner, decodes)  # the first step of a kind is not like those that follow
    tokens = min(_FIRST, most)
    for _ in range(2):  # the second time near the answer: a token costs more or less in chunks of another size
        # In turns: a neighbour that comes or goes meanwhile would otherwise make the one look slower than the other.
        turns = [(_seconds(runner, decodes), _seconds(runner, [*decodes, _chunk(runner, tokens)])) for _ in range(_REPEATS)]
        alone, together = map(min, zip(*turns, strict=True))
        tokens = chunk_for(alone, max(together - alone, 0.0) / tokens, most)
    return tokens


def chunk_for(step_seconds: float, token_seconds: float, most: int) -> int:
    """Tokens of `token_seconds` each that add about `SHARE` of `step_seconds`, in grains, as far as `most` lets them."""
    if token_seconds * most <= SHARE * step_seconds:
        return most
    return min(most, GRAIN * max(1, round(SHARE * step_seconds / token_seconds / GRAIN)))


def _seconds(runner: Runner, rows: Sequence[Row]) -> float:
    begun = time.perf_counter()
    runner.run(rows)
    return time.perf_counter() - begun


def _decode(runner: Runner, length: int) -> Row:
    """All of them over the same blocks: the time is the same, and no memory is touched that a full step leaves alone."""
    sequence = _sequence(runner, length)
    sequence.prompt_end -= 1
    return Row(sequence, length - 1, 1)


def _chunk(runner: Runner, tokens: int) -> Row:
    return Row(_sequence(runner, tokens + 1), 0, tokens)


def _sequence(runner: Runner, length: int) -> Seq:
    ids = [0] * length
    request = Request("pace", "", (), tuple(ids), Sampling(1))
    return Seq(request, (), b"", 0, ids, length, blocks=runner.scratch_blocks(length))
