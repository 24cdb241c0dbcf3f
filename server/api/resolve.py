"""Which adapters a request goes through: names and users in, content digests out. Reads the store, changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anyio import to_thread

from adapters_store.digest import Digest
from adapters_store.errors import Invalid, NotFound
from adapters_store.records import JSON, AdapterRecord
from adapters_store.store import Store

from ..recipes import Join, Recipe, Source, digest_of
from .context import Names
from .merged import Combination
from .prompts import PLAIN, Frame, check_task_used, one_frame, source_of

_NO_ADAPTER = ("", "__base_model__")  # what LoRAX's clients send for the base


@dataclass(frozen=True, slots=True)
class Resolved:
    """The adapters of one request, in the order they apply; none = the base model."""

    names: tuple[str, ...] = ()
    digests: tuple[Digest, ...] = ()
    virtual_tokens: int = 0  # positions they put in front of the text
    recipes: tuple[Recipe, ...] = ()  # how those of them are computed that the store does not hold
    details: tuple[Mapping[str, JSON], ...] = ()  # the records' own, of each stored adapter that is named
    frame: Frame = PLAIN  # what a discrete prompt among them puts around the input


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One adapter that a request names, stored or computed from stored ones."""

    source: Source
    names: tuple[str, ...]
    methods: frozenset[str]
    virtual_tokens: int
    details: tuple[Mapping[str, JSON], ...] = ()


async def resolve(
    store: Store,
    names: Names,
    tenant: str,
    *,
    adapter_id: str | None,
    user_id: str | None,
    compose: bool,
    merged: Combination | None = None,
    task_id: int | None = None,
) -> Resolved:
    """An explicit adapter wins over the user's own; with `compose` both apply. A user without one gets the base.

    `merged` stands where an explicit adapter does; `task_id` picks a task of a multitask prompt among the adapters.

    Users need not be registered: an id that is bound to nothing, or could not be, is answered by the base model.

    Raises: NotFound, the same for a foreign name, a missing one and one that cannot exist; ValidationError naming an
    adapter that cannot be merged, or `task_id`.
    """
    explicit = None if adapter_id is None or adapter_id in _NO_ADAPTER else adapter_id
    if explicit is None and merged is None and (not user_id or adapter_id is not None):
        check_task_used(task_id, ())
        return Resolved()
    found = await to_thread.run_sync(_ingredients, store, tenant, merged or explicit, user_id, compose, task_id)
    check_task_used(task_id, [ingredient.source for ingredient in found])
    together = _together(found)
    for ingredient in together:
        names.note(digest_of(ingredient.source), "+".join(ingredient.names))
    described = tuple(details for ingredient in together for details in ingredient.details)
    return Resolved(
        names=tuple(dict.fromkeys(name for ingredient in together for name in ingredient.names)),
        digests=tuple(digest_of(ingredient.source) for ingredient in together),
        virtual_tokens=sum(ingredient.virtual_tokens for ingredient in together),
        recipes=tuple(ingredient.source for ingredient in together if not isinstance(ingredient.source, Digest)),
        details=described,
        frame=one_frame(described),
    )


def _together(found: list[Ingredient]) -> list[Ingredient]:
    """The ingredients as the engine can apply them to one request: two of one family, or two prefixes, become one.

    The same adapter twice is one adapter.
    """
    unique = list({digest_of(ingredient.source): ingredient for ingredient in found}.values())
    families = [family for ingredient in unique for family in ingredient.methods]
    prefixes = sum(1 for ingredient in unique if ingredient.virtual_tokens)
    if len(families) == len(set(families)) and prefixes <= 1:
        return unique
    return [
        Ingredient(
            source=Join(tuple(ingredient.source for ingredient in unique)),
            names=tuple(name for ingredient in unique for name in ingredient.names),
            methods=frozenset(families),
            virtual_tokens=sum(ingredient.virtual_tokens for ingredient in unique),
            details=tuple(details for ingredient in unique for details in ingredient.details),
        )
    ]


def virtual_tokens(record: AdapterRecord) -> int:
    count = record.details.get("virtual_tokens", 0)
    return count if isinstance(count, int) else 0


def _ingredients(
    store: Store,
    tenant: str,
    explicit: Combination | str | None,
    user_id: str | None,
    compose: bool,
    task_id: int | None,
) -> list[Ingredient]:
    """What is named outright, then the user's own."""
    found = []
    if isinstance(explicit, Combination):
        records = [_adapter(store, tenant, name) for name in explicit.ids]
        found.append(Ingredient(explicit.recipe(records), explicit.ids, frozenset(("lora",)), 0))
    elif explicit is not None:
        found.append(_stored(_adapter(store, tenant, explicit), task_id))
    if user_id and (compose or not found):
        bound = _binding(store, tenant, user_id)
        if bound is not None:
            found.append(_stored(_adapter(store, tenant, bound), task_id))
    return found


def _stored(record: AdapterRecord, task_id: int | None) -> Ingredient:
    source, methods = source_of(record, task_id), frozenset(record.parts)
    return Ingredient(source, (record.name,), methods, virtual_tokens(record), (record.details,))


def _adapter(store: Store, tenant: str, name: str) -> AdapterRecord:
    try:
        return store.resolve(tenant, name)
    except Invalid:
        raise NotFound("adapter", name) from None


def _binding(store: Store, tenant: str, user_id: str) -> str | None:
    try:
        return store.get_user(tenant, user_id).adapter_id
    except (NotFound, Invalid):
        return None
