"""Every error the store raises, as one tree of its own; it knows nothing of HTTP or of `server.errors`.

StoreError
├── NotFound      no such adapter, version, user or digest for this tenant; foreign and missing read the same
├── Invalid       an argument is wrong: `field`, what is allowed, the value
├── TooLarge      an upload is over its byte limit: `limit`, `value`
├── OverQuota     a tenant would keep more than it may: `quota`, `limit`, `value`
├── Conflict      the state forbids it: a catalog written by newer code, an upload published twice
├── Corrupt       stored bytes are not what they were
└── Unavailable   the disk or the database refused (full, locked, I/O error); the cause is chained
"""
# ruff: noqa: N818 - the names with an Error suffix are `server.errors`, which clients see; both are used side by side

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StoreError(Exception):
    """Base of the tree. `str(error)` holds no path and no byte of an upload."""


class NotFound(StoreError):
    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {clip(name)} does not exist")
        self.kind = kind
        self.name = name


class Invalid(StoreError):
    """`rule` is a phrase that follows the field's name: "must have 1 to 128 characters"."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(f"{field}: {rule}, got {clip(value)}")
        self.field = field
        self.rule = rule
        self.value = value


class TooLarge(StoreError):
    """`limit` and `value` are bytes; `value` is how much had arrived when the upload was cut off."""

    def __init__(self, limit: int, value: int) -> None:
        super().__init__(f"upload: at most {limit} bytes are accepted, got {value} or more")
        self.limit = limit
        self.value = value


class OverQuota(StoreError):
    """`quota` is max_adapters or max_adapter_bytes; `value` is what the tenant would have."""

    def __init__(self, quota: str, limit: int, value: int) -> None:
        super().__init__(f"{quota} is {limit}: with this upload it would be {value}")
        self.quota = quota
        self.limit = limit
        self.value = value


class Conflict(StoreError):
    pass


class Corrupt(StoreError):
    pass


class Unavailable(StoreError):
    pass


def clip(value: object) -> str:
    """`value` as a person can read it in one line, whatever a client sent."""
    shown = repr(value[:80] if isinstance(value, str) else value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns OSError into Unavailable. Only its reason is kept: `str(OSError)` carries a path.

    Raises: Unavailable.
    """
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the store's disk failed: {error.strerror or type(error).__name__}") from error
