"""API keys: random text that stands for a tenant and scopes. Owns what a key looks like, and the queries of that table.

    adk_3f9c0a1b2d4e_<64 hex digits>        "adk_", the key's id (public), 256 random bits

Only the sha256 of the whole text is kept, so neither the catalog nor a copy of it holds a key. A plain hash is enough: there is
nothing to guess in 256 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import RowMapping, insert, select, update

from .errors import Invalid, NotFound
from .records import KeyRecord, TenantRecord
from .schema import keys, tenants
from .sql import Transaction, upsert

PREFIX = "adk_"
MAX_NOTE = 200  # characters
_KEY = re.compile(r"adk_[0-9a-f]{12}_[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{12}")
_SCOPE = re.compile(r"[a-z]{1,32}")

_SHOWN = tuple(column for column in keys.c if column is not keys.c.sha256)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the one time that its text is known."""

    record: KeyRecord
    text: str

    def __repr__(self) -> str:
        """Without the text, which belongs in no log."""
        return f"NewKey({self.record.id})"


def hashed(text: str) -> str | None:
    """Under which sha256 a key is kept; None for what cannot be one."""
    return hashlib.sha256(text.encode()).hexdigest() if _KEY.fullmatch(text) else None


class ApiKeys:
    """The keys of one catalog."""

    def __init__(self, read: Transaction, write: Transaction, clock: Callable[[], datetime]) -> None:
        self._read = read
        self._write = write
        self._clock = clock

    def add(self, tenant: str, scopes: Sequence[str], note: str) -> NewKey:
        """A new key of `tenant`, which is made if need be. Raises: Invalid for scopes or a note that cannot be kept."""
        record = KeyRecord(secrets.token_hex(6), tenant, _checked_scopes(scopes), _checked_note(note), self._clock(), None)
        text = f"{PREFIX}{record.id}_{secrets.token_hex(32)}"
        owner = {"name": tenant, "policy": {}, "created_at": record.created_at}
        row = {
            "id": record.id,
            "tenant": tenant,
            "sha256": hashed(text),
            "scopes": list(record.scopes),
            "note": note,
            "created_at": record.created_at,
        }
        with self._write() as db:
            db.execute(upsert(db, tenants).values(owner).on_conflict_do_nothing())
            db.execute(insert(keys).values(row))
        return NewKey(record, text)

    def find(self, text: str) -> tuple[KeyRecord, TenantRecord] | None:
        """What a key stands for; None for one that is unknown or revoked, or whose tenant is gone."""
        sha256 = hashed(text)
        if sha256 is None:
            return None
        query = select(keys, tenants.c.policy, tenants.c.created_at.label("tenant_since"))
        query = query.join(tenants, tenants.c.name == keys.c.tenant).where(keys.c.sha256 == sha256, keys.c.revoked_at.is_(None))
        with self._read() as db:
            row = db.execute(query).mappings().first()
        if row is None or not hmac.compare_digest(str(row["sha256"]), sha256):
            return None
        return _key_of(row), TenantRecord(row["tenant"], row["policy"], row["tenant_since"])

    def list(self, tenant: str | None) -> tuple[KeyRecord, ...]:
        """Every key ever made, or all of one tenant, newest first."""
        query = select(*_SHOWN).order_by(keys.c.created_at.desc(), keys.c.id)
        if tenant is not None:
            query = query.where(keys.c.tenant == tenant)
        with self._read() as db:
            return tuple(map(_key_of, db.execute(query).mappings()))

    def revoke(self, key_id: str) -> KeyRecord:
        """From now on the key is unknown; a key that was revoked before stays so since then. Raises: NotFound."""
        if not _ID.fullmatch(key_id):
            raise NotFound("key", key_id)
        with self._write() as db:
            live = (keys.c.id == key_id, keys.c.revoked_at.is_(None))
            db.execute(update(keys).where(*live).values(revoked_at=self._clock()))
            row = db.execute(select(*_SHOWN).where(keys.c.id == key_id)).mappings().first()
        if row is None:
            raise NotFound("key", key_id)
        return _key_of(row)


def _key_of(row: RowMapping) -> KeyRecord:
    scopes = tuple(row["scopes"])
    return KeyRecord(row["id"], row["tenant"], scopes, row["note"], row["created_at"], row["revoked_at"])


def _checked_scopes(scopes: Sequence[str]) -> tuple[str, ...]:
    if not scopes or len(scopes) > 16 or not all(_SCOPE.fullmatch(scope) for scope in scopes):
        raise Invalid("scopes", "must be 1 to 16 words of lower-case letters", list(scopes))
    return tuple(dict.fromkeys(scopes))


def _checked_note(note: str) -> str:
    if len(note) > MAX_NOTE or not note.isprintable():
        raise Invalid("note", f"must be printable and have at most {MAX_NOTE} characters", note)
    return note
