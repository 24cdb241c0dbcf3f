"""Sites: the modules of the base at which resident adapters act, as forward hooks on the unmodified model.

A hook is attached when the first resident adapter names the module and removed with the last. Owns the ops (device pools)
and nothing else; which rows go through them is read from `Step`.

    module(x):   IA3-in -> base -> LoRA -> bias -> IA3-out -> bottleneck          (Op.order)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..methods.base import BaseShape, Method, Op, Part
from .step import Step


@runtime_checkable
class Extensible(Protocol):
    """A module of our own that calls `extension(x, y)` on its input and output: a hook without a hook's cost."""

    extension: Callable[[Tensor, Tensor], Tensor] | None


class Extension:
    """What a module calls after itself, until removed."""

    def __init__(self, module: Extensible, act: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._module = module
        module.extension = act

    def remove(self) -> None:
        self._module.extension = None


@dataclass(eq=False)
class _Pooled:
    """One op at one module, and how many of its slots hold an adapter."""

    pool: str
    op: Op
    capacity: int = 0
    occupied: set[int] = field(default_factory=set)


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
        self._handles: list[RemovableHandle | Extension] = []

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
        if self._before:
            self._handles.append(self.module.register_forward_pre_hook(self._run_before))

    def _attach_after(self) -> RemovableHandle | Extension:
        if isinstance(self.module, Extensible):
            return Extension(self.module, self._act)
        return self.module.register_forward_hook(lambda module, args, output: self._act(args[0], output))

    def _run_before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = flat = args[0]
        pools = self._step.kept_rows if self._kept else self._step.rows
        for pooled in self._before:
            rows = pools.get(pooled.pool)
            if rows is not None:
                flat = pooled.op.before(flat.reshape(-1, flat.shape[-1]), rows)
        return None if flat is x else (flat.view(x.shape), *args[1:])

    def _act(self, given: Tensor, output: Tensor) -> Tensor:
        """The module's output through the ops of this step's rows. given [1, T, in] or ids [1, T], output [1, T, out]."""
        x: Tensor | None = None
        y = flat = output
        pools = self._step.kept_rows if self._kept else self._step.rows
        for pooled in self._after:
            rows = pools.get(pooled.pool)
            if rows is None:
                continue
            if x is None:
                x = given.reshape(-1) if self._ids else given.reshape(-1, given.shape[-1])
                y = flat = output.view(-1, output.shape[-1])
            y = pooled.op.after(x, y, rows)
        return output if y is flat else y.view(output.shape)


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

    @property
    def nbytes(self) -> int:
        """Device bytes of all pools."""
        return sum(pooled.op.nbytes for site in self._sites.values() for pooled in site.pools.values())

    @property
    def attached(self) -> tuple[str, ...]:
        """Names of the modules that carry a hook now."""
        return tuple(self._sites)

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
            pooled.op.put(slot, tensors)
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
