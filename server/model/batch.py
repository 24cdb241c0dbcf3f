"""Batch: a plan's rows become the tensors of a `Step`. Index arithmetic in numpy, one copy to the device each.

Owns the order of rows in a step and the cache of what depends only on its composition. Runs no model.

    order   decode rows first (one token each, one batched attention), each half sorted by its adapters' slots, so that
            a pool's tokens are nearly always one run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.plan import Row
from ..methods.base import Rows
from .step import Step

_Composition = tuple[tuple[tuple[tuple[str, int], ...], int], ...]


def order_rows(rows: Sequence[Row]) -> list[Row]:
    """Decode rows before prefill rows, each sorted by (pool, slot)."""
    return sorted(rows, key=lambda row: (row.count > 1, sorted(row.sequence.slots.items())))


@dataclass
class BatchBuilder:
    """Fills a `Step` from rows. Invariant: `step.rows` of an unchanged composition are the same objects, scratch and all."""

    step: Step
    block_size: int
    device: torch.device

    def __post_init__(self) -> None:
        self._composition: _Composition = ()

    def fill(self, rows: Sequence[Row], keep: Sequence[int]) -> None:
        """`rows` in the order of `order_rows`; `keep` indexes tokens of the step."""
        step = self.step
        counts = np.fromiter((row.count for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        ends = counts.cumsum()
        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(int(ends[-1])) - (ends - counts - starts)[row_of]
        tables = self._tables(rows)
        write = tables[row_of, positions // self.block_size].astype(np.int64) * self.block_size
        ids = np.fromiter(
            (i for row in rows for i in row.sequence.ids[row.start : row.start + row.count]), np.int64, len(positions)
        )
        contexts = starts + counts
        step.ids = self._put(np.maximum(ids, 0))  # virtual positions have no id; their embedding is put in later
        step.positions = self._put(positions)
        step.write = self._put(write + positions % self.block_size)
        step.tables = self._put(tables)
        step.starts = self._put(np.concatenate(([0], ends)).astype(np.int32))
        step.contexts = self._put(contexts.astype(np.int32))
        step.keep = self._put(np.asarray(keep, np.int64))
        begins = (ends - counts).tolist()
        step.spans = tuple(zip(begins, ends.tolist(), contexts.tolist(), strict=True))
        step.decodes = int((counts == 1).sum())
        step.taps.clear()
        self._fill_pools(rows, begins)

    def forget_composition(self) -> None:
        """Slots changed hands: what was gathered from them is stale."""
        self._composition = ()

    def _tables(self, rows: Sequence[Row]) -> NDArray[np.int32]:
        """[R, longest block list], padded with the null block."""
        tables = np.zeros((len(rows), max(len(row.sequence.blocks) for row in rows)), np.int32)
        for i, row in enumerate(rows):
            tables[i, : len(row.sequence.blocks)] = row.sequence.blocks
        return tables

    def _fill_pools(self, rows: Sequence[Row], begins: Sequence[int]) -> None:
        composition = tuple((tuple(row.sequence.slots.items()), row.count) for row in rows)
        if composition == self._composition:
            return
        runs: dict[str, list[tuple[int, int, int]]] = {}  # pool -> (slot, first token, count)
        for row, begin in zip(rows, begins, strict=True):
            for pool, slot in row.sequence.slots.items():
                runs.setdefault(pool, []).append((slot, begin, row.count))
        self.step.rows = {pool: self._rows(sorted(found)) for pool, found in runs.items()}
        self._composition = composition

    def _rows(self, runs: list[tuple[int, int, int]]) -> Rows:
        index = np.concatenate([np.arange(begin, begin + count) for _, begin, count in runs])
        slot = np.repeat([s for s, _, _ in runs], [count for _, _, count in runs])
        first, n = int(index[0]), len(index)
        consecutive = bool((index == np.arange(first, first + n)).all())
        return Rows(
            index=self._put(index),
            slot=self._put(slot.astype(np.int64)),
            groups=_groups(runs),
            span=slice(first, first + n) if consecutive else None,
            taps=self.step.taps,
        )

    def _put(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _groups(runs: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """(slot, first token, count) sorted by slot -> (slot, start, stop) over the pool's rows, equal slots joined."""
    groups: list[tuple[int, int, int]] = []
    at = 0
    for slot, _, count in runs:
        if groups and groups[-1][0] == slot:
            groups[-1] = (slot, groups[-1][1], at + count)
        else:
            groups.append((slot, at, at + count))
        at += count
    return tuple(groups)
