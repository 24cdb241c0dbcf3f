"""What the store hands out: frozen, plain data. No database row, no file handle, no path.

Usage:
    record, created = store.publish(staged, tenant="acme", name="support", method="lora", parts=("lora",), details={})
    record.version, record.digest.short
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

from .digest import Digest

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One immutable version of one tenant's adapter. Records with the same digest are one tenant's, and hold the same files."""

    tenant: str
    name: str
    version: int  # from 1, never given twice for one name
    digest: Digest  # of the manifest, hence of the tenant and every file's name and content
    method: str
    parts: tuple[str, ...]
    size_bytes: int  # all files together
    created_at: datetime  # aware, UTC
    details: Mapping[str, JSON] = field(hash=False)  # what validation reported, as it was given


@dataclass(frozen=True, slots=True)
class UserBinding:
    """Which adapter a tenant's user goes through. The adapter is named, not versioned: new uploads take effect."""

    tenant: str
    user_id: str
    adapter_id: str
    updated_at: datetime  # aware, UTC


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """One tenant; `policy` is as it was given, and means something to the server alone."""

    name: str
    policy: Mapping[str, JSON] = field(hash=False)
    created_at: datetime  # aware, UTC


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known of an API key, which is all but the key."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    note: str
    created_at: datetime  # aware, UTC
    revoked_at: datetime | None  # None while it works


@dataclass(frozen=True, slots=True)
class Collected:
    """What one garbage collection removed."""

    blobs: int
    size_bytes: int
    uploads: int  # staging directories of processes that are gone


@dataclass(frozen=True, slots=True)
class Damage:
    """One blob that is not what it was, and the live versions ("tenant name@version") that need it."""

    blob: Digest
    problem: Literal["missing", "damaged"]
    versions: tuple[str, ...]
