"""Text in, token ids out, and back: a fast tokenizer, an incremental detokeniser and stop sequences.

Owns everything that turns characters into tokens and tokens into characters. Knows no request, no engine, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..errors import ValidationError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 5  # tokens of the prompt that a detokeniser needs to know whether a leading space is to be kept
_LONGEST_PARTIAL = 3  # an unfinished UTF-8 character has at most three bytes, so at most three tokens
_PATIENCE = 8  # tokens that decode to no whole character before they are taken for garbage


@dataclass(frozen=True, slots=True)
class Offset:
    """One token of a text and the characters it covers."""

    id: int
    text: str
    start: int
    stop: int


class Text:
    """One base model's tokenizer. Invariant: immutable after construction, so any thread may use it.

    The tokenizer's own `__call__` is avoided: it writes truncation state into the shared Rust object, which is a race.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: Iterable[int] = ()) -> None:
        """`eos_ids` end a generation; without any, the tokenizer's own EOS does."""
        self._chat = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        own = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        self.eos_ids: frozenset[int] = frozenset(eos_ids) or frozenset(own)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special) | self.eos_ids
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self._pieces: dict[int, str] = {}
        self._opening = _opening(self.encode("a"), self.encode("a", special=False))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat.chat_template)

    def encode(self, text: str, *, truncate: int | None = None, special: bool = True) -> list[int]:
        """Token ids of `text`, with the model's leading special tokens if `special`; `truncate` keeps the last n.

        The batch entry point is used because it is the one that releases the GIL.
        """
        encoding = self._backend.encode_batch_fast([_whole(text)], add_special_tokens=special)[0]
        return list(encoding.ids if truncate is None else encoding.ids[-truncate:])

    def encode_piece(self, text: str, first: bool) -> list[int]:
        """Ids of one piece of a prompt that is put together from several: the tokens that open a text (BOS) come with the
        first piece, those that would close one with none."""
        return [*(self._opening if first else ()), *self.encode(text, special=False)]

    def offsets(self, text: str, *, special: bool = True) -> list[Offset]:
        """The tokens of `text`, each with the characters it covers (none for a special token that was added)."""
        text = _whole(text)
        encoding = self._backend.encode_batch([text], add_special_tokens=special)[0]
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [Offset(id, text[start:stop] or self.piece(id), start, stop) for id, (start, stop) in pairs]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, id: int) -> str:
        """One token's text on its own; a part of a character reads as U+FFFD."""
        piece = self._pieces.get(id)
        if piece is None:
            piece = self._pieces[id] = self.decode([id])
        return piece

    def chat(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The prompt for a conversation, rendered by the base model's own template (never by a tenant's).

        Raises: ValidationError when there is no template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise ValidationError("`messages` cannot be used: the base model has no chat template")
        try:
            rendered = self._chat.apply_chat_template(
                [dict(message) for message in messages],  # type: ignore[arg-type]  # parts are objects, not only text
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValidationError(f"`messages` do not fit the chat template: {error}") from error
        return str(rendered)


def _opening(whole: Sequence[int], plain: Sequence[int]) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text: `whole` is one with its special tokens, `plain` the same without."""
    starts = range(len(whole) - len(plain) + 1)
    return tuple(whole[: next((at for at in starts if list(whole[at : at + len(plain)]) == list(plain)), 0)])


def _whole(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced, as the Rust side takes no others."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Stream:
    """Turns tokens into text as they arrive, never splitting a character.

        ids     p p p p p | t0 t1 t2 t3         text of t3 = decode(ids[prefix:]) - decode(ids[prefix:read])
                          ^prefix    ^read      kept back while it ends in U+FFFD: a character still unfinished

    The tokens before `read` are decoded along because a tokenizer may treat the first token of a text differently.
    """

    def __init__(self, text: Text, prompt: Sequence[int] = ()) -> None:
        self._text = text
        self._ids = list(prompt[-_CONTEXT:])
        self._prefix = 0
        self._read = len(self._ids)

    def push(self, id: int) -> str:
        """The text that this token made final; empty while a character is unfinished."""
        self._ids.append(id)
        new = self._pending(len(self._ids))
        if not new.endswith(_REPLACEMENT):
            self._advance(len(self._ids))
            return new
        return self._give_up() if len(self._ids) - self._read > _PATIENCE else ""

    def skip(self, id: int) -> str:
        """Take a special token in: its own text, which starts afresh whatever was pending (`flush` first)."""
        self._ids.append(id)
        self._prefix, self._read = len(self._ids) - 1, len(self._ids)
        return self._text.piece(id)

    def flush(self) -> str:
        """The whole characters among what was kept back; half a character at the end is dropped."""
        new = self._pending(len(self._ids)).rstrip(_REPLACEMENT)
        self._advance(len(self._ids))
        return new

    def _pending(self, stop: int) -> str:
        """Text of the tokens from `read` to `stop`."""
        if stop <= self._read:
            return ""
        before = self._ids[self._prefix : self._read]
        known = self._text.piece(before[0]) if len(before) == 1 else self._text.decode(before)
        return self._text.decode(self._ids[self._prefix : stop])[len(known) :]

    def _give_up(self) -> str:
        """Let go of bytes that are no text, so that the window (and the cost of a step) stays bounded."""
        stop = len(self._ids) - _LONGEST_PARTIAL
        new = self._pending(stop)
        self._advance(stop)
        return new

    def _advance(self, stop: int) -> None:
        self._prefix, self._read = self._read, stop
        del self._ids[: self._prefix]
        self._prefix, self._read = 0, self._read - self._prefix


@dataclass(frozen=True, slots=True)
class Match:
    """A stop sequence was completed: it covers the last `length` characters before `end` of the text pushed last."""

    end: int
    length: int


class StopMatcher:
    """Finds the first stop sequence in a text that arrives in pieces; first = the one that ends earliest.

    What counts is characters, not tokens: a sequence may begin, end or lie whole inside a piece.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._keep = max((len(stop) for stop in self._stops), default=1) - 1
        self._tail = ""  # the last `_keep` characters before the next piece

    def push(self, piece: str) -> Match | None:
        if not self._stops:
            return None
        window, before = self._tail + piece, len(self._tail)
        found = [(at + len(stop), -len(stop)) for stop in self._stops if (at := window.find(stop)) >= 0]
        self._tail = window[len(window) - self._keep :] if len(window) > self._keep else window
        if not found:
            return None
        end, length = min(found)
        return Match(end - before, -length)

    @property
    def held(self) -> int:
        """Characters at the end of the text so far that may turn out to be the beginning of a stop sequence."""
        longest = min(self._keep, len(self._tail))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(self._tail[-n:]) for stop in self._stops))
        return next(ends, 0)


