"""Native CPU kernels: C++ compiled once per machine, loaded through ctypes, checked before use.

`load` is the door. A machine without a compiler gets None and a reason, never an exception. Knows tensors only: no model,
no adapters, no requests.

    kernels = load(home, print)
    linear = kernels.packed_linear(weight)      # [N, K] fp32 or bf16
    y = linear(x)                               # [T, K] -> [T, N]; a row's bits never depend on the other rows
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .build import NativeUnavailable, library_path
from .checks import self_check
from .layouts import CacheSize, make_caches
from .library import NativeKernels
from .prepared import PackedLinear

__all__ = ["CacheSize", "NativeKernels", "NativeUnavailable", "PackedLinear", "load", "make_caches", "open_library"]


def load(cache_dir: Path, on_progress: Callable[[str], None] | None = None) -> NativeKernels | None:
    """The kernels, compiled into `cache_dir` on first use; None where they cannot be had, the reason told to `on_progress`."""
    say = on_progress or (lambda message: None)
    try:
        return open_library(cache_dir, say)
    except NativeUnavailable as reason:
        say(f"native kernels unavailable: {reason}")
        return None


def open_library(cache_dir: Path, on_progress: Callable[[str], None]) -> NativeKernels:
    """Like `load`. Raises: NativeUnavailable with the reason: no compiler, a failed build, a failed self-check."""
    try:
        kernels = NativeKernels(library_path(cache_dir, on_progress))
    except (OSError, AttributeError) as error:  # a full disk, a file that is no library, a library of other sources
        raise NativeUnavailable(f"the library could not be built or loaded: {error}") from error
    self_check(kernels)
    return kernels
