"""The floor under a decode step: it reads every weight once, so it cannot be faster than memory gives them.

Owns that arithmetic and nothing else; bytes and bandwidth are measured elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepBytes:
    """What a decode step has to read, however few rows it has."""

    base: int  # the base's weights as they are held
    base_as_fp32: int  # the same weights if they were fp32
    adapters: int  # the distinct adapters of the batch, as they are held


@dataclass(frozen=True)
class Floor:
    """Seconds that memory needs for the bytes of one decode step."""

    base: float  # what is held for the base
    base_as_fp32: float  # the floor of all who keep fp32 weights; weights in fewer bytes can get under it
    adapted: float  # what is held for the base and the batch's adapters

    @classmethod
    def of(cls, reads: StepBytes, read_gb_per_second: float) -> Floor:
        sizes = (reads.base, reads.base_as_fp32, reads.base + reads.adapters)
        return cls(*(size / (read_gb_per_second * 1e9) for size in sizes))
