"""What adapters' records say about the prompt itself: a text around the input, words to answer with, tasks to choose from.

Owns the reading of those details and the order in which a prompt's pieces are tokenised. Reads no store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adapters_store.records import JSON, AdapterRecord

from ..errors import ValidationError
from ..model.text import Offset, Text
from ..recipes import Source, Task
from .body import shown

Verbalizer = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Frame:
    """What a discrete prompt leaves to be done per request; its head is the adapter's prefix already.

    The pieces of a prompt (head, input, tail) are tokenised one by one, so the whole is the concatenation of their ids.
    """

    headed: bool = False  # the input does not open the text
    tail: str = ""
    verbalizer: Verbalizer | None = None

    def ids(self, text: Text, inputs: str, truncate: int | None, *, special: bool) -> list[int]:
        """The ids behind the prefix; `truncate` keeps the last n of the input's own. `special`: as for `Text.encode`."""
        if self is PLAIN:
            return text.encode(inputs, truncate=truncate, special=special)
        given = text.encode_piece(inputs, special and not self.headed)
        return self.closed(text, given if truncate is None else given[-truncate:])

    def offsets(self, text: Text, inputs: str) -> list[Offset]:
        """The input's own tokens and the characters they cover, those that open a text included where it does."""
        if self is PLAIN:
            return text.offsets(inputs)
        opening = () if self.headed else text.encode_piece("", first=True)
        return [*(Offset(id, text.piece(id), 0, 0) for id in opening), *text.offsets(inputs, special=False)]

    def closed(self, text: Text, ids: Sequence[int]) -> list[int]:
        """The input's ids with the tail's behind them."""
        return [*ids, *(text.encode(self.tail, special=False) if self.tail else ())]


PLAIN = Frame()


def frame_of(details: Mapping[str, JSON]) -> Frame:
    """PLAIN for an adapter that is no discrete prompt."""
    template, verbalizer = details.get("template"), details.get("verbalizer")
    if not isinstance(template, Mapping):
        return PLAIN
    words = verbalizer.items() if isinstance(verbalizer, Mapping) else ()
    answers = {label: tuple(str(word) for word in given) for label, given in words if isinstance(given, list | tuple)}
    return Frame(bool(template.get("headed")), str(template.get("tail", "")), answers or None)


def one_frame(details: Iterable[Mapping[str, JSON]]) -> Frame:
    """Of a request's adapters. Raises: ValidationError for two discrete prompts: one input cannot stand in two templates."""
    found = [frame for frame in map(frame_of, details) if frame is not PLAIN]
    if len(found) > 1:
        raise ValidationError("`compose` takes at most one discrete prompt")
    return found[0] if found else PLAIN


def tasks_of(record: AdapterRecord) -> int:
    """How many tasks an adapter lets a request choose from; 0: none, it is one task."""
    tasks = record.details.get("tasks", 0)
    return tasks if isinstance(tasks, int) else 0


def source_of(record: AdapterRecord, task_id: int | None) -> Source:
    """The adapter, or the one task of it that a request names. Raises: ValidationError naming `task_id` and its range."""
    tasks = tasks_of(record)
    if not tasks:
        return record.digest
    if task_id is None:
        raise ValidationError(f"`task_id` is required: {record.name!r} has {tasks} tasks, 0 to {tasks - 1}")
    if not 0 <= task_id < tasks:
        raise ValidationError(f"`task_id` must be >= 0 and < {tasks} for {record.name!r}. Given: {shown(task_id)}")
    return Task(record.digest, task_id)


def check_task_used(task_id: int | None, sources: Sequence[Source]) -> None:
    """Raises: ValidationError for a `task_id` that no adapter of the request has a use for."""
    if task_id is not None and not any(isinstance(source, Task) for source in sources):
        raise ValidationError(f"`task_id` needs an adapter with several tasks. Given: {shown(task_id)}")
