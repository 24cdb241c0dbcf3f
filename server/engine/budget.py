"""Budget: the rows of one step while it is planned, and how many tokens it may still take.

Two limits: the tokens of a step, and the tokens that may stand beside running streams (prompts, guesses), because every one
of them delays the next token of everybody who streams. A step without streams has the first limit only, and so has one
whose streams have only just begun, the more so beside prompts that were there before them: requests that come together get
their first tokens together.
"""

from __future__ import annotations

import math
from typing import Final

from .plan import Row, Sequence

#: Tokens after which a stream is not to be held up any more: by prompts that came when it had begun,
SETTLED: Final = 4
#: and by prompts that were there before. As many steps take those of requests that come together: held to the share of prompts
#: that come later, 32 of 128 tokens had the last of their first tokens a third later, and all tokens 8% later.
SETTLED_TOGETHER: Final = 16


class StepBudget:
    """Rows by sequence, in the order in which they were planned."""

    def __init__(self, tokens: int, beside: int, latest: float = math.inf) -> None:
        """`beside` = tokens beside streams, 0 = as many as the step takes; `latest` = when the last of the prompts came."""
        self.rows: dict[Sequence, Row] = {}
        self._tokens = tokens
        self._beside = beside or tokens
        self._latest = latest
        self._streams = 0

    @property
    def extra(self) -> int:
        """Tokens that may still be added beside what streams."""
        return min(self._tokens, self._beside) if self._streams else self._tokens

    def room(self, sequence: Sequence) -> int:
        """Positions that this sequence may compute in this step; one of a stream's own never counts as extra."""
        return min(sequence.remaining, self._tokens if sequence.remaining == 1 else self.extra)

    def add(self, row: Row) -> None:
        """Plan a row, in place of the sequence's earlier one if it had one."""
        self.drop(row.sequence)
        self.rows[row.sequence] = row
        self._book(row, 1)

    def drop(self, sequence: Sequence) -> None:
        row = self.rows.pop(sequence, None)
        if row is not None:
            self._book(row, -1)

    def _book(self, row: Row, sign: int) -> None:
        is_decode = row.start == len(row.sequence.ids) - 1
        self._streams += sign * (is_decode and self._is_settled(row.sequence))
        self._tokens -= sign * row.count
        self._beside -= sign * (row.count - is_decode)

    def _is_settled(self, sequence: Sequence) -> bool:
        return sequence.generated >= (SETTLED if sequence.began_at < self._latest else SETTLED_TOGETHER)
