"""Host memory in large pages, for what a step reads from end to end: weights and caches.

Finding a page costs more than reading it where pages are small. Where the system has no large ones it is memory like any.
Nothing is taken before it is written, and nothing is given back but all of it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_PAGE: Final = 2 << 20  # bytes of a large page
_CHUNK: Final = 64 << 20
_LINE: Final = 64  # bytes; where a tensor begins


def zeros(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zero tensor whose pages take memory once they are written."""
    return _bytes(math.prod(size) * dtype.itemsize).view(dtype).view(*size)


class Room:
    """Tensors side by side, so that matrices smaller than a large page share some."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a host tensor."""
        count = tensor.numel() * tensor.itemsize
        taken = -(-count // _LINE) * _LINE
        if taken > len(self._left):
            self._left = _bytes(max(taken, _CHUNK))
        own, self._left = self._left[:count], self._left[taken:]
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _bytes(count: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, count + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % _PAGE
    return whole[begin : begin + count]
