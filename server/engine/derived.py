"""Recipes in use: what the loader asks to learn how an adapter that is in no store is computed. Never imports torch.

submit(request) --hold--> digest -> recipe --get--> loader          finishing event --release--> forgotten
"""

from __future__ import annotations

from collections import Counter
from threading import Lock

from adapters_store.digest import Digest

from ..recipes import Recipe, stored_sources
from ..requests import Request


class Recipes:
    """Digest -> recipe, any thread. Invariant: a recipe is known exactly while a request that needs it has not ended.

    Who was accepted bounds its size: it holds no more than the engine's accepted requests name.
    """

    def __init__(self) -> None:
        self._recipes: dict[Digest, Recipe] = {}
        self._uses: Counter[Digest] = Counter()
        self._held: dict[str, tuple[Digest, ...]] = {}  # by request id
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._recipes)

    def hold(self, request: Request) -> None:
        if not request.recipes:
            return
        known = {recipe.digest: recipe for recipe in request.recipes}
        with self._lock:
            self._recipes |= known
            self._uses.update(list(known))
            self._held[request.id] = tuple(known)

    def release(self, request_id: str) -> None:
        """The request has ended. Unknown ids and requests without recipes are ignored."""
        with self._lock:
            for digest in self._held.pop(request_id, ()):
                self._uses[digest] -= 1
                if not self._uses[digest]:
                    del self._uses[digest], self._recipes[digest]

    def get(self, digest: Digest) -> Recipe | None:
        with self._lock:
            return self._recipes.get(digest)

    def made_from(self, stored: Digest) -> tuple[Digest, ...]:
        """The adapters in use that are computed from a stored one."""
        with self._lock:
            return tuple(digest for digest, recipe in self._recipes.items() if stored in stored_sources(recipe))
