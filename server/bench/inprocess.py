"""The engine in this process, as the server builds it, fed whole batches: no HTTP, no store, no tokenizer.

Owns the engine's thread and the clock of its steps. Decides neither what is generated nor how often.

    with EngineUnderTest.load(directory, rows=8, tokens=200) as ours:
        names = ours.add({"a": make_adapter("lora", ours.dimensions, np.random.default_rng(0))})
        batch = ours.generate([[1, 2, 3]], ["a"], new=64)
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_store.digest import Digest

from ..engine.engine import Engine
from ..engine.pages import Pages
from ..engine.residency import Residency
from ..engine.scheduler import Scheduler, SchedulerLimits
from ..methods import build_methods
from ..methods.base import Adapter, Limits
from ..methods.read import read_adapter
from ..metrics import Metrics
from ..model.kernels import choose_kernels
from ..model.linear import PackedModule
from ..model.loader import Base, load_base
from ..model.runner import CacheShape, Runner
from ..requests import Event, FinishReason, Request, Sampling
from ..settings import Settings, default_home
from .adapters import Files
from .dimensions import Dimensions
from .options import BenchError

_BLOCK: int = Settings.model_fields["block_size"].default
_SPARE = 4  # blocks of a sequence for a partly filled last one, and the copy of a prefix's


@dataclass(frozen=True)
class Batch:
    """One batch, from the first request submitted to the last token of all."""

    seconds: float
    tokens: tuple[tuple[int, ...], ...]  # of each row
    prefill_seconds: float  # until every row had its first token
    step_seconds: tuple[float, ...]  # of each step after that, all of them decode

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class _Clock:
    """The batch that is running: its tokens and when they came. Written by the engine's thread, read once it is done."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.done = threading.Event()
        self.tokens: dict[str, list[int]] = {id: [] for id in ids}
        self.times: list[tuple[float, int]] = []  # after each step: when, and how many rows had begun
        self.failure: str | None = None
        self._left = set(ids)

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            self.tokens[event.request_id].extend(token.id for token in event.tokens)
            if event.finish is not None:
                self._left.discard(event.request_id)
            if event.finish is FinishReason.ERROR:
                self.failure = str(event.error)
        self.times.append((time.perf_counter(), sum(map(bool, self.tokens.values()))))
        if not self._left:
            self.done.set()

    def batch(self, begun: float) -> Batch:
        times = [at for at, rows in self.times if rows == len(self.tokens)]
        steps = tuple(later - earlier for earlier, later in pairwise(times))
        rows = tuple(map(tuple, self.tokens.values()))
        return Batch(self.times[-1][0] - begun, rows, times[0] - begun, steps)


class EngineUnderTest:
    """One base and its engine. Adapters are added before they are named; one batch runs at a time."""

    def __init__(self, base: Base, runner: Runner, limits: SchedulerLimits, pages: Pages, slots: int, kernels: str) -> None:
        self.base = base
        self.kernels = kernels
        self.limits = limits
        self._adapters: dict[str, Adapter] = {}
        self._batches = 0
        self._clock = _Clock(())
        scheduler = Scheduler(pages, Residency(slots), limits, base.shape.digest, base.eos)
        self._engine = Engine(runner, scheduler, self._adapter, Metrics("bench"), self._publish)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        rows: int,
        tokens: int,
        slots: int = 32,
        threads: int = 0,
        native: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> Self:
        """`rows` sequences of up to `tokens` positions at once, `slots` adapters; 0 threads: every CPU it may use."""
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        device = torch.device("cpu")
        kernels = choose_kernels(device, torch.float32, native, default_home(), say)
        base = load_base(directory, device, torch.float32, kernels.prepare)
        blocks = 1 + rows * (-(-tokens // _BLOCK) + _SPARE)
        methods = build_methods(kernels.lora, kernels.linear, kernels.bottleneck)
        runner = Runner(base, CacheShape(blocks, _BLOCK), methods, kernels)
        budget: int = Settings.model_fields["max_batch_tokens"].default
        context = min(base.shape.max_positions, (blocks - 2) * _BLOCK)
        limits = SchedulerLimits(budget, rows, rows, context, splits_prompts=kernels.splits_prompts)
        return cls(base, runner, limits, Pages(blocks, _BLOCK), slots, kernels.name)

    def __enter__(self) -> Self:
        self._engine.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.stop()

    @property
    def dimensions(self) -> Dimensions:
        return Dimensions.of_shape(self.base.shape)

    def add(self, adapters: Mapping[str, Files]) -> None:
        """Read adapters as an upload would be. Raises: AdapterError naming what is wrong with one."""
        with tempfile.TemporaryDirectory(prefix="adapterd-bench-") as scratch:
            for name, files in adapters.items():
                folder = Path(scratch) / name
                folder.mkdir()
                for file, body in files.items():
                    (folder / file).write_bytes(body)
                paths = {file: folder / file for file in files}
                self._adapters[name] = read_adapter(paths, self.base.shape, Limits(), Digest.of(name.encode()))

    def generate(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], new: int) -> Batch:
        """One row per prompt (token ids), greedy, past the end-of-sequence token; None is the base alone.

        Raises: BenchError when a row fails.
        """
        self._batches += 1
        # A tenant of its own per batch: nothing may come from the prefix cache.
        tenant, ids = str(self._batches), [f"{self._batches}/{row}" for row in range(len(prompts))]
        self._clock = clock = _Clock(ids)
        begun = time.perf_counter()
        for id, prompt, name in zip(ids, prompts, adapters, strict=True):
            digests = () if name is None else (self._adapters[name].digest,)
            self._engine.submit(Request(id, tenant, digests, tuple(prompt), Sampling(new, ignore_eos=True), begun))
        clock.done.wait()
        if clock.failure is not None:
            raise BenchError(f"a row failed: {clock.failure}")
        return clock.batch(begun)

    def adapter_bytes(self, name: str) -> int:
        """Of one adapter's tensors, as they are held."""
        return self._adapters[name].nbytes

    def step_bytes(self) -> tuple[int, int]:
        """Weights that a decode step of any few rows reads: (as they are held, if they were fp32). Norms are too small."""
        modules = {id(module): module for module in self.base.model.modules()}.values()
        packed = [module for module in modules if isinstance(module, PackedModule)]
        plain = [module.weight for module in modules if isinstance(module, nn.Linear | Conv1D)]
        held = sum(m.nbytes for m in packed) + sum(weight.nbytes for weight in plain)
        count = sum(m.in_features * m.out_features for m in packed) + sum(weight.numel() for weight in plain)
        return held, 4 * count

    def _adapter(self, digest: Digest) -> Adapter:
        return next(adapter for adapter in self._adapters.values() if adapter.digest == digest)

    def _publish(self, events: list[Event]) -> None:
        self._clock.take(events)
