"""Passes: one step's rows through the device, in as many forward passes as it takes. Runs on the engine's thread.

Owns what is learnt from passes that broke: how many tokens a pass may have, and whose adapters run apart. Decides nothing
about which rows run; a sequence's tokens are booked by the scheduler.

    pass of 64 rows raises   -> 32 | 32 -> ... -> the culprit alone fails    at most 2 k log2(64) + 1 passes for k culprits
    out of memory            -> the same, and a lone prompt goes in pieces; a single position that does not fit fails
    all went well in halves  -> it was the size, or the company: for a while no pass is larger than such a half
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, Protocol

import structlog

from adapters_store.digest import Digest

from ..errors import failure
from ..memory import out_of_memory
from .plan import Row, Sample
from .plan import Sequence as Seq
from .scheduler import Scheduler

log = structlog.get_logger(__name__)

CALM: Final = 32  # steps without a failure after which passes grow again
MOST_CALM: Final = 1024
_SUSPECTS: Final = 256
Kind = Literal["memory", "error"]


class Watch(Protocol):
    """What is told as passes go; called on the engine's thread, so it must be cheap."""

    def speculated(self, guessed: int, right: int) -> None: ...
    def pass_failed(self, kind: Kind) -> None: ...


class PassSize:
    """Most tokens of one pass: halved by a failure, doubled after a while without one, until nothing is limited.

    Each failure doubles that while, from 32 steps to 1,024; as long without any, and it is 32 again.
    """

    def __init__(self, most: int) -> None:
        """`most` = tokens of a full step."""
        self._most = most
        self.limit: int | None = None
        self._calm = 1  # steps since the last failure or growth
        self._patience = CALM // 2

    def shrink(self, tokens: int) -> None:
        """A pass of so many tokens failed, and its halves went well."""
        if self._calm:  # once per step, however many of its passes failed
            self._patience = min(MOST_CALM, 2 * self._patience)
        half = max(1, tokens // 2)
        self.limit = half if self.limit is None else min(self.limit, half)
        self._calm = 0

    def stepped(self) -> None:
        """A step is over."""
        self._calm += 1
        if self._calm < self._patience:
            return
        self._calm = 1
        if self.limit is None:
            self._patience = CALM // 2
        else:
            self.limit = None if 2 * self.limit >= self._most else 2 * self.limit


class Suspects:
    """Adapters through which a row broke a pass, until one of theirs goes well. The last 256 are remembered."""

    def __init__(self) -> None:
        self._digests: OrderedDict[Digest, None] = OrderedDict()

    def __contains__(self, row: Row) -> bool:
        return any(digest in self._digests for digest in row.sequence.adapters)

    def blame(self, row: Row) -> None:
        for digest in row.sequence.adapters:
            self._digests[digest] = None
        while len(self._digests) > _SUSPECTS:
            self._digests.popitem(last=False)

    def clear(self, rows: Sequence[Row]) -> None:
        if self._digests:
            for digest in {digest for row in rows for digest in row.sequence.adapters}:
                self._digests.pop(digest, None)


class Passes:
    """Usage, each step: run(rows). Invariant: every row is booked once, or its sequence has failed alone."""

    def __init__(
        self,
        forward: Callable[[list[Row]], Mapping[Seq, Sample]],
        scheduler: Scheduler,
        watch: Watch,
        relieve: Callable[[], None],
    ) -> None:
        """`relieve` frees what memory it can without harm to anybody who runs."""
        self._forward = forward
        self._scheduler = scheduler
        self._watch = watch
        self._relieve = relieve
        self.size = PassSize(scheduler.limits.max_batch_tokens)
        self.suspects = Suspects()

    def run(self, rows: list[Row]) -> None:
        for batch in self._divided(rows):
            self._attempt(batch)
        self.size.stepped()

    def _divided(self, rows: list[Row]) -> Iterator[list[Row]]:
        """The passes of a step: nearly always one."""
        suspected = [row for row in rows if row in self.suspects]
        trusted = [row for row in rows if row not in self.suspects] if suspected else rows
        for group in (trusted, suspected):
            yield from [group] if self.size.limit is None else _sized(group, self.size.limit)

    def _attempt(self, rows: list[Row], last: bool = False) -> bool:
        """One pass; if it raises, smaller ones. Whether all rows went well. `last`: there will be no other attempt."""
        rows = [row for row in rows if row.sequence in self._scheduler.running]
        if not rows:
            return True
        smaller = _halves(rows)
        try:
            samples = self._forward(rows)
        except Exception as error:
            exhausted = out_of_memory(error)
            self._watch.pass_failed("memory" if exhausted else "error")
            if last or (len(rows) == 1 and not exhausted):
                self._fail(rows[0], error)
                return False
        else:
            self._book(rows, samples)
            return True
        # Out here the exception is gone, and with its traceback the tensors of the pass that broke.
        return self._again(rows, smaller, exhausted)

    def _again(self, rows: list[Row], smaller: Sequence[list[Row]], exhausted: bool) -> bool:
        if len(smaller) == 1:
            self._relieve()
            return self._attempt(smaller[0], last=True)
        outcomes = [self._attempt(part) for part in smaller]  # all of them, whatever becomes of the first
        if well := all(outcomes):
            self.size.shrink(_tokens(rows))
            log.warning("a step went well only in parts", rows=len(rows), tokens=_tokens(rows), memory=exhausted)
        return well

    def _fail(self, row: Row, error: Exception) -> None:
        log.error("a step failed", adapters=[digest.short for digest in row.sequence.adapters], exc_info=error)
        self.suspects.blame(row)
        self._scheduler.fail_sequence(row.sequence, failure("the step", error))

    def _book(self, rows: list[Row], samples: Mapping[Seq, Sample]) -> None:
        self.suspects.clear(rows)
        guessed = sum(len(row.draft) for row in rows)
        if guessed:
            self._watch.speculated(guessed, sum(len(sample.more) for sample in samples.values()))
        self._scheduler.advance(rows, samples)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row.count for row in rows)


def _without_guesses(row: Row) -> Row:
    return replace(row, count=row.count - len(row.draft), draft=()) if row.draft else row


def _pieces(row: Row, most: int) -> Iterator[Row]:
    """A row's positions in order, at most `most` at a time; guesses are dropped, as each piece needs the one before."""
    row = _without_guesses(row) if row.count > most else row
    for start in range(row.start, row.start + row.count, most) if row.count > most else (row.start,):
        yield replace(row, start=start, count=min(most, row.start + row.count - start))


def _halves(rows: list[Row]) -> tuple[list[Row], ...]:
    """Two smaller passes that do the same, one after the other; a lone position is one pass and stays it."""
    if len(rows) > 1:
        return rows[: len(rows) // 2], rows[len(rows) // 2 :]
    (row,) = rows
    if row.draft:
        return ([_without_guesses(row)],)
    return tuple([piece] for piece in _pieces(row, -(-row.count // 2)))


def _sized(rows: list[Row], most: int) -> Iterator[list[Row]]:
    """Passes of at most `most` tokens. The pieces of a prompt each stand in a pass of their own."""
    batch: list[Row] = []
    for piece in (piece for row in rows for piece in _pieces(row, most)):
        if batch and (_tokens(batch) + piece.count > most or batch[-1].sequence is piece.sequence):
            yield batch
            batch = []
        batch.append(piece)
    yield batch
