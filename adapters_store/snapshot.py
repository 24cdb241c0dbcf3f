"""Snapshot: what the catalog says about some tenants, as a value, and as the JSON index of an export. No SQL, no disk.

Reading an index believes nothing: every name, number and digest is checked, and that all it refers to is there. Keys of
tenants are no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from .digest import Digest
from .errors import Invalid
from .names import check_name, check_owner
from .records import JSON, AdapterRecord, UserBinding

FORMAT: Final = "adapterd-export"
FORMAT_VERSION: Final = 1
MAX_VERSION: Final = 2**31 - 1  # what the catalog's column holds


@dataclass(frozen=True, slots=True)
class TenantSnapshot:
    """One tenant's live versions, users and settings. `policy` and `created_at` are None where nobody has set it up."""

    tenant: str
    policy: Mapping[str, JSON] | None
    created_at: datetime | None  # of the tenant; aware, UTC
    last_versions: Mapping[str, int]  # adapter -> the last number given, of deleted versions too
    versions: tuple[AdapterRecord, ...]
    users: tuple[UserBinding, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """The index of an archive."""

    tenants: tuple[TenantSnapshot, ...]
    blobs: Mapping[Digest, int]  # size in bytes of each file and manifest

    @property
    def versions(self) -> tuple[AdapterRecord, ...]:
        return tuple(version for tenant in self.tenants for version in tenant.versions)


def encode(index: Index) -> bytes:
    tenants = [_plain(tenant) for tenant in index.tenants]
    stored = {"format": FORMAT, "format_version": FORMAT_VERSION, "tenants": tenants, "blobs": dict(index.blobs)}
    return json.dumps(stored, indent=1, allow_nan=False).encode()


def decode(data: bytes) -> Index:
    """Raises: Invalid for what `encode` cannot have written."""
    try:
        stored = json.loads(data, parse_constant=_no_constant)
        if stored["format"] != FORMAT or stored["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {stored['format']!r} version {stored['format_version']!r}")
        tenants = tuple(_tenant(tenant) for tenant in stored["tenants"])
        _unique("tenant", (tenant.tenant for tenant in tenants))
        return Index(tenants, {Digest(blob): _number(size, 0, 2**63 - 1) for blob, size in stored["blobs"].items()})
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Invalid(
            "archive", f"its index must be of {FORMAT} version {FORMAT_VERSION}, as export writes it", reason
        ) from error


def _plain(tenant: TenantSnapshot) -> dict[str, object]:
    versions = [asdict(version) | {"created_at": version.created_at.isoformat()} for version in tenant.versions]
    users = [asdict(user) | {"updated_at": user.updated_at.isoformat()} for user in tenant.users]
    for row in (*versions, *users):
        del row["tenant"]
    created_at = None if tenant.created_at is None else tenant.created_at.isoformat()
    plain = {"tenant": tenant.tenant, "policy": tenant.policy, "created_at": created_at}
    return {**plain, "last_versions": dict(tenant.last_versions), "versions": versions, "users": users}


def _tenant(stored: Mapping[str, Any]) -> TenantSnapshot:
    tenant = check_name("tenant", stored["tenant"])
    last = {check_name("adapter_id", name): _number(number, 0, MAX_VERSION) for name, number in stored["last_versions"].items()}
    versions = tuple(_version(tenant, row, last) for row in stored["versions"])
    users = tuple(_user(tenant, row, last) for row in stored["users"])
    _unique("version", ((version.name, version.version) for version in versions))
    _unique("user", (user.user_id for user in users))
    if stored["policy"] is None:
        return TenantSnapshot(tenant, None, None, last, versions, users)
    check_owner(tenant)
    return TenantSnapshot(tenant, _object(stored["policy"]), _moment(stored["created_at"]), last, versions, users)


def _version(tenant: str, stored: Mapping[str, Any], last: Mapping[str, int]) -> AdapterRecord:
    name = stored["name"]
    return AdapterRecord(
        tenant=tenant,
        name=name,
        version=_number(stored["version"], 1, last[name]),
        digest=Digest(stored["digest"]),
        method=_text(stored["method"], 64),
        parts=tuple(_text(part, 64) for part in stored["parts"]),
        size_bytes=_number(stored["size_bytes"], 0, 2**63 - 1),
        created_at=_moment(stored["created_at"]),
        details=_object(stored["details"]),
    )


def _user(tenant: str, stored: Mapping[str, Any], last: Mapping[str, int]) -> UserBinding:
    adapter = stored["adapter_id"]
    if adapter not in last:
        raise KeyError(f"adapter {adapter!r} of a user")
    return UserBinding(tenant, check_name("user_id", stored["user_id"]), adapter, _moment(stored["updated_at"]))


def _number(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def _text(value: object, most: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise ValueError(f"{value!r} is no text of 1 to {most} characters")
    return value


def _moment(value: str) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"{value!r} names no time zone")
    return moment.astimezone(UTC)


def _object(value: object) -> dict[str, JSON]:
    """Raises: ValueError or RecursionError for what could not be written to a catalog as JSON again."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    json.dumps(value)
    return value


def _unique(kind: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{kind} {value!r} is there twice")
        seen.add(value)


def _no_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")
