"""Which adapters a request goes through: names and users in, content digests out. Reads the store, changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from anyio import to_thread

from adapters_store.digest import Digest
from adapters_store.errors import Invalid, NotFound
from adapters_store.records import AdapterRecord
from adapters_store.store import Store

from .context import Names

_NO_ADAPTER = ("", "__base_model__")  # what LoRAX's clients send for the base


@dataclass(frozen=True, slots=True)
class Resolved:
    """The adapters of one request, in the order they apply; none = the base model."""

    names: tuple[str, ...] = ()
    digests: tuple[Digest, ...] = ()
    virtual_tokens: int = 0  # positions they put in front of the text


async def resolve(
    store: Store, names: Names, tenant: str, *, adapter_id: str | None, user_id: str | None, compose: bool
) -> Resolved:
    """An explicit adapter wins over the user's own; with `compose` both apply. A user without one gets the base.

    Users need not be registered: an id that is bound to nothing, or could not be, is answered by the base model.

    Raises: NotFound, the same for a foreign name, a missing one and one that cannot exist.
    """
    explicit = None if adapter_id is None or adapter_id in _NO_ADAPTER else adapter_id
    if explicit is None and (not user_id or adapter_id is not None):
        return Resolved()
    records = await to_thread.run_sync(_records, store, tenant, explicit, user_id, compose)
    for record in records:
        names.note(record.digest, record.name)
    unique = {record.digest: record for record in records}
    return Resolved(
        names=tuple(record.name for record in unique.values()),
        digests=tuple(unique),
        virtual_tokens=sum(virtual_tokens(record) for record in unique.values()),
    )


def virtual_tokens(record: AdapterRecord) -> int:
    count = record.details.get("virtual_tokens", 0)
    return count if isinstance(count, int) else 0


def _records(store: Store, tenant: str, explicit: str | None, user_id: str | None, compose: bool) -> list[AdapterRecord]:
    records = [] if explicit is None else [_adapter(store, tenant, explicit)]
    if user_id and (compose or not records):
        bound = _binding(store, tenant, user_id)
        if bound is not None:
            records.append(_adapter(store, tenant, bound))
    return records


def _adapter(store: Store, tenant: str, name: str) -> AdapterRecord:
    try:
        return store.get(tenant, name)
    except Invalid:
        raise NotFound("adapter", name) from None


def _binding(store: Store, tenant: str, user_id: str) -> str | None:
    try:
        return store.get_user(tenant, user_id).adapter_id
    except (NotFound, Invalid):
        return None
