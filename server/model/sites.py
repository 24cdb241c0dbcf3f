"""Sites: the modules of the base at which resident adapters act, as forward hooks on the unmodified model.

A hook is attached when the first resident adapter names the module and removed with the last. Owns the ops (device pools)
and nothing else; which rows go through them is read from `Step`.

    module(x):   IA3-in -> base -> LoRA -> bias -> IA3-out -> bottleneck          (Op.order)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..methods.base import BaseShape, Method, Op, Part, Rows, Run
from .step import Step


class Extension(Protocol):
    """What adapters do at a module of our own: `x = before(x)`, then `y = extension(x, y)` on its output."""

    def before(self, x: Tensor) -> Tensor: ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...

    def runs(self) -> Sequence[Run] | None:
        """What this step does to the output, as prepared calls for a program; None where it has to be called."""

    def runs_before(self) -> Sequence[Run] | None:
        """The same for the input: each called as run(x, x), on an input that no other module reads."""


@runtime_checkable
class Extensible(Protocol):
    """A module of our own that applies its `extension` itself: a hook without a hook's cost."""

    extension: Extension | None


@dataclass(eq=False)
class _Pooled:
    """One op at one module, and how many of its slots hold an adapter."""

    pool: str
    op: Op
    capacity: int = 0
    occupied: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Attached:
    module: Extensible

    def remove(self) -> None:
        self.module.extension = None


