"""Host memory straight from the system: nothing is taken before it is written, or, by `Ahead`, shortly before.

Large pages for what a step reads from end to end (weights, caches): finding a page costs more than reading it where pages are
small. Small ones for what is written here and there. Where the system has no large pages all memory is alike. How much there is
to take, the machine and the control groups around the process say.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
import torch
from torch import Tensor

_PAGE: Final = 2 << 20  # bytes of a large page
_CHUNK: Final = 64 << 20
_MODE: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never"
_GROUPS: Final = Path("/sys/fs/cgroup")
_OWN_GROUP: Final = Path("/proc/self/cgroup")
_LINE: Final = 64  # bytes; where a tensor begins
#: Called as a function of a library, so the GIL is free meanwhile.
_madvise: Final = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
_POPULATE: Final = 23  # MADV_POPULATE_WRITE, which Python does not name: Linux 5.14
_SPARE: Final = 512 << 20  # bytes that a quiet moment takes ahead of what is written: some ten thousand tokens of a small base


def available() -> int:
    """Bytes that this process can still take: what the machine has left, or its control group, a container's above all."""
    return min([psutil.virtual_memory().available, *_left_by_groups()])


def zeros(size: Sequence[int], dtype: torch.dtype, *, large_pages: bool) -> Tensor:
    """A zero tensor whose pages take memory once they are written."""
    return _bytes(math.prod(size) * dtype.itemsize, large_pages).view(dtype).view(*size)


def taken(written: int, *, large_pages: bool) -> int:
    """Bytes of memory that a tensor of `zeros` takes once its first `written` bytes are written: whole pages."""
    page = _PAGE if large_pages and _has_large_pages() else mmap.PAGESIZE
    return -(-written // page) * page


class Room:
    """Tensors side by side, so that matrices smaller than a large page share some. Memory is given back when all are gone."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a host tensor."""
        count = tensor.numel() * tensor.itemsize
        lines = -(-count // _LINE) * _LINE
        if lines > len(self._left):
            self._left = _bytes(max(lines, _CHUNK), large_pages=True)
        own, self._left = self._left[:count], self._left[lines:]
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Ahead:
    """Takes memory of tensors of `zeros` before it is written, so that no step waits for it. One thread.

    For tensors of one size that are written from their beginnings at one pace, as the caches of all layers are: all of them
    need their next page in the same step, and a virtual machine may take 4 ms for one (60 tensors: steps of 250 ms). So
    each step takes as much as it writes, a page of every tensor ahead, and quiet moments take more. Where the system can not
    do that, memory is taken when it is written.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._size = tensors[0].nbytes if tensors else 0
        self._most = -(-self._size // _PAGE) * len(tensors)  # pages of all
        self._written = 0  # bytes of each, or about to be
        self._taken = 0  # pages: the first of each tensor, then the second of each, ...
        self._able = _madvise is not None

    @property
    def nbytes(self) -> int:
        """Bytes taken of all tensors, by this or by being written."""
        count = len(self._tensors)
        if not self._able:
            return count * min(self._size, taken(self._written, large_pages=True))
        whole, more = divmod(self._taken, max(1, count))
        return more * min(self._size, (whole + 1) * _PAGE) + (count - more) * min(self._size, whole * _PAGE)

    def reach(self, written: int) -> None:
        """The first `written` bytes of each tensor are about to be written."""
        self._written = max(self._written, written)
        self._take(self._near())

    def more(self) -> bool:
        """Take a page that is not needed yet, there being nothing else to do; whether there is another to take."""
        spare = min(self._most, self._near() + _SPARE / _PAGE)
        self._take(min(spare, self._taken + 1))
        return self._able and self._taken < spare

    def _near(self) -> float:
        """Pages that are wanted by now: what is written, and as far into each tensor's next page as it is into its last."""
        return len(self._tensors) * (1 + self._written / _PAGE)

    def _take(self, pages: float) -> None:
        while self._able and self._taken < min(pages, self._most):
            page, tensor = divmod(self._taken, len(self._tensors))
            at = page * _PAGE
            self._able = _populated(self._tensors[tensor].data_ptr() + at, min(_PAGE, self._size - at))
            self._taken += self._able


def _populated(address: int, count: int) -> bool:
    """Have the system make room, as a write would, without one; false where it can not (before Linux 5.14)."""
    return _madvise is not None and _madvise(ctypes.c_void_p(address), ctypes.c_size_t(count), _POPULATE) == 0


def _left_by_groups() -> Iterator[int]:
    """Bytes that each control group (v2) around this process leaves; files that it holds in memory would make way."""
    try:
        line = next(line for line in _OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
        group = _GROUPS / line.removeprefix("0::").strip("/")
    except (OSError, StopIteration):
        return
    for around in (group, *group.parents):
        if around.is_relative_to(_GROUPS):
            with suppress(OSError, ValueError):  # "max"; the outermost has no limit
                limit, used = (int((around / name).read_text()) for name in ("memory.max", "memory.current"))
                stat = dict(map(str.split, (around / "memory.stat").read_text().splitlines()))
                yield max(0, limit - used + int(stat["inactive_file"]))


def _has_large_pages() -> bool:
    try:
        return "[never]" not in _MODE.read_text()
    except OSError:
        return False


def _bytes(count: int, large_pages: bool) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    spare = _PAGE if large_pages else 0  # to begin where a large page can
    pages = mmap.mmap(-1, count + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE" if large_pages else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        pages.madvise(advice)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % _PAGE if large_pages else 0
    return whole[begin : begin + count]