class Transcript:
    """The text of one generation, token by token, up to the end of the first stop sequence.

    Two readings of it: `push` gives each token's own text at once (TGI's events: stop sequence included, special tokens
    spelled out); `take` gives the answer without special tokens and without the stop sequence, and keeps back what may
    still become one (OpenAI's chunks). `answer` is TGI's `generated_text`: the stop sequence stays in it.
    """

    def __init__(self, text: Text, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._text = text
        self._stream = Stream(text, prompt)
        self._matcher = StopMatcher(stops)
        self._segments: list[tuple[str, bool]] = []  # (characters, visible)
        self._taken = 0  # characters of all segments that `take` is past
        self._length = 0  # characters of all segments
        self._end = 0  # characters of all segments before the stop sequence; equals _length without one
        self.stopped = False

    @property
    def answer(self) -> str:
        return "".join(characters for characters, visible in self._segments if visible)

    def push(self, id: int, *, last: bool = False) -> str:
        """The text this token made final. With `last`, whole characters that were kept back come along.

        After `stopped` turned true nothing more may be pushed.
        """
        if id in self._text.special_ids:
            shown = self._add(self._stream.flush(), visible=True)
            return shown if self.stopped else shown + self._add(self._stream.skip(id), visible=False)
        return self._add(self._stream.push(id) + (self._stream.flush() if last else ""), visible=True)

    def take(self, *, last: bool = False) -> str:
        """What the answer gained since the last call and can no longer be part of a stop sequence."""
        upto = self._end if last or self.stopped else self._length - self._matcher.held
        given = self._visible(self._taken, upto)
        self._taken = max(self._taken, upto)
        return given

    def _add(self, piece: str, *, visible: bool) -> str:
        match = self._matcher.push(piece)
        kept = piece if match is None else piece[: match.end]
        if kept:
            self._segments.append((kept, visible))
        self._length += len(kept)
        self._end = self._length - (match.length if match else 0)
        self.stopped = match is not None
        return kept

    def _visible(self, start: int, stop: int) -> str:
        """Visible characters from `start` to `stop`, walking back from the end as only the last few are asked for."""
        parts: list[str] = []
        at = self._length
        for characters, visible in reversed(self._segments):
            if at <= start:
                break
            at -= len(characters)
            if visible:
                parts.append(characters[max(0, start - at) : max(0, stop - at)])
        return "".join(reversed(parts))
