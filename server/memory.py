"""Memory: hands freed heap back to the operating system, tells when there was none, and keeps collections off what stays.

Knows no adapters, never imports torch.

glibc keeps what is freed between live blocks. Loading a base and reading thousands of adapters frees tensors of every
size on several threads, so without this the process stays larger than what it holds. Elsewhere than on Linux with glibc
nothing is handed back.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: How torch and the libraries below it say that an allocation failed: RuntimeErrors, torch.OutOfMemoryError among them.
_EXHAUSTED: Final = ("can't allocate memory", "out of memory", "std::bad_alloc", "_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on the device."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _EXHAUSTED)
    return isinstance(error, MemoryError)


@contextmanager
def kept(*, clean: bool = False) -> Iterator[None]:
    """What is imported and made inside is there to stay: no collection looks for garbage in it, now or later.

    A collection stops every thread. While a server is put together some hundred of them would walk over ever more objects,
    and each full one afterwards over all of them. `clean`: nothing large inside becomes garbage (so with imports), and even
    the last walk, half a second over what torch and transformers make, is left out.
    """
    gc.disable()
    try:
        yield
        if not clean:
            gc.collect()
    finally:
        gc.freeze()
        gc.enable()


class Reclaimer:
    """Trims the heap each time `every` bytes have passed through it. Any thread."""

    def __init__(self, every: int = 16 << 20) -> None:
        self._every = every
        self._passed = 0
        self._lock = threading.Lock()

    def passed(self, nbytes: int) -> None:
        """`nbytes` were allocated for a while and are, or will soon be, free again."""
        with self._lock:
            self._passed += nbytes
            due = self._passed >= self._every
            if due:
                self._passed = 0
        if due:
            self.trim()

    def trim(self) -> None:
        """Give every free page back now; a few milliseconds, without the GIL."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
