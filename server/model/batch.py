"""Batch: a plan's rows become the tensors of a `Step`. Index arithmetic in numpy, one copy to the device each.

Owns the order of rows in a step and the cache of what depends only on its composition. Runs no model.

    order   decode rows first (one token each, one batched attention), each half sorted by its adapters' slots, so that
            a pool's tokens are nearly always one run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.plan import Row
from ..methods.base import Rows
from .step import Step

_Composition = tuple[tuple[tuple[tuple[str, int], ...], int, int], ...]  # of each row: slots, tokens, kept tokens
_Run = tuple[int, int, int]  # slot, first token, count


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
        shifts = np.fromiter((row.sequence.shift for row in rows), np.int64, len(rows))
        step.positions = self._put(positions - shifts[row_of])
        step.write = self._put(write + positions % self.block_size)
        step.tables = self._put(tables)
        step.starts = self._put(np.concatenate(([0], ends)).astype(np.int32))
        step.contexts = self._put(contexts.astype(np.int32))
        step.keep = self._put(np.asarray(keep, np.int64))
        begins = (ends - counts).tolist()
        step.spans = tuple(zip(begins, ends.tolist(), contexts.tolist(), strict=True))
        step.decodes = int((counts == 1).sum())
        step.taps.clear()
        kept = np.searchsorted(np.asarray(keep, np.int64), np.concatenate((begins, ends[-1:])))
        self._fill_pools(rows, begins, kept.tolist())

    def forget_composition(self) -> None:
        """Slots changed hands: what was gathered from them is stale."""
        self._composition = ()

    def _tables(self, rows: Sequence[Row]) -> NDArray[np.int32]:
        """[R, longest block list], padded with the null block."""
        tables = np.zeros((len(rows), max(len(row.sequence.blocks) for row in rows)), np.int32)
        for i, row in enumerate(rows):
            tables[i, : len(row.sequence.blocks)] = row.sequence.blocks
        return tables

    def _fill_pools(self, rows: Sequence[Row], begins: Sequence[int], kept: Sequence[int]) -> None:
        """`kept[i]` is row i's first place in `keep`, `kept[i + 1]` the one after its last."""
        kept_counts = [last - first for first, last in pairwise(kept)]
        composition = tuple(
            (tuple(row.sequence.slots.items()), row.count, count) for row, count in zip(rows, kept_counts, strict=True)
        )
        if composition == self._composition:
            return
        self.step.rows = self._pools(rows, begins, [row.count for row in rows])
        self.step.kept_rows = self._pools(rows, kept[:-1], kept_counts)
        self._composition = composition

    def _pools(self, rows: Sequence[Row], begins: Sequence[int], counts: Sequence[int]) -> dict[str, Rows]:
        runs: dict[str, list[_Run]] = {}
        for row, begin, count in zip(rows, begins, counts, strict=True):
            for pool, slot in row.sequence.slots.items() if count else ():
                runs.setdefault(pool, []).append((slot, begin, count))
        return {pool: self._rows(sorted(found)) for pool, found in runs.items()}

    def _rows(self, runs: list[_Run]) -> Rows:
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


def _groups(runs: Sequence[_Run]) -> tuple[tuple[int, int, int], ...]:
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
