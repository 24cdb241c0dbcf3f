"""Patterns in an upload's config, run by RE2 in linear time: `(.|..)+!` would keep Python's `re` busy for seconds.

Owns the limits on patterns, and the refusal of what RE2 has not or reads otherwise than `re`. Knows no field's meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import re2

from ..errors import AdapterError

MAX_KEYS: Final = 1024
MAX_LENGTH: Final = 512
#: RE2 instructions of one field's keys together (a plain name has about as many as characters), and bytes for running them:
#: what bounds the time that patterns can take.
MAX_PROGRAM: Final = 150_000
MEMORY: Final = 8 << 20
#: Legal in both, but with another meaning: `re` takes {,3} for {0,3} and [[:a:]] for a set of characters.
_READ_DIFFERENTLY: Final = ("{,", "[[:")


def first_keys(field: str, keys: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Module name -> the first key for which `re.match(rf"(.*\\.)?({key})$", name)` holds, as PEFT looks them up.

    Names that no key matches are left out. Raises: AdapterError naming the field and the key.
    """
    if len(keys) > MAX_KEYS:
        raise AdapterError(field, f"has {len(keys)} keys, over the limit of {MAX_KEYS}")
    if not keys:
        return {}
    together, size = re2.Set.MatchSet(_options()), 0
    for key in keys:
        size += compiled(field, key, rf"(.*\.)?({key})$").programsize
        if size > MAX_PROGRAM:
            raise AdapterError(field, f"its keys need more than {MAX_PROGRAM} RE2 instructions")
        together.Add(rf"(.*\.)?({key})$")
    together.Add("(?s).*")  # matches always: an answer without it is no answer, RE2 ran out of memory
    return _matched(field, keys, together, names)


def _matched(field: str, keys: Sequence[str], together: re2.Set, names: Collection[str]) -> dict[str, str]:
    too_large = AdapterError(field, f"its keys need more than {MEMORY} bytes to be matched")
    try:
        together.Compile()
    except re2.error:
        raise too_large from None
    found: dict[str, str] = {}
    for name in names:
        matching = set(together.Match(name))
        if len(keys) not in matching:
            raise too_large
        first = min(matching)
        if first < len(keys):
            found[name] = keys[first]
    return found


def whole_match(field: str, pattern: str) -> Callable[[str], bool]:
    """name -> whether `re.fullmatch(pattern, name)` holds. Raises: AdapterError naming the field and the pattern."""
    regex = compiled(field, pattern)
    return lambda name: regex.fullmatch(name) is not None


def compiled(field: str, shown: str, pattern: str | None = None) -> Any:  # google-re2 has no types
    """`pattern` (by default `shown`, the upload's own text in it), ready to be matched.

    Raises: AdapterError naming the field, the upload's text, and what is wrong with it.
    """
    if len(shown) > MAX_LENGTH:
        raise AdapterError(field, f"holds a pattern of {len(shown)} characters, over the limit of {MAX_LENGTH}")
    for part in _READ_DIFFERENTLY:
        if part in shown:
            raise AdapterError(field, f"{shown!a} holds {part!r}, which is not served; write it out")
    try:
        return re2.compile(shown if pattern is None else pattern, _options())
    except re2.error as error:
        raise AdapterError(field, f"{shown!a} is no regular expression that is served: {_reason(error)}") from None


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = MEMORY
    options.log_errors = False
    return options


def _reason(error: Exception) -> str:
    (reason,) = error.args
    return ascii(reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason))[1:-1]
