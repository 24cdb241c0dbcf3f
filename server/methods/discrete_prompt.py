"""Discrete prompts with answer mapping (pattern and verbalizer: Schick and Schütze, 2021): a text instead of weights.

Owns the split of the template, what of it is tokenised once, and the limits. The template's head is the adapter's prefix,
run once as plain tokens; its tail and the verbalizer are kept in the adapter's record as text, for whoever words requests.

    Checkpoint.config = {"template": str, "verbalizer": {label: [word, ...]} or None}
    "Review: {input}\\nIt was"  ->  prefix of the tokens of "Review: ", told {"headed": true, "tail": "\\nIt was"}

A prompt is tokenised piece by piece (head, input, tail), so that the head's keys and values serve every input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, cast

import torch

from adapters_store.records import JSON

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, Part, Prefix
from .prefix_tuning import check_length

INPUT: Final = "{input}"
MAX_TEMPLATE: Final = 1 << 15  # characters
MAX_LABELS: Final = 64
MAX_LABEL: Final = 128  # characters of one
MAX_WORDS: Final = 256  # of all labels together
MAX_WORD_TOKENS: Final = 16
MAX_CONTINUATIONS: Final = 64  # runs through the base beyond the first that words of several tokens may cost

Verbalizer = Mapping[str, Sequence[str]]


class DiscretePrompt(Method):
    """A template, and maybe a verbalizer. Without a head it changes no position, and has no prefix."""

    name: ClassVar[str] = "discrete_prompt"
    served: ClassVar[str] = "its text is run once, as plain tokens, its K/V kept as shared pages"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        head, tail = _split(str(checkpoint.config["template"]))
        ids = tuple(base.tokens(head, True)) if head else ()
        behind = base.tokens(tail, False) if tail else ()
        check_length("template", len(ids), base, limits)
        check_length("template", len(ids) + len(behind), base, limits)
        verbalizer = cast("Verbalizer | None", checkpoint.config.get("verbalizer"))
        if verbalizer is not None:
            _check_verbalizer(verbalizer, base)
        prefix = Prefix(len(ids), ids=torch.tensor(ids, dtype=torch.int64)) if ids else None
        template: dict[str, JSON] = {"headed": bool(head), "tail": tail}
        return Part(self.name, prefix=prefix, told={"template": template, "verbalizer": verbalizer})


def _split(template: str) -> tuple[str, str]:
    if len(template) > MAX_TEMPLATE:
        raise AdapterError("template", f"has {len(template)} characters, over the limit of {MAX_TEMPLATE}")
    if template.count(INPUT) != 1:
        raise AdapterError("template", f"must hold {INPUT} exactly once, it holds it {template.count(INPUT)} times")
    head, _, tail = template.partition(INPUT)
    return head, tail


def _check_verbalizer(verbalizer: Verbalizer, base: BaseShape) -> None:
    _check_count("labels", len(verbalizer), 2, MAX_LABELS)
    _check_count("words", sum(len(words) for words in verbalizer.values()), 1, MAX_WORDS)
    heads: set[tuple[int, ...]] = set()
    for label, words in verbalizer.items():
        if not 0 < len(label) <= MAX_LABEL:
            raise AdapterError("verbalizer", f"has a label of {len(label)} characters; accepted: 1 to {MAX_LABEL}")
        if not words:
            raise AdapterError("verbalizer", f"{_shown(label)} has no words")
        for ids in _word_ids(label, words, base):
            heads |= {ids[:stop] for stop in range(1, len(ids))}
    if len(heads) > MAX_CONTINUATIONS:
        cost = f"needs {len(heads)} continuations for its words of several tokens"
        raise AdapterError("verbalizer", f"{cost}, over the limit of {MAX_CONTINUATIONS}")


def _word_ids(label: str, words: Sequence[str], base: BaseShape) -> list[tuple[int, ...]]:
    """The words' tokens. Raises: AdapterError for a word without any, with too many, and for one given twice."""
    found: list[tuple[int, ...]] = []
    for word in words:
        ids = tuple(base.tokens(word, False))
        if not 0 < len(ids) <= MAX_WORD_TOKENS:
            limit = f"accepted: 1 to {MAX_WORD_TOKENS}"
            raise AdapterError("verbalizer", f"the word {_shown(word)} of {_shown(label)} has {len(ids)} tokens; {limit}")
        if ids in found:
            raise AdapterError("verbalizer", f"the word {_shown(word)} of {_shown(label)} is there twice")
        found.append(ids)
    return found


def _check_count(what: str, count: int, least: int, most: int) -> None:
    if not least <= count <= most:
        raise AdapterError("verbalizer", f"has {count} {what}; accepted: {least} to {most}")


def _shown(text: str) -> str:
    return ascii(text[:80])
