"""Answer mapping: the words of each label, scored as what follows the prompt.

Owns which requests that takes and how their scores become one number per label. Runs through the engine alone.

    p(label) = sum of p(word | prompt) over its words, and over all labels 1;  p(word) = product over the word's tokens

    words  great · good · terr|ible      behind ""    choices great, good, terr      one run per text
                                         behind terr  choices ible                   one more per distinct beginning
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..engine.client import EngineClient, Job
from ..engine.scoring import score_all
from ..errors import ValidationError
from ..model.text import Text

Ids = tuple[int, ...]
Logprobs = Mapping[int, float]  # by token id

_AT_ONCE: Final = 32  # continuations of one request in the engine's queue


@dataclass(frozen=True, slots=True)
class Words:
    """A verbalizer as tokens. Invariant: every word has at least one."""

    labels: tuple[str, ...]
    ids: tuple[tuple[Ids, ...], ...]  # the words of each label

    @classmethod
    def of(cls, verbalizer: Mapping[str, object], text: Text) -> Words:
        """`verbalizer` as an adapter's record holds it: {label: [word, ...]}."""
        given = {label: words for label, words in verbalizer.items() if isinstance(words, list | tuple)}
        ids = (tuple(tuple(text.encode_piece(str(word), first=False)) for word in words) for words in given.values())
        return cls(tuple(given), tuple(ids))

    @property
    def longest(self) -> int:
        """Tokens of the longest word."""
        return max(map(len, self._all))

    @property
    def choices(self) -> dict[Ids, Ids]:
        """Every beginning of a word, "" first and shorter before longer -> the tokens that go on from there."""
        found: dict[Ids, dict[int, None]] = {(): {}}
        for word in self._all:
            for at, token in enumerate(word):
                found.setdefault(word[:at], {})[token] = None
        return {beginning: tuple(found[beginning]) for beginning in sorted(found, key=len)}

    def scores(self, logprobs: Mapping[Ids, Logprobs]) -> list[float]:
        """The log of each label's probability mass; `logprobs` has an entry for each of `choices`."""
        return [_log_sum([_logprob(word, logprobs) for word in words]) for words in self.ids]

    @property
    def _all(self) -> Iterable[Ids]:
        return (word for words in self.ids for word in words)


async def label_scores(client: EngineClient, jobs: Sequence[Job], words: Words) -> list[list[float]]:
    """One list of label scores (log probability mass) per job; the jobs' prompts are whole, their choices still empty.

    The prompts run first, so that the continuations find their blocks in the prefix cache.

    Raises: AdapterdError when one of the requests fails.
    """
    choices = words.choices
    asked = [(index, beginning) for index in range(len(jobs)) for beginning in choices]
    asked.sort(key=lambda pair: bool(pair[1]))
    found: list[dict[Ids, Logprobs]] = [{} for _ in jobs]
    for part in _parts(asked, len(jobs)):
        requests = [_behind(jobs[index], beginning, choices[beginning]) for index, beginning in part]
        for (index, beginning), scores in zip(part, await score_all(client, requests), strict=True):
            found[index][beginning] = dict(zip(choices[beginning], scores[0], strict=True))
    return [words.scores(logprobs) for logprobs in found]


def check_words_fit(jobs: Sequence[Job], words: Words, virtual: int, limit: int) -> None:
    """Raises: ValidationError for a prompt that leaves no room for the longest word."""
    for job in jobs:
        needed = len(job.request.prompt) + virtual + words.longest - 1
        if needed > limit:
            raise ValidationError(
                f"`inputs` must leave room for the verbalizer's words within {limit} tokens. Given: {needed} with the longest"
            )


def _parts(asked: Sequence[tuple[int, Ids]], first: int) -> Iterable[Sequence[tuple[int, Ids]]]:
    """The first `first` together, then the others a few at a time."""
    yield asked[:first]
    for start in range(first, len(asked), _AT_ONCE):
        yield asked[start : start + _AT_ONCE]


def _behind(job: Job, beginning: Ids, choices: Ids) -> Job:
    prompt, arrival = (*job.request.prompt, *beginning), time.monotonic() if beginning else job.request.arrival
    id = job.trail.new_run() if beginning else job.request.id
    return replace(job, request=replace(job.request, id=id, prompt=prompt, choices=choices, arrival=arrival))


def _logprob(word: Ids, logprobs: Mapping[Ids, Logprobs]) -> float:
    return math.fsum(logprobs[word[:at]][token] for at, token in enumerate(word))


def _log_sum(logs: Sequence[float]) -> float:
    """log of the sum of exponentials."""
    highest = max(logs)
    return highest + math.log(math.fsum(math.exp(log - highest) for log in logs))
