"""From a recipe to the adapter it describes. Reads nothing itself: `read` brings each source, stored or derived in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import AdapterError
from ..recipes import Join, Merge, Recipe, Source, Task, stored_sources
from .base import Adapter, Part
from .join import join
from .merge import merge


def derive(recipe: Recipe, read: Callable[[Source], Adapter]) -> Adapter:
    """The adapter under the recipe's digest. Raises: ValidationError naming why it cannot be, and what `read` raises."""
    return Adapter(recipe.digest, _parts(recipe, [read(source) for source in recipe.sources]), stored_sources(recipe))


def _parts(recipe: Recipe, sources: list[Adapter]) -> tuple[Part, ...]:
    match recipe:
        case Merge():
            return (merge(recipe, sources),)
        case Join():
            return join(sources)
        case Task(_, task_id):
            return _of_task(sources[0].parts, task_id)


def _of_task(parts: tuple[Part, ...], task_id: int) -> tuple[Part, ...]:
    """Raises: AdapterError naming `task_id` for an adapter that has no such task."""
    if all(part.prefix is None for part in parts):
        raise AdapterError("task_id", "the adapter has no tasks")
    return tuple(part if part.prefix is None else replace(part, prefix=part.prefix.for_task(task_id)) for part in parts)
