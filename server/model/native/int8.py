"""int8 weights: symmetric, one scale per output channel, and the panels the native kernel reads them from.

Owns the rounding, which is the same whoever multiplies afterwards. Knows no model and no module.

    weight [N, K]  ->  values = round(weight / scale) within -127..127,  scale [N] = largest |weight| of the row / 127
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32  # columns per panel, as in simd.h
_SCALES = PANEL * 4  # bytes in front of a panel's values

LARGEST = 127


@dataclass(frozen=True)
class Int8Weight:
    """A matrix as int8 values and a scale per row: values * scales[:, None]."""

    values: Tensor  # [N, K] int8
    scales: Tensor  # [N] fp32

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """The nearest to weight [N, K], a finite float matrix. A row of zeros stays one."""
        wide = weight.detach().float()
        scales = wide.abs().amax(1) / LARGEST
        steps = torch.where(scales > 0, scales, 1.0)
        return cls((wide / steps[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def widened(self) -> Tensor:
        """The matrix that is multiplied with, in fp32."""
        return self.values.float() * self.scales[:, None]


def pack_int8(weight: Int8Weight) -> Tensor:
    """-> panels [ceil(N / 32), 128 + 32 K] int8: the 32 scales' own bytes, then K rows of 32 values; zero padded."""
    n, k = weight.shape
    count = -(-n // PANEL)
    missing = count * PANEL - n
    scales = F.pad(weight.scales, (0, missing)).view(count, PANEL).view(torch.int8)
    values = F.pad(weight.values, (0, 0, 0, missing)).view(count, PANEL, k).transpose(1, 2)
    return torch.cat((scales, values.reshape(count, k * PANEL)), 1)


def unpack_int8(panels: Tensor, n: int) -> Int8Weight:
    """What `pack_int8` was given, bit for bit."""
    count, size = panels.shape
    scales = panels[:, :_SCALES].contiguous().view(torch.float32).reshape(-1)
    values = panels[:, _SCALES:].reshape(count, (size - _SCALES) // PANEL, PANEL).transpose(1, 2)
    return Int8Weight(values.reshape(count * PANEL, -1)[:n], scales[:n])
