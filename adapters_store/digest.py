"""Digest: a sha256 parsed once, and the only thing a path inside the store can be made from.

Knows nothing of files, tenants or names.
"""

from __future__ import annotations

import hashlib
import re
from typing import Self

_HEX64 = re.compile(r"[0-9a-f]{64}")


class Digest(str):
    """A lower-case hex sha256. Invariant: exactly 64 characters of [0-9a-f]."""

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        """Raises: ValueError when `value` is not a lower-case hex sha256."""
        if not _HEX64.fullmatch(value):
            raise ValueError(f"not a sha256 digest: {value[:80]!r}")
        return super().__new__(cls, value)

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(hashlib.sha256(data).hexdigest())

    @property
    def short(self) -> str:
        """The first 12 characters, for logs and people."""
        return self[:12]
