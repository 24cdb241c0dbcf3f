"""Loading: from the store to host memory, off the engine's thread, at most once at a time per adapter.

Owns the worker threads and the bounded host cache of parsed adapters. Touches no device memory.

    digest --want--> worker: files -> parts --done(adapter)--> the engine's inbox
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
        with self._lock:
            if digest in self._adapters:
                self._drop(digest)

    def _drop(self, digest: Digest) -> None:
        self.nbytes -= self._adapters.pop(digest).nbytes


class Loading:
    """A few threads that read adapters. `done(digest, adapter or error, seconds)` is called on one of them."""

    def __init__(
        self, load: Load, cache: HostCache, done: Callable[[Digest, Adapter | AdapterdError, float], None], workers: int = 2
    ) -> None:
        self._load = load
        self._cache = cache
        self._done = done
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="adapter-load")

    def start(self, digest: Digest) -> None:
        self._threads.submit(self._run, digest)

    def stop(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, digest: Digest) -> None:
        begun = time.monotonic()
        result = self._read(digest)
        self._done(digest, result, time.monotonic() - begun)

    def _read(self, digest: Digest) -> Adapter | AdapterdError:
        try:
            adapter = self._cache.get(digest) or self._load(digest)
            self._cache.put(adapter)
            return adapter
        except AdapterdError as error:
            return error
        except Exception as error:  # an unreadable adapter fails only who asked for it, whatever the reason
            failure = GenerationError(f"the adapter could not be loaded ({type(error).__name__})")
            failure.__cause__ = error
            return failure
