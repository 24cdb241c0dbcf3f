"""CUDA graphs of decode steps: all launches of a step replayed at once, over tensors that never move.

One graph per number of rows (rounded up) and set of pools, recorded when such a step is first met. A step fits where every
row is one decoding token and all its ops take slots from the device (`Op.graphable`); any other runs as ever. Knows no
adapters: a graph holds for whatever slots, blocks and contexts are copied into its tensors.

    5 rows -> a graph of 8:   ids, positions ...  [5 of the step | 3 that write to the spare block and see themselves]
                              slots of a pool     [4 4 0 7 7     | 0 0 0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Protocol

import structlog
import torch
from torch import Tensor

from ..methods.base import Rows
from .sites import Sites
from .step import Step

log = structlog.get_logger(__name__)

MOST_GRAPHS = 32  # kept at once; the one recorded first makes room

_Key = tuple[int, tuple[str, ...]]  # rows, pools


class Record(Protocol):
    """Records what `work` launches. `work` may run any number of times for it, with the same outcome each time."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """-> replay(), and the tensor that a replay fills.

        Raises: RuntimeError when `work` cannot be recorded.
        """


class CudaRecord:
    """`Record` with `torch.cuda.CUDAGraph`. All graphs share one memory pool: they run one at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # compiles kernels and allocates workspaces, which a recording must not do
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; only what this one must not do ends the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output


@dataclass(frozen=True)
class GraphLimits:
    """What a graph's tensors have room for."""

    rows: int  # most rows of a step
    table_width: int  # blocks of one row
    block_size: int
    spare_block: int  # a block of the cache that no row owns


@dataclass(frozen=True)
class _Graph:
    step: Step  # its tensors, which a replay reads
    replay: Callable[[], None]
    logits: Tensor  # [rows, V]


class DecodeGraphs:
    """Usage: `logits = graphs.run()` once the step is filled; None says that it has to be run as ever.

    Invariant: graphs are dropped as soon as ops or their pools are others than those recorded (`Sites.version`).
    """

    def __init__(self, step: Step, sites: Sites, forward: Callable[[], Tensor], limits: GraphLimits, record: Record) -> None:
        """`forward` computes the logits [rows, V] of what `step` holds."""
        self._step = step
        self._sites = sites
        self._forward = forward
        self._limits = limits
        self._record: Record | None = record
        self._graphs: dict[_Key, _Graph] = {}
        self._version = sites.version

    @property
    def kept(self) -> int:
        return len(self._graphs)

    def run(self) -> Tensor | None:
        """Logits [R, V] of the step's rows, valid until the next call."""
        if self._sites.version != self._version:
            self._graphs.clear()
            self._version = self._sites.version
        key = self._key()
        if key is None:
            return None
        graph = self._graphs.get(key) or self._recorded(key)
        if graph is None:
            return None
        load(graph.step, self._step, self._limits)
        graph.replay()
        return graph.logits[: len(self._step.spans)]

    def _key(self) -> _Key | None:
        """None where no graph can stand in for the step."""
        step, limits = self._step, self._limits
        count = len(step.spans)
        if self._record is None or not count == step.decodes == len(step.keep) or count > limits.rows:
            return None
        if max(context for _, _, context in step.spans) > limits.table_width * limits.block_size:
            return None
        pools = tuple(sorted(step.rows))
        return (rounded(count, limits.rows), pools) if all(map(self._sites.graphable, pools)) else None

    def _recorded(self, key: _Key) -> _Graph | None:
        """None, from now on, where recording fails: the step is then run as ever."""
        if self._record is None:
            return None
        static = static_step(*key, self._step, self._limits)
        load(static, self._step, self._limits)
        try:
            with standing_in(self._step, static):
                replay, logits = self._record(self._forward)
        except RuntimeError as error:
            log.warning("no CUDA graphs", reason=str(error).splitlines()[0])
            self._record = None
            return None
        while len(self._graphs) >= MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = _Graph(static, replay, logits)
        return self._graphs[key]


def rounded(count: int, most: int) -> int:
    """Rows of the graph for `count` rows: the next power of two up to 8, then the next multiple of 8."""
    return min(most, 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8)


def static_step(count: int, pools: tuple[str, ...], like: Step, limits: GraphLimits) -> Step:
    """Tensors of a step of `count` decoding rows, all of them spare, on the device of `like`."""
    device = like.ids.device
    order = torch.arange(count, device=device)
    # Computed on the host, where the bound holds for every context.
    spans = tuple((i, i + 1, limits.table_width * limits.block_size) for i in range(count))
    rows = {pool: fixed_rows(torch.zeros_like(order), like.taps) for pool in pools}
    return Step(
        ids=torch.zeros_like(order),
        positions=torch.zeros_like(order),
        write=torch.full_like(order, limits.spare_block * limits.block_size),
        tables=torch.full((count, limits.table_width), limits.spare_block, dtype=torch.int32, device=device),
        starts=torch.arange(count + 1, dtype=torch.int32, device=device),
        contexts=torch.ones(count, dtype=torch.int32, device=device),
        key_starts=torch.arange(count + 1, dtype=torch.int32, device=device),
        keep=order,
        spans=spans,
        decodes=count,
        rows=rows,
        kept_rows=rows,
        taps=like.taps,
    )


def fixed_rows(slot: Tensor, taps: Mapping[str, Tensor]) -> Rows:
    """Every row of a step as a pool's row, whose slots [n] only the device knows."""
    count = len(slot)
    order = torch.arange(count, device=slot.device)
    return Rows(order, slot, ((0, 0, count),), slice(0, count), taps, fixed=True)


def load(static: Step, step: Step, limits: GraphLimits) -> None:
    """Copy a step of decodes into a graph's tensors. Nothing is waited for; rows left over become spare."""
    count, width = len(step.spans), min(step.tables.shape[1], limits.table_width)
    for mine, given, spare in (
        (static.ids, step.ids, 0),
        (static.positions, step.positions, 0),
        (static.write, step.write, limits.spare_block * limits.block_size),
        (static.contexts, step.contexts, 1),
    ):
        mine[:count].copy_(given)
        mine[count:].fill_(spare)
    static.tables[:count, :width].copy_(step.tables[:, :width])
    static.tables[count:, :1].fill_(limits.spare_block)
    torch.cumsum(static.contexts, 0, dtype=torch.int32, out=static.key_starts[1:])
    for pool, rows in static.rows.items():
        rows.slot.zero_()
        rows.slot.index_copy_(0, step.rows[pool].index, step.rows[pool].slot)


@contextmanager
def standing_in(step: Step, other: Step) -> Iterator[None]:
    """Whoever reads `step` meanwhile finds what `other` holds."""
    names = [field.name for field in fields(Step)]
    own = {name: getattr(step, name) for name in names}
    try:
        for name in names:
            setattr(step, name, getattr(other, name))
        yield
    finally:
        for name, value in own.items():
            setattr(step, name, value)
