"""Loading: from the store to host memory, off the engine's thread, at most once at a time per adapter.

Owns the worker threads, the bounded host cache of parsed adapters and what is remembered of failures. Touches no device.

    digest --want--> worker: host cache, else files -> parts, else the last failure --done(adapter)--> the engine's inbox
                     or recipe -> sources -> parts
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

import structlog

from adapters_store.digest import Digest

from ..errors import AdapterdError, GenerationError
from ..memory import out_of_memory
from ..methods.base import Adapter
from ..methods.derive import derive
from ..recipes import Source, digest_of
from .backoff import Backoff
from .derived import Recipes

log = structlog.get_logger(__name__)

Load = Callable[[Digest], Adapter]

_NICE: Final = 19  # the lowest priority: 1.5% of a core that the engine wants too


class HostCache:
    """Parsed adapters in host memory, least recently used out first. Invariant: at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        """`limit` in bytes; 0 keeps nothing."""
        self.limit = limit
        self.nbytes = 0
        self._adapters: OrderedDict[Digest, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: Digest) -> Adapter | None:
        with self._lock:
            adapter = self._adapters.get(digest)
            if adapter is not None:
                self._adapters.move_to_end(digest)
            return adapter

    def put(self, adapter: Adapter) -> None:
        with self._lock:
            if adapter.digest in self._adapters or adapter.nbytes > self.limit:
                return
            self._adapters[adapter.digest] = adapter
            self.nbytes += adapter.nbytes
            while self.nbytes > self.limit:
                self._drop(next(iter(self._adapters)))

    def discard(self, digest: Digest) -> None:
        """Drop an adapter, and what was computed from it."""
        with self._lock:
            for each in [key for key, adapter in self._adapters.items() if key == digest or digest in adapter.sources]:
                self._drop(each)

    def clear(self) -> None:
        with self._lock:
            for digest in list(self._adapters):
                self._drop(digest)

    def _drop(self, digest: Digest) -> None:
        self.nbytes -= self._adapters.pop(digest).nbytes


class Loading:
    """A few threads that read adapters. `done(digest, adapter or error, seconds)` is called on one of them.

    `load` reads stored adapters; one that `recipes` knows is computed instead, from sources that come the same way.
    """

    def __init__(
        self,
        load: Load,
        cache: HostCache,
        done: Callable[[Digest, Adapter | AdapterdError, float], None],
        workers: int = 2,
        recipes: Recipes | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self._load = load
        self._cache = cache
        self._done = done
        self._recipes = Recipes() if recipes is None else recipes
        self._backoff = Backoff() if backoff is None else backoff
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="adapter-load", initializer=_give_way)

    def start(self, digest: Digest) -> None:
        self._threads.submit(self._run, self._source(digest))

    def stop(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _source(self, digest: Digest) -> Source:
        """The recipe is looked up when the load starts: who wanted it may have gone when its turn comes."""
        return self._recipes.get(digest) or digest

    def _run(self, source: Source) -> None:
        begun = time.monotonic()
        result = self._read(source)
        self._done(digest_of(source), result, time.monotonic() - begun)

    def keep(self, adapter: Adapter) -> None:
        """Have an adapter in host memory that was parsed elsewhere. Any thread."""
        self._backoff.forget(adapter.digest)
        self._cache.put(adapter)

    def _adapter(self, source: Source) -> Adapter:
        adapter = self._cache.get(digest_of(source))
        if adapter is None:
            adapter = self._load(source) if isinstance(source, Digest) else derive(source, self._adapter)
            self._cache.put(adapter)
        return adapter

    def _read(self, source: Source) -> Adapter | AdapterdError:
        digest = digest_of(source)
        known = None if self._cache.get(digest) else self._backoff.refusal(digest)
        if known is not None:
            return known
        result = self._tried(source)
        if isinstance(result, AdapterdError):
            log.warning("adapter could not be loaded", digest=digest.short, error=str(result), exc_info=result.__cause__)
            self._backoff.failed(digest, result)
        else:
            self._backoff.forget(digest)
        return result

    def _tried(self, source: Source, last: bool = False) -> Adapter | AdapterdError:
        try:
            return self._adapter(source)
        except AdapterdError as error:
            return error
        except Exception as error:  # an unreadable adapter fails only who asked for it, whatever the reason
            if last or not out_of_memory(error):
                return _unreadable(error)
        self._cache.clear()  # out here the exception is gone, and what it held with it
        return self._tried(source, last=True)


def _give_way() -> None:
    """Streams come first: on Linux each thread has a priority of its own, and so have those that it starts."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, _NICE)


def _unreadable(error: Exception) -> AdapterdError:
    failure = GenerationError(f"the adapter could not be loaded ({type(error).__name__})")
    failure.__cause__ = error
    return failure
