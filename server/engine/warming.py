"""Warming: who waits for adapters to become resident although no request asks for them. On the engine's thread."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future

from adapters_store.digest import Digest

from ..errors import AdapterdError


class Warming:
    """Futures, each with the adapters it still lacks. Invariant: each one handed in ends, at the latest by `end`."""

    def __init__(self) -> None:
        self._waiting: list[tuple[set[Digest], Future[None]]] = []

    def add(self, missing: Collection[Digest], future: Future[None]) -> bool:
        """Whether there is something to wait for: not for a future that was cancelled, nor when nothing is missing."""
        if not future.set_running_or_notify_cancel():
            return False  # from here on it cannot be cancelled, so telling it cannot fail
        if not missing:
            future.set_result(None)
            return False
        self._waiting.append((set(missing), future))
        return True

    def told(self, digest: Digest, error: AdapterdError | None = None) -> None:
        """The adapter is resident, or never will be."""
        for missing, future in [entry for entry in self._waiting if digest in entry[0]]:
            missing.discard(digest)
            if error is not None:
                future.set_exception(error)
            elif not missing:
                future.set_result(None)
        self._waiting = [(missing, future) for missing, future in self._waiting if not future.done()]

    def end(self, error: AdapterdError) -> None:
        while self._waiting:
            self._waiting.pop()[1].set_exception(error)
