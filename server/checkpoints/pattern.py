"""Pattern: PEFT's rank_pattern and alpha_pattern, matched without ever running an upload's regular expression.

Owns the plain-name subset of the syntax. `(.|..)+!` in an upload would hang `re` for seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..errors import AdapterError

MAX_KEYS: Final = 1024
_REGULAR: Final = frozenset("\\*+?[](){}|^$\0")


class Pattern:
    """Module name -> number, by the first key for which `re.match(rf"(.*\\.)?({key})$", name)` would hold.

    Only keys that are plain names are matched: "." stands for any character, "\\." for a dot, a leading "^" ties the key
    to the whole name. Keys that need a regular expression engine are listed in `regular` and match nothing.
    """

    def __init__(self, field: str, values: Mapping[str, float]) -> None:
        if len(values) > MAX_KEYS:
            raise AdapterError(field, f"has {len(values)} keys, over the limit of {MAX_KEYS}")
        literals = {key: _literal(key) for key in values}
        self.values = values
        self.regular = tuple(key for key, literal in literals.items() if literal is None)
        self._literals = [(values[key], literal) for key, literal in literals.items() if literal is not None]

    def get(self, module: str, default: float) -> float:
        return next((value for value, literal in self._literals if literal.matches(module)), default)


@dataclass(frozen=True)
class _Literal:
    text: str
    wild: frozenset[int]  # positions of text that match any character
    whole: bool  # anchored: no dotted prefix may precede it

    def matches(self, name: str) -> bool:
        start = len(name) - len(self.text)
        if start < 0 or (start and (self.whole or name[start - 1] != ".")):
            return False
        pairs = enumerate(zip(name[start:], self.text, strict=True))
        return all(have == want or i in self.wild for i, (have, want) in pairs)


def _literal(key: str) -> _Literal | None:
    pieces = key.removeprefix("^").removesuffix("$").split("\\.")  # between them: dots that are dots
    text = ".".join(pieces)
    if not text or any(not _REGULAR.isdisjoint(piece) for piece in pieces):
        return None
    escaped = {sum(len(piece) + 1 for piece in pieces[:i]) - 1 for i in range(1, len(pieces))}
    wild = frozenset(i for i, char in enumerate(text) if char == "." and i not in escaped)
    return _Literal(text, wild, key.startswith("^"))
