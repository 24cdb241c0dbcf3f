"""Batch: a plan's rows become the tensors of a `Step`. Index arithmetic in numpy, in buffers kept from step to step.

Owns the order of rows in a step and the cache of what depends only on its composition. Runs no model.

    order   decode rows first (one token each, one batched attention), each half sorted by its adapters' slots, so that
            a pool's tokens are nearly always one run
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.plan import Row
from ..methods.base import NO_PROMPT, Rows
from .step import Step

_Run = tuple[int, int, int]  # slot, first token, count
_Key = tuple[tuple[tuple[tuple[str, int], ...], int, int, bool], ...]  # of each row: slots, tokens, kept tokens, of a prompt

_KNOWN = 8  # compositions remembered
_ADAPTED_KNOWN = 2  # of these, such as have adapters: ops may have gathered weights for them


def order_rows(rows: Sequence[Row]) -> list[Row]:
    """What was generated before prompts, single tokens before longer rows, each sorted by (pool, slot)."""
    return sorted(rows, key=lambda row: (row.of_prompt, row.count > 1, sorted(row.sequence.slots.items())))


@dataclass(frozen=True)
class _Known:
    """What depends on a composition alone."""

    rows: dict[str, Rows]
    kept_rows: dict[str, Rows]
    memo: dict[object, object] = field(default_factory=dict)


class BlockTables:
    """Block lists of a step's rows as one array; a row is written only where its list is another or has grown."""

    def __init__(self) -> None:
        self._table = np.zeros((0, 0), np.int32)
        self._lists: list[list[int]] = []  # what each row was written from, held so that none is taken for another
        self._written: list[int] = []  # how much of it

    def fill(self, lists: Sequence[list[int]]) -> NDArray[np.int32]:
        """-> [R, at least the longest list], the rest of each row being the null block. Lists may have grown in place."""
        widest = max(map(len, lists))
        if len(lists) > len(self._table) or widest > self._table.shape[1]:
            self._grow(len(lists), widest)
        for i, blocks in enumerate(lists):
            known = self._written[i]
            if self._lists[i] is not blocks:
                self._lists[i], known = blocks, 0
                self._table[i] = 0
            if len(blocks) > known:
                self._table[i, known : len(blocks)] = blocks[known:]
            self._written[i] = len(blocks)
        return self._table[: len(lists)]

    def _grow(self, rows: int, width: int) -> None:
        """At first exactly what is needed, later twice what there was: the table is written anew each time."""
        held_rows, held_width = self._table.shape
        rows = rows if rows <= held_rows else max(rows, 2 * held_rows)
        width = width if width <= held_width else max(width, 2 * held_width)
        self._table = np.zeros((max(rows, held_rows), max(width, held_width)), np.int32)
        self._lists = [[] for _ in self._table]
        self._written = [0] * len(self._table)


