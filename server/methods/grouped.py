"""Row arithmetic shared by the ops: slot pools, the rows of one slot, and the plain loop faster paths must equal.

Owns device tensors with a leading slot axis. Knows no family's files, no model and no scheduler.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..host_memory import zeros
from .base import Op, Rows, Run

Groups = tuple[tuple[int, int, int], ...]

#: A group of at least this many rows gets products of its own; shorter ones share batched ones over gathered weights.
LONG_GROUP = 4


#: Slots for which a pool in host memory reserves addresses at once. Only pages that are written take memory, so that the pool
#: grows without being copied in the middle of everybody's stream.
RESERVED: Final = 64
_PAGE: Final = 4096  # bytes; of a slot, from which that pays


class Pool:
    """One tensor per slot, [slots, *shape]. Invariant: slot 0 and every slot not in use hold `identity`."""

    def __init__(self, shape: Sequence[int], identity: float, device: torch.device, dtype: torch.dtype) -> None:
        self.identity = identity
        self.dtype = dtype
        self.tensor = torch.empty((0, *shape), device=device, dtype=dtype)
        self._raw = raw(self.tensor)
        self._room = self.tensor  # [slots, *shape]: what `tensor` is the beginning of
        paged = math.prod(shape) * dtype.itemsize >= _PAGE
        self._reserves = paged and identity == 0 and device.type == "cpu"

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def grow(self, capacity: int) -> None:
        """At least doubles once in use, so that a pool that grows slot by slot copies each slot O(1) times."""
        held = len(self.tensor)
        if capacity <= held:
            return
        capacity = max(capacity, 2 * held)
        if capacity > len(self._room):
            room = self._new_room(capacity)
            room[:held] = self.tensor
            self._room = room
        self.tensor = self._room[:capacity]
        self._raw = raw(self.tensor)

    def _new_room(self, capacity: int) -> Tensor:
        size = self.tensor.shape[1:]
        if not self._reserves:
            return self.tensor.new_full((capacity, *size), self.identity)
        # One large page would hold many slots, and take memory for all of them with the first.
        return zeros((max(capacity, RESERVED), *size), self.tensor.dtype, large_pages=False)

    def put(self, slot: int, own: Tensor) -> None:
        """own [n, ...]: all of a slot, or the first n rows of a matrix, with the identity behind them.

        All streams wait while the hundreds of tensors of an adapter are put, so on the CPU bits are copied by NumPy, whose
        calls cost a tenth of torch's. Raises: ValueError for another shape.
        """
        held, bits = self._raw, raw(own) if own.dtype is self.dtype else None
        (_, *size), (count, *rest) = (
            (self.tensor.shape, own.shape) if held is None or bits is None else (held.shape, bits.shape)
        )
        if (count != size[0] and (count > size[0] or not rest)) or rest != size[1:]:
            raise ValueError(f"a tensor of {[count, *rest]} does not fit a slot of {size}")
        if held is None or bits is None:
            self.tensor[slot, :count] = own
        else:
            held[slot, :count] = bits
        if count < size[0]:
            self._fill(slot, count)

    def clear(self, slot: int) -> None:
        self._fill(slot, 0)

    def _fill(self, slot: int, start: int) -> None:
        if self._raw is None or (self.identity and self._raw.dtype.kind != "f"):
            self.tensor[slot, start:] = self.identity
        else:
            self._raw[slot, start:] = self.identity


def raw(tensor: Tensor) -> NDArray[Any] | None:
    """The same memory for NumPy, which has no bf16: as integers then. None where it is not the host's."""
    if tensor.device.type != "cpu":
        return None
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


class PooledOp(Op):
    """An op with pools, at a module that not every adapter of its pool names.

    Invariant: only rows of slots that were put here run here. A step's rows hold slots of other modules too, and those may
    lie past the end of this module's pools.
    """

    def __init__(self) -> None:
        self._held: set[int] = set()

    def held(self, rows: Rows) -> Rows:
        """The rows this module's adapters own: found once per composition, nearly always all of them."""
        if rows.fixed:
            return rows
        kept = rows.scratch.get((self, "held"))
        if kept is None:
            groups = tuple(group for group in rows.groups if group[0] in self._held)
            kept = rows.scratch[self, "held"] = len(groups) == len(rows.groups) or _narrowed(rows, groups)
        return rows if kept is True else cast("Rows", kept)


class RunsOp(PooledOp):
    """A pooled op whose `after` is a few prepared calls, so that a layer can run as one program."""

    @abstractmethod
    def prepare(self, rows: Rows) -> Sequence[Run]:
        """What a composition computes here; `rows` are this module's own, and some."""

    def runs(self, rows: Rows) -> Sequence[Run]:
        kept = rows.scratch.get(self)
        if kept is None:
            held = self.held(rows)
            kept = rows.scratch[self] = tuple(self.prepare(held)) if held.groups or held.fixed else ()
        return cast("Sequence[Run]", kept)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        for run in self.runs(rows):
            run(x, y)
        return y


@dataclass(frozen=True, eq=False)
class AddRows:
    """A `Run`: y[t] += vectors[s] for each row t, s its slot. vectors [slots, out]."""

    vectors: Tensor
    rows: Rows

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.rows.store(y, (self.rows.take(y) + per_row(self.vectors, self.rows, self)).to(y.dtype))


