"""Loading: from the store to host memory, off the engine's thread, at most once at a time per adapter.

Owns the worker threads and the bounded host cache of parsed adapters. Touches no device memory.

    digest --want--> worker: files -> parts            --done(adapter)--> the engine's inbox
                     or recipe -> sources -> parts
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from adapters_store.digest import Digest

from ..errors import AdapterdError, GenerationError
from ..methods.base import Adapter
from ..methods.derive import derive
from ..recipes import Source, digest_of
from .derived import Recipes

Load = Callable[[Digest], Adapter]


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
    ) -> None:
        self._load = load
        self._cache = cache
        self._done = done
        self._recipes = Recipes() if recipes is None else recipes
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="adapter-load")

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

    def _adapter(self, source: Source) -> Adapter:
        adapter = self._cache.get(digest_of(source))
        if adapter is None:
            adapter = self._load(source) if isinstance(source, Digest) else derive(source, self._adapter)
            self._cache.put(adapter)
        return adapter

    def _read(self, source: Source) -> Adapter | AdapterdError:
        try:
            return self._adapter(source)
        except AdapterdError as error:
            return error
        except Exception as error:  # an unreadable adapter fails only who asked for it, whatever the reason
            failure = GenerationError(f"the adapter could not be loaded ({type(error).__name__})")
            failure.__cause__ = error
            return failure
