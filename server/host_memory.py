"""Host memory straight from the system: nothing is taken before it is written.

Large pages for what a step reads from end to end (weights, caches): finding a page costs more than reading it where pages are
small. Small ones for what is written here and there. Where the system has no large pages all memory is alike.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

_PAGE: Final = 2 << 20  # bytes of a large page
_CHUNK: Final = 64 << 20
_MODE: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never"
_LINE: Final = 64  # bytes; where a tensor begins


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