@dataclass(frozen=True, eq=False)
class MulRows:
    """A `Run`: y[t] *= vectors[s] for each row t, s its slot. vectors [slots, out]."""

    vectors: Tensor
    rows: Rows

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.rows.store(y, (self.rows.take(y) * per_row(self.vectors, self.rows, self)).to(y.dtype))


def _narrowed(rows: Rows, groups: Groups) -> Rows:
    """`rows` without the other groups; modules that hold the same slots share the result, and what ops keep in it."""
    kept = rows.scratch.get(groups)
    if kept is None:
        at = [position for _, start, stop in groups for position in range(start, stop)]
        picked = rows.index.new_tensor(at)
        where = tokens(rows, at[0], at[-1] + 1) if at and _is_run(at) else None
        kept = rows.scratch[groups] = Rows(
            index=rows.index[picked],
            slot=rows.slot[picked],
            groups=_runs([slot for slot, start, stop in groups for _ in range(start, stop)]),
            span=where if isinstance(where, slice) else None,
            taps=rows.taps,
            prompt=rows.prompt,
        )
    return cast("Rows", kept)


def per_row(pool: Tensor, rows: Rows, key: object) -> Tensor:
    """Each row's own vector of `pool` [slots, d]: a [1, d] view for one slot, else [n, d] kept with the composition."""
    if len(rows.groups) == 1:
        slot = rows.groups[0][0]
        return pool[slot : slot + 1]
    gathered = rows.scratch.get(key)
    if gathered is None:
        gathered = rows.scratch[key] = pool[rows.slot]
    return cast("Tensor", gathered)


def each_group(rows: Rows) -> Iterator[tuple[int, slice | Tensor]]:
    """(slot, the step's tokens that belong to it), a slice wherever the pool's rows are consecutive."""
    for slot, start, stop in rows.groups:
        yield slot, tokens(rows, start, stop)


def tokens(rows: Rows, start: int, stop: int) -> slice | Tensor:
    """Positions start..stop of the pool's rows as tokens of the step."""
    if rows.span is not None:
        return slice(rows.span.start + start, rows.span.start + stop)
    return rows.index[start:stop]


@dataclass(frozen=True)
class Split:
    """A composition's groups by the arithmetic that suits them."""

    long: tuple[tuple[int, slice | Tensor], ...]  # (slot, its tokens): products of their own
    short: slice | Tensor | None  # the m tokens of all short groups, which share batched products
    slots: slice | Tensor  # [m] slot of each of those; a slice where they are consecutive, so that no weight is copied


def split_of(rows: Rows) -> Split:
    """A lone group counts as long: it needs no gather. Found once per composition, shared by the pool's sites.

    groups (4, 0, 9) (7, 9, 10) (8, 10, 12)  ->  long slot 4: rows 0..8; short: rows 9 10 11, slots [7 8 8]
    """
    kept = rows.scratch.get("split")
    if kept is None:
        kept = rows.scratch["split"] = _split(rows)
    return cast("Split", kept)


def _split(rows: Rows) -> Split:
    least = LONG_GROUP if len(rows.groups) > 1 else 1
    long = tuple((slot, tokens(rows, i, j)) for slot, i, j in rows.groups if j - i >= least)
    short = [(slot, at) for slot, i, j in rows.groups if j - i < least for at in range(i, j)]
    if not short:
        return Split(long, None, slice(0, 0))
    slots, at = [slot for slot, _ in short], [at for _, at in short]
    where = tokens(rows, at[0], at[-1] + 1) if _is_run(at) else rows.index[rows.index.new_tensor(at)]
    return Split(long, where, slice(slots[0], slots[-1] + 1) if _is_run(slots) else rows.slot.new_tensor(slots))


def _is_run(numbers: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in pairwise(numbers))


def lora_loop(x: Tensor, y: Tensor, a: Tensor, b: Tensor, rows: Rows) -> None:
    """The oracle of every LoRA path: one adapter at a time, in place.

    Semantics: y[t] += B[s]^T @ (A[s] @ x[t]) for each row t of the pool, s its slot.
    x [T, in], y [T, out], a [slots, r, in], b transposed [slots, r, out].
    """
    for slot, where in each_group(rows):
        y[where] += x[where] @ a[slot].T @ b[slot]


def rows_of(slots: Sequence[int], device: torch.device | None = None) -> Rows:
    """The rows of a pool for a step whose token t goes through `slots[t]` (0 = not in this pool).

    slots = [0, 0, 4, 4, 4, 0, 7]  ->  index [2 3 4 6]  slot [4 4 4 7]  groups ((4, 0, 3), (7, 3, 4))
    """
    order = sorted((slot, token) for token, slot in enumerate(slots) if slot)
    index = [token for _, token in order]
    return Rows(
        index=torch.tensor(index, dtype=torch.int64, device=device),
        slot=torch.tensor([slot for slot, _ in order], dtype=torch.int64, device=device),
        groups=_runs([slot for slot, _ in order]),
        span=slice(index[0], index[0] + len(index)) if index and _is_run(index) else None,
        taps={},
    )


def _runs(slots: Sequence[int]) -> Groups:
    starts = [i for i, slot in enumerate(slots) if i == 0 or slot != slots[i - 1]]
    return tuple((slots[i], i, j) for i, j in pairwise([*starts, len(slots)]))