class Site:
    """One module with at least one op. Invariant: hooks are attached exactly while they have something to do."""

    def __init__(self, module: nn.Module, step: Step, *, kept: bool = False, ids: bool = False) -> None:
        """`kept`: the module sees the step's kept tokens only; `ids`: its input is token ids [1, T], not features."""
        self.module = module
        self._kept, self._ids = kept, ids
        self.pools: dict[str, _Pooled] = {}
        self._step = step
        self._before: tuple[_Pooled, ...] = ()
        self._after: tuple[_Pooled, ...] = ()
        self._handles: list[RemovableHandle | _Attached] = []

    def attach(self) -> None:
        """Bring the hooks in line with the ops."""
        ordered = tuple(sorted(self.pools.values(), key=lambda pooled: (pooled.op.order, pooled.pool)))
        before = tuple(p for p in ordered if p.op.acts_before)
        if (before, ordered) == (self._before, self._after):
            return
        for handle in self._handles:
            handle.remove()
        self._before, self._after = before, ordered
        self._handles = [self._attach_after()] if ordered else []
        if self._before and not isinstance(self.module, Extensible):
            self._handles.append(self.module.register_forward_pre_hook(self._run_before))

    def _attach_after(self) -> RemovableHandle | _Attached:
        if isinstance(self.module, Extensible):
            self.module.extension = self
            return _Attached(self.module)
        return self.module.register_forward_hook(lambda module, args, output: self(args[0], output))

    def runs(self) -> Sequence[Run] | None:
        return self._gathered([p.op.runs(rows) for p in self._after if (rows := self._pools.get(p.pool)) is not None])

    def runs_before(self) -> Sequence[Run] | None:
        return self._gathered([p.op.runs_before(rows) for p in self._before if (rows := self._pools.get(p.pool)) is not None])

    def _gathered(self, found: Sequence[Sequence[Run] | None]) -> Sequence[Run] | None:
        return None if None in found else [run for runs in found if runs is not None for run in runs]

    @property
    def _pools(self) -> Mapping[str, Rows]:
        return self._step.kept_rows if self._kept else self._step.rows

    def _run_before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = self.before(args[0])
        return None if x is args[0] else (x, *args[1:])

    def before(self, x: Tensor) -> Tensor:
        """The module's input through the ops that act before it, a copy where one does. x [1, T, in]."""
        flat = x
        pools = self._pools
        for pooled in self._before:
            rows = pools.get(pooled.pool)
            if rows is not None:
                flat = pooled.op.before(flat.reshape(-1, flat.shape[-1]), rows)
        return x if flat is x else flat.view(x.shape)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's output through the ops of this step's rows. x [1, T, in] or ids [1, T], y [1, T, out]."""
        pools = self._pools
        acting = [(pooled.op, rows) for pooled in self._after if (rows := pools.get(pooled.pool)) is not None]
        if not acting:
            return y
        given = x.reshape(-1) if self._ids else x.reshape(-1, x.shape[-1])
        flat = changed = y.view(-1, y.shape[-1])
        for op, rows in acting:
            changed = op.after(given, changed, rows)
        return y if changed is flat else changed.view(y.shape)


@dataclass
class _Tap:
    handle: RemovableHandle
    users: int = 0


class Sites:
    """All sites of one model, and what is in their pools."""

    def __init__(
        self,
        model: nn.Module,
        base: BaseShape,
        step: Step,
        methods: Mapping[str, Method],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._base = base
        self._step = step
        self._methods = methods
        self._device = device
        self._dtype = dtype
        self._sites: dict[str, Site] = {}
        self._taps: dict[str, _Tap] = {}
        self._where: dict[tuple[str, int], dict[str, None]] = {}  # (pool, slot) -> modules, in order
        self._graphable: dict[str, bool] = {}  # pools asked about since the last change
        self.version = 0  # another whenever an op came or went, moved its memory, or is graphable no more

    @property
    def nbytes(self) -> int:
        """Device bytes of all pools."""
        return sum(pooled.op.nbytes for site in self._sites.values() for pooled in site.pools.values())

    @property
    def attached(self) -> tuple[str, ...]:
        """Names of the modules that carry a hook now."""
        return tuple(self._sites)

    def graphable(self, pool: str) -> bool:
        """Whether a CUDA graph can hold what the pool's ops do, at every module."""
        if pool not in self._graphable:
            ops = (site.pools[pool].op for site in self._sites.values() if pool in site.pools)
            self._graphable[pool] = all(op.graphable for op in ops)
        return self._graphable[pool]

    def _changed(self) -> None:
        self._graphable.clear()
        self.version += 1

    def put(self, part: Part, slot: int) -> None:
        """Write a part into `slot` of its pool, at every module it names."""
        if part.pool is None:
            return
        names = self._where.setdefault((part.pool, slot), {})  # filled as it goes: `clear` undoes a put that fails half way
        for name, tensors in part.sites.items():
            pooled = self._pooled(name, part)
            names[name] = None
            if slot >= pooled.capacity:
                capacity = max(slot + 1, 2 * pooled.capacity)
                pooled.op.grow(capacity)
                pooled.capacity = capacity
                self._changed()
            graphable = pooled.op.graphable
            pooled.op.put(slot, tensors)
            if pooled.op.graphable != graphable:
                self._changed()
            pooled.occupied.add(slot)
            self._sites[name].attach()  # an op may act before the module only since this adapter

    def clear(self, pool: str, slot: int) -> None:
        """Make `slot` the identity again everywhere; modules nobody acts on any more lose their hook."""
        names = self._where.get((pool, slot), {})
        while names:  # each is struck out once it is done, so that a clear that raises can be tried again
            name = next(iter(names))
            site = self._sites[name]
            pooled = site.pools[pool]
            if slot < pooled.capacity:
                pooled.op.clear(slot)
            pooled.occupied.discard(slot)
            if not pooled.occupied:
                self._untap(pooled.op)
                self._changed()
                del site.pools[pool]
                site.attach()
                if not site.pools:
                    del self._sites[name]
            del names[name]
        self._where.pop((pool, slot), None)

    def _pooled(self, name: str, part: Part) -> _Pooled:
        site = self._sites.get(name) or self._site(name)
        pool = str(part.pool)
        pooled = site.pools.get(pool)
        if pooled is None:
            op = self._methods[part.method].op(part, name, self._base, self._device, self._dtype)
            self._tap(op)
            self._changed()
            pooled = site.pools[pool] = _Pooled(pool, op)
            self._sites[name] = site
        return pooled

    def _site(self, name: str) -> Site:
        shape = self._base.modules[name]
        return Site(self._modules[name], self._step, kept=name == self._base.head, ids=shape.kind == "embedding")

    def _tap(self, op: Op) -> None:
        for name in op.taps:
            if name not in self._taps:
                # First in line, so that it sees what the base gave, whichever adapter of the module came first.
                handle = self._modules[name].register_forward_pre_hook(_Record(self._step, name), prepend=True)
                self._taps[name] = _Tap(handle)
            self._taps[name].users += 1

    def _untap(self, op: Op) -> None:
        for name in op.taps:
            self._taps[name].users -= 1
            if not self._taps[name].users:
                self._taps.pop(name).handle.remove()


@dataclass(frozen=True)
class _Record:
    """A pre-hook that keeps a module's input for an op further down the layer."""

    step: Step
    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.step.taps[self.name] = args[0].reshape(-1, args[0].shape[-1])
