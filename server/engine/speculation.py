"""Speculation by prompt lookup: where a sequence's last tokens stood before, what followed then is guessed to follow now.

Owns each sequence's index of n-grams and how far its guesses are trusted. Guesses are free to be wrong: a step verifies
them, and a wrong one costs the time it took. Never imports torch.

    ids   the cat sat on the mat . the cat      "the cat" stood before   ->   guess: sat on the mat
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

from .plan import Sequence

GRAMS: Final = (3, 2)  # tokens that are looked up, the longest first
LONGEST_PAUSE: Final = 32  # steps without a guess, for a sequence whose guesses keep being wrong


class Lookup:
    """The n-grams of one sequence of ids that only grows, each with the place behind its latest occurrence."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}
        self._seen = 1  # n-grams that end before this place are in the index

    def guess(self, ids: Seq[int], count: int) -> tuple[int, ...]:
        """At most `count` ids to follow `ids`; none where nothing like its end stood before."""
        for end in range(self._seen, len(ids)):  # not at the very end: nothing follows there yet
            for n in GRAMS:
                if end >= n:
                    self._behind[tuple(ids[end - n : end])] = end
        self._seen = len(ids)
        at = next((self._behind[gram] for n in GRAMS if (gram := tuple(ids[-n:])) in self._behind), None)
        return () if at is None else self._copy(ids, at, count)

    def _copy(self, ids: Seq[int], at: int, count: int) -> tuple[int, ...]:
        """Ids from `at` on; a copy that reaches the end goes on with what it has copied, so a loop is guessed as a loop."""
        copied: list[int] = []
        for place in range(at, at + count):
            id = ids[place] if place < len(ids) else copied[place - len(ids)]
            if id < 0:  # a virtual position
                break
            copied.append(id)
        return tuple(copied)


@dataclass
class _Trust:
    lookup: Lookup
    length: int  # of the next guess, at most
    pause: int = 0  # steps to sit out
    failures: int = 0  # guesses in a row that were wrong from their first token


@dataclass
class Speculation:
    """Guesses for all sequences, at most `most` tokens each; 0 = none at all."""

    most: int
    _trust: WeakKeyDictionary[Sequence, _Trust] = field(default_factory=WeakKeyDictionary)

    def guess(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Ids to follow the sequence's own, at most `room`, for one that is about to pick its next token greedily."""
        trust = self._trust.setdefault(sequence, _Trust(Lookup(), self.most))
        if trust.pause:
            trust.pause -= 1
            return ()
        return trust.lookup.guess(sequence.ids, min(trust.length, room))

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        """Of `guessed` ids the first `right` were right: the next guess is longer, shorter, or has to wait."""
        trust = self._trust.get(sequence)
        if trust is None or not guessed:
            return
        trust.length = min(self.most, 2 * guessed) if right == guessed else min(self.most, right + 1)
        trust.failures = 0 if right else trust.failures + 1
        trust.pause = min(LONGEST_PAUSE, 2**trust.failures) if trust.failures else 0


def may_speculate(sequence: Sequence) -> bool:
    """Whether its next token is certain once the model has spoken: it generates, greedily, and its prompt is done."""
    request = sequence.request
    return (
        request is not None
        and request.task == "generate"
        and not request.sampling.do_sample
        and sequence.generated > 0
        and sequence.remaining == 1
    )
