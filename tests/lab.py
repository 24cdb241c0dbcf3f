"""Lab: a real engine without its thread, turned by hand, that remembers the logits behind every token."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters_store.digest import Digest
from server.engine.engine import Engine
from server.engine.footprint import Footprint
from server.engine.loading import Loading
from server.engine.pages import Pages
from server.engine.plan import Row, Sample
from server.engine.plan import Sequence as Seq
from server.engine.residency import Residency
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.errors import NotFoundError
from server.methods import build_methods
from server.methods.base import Adapter
from server.methods.weigh import check_fits, footprint_of
from server.model.kernels import Kernels, choose_kernels
from server.model.loader import Base, make_base
from server.model.runner import CacheShape, Runner
from server.recipes import Source, digest_of
from server.requests import Event, FinishReason, Request, Sampling, Task
from server.settings import default_home
from server.tenancy.policy import OPEN, TenantPolicy
from server.tenancy.quotas import Admission

BASE = Digest("0" * 64)
TORCH = Kernels("torch")


def kernels_named(name: str) -> Kernels:
    """The "torch" kernels, or the "native" ones; skips the test where there are none."""
    if name == "torch":
        return Kernels("torch")
    chosen = choose_kernels(torch.device("cpu"), torch.float32, True, default_home(), lambda line: None)
    if chosen.name != name:
        pytest.skip(chosen.name)
    return chosen


class RecordingRunner(Runner):
    """Keeps the logits [V] of every sampled position, per request."""

    logits: dict[str, list[Tensor]]

    def _sample(self, rows: Sequence[Row], kept: Sequence[range], logits: Tensor) -> dict[Seq, Sample]:
        at = 0
        for row, offsets in zip(rows, kept, strict=True):
            at += len(offsets)
            if row.samples and row.sequence.request is not None and offsets:
                self.logits.setdefault(row.sequence.request.id, []).append(logits[at - 1].clone())
        return super()._sample(rows, kept, logits)


class Observer:
    """Counts what the engine reports."""

    def __init__(self) -> None:
        self.rows_per_step: list[int] = []
        self.adapters_per_step: list[int] = []
        self.families_per_step: list[int] = []
        self.loads = self.evictions = self.preemptions = 0
        self.guessed = self.right = 0
        self.refusals: list[str] = []
        self.failed_passes: list[str] = []

    def pass_failed(self, kind: str) -> None:
        self.failed_passes.append(kind)

    def observe_step(self, rows: int, tokens: int, adapters: int, families: int, seconds: float) -> None:
        self.rows_per_step.append(rows)
        self.adapters_per_step.append(adapters)
        self.families_per_step.append(families)

    def adapter_loaded(self, seconds: float, outcome: str) -> None:
        self.loads += 1

    def evicted(self) -> None:
        self.evictions += 1

    def preempted(self) -> None:
        self.preemptions += 1

    def prefix_cache(self, queried: int, hit: int) -> None:
        pass

    def speculated(self, guessed: int, right: int) -> None:
        self.guessed += guessed
        self.right += right

    def refused(self, limit: str) -> None:
        self.refusals.append(limit)


class _AtOnce(Loading):
    """Loads where it is asked to, so that tests depend on no thread."""

    def start(self, digest: Digest) -> None:
        self._run(self._source(digest))


class Lab:
    """Usage: lab = Lab(model, {digest: adapter}); lab.submit("a", [1, 2], digest); lab.run(); lab.tokens("a")"""

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[Digest, Adapter],
        *,
        blocks: int = 257,
        block_size: int = 4,
        slots: int = 16,
        budget: int | None = None,
        max_batch_tokens: int = 24,
        max_running: int = 64,
        max_total_tokens: int = 200,
        max_prefill_tokens: int = 0,
        speculate: int = 0,
        kernels: Kernels = TORCH,
        admission: Admission | None = None,
    ) -> None:
        self.adapters = dict(adapters)
        self._native = kernels.linear is not None
        self.observer = Observer()
        self.events: list[Event] = []
        base: Base = make_base(model, BASE, torch.device("cpu"), torch.float32, kernels.prepare)
        methods = build_methods(kernels.lora, kernels.linear, kernels.bottleneck)
        self.runner = RecordingRunner(base, CacheShape(blocks, block_size), methods, kernels)
        self.runner.logits = {}
        limits = SchedulerLimits(
            max_batch_tokens,
            max_running,
            1000,
            min(max_total_tokens, (blocks - 2) * block_size),
            max_prefill_tokens=max_prefill_tokens,
            speculate=speculate,
            splits_prompts=kernels.splits_prompts,
        )
        self.scheduler = Scheduler(Pages(blocks, block_size), Residency(slots, budget), limits, BASE, [2])
        self.engine = Engine(
            self.runner, self.scheduler, self._load, self.observer, self.events.extend, 0, self._weigh, admission
        )
        self.engine._loading = _AtOnce(self._load, self.engine._cache, self.engine._on_loaded, recipes=self.engine._recipes)

    def submit(
        self,
        id: str,
        prompt: Sequence[int],
        *adapters: Source,
        tenant: str = "t",
        policy: TenantPolicy = OPEN,
        **sampling: object,
    ) -> None:
        params = Sampling(**{"max_new_tokens": 6, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        digests = tuple(map(digest_of, adapters))
        recipes = tuple(adapter for adapter in adapters if not isinstance(adapter, Digest))
        now = time.monotonic()
        self.engine.submit(Request(id, tenant, digests, tuple(prompt), params, now, recipes=recipes, policy=policy))

    def ask(self, task: Task, id: str, prompt: Sequence[int], *adapters: Digest, tenant: str = "t", **more: object) -> None:
        """Submit a task that generates nothing; `more` are fields of `Request`."""
        request = Request(id, tenant, adapters, tuple(prompt), Sampling(0), time.monotonic(), task, **more)  # type: ignore[arg-type]
        self.engine.submit(request)

    def scores(self, id: str) -> Tensor:
        """[rows, k] of a task that generates nothing."""
        return torch.tensor(self.ending(id).scores)

    def turn(self) -> None:
        self.engine.turn()

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            self.engine.turn()
            if self.scheduler.idle and not self.engine._inbox:
                self.scheduler.check_idle()
                return
        raise AssertionError("the engine does not come to an end")

    def tokens(self, id: str) -> list[int]:
        return [token.id for event in self.events if event.request_id == id for token in event.tokens]

    def logits(self, id: str) -> Tensor:
        """[tokens, V]"""
        return torch.stack(self.runner.logits[id])

    def ending(self, id: str) -> Event:
        """The one finishing event of a request."""
        (event,) = [event for event in self.events if event.request_id == id and event.finish is not None]
        return event

    def finished(self, id: str) -> bool:
        return self.ending(id).finish is FinishReason.LENGTH

    def check_bytes(self) -> None:
        """What adapters were weighed as is what they take, but for vectors of which two of one pool bring different ones.

        Native kernels pad what holds whole matrices to full panels, which is much of a tiny matrix.
        """
        weighed, held = self.scheduler.residency.nbytes, self.runner.adapter_bytes
        assert self._native or weighed <= held <= 1.05 * weighed

    def _weigh(self, adapter: Adapter) -> Footprint:
        footprint = footprint_of(adapter.parts, self.runner.base.shape, self.runner.base.dtype)
        check_fits(adapter.parts, footprint, self.scheduler.residency.budget)
        return footprint

    def _load(self, digest: Digest) -> Adapter:
        if digest not in self.adapters:
            raise NotFoundError("the adapter is gone")
        return self.adapters[digest]
