"""What tenants, adapters, users and uploaded files may be called.

Names are keys of the catalog and of manifests only. Nothing here, and nothing elsewhere, makes a path of one.
"""

from __future__ import annotations

from string import ascii_letters, digits
from typing import Literal

from .errors import Invalid

NameField = Literal["tenant", "adapter_id", "user_id"]

MAX_NAME = 128  # characters, also of a file name

_PUNCTUATION = {"tenant": "-_.:/@+", "adapter_id": "-_.:/", "user_id": "-_.:/@+"}


def check_name(field: NameField, value: str) -> str:
    """`value` itself: ASCII letters, digits and some punctuation, `/` between parts only ("org/name"), never `..`.

    Raises: Invalid naming the field, the rule and the value.
    """
    if not 1 <= len(value) <= MAX_NAME:
        raise Invalid(field, f"must have 1 to {MAX_NAME} characters, has {len(value)}", value)
    punctuation = _PUNCTUATION[field]
    if not set(value) <= set(ascii_letters + digits + punctuation):
        raise Invalid(field, f"may hold ASCII letters, digits and {' '.join(punctuation)} only", value)
    if ".." in value or any(part in ("", ".") for part in value.split("/")):
        raise Invalid(field, "may not hold '..', or an empty or '.' part between slashes", value)
    return value


def check_file_name(value: str) -> str:
    """`value` itself: one printable path component. Which names an upload may hold is its caller's business.

    Raises: Invalid naming the rule and the value.
    """
    if not 1 <= len(value) <= MAX_NAME:
        raise Invalid("files", f"a file name must have 1 to {MAX_NAME} characters, has {len(value)}", value)
    if not value.isprintable() or "/" in value or "\\" in value or not value.strip("."):
        raise Invalid("files", "a file name must be printable, without separators, and more than dots", value)
    return value