@dataclass
class BatchBuilder:
    """Fills a `Step` from rows. Invariant: `step.rows` of an unchanged composition are the same objects, scratch and all."""

    step: Step
    block_size: int
    device: torch.device

    def __post_init__(self) -> None:
        self._composition: list[tuple[Mapping[str, int], int, int, bool]] = []  # as in a key
        self._known: OrderedDict[_Key, _Known] = OrderedDict()  # the latest last
        self._tables = BlockTables()
        self._buffers: dict[str, NDArray[Any]] = {}

    def fill(self, rows: Sequence[Row], keep: Sequence[int]) -> None:
        """`rows` in the order of `order_rows`; `keep` indexes tokens of the step.

        On the CPU the step's tensors are this builder's buffers: they hold until the next call.
        """
        step, number = self.step, len(rows)
        starts = self._buffer("begins", np.int64, number)
        counts = self._buffer("counts", np.int64, number)
        starts[:] = [row.start for row in rows]
        counts[:] = [row.count for row in rows]
        bounds = self._buffer("starts", np.int32, number + 1)
        bounds[0] = 0
        np.cumsum(counts, out=bounds[1:])
        contexts = self._buffer("contexts", np.int32, number)
        np.add(starts, counts, out=contexts, casting="unsafe")
        key_starts = self._buffer("key_starts", np.int32, number + 1)
        key_starts[0] = 0
        np.cumsum(contexts, out=key_starts[1:])
        begins, ends = bounds[:-1].tolist(), bounds[1:].tolist()
        kept = self._buffer("keep", np.int64, len(keep))
        kept[:] = keep
        self._fill_tokens(rows, starts, counts, begins)
        step.starts = self._put(bounds)
        step.contexts = self._put(contexts)
        step.key_starts = self._put(key_starts)
        step.keep = self._put(kept)
        step.spans = tuple(zip(begins, ends, contexts.tolist(), strict=True))
        step.decodes = number if ends[-1] == number else int(np.argmax(counts > 1))
        step.prompt = next((begin for row, begin in zip(rows, begins, strict=True) if row.of_prompt), ends[-1])
        step.taps.clear()
        self._fill_pools(rows, begins, np.searchsorted(kept, bounds).tolist())

    def forget_composition(self) -> None:
        """Slots changed hands: what was gathered from them is stale."""
        self._composition = []
        self._known.clear()

    def forget_slots(self, slots: Mapping[str, int]) -> None:
        """These slots (pool -> slot) changed hands: compositions that name one of them are stale, others are not."""
        changed = slots.items()
        self._known = OrderedDict(
            (key, known) for key, known in self._known.items() if not any(slot in changed for held, *_ in key for slot in held)
        )
        if any(changed & held.items() for held, *_ in self._composition):
            self._composition = []

    def _fill_tokens(
        self, rows: Sequence[Row], starts: NDArray[np.int64], counts: NDArray[np.int64], begins: Sequence[int]
    ) -> None:
        """What there is one of per token: ids, positions, and places in the cache."""
        step, size, tables = self.step, self.block_size, self._tables.fill([row.sequence.blocks for row in rows])
        total = begins[-1] + rows[-1].count
        ids, positions, write = (self._buffer(name, np.int64, total) for name in ("ids", "positions", "write"))
        ids[:] = _ids(rows, total)
        np.maximum(ids, 0, out=ids)  # virtual positions have no id; their embedding is put in later
        row_of, places = self._places(starts, counts, begins, total)
        write[:] = tables[row_of, places // size]
        write *= size
        write += places % size
        np.subtract(places, np.asarray([row.sequence.shift for row in rows])[row_of], out=positions)
        step.ids, step.positions, step.write = self._put(ids), self._put(positions), self._put(write)
        step.tables = self._put(tables)

    def _places(
        self, starts: NDArray[np.int64], counts: NDArray[np.int64], begins: Sequence[int], total: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each token: its row, and its place in that row's sequence."""
        if total == len(counts):  # a step of decodes
            return np.arange(total), starts
        row_of = np.repeat(np.arange(len(counts)), counts)
        return row_of, np.arange(total) + (starts - begins)[row_of]

    def _buffer(self, name: str, dtype: type[np.generic], length: int) -> NDArray[Any]:
        """The first `length` elements of a buffer that only ever grows."""
        held = self._buffers.get(name)
        if held is None or len(held) < length:
            held = self._buffers[name] = np.empty(2 * length, dtype)
        return held[:length]

    def _fill_pools(self, rows: Sequence[Row], begins: Sequence[int], kept: Sequence[int]) -> None:
        """`kept[i]` is row i's first place in `keep`, `kept[i + 1]` the one after its last."""
        kept_counts = [last - first for first, last in pairwise(kept)]
        composition = [
            (row.sequence.slots, row.count, count, row.of_prompt) for row, count in zip(rows, kept_counts, strict=True)
        ]
        if composition == self._composition:  # mappings that are the same object are not even looked into
            return
        key = tuple((tuple(sorted(slots.items())), count, kept, prompt) for slots, count, kept, prompt in composition)
        known = self._known.pop(key, None)
        if known is None:
            counts = [row.count for row in rows]
            pools = self._pools(rows, begins, counts, self.step.prompt)
            known = _Known(pools, self._pools(rows, kept[:-1], kept_counts, NO_PROMPT))
        self._remember(key, known)
        self.step.rows, self.step.kept_rows, self.step.memo = known.rows, known.kept_rows, known.memo
        self._composition = composition

    def _remember(self, key: _Key, known: _Known) -> None:
        """Keep the last few compositions: prompts and guesses come and go beside the same decodes."""
        self._known[key] = known
        adapted = [each for each, one in self._known.items() if one.rows]
        for old in adapted[:-_ADAPTED_KNOWN]:
            del self._known[old]
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def _pools(self, rows: Sequence[Row], begins: Sequence[int], counts: Sequence[int], prompt: int) -> dict[str, Rows]:
        runs: dict[str, list[_Run]] = {}
        for row, begin, count in zip(rows, begins, counts, strict=True):
            for pool, slot in row.sequence.slots.items() if count else ():
                runs.setdefault(pool, []).append((slot, begin, count))
        return {pool: self._rows(sorted(found), prompt) for pool, found in runs.items()}

    def _rows(self, runs: list[_Run], prompt: int) -> Rows:
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
            prompt=prompt,
        )

    def _put(self, array: NDArray[np.generic]) -> torch.Tensor:
        host = torch.from_numpy(array)
        # From pinned memory, in a copy of its own, the host does not wait for the device, nor the device for this buffer.
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host.to(self.device)


def _ids(rows: Sequence[Row], total: int) -> list[int]:
    """Of every token of the step, guesses included."""
    if total == len(rows):
        return [row.sequence.ids[row.start] for row in rows]
    ids: list[int] = []
    for row in rows:
        ids += row.sequence.ids[row.start : row.start + row.count]
        ids += row.draft
    return ids


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
