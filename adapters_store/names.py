"""What tenants, adapters, users and uploaded files may be called.

Names are keys of the catalog and of manifests only. Nothing here, and nothing elsewhere, makes a path of one.
"""

from __future__ import annotations

from string import ascii_letters, digits
from typing import Literal

from .errors import Invalid

NameField = Literal["tenant", "adapter_id", "user_id"]

SHARED = "shared"  # the tenant whose adapters all others may use; nobody has a key of it
MAX_NAME = 128  # characters, also of each component of a file name

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


def check_owner(tenant: str) -> str:
    """`tenant` itself, if it may have keys and a policy. Raises: Invalid."""
    if check_name("tenant", tenant) == SHARED:
        raise Invalid("tenant", "is reserved for the adapters that an operator shares with all tenants", tenant)
    return tenant


def check_file_name(value: str) -> str:
    """`value` itself: "file", or "part/file" in an upload of several parts. Which names may come is its caller's business.

    Raises: Invalid naming the rule and the value.
    """
    if value.count("/") > 1:
        raise Invalid("files", "a file name must have at most one '/', between part and file", value)
    for component in value.split("/"):
        _check_component(component, value)
    return value


def _check_component(component: str, value: str) -> None:
    if not 1 <= len(component) <= MAX_NAME:
        raise Invalid("files", f"a file name must have 1 to {MAX_NAME} characters, has {len(component)}", value)
    if not component.isprintable() or "\\" in component or not component.strip("."):
        raise Invalid("files", "a file name must be printable, without backslashes, and more than dots", value)
