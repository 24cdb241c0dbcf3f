"""Engine: the one thread that joins the scheduler to the runner, and what any thread may ask of it.

    submit, cancel, loaded adapters --inbox--> [ take -> plan -> place -> passes -> book ] --publish(events)-->

Everything that crosses its border is plain data, so it can move to another process without a rewrite. State is touched by
the engine's own thread alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

import structlog

from adapters_store.digest import Digest

from ..errors import AdapterdError, OverloadedError, QuotaError, UnavailableError, failure
from ..methods.base import Adapter
from ..metrics import EngineStats
from ..model.runner import Runner
from ..requests import Event, FinishReason, Request
from ..step_times import StepTimes
from ..tenancy.quotas import Admission, AdmissionLimits
from .derived import Recipes
from .footprint import Footprint
from .inbox import Inbox
from .leaving import GRACE
from .loading import HostCache, Load, Loading
from .passes import Kind, Passes
from .placing import Placing
from .plan import Plan
from .residency import AdapterFacts
from .scheduler import Scheduler
from .warming import Warming
from .watchdog import Pulse

log = structlog.get_logger(__name__)


class StepObserver(Protocol):
    """What the engine reports as it goes; called on its thread and its loaders', so it must be cheap."""

    def observe_step(self, rows: int, tokens: int, adapters: int, families: int, seconds: float) -> None: ...
    def pass_failed(self, kind: Kind) -> None: ...
    def adapter_loaded(self, seconds: float, outcome: str) -> None: ...
    def evicted(self) -> None: ...
    def preempted(self) -> None: ...
    def prefix_cache(self, queried: int, hit: int) -> None: ...
    def speculated(self, guessed: int, right: int) -> None: ...
    def refused(self, limit: str) -> None: ...


class Engine:
    """Requests in, events out. Invariant: a request that `submit` accepted ends in exactly one finishing event."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        load: Load,
        observer: StepObserver,
        publish: Callable[[list[Event]], None],
        host_cache_bytes: int = 512 << 20,
        weigh: Callable[[Adapter], Footprint] = lambda adapter: Footprint(),
        admission: Admission | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        """`weigh` says what an adapter takes of the device, and raises AdapterError for one that can never fit.

        `admission` is by default that of the scheduler's limits, the same for all tenants.
        """
        limits = scheduler.limits
        self._runner = runner
        self._scheduler = scheduler
        self._observer = observer
        self._publish = publish
        self._weigh = weigh
        self._admission = admission or Admission(AdmissionLimits(limits.max_running, limits.max_waiting))
        self._cache = HostCache(host_cache_bytes)
        self._recipes = Recipes()
        self._loading = Loading(load, self._cache, self._on_loaded, recipes=self._recipes)
        self._warming = Warming()
        self._placing = Placing(runner, scheduler, observer, self._warming, self._cache)
        self._passes = Passes(lambda rows: self._runner.run(rows), scheduler, observer, self._placing.relieve)
        self._inbox = Inbox()
        self._progress = False  # the last step did something, or prepared for others, so the next may too
        self._broken = False  # the last step failed, and so did the recovery from it
        self._times = runner.times
        self._snapshot()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._pulse = Pulse() if pulse is None else pulse

    # -- any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request with an error event, then the thread. Idempotent."""
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self.turn()  # never started: whoever was accepted is told here
        self._loading.stop()

    def submit(self, request: Request) -> None:
        """Take a request. Raises: OverloadedError, QuotaError (see `Admission.admit`), UnavailableError when stopping."""
        with self._inbox.lock:
            self._inbox.check_open()
            try:
                self._admission.admit(request)
            except (OverloadedError, QuotaError) as error:
                self._observer.refused(error.limit)
                raise
            self._recipes.hold(request)
            self._inbox.put(lambda: self._submit(request))

    def cancel(self, request_id: str) -> None:
        """The request ends with a CANCELLED event within one step, unless it has ended already."""
        self._inbox.put(lambda: self._scheduler.cancel(request_id))

    def warm(self, digests: tuple[Digest, ...], tenant: str = "default") -> Future[None]:
        """Make adapters resident, at the expense of `tenant`'s slots. The future raises the first thing that went wrong."""
        future: Future[None] = Future()
        if not self._inbox.put(lambda: self._start_warming(digests, tenant, future)):
            future.set_exception(UnavailableError("the server is shutting down"))
        return future

    def keep(self, adapter: Adapter) -> None:
        """Have an adapter in host memory, so that the first request that names it waits for no disk."""
        self._inbox.put(lambda: self._placing.stay(adapter.digest))
        self._loading.keep(adapter)

    def unload(self, digest: Digest, *, deleted: bool = False) -> bool:
        """Drop an adapter from device and host memory; false when it was not there or requests still use it.

        Those that do go on, and it goes with the last of them. `deleted`: with the last of those, too, that had found it in
        the store and were not submitted yet. Waits for the step that is running now.
        """
        future: Future[bool] = Future()

        def work() -> None:
            try:
                future.set_result(self._unload(digest, GRACE if deleted else 0.0))
            except Exception as error:
                future.set_exception(error)

        return self._inbox.put(work) and future.result()

    def residency(self, digest: Digest) -> tuple[str, str | None]:
        """(stored | loading | resident | failed, reason)."""
        return self._scheduler.residency.state(digest)

    def stats(self) -> EngineStats:
        return replace(self._stats, last_step_age=self._pulse.age, waiting_of=self._admission.waiting())

    def stalled(self, seconds: float) -> bool:
        """Whether there is work, and the loop has not come round for so long. A load is no stall: it is not the loop's work."""
        return self._pulse.late(seconds) and (self.pending > 0 or len(self._inbox) > 0)

    def step_times(self) -> StepTimes:
        """Where the last steps' time went."""
        return self._times

    @property
    def pending(self) -> int:
        """Accepted requests that have not ended yet."""
        return self._admission.pending

    def _on_loaded(self, digest: Digest, result: Adapter | AdapterdError, seconds: float) -> None:
        """On a loader's thread."""
        loaded = result if isinstance(result, AdapterdError) else self._weighed(result)
        outcome = "failed" if isinstance(loaded, AdapterdError) else "loaded"
        self._observer.adapter_loaded(seconds, outcome)
        self._inbox.put(lambda: self._take_loaded(digest, loaded))

    def _weighed(self, adapter: Adapter) -> tuple[Adapter, AdapterFacts] | AdapterdError:
        try:
            return adapter, replace(_facts(adapter), footprint=self._weigh(adapter))
        except Exception as error:  # as any adapter that cannot be loaded
            log.warning("adapter could not be weighed", digest=adapter.digest.short, exc_info=error)
            return failure("the adapter's load", error)

    # -- the engine's thread: inbox ------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        try:
            self._scheduler.submit(request)
        except Exception as error:
            self._tell([Event(request.id, finish=FinishReason.ERROR, error=failure("the request", error))])

    def _take_loaded(self, digest: Digest, result: tuple[Adapter, AdapterFacts] | AdapterdError) -> None:
        if isinstance(result, AdapterdError):
            self._scheduler.residency.failed(digest, str(result))
            self._scheduler.fail_adapter(digest, result)
            self._warming.told(digest, result)
            return
        adapter, facts = result
        self._placing.loaded(digest, adapter)
        self._scheduler.residency.loaded(digest, facts)

    def _start_warming(self, digests: tuple[Digest, ...], tenant: str, future: Future[None]) -> None:
        for digest in digests:
            self._placing.stay(digest)
        missing = [digest for digest in digests if not self._scheduler.residency.is_resident(digest)]
        if self._warming.add(missing, future):
            for digest in missing:
                self._scheduler.warm(digest, tenant)

    def _unload(self, digest: Digest, grace: float = 0.0) -> bool:
        return self._placing.unload(digest, self._recipes.made_from(digest), grace=grace)

    # -- the engine's thread: steps ------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self.turn(wait=1.0):
            pass

    def turn(self, wait: float = 0.0) -> bool:
        """Take in what has arrived and run one step; false once the engine has stopped.

        `wait` is how many seconds to wait for work when there is none. Called by the engine's own thread, or by an
        embedder that has not called `start`.
        """
        jobs, closed = self._inbox.take(wait, self._has_work)
        for job in jobs:
            try:
                job()
            except Exception:
                log.exception("a message to the engine could not be handled")
        if closed:
            self._end_all()
            return False
        try:
            self._step()
        except Exception as error:  # a defect here must cost the requests it met, never the engine
            log.exception("the engine's step failed")
            self._broken = not self._recovered(failure("the step", error))
        else:
            self._broken = False
        if not self._broken:  # otherwise the watchdog is to notice
            self._pulse.beat()
        return True

    def _has_work(self) -> bool:
        return not self._broken and (self._progress or bool(self._scheduler.running))

    def _step(self) -> None:
        self._times.begin()
        self._placing.clear_slots()
        self._end_overdue()
        plan = self._scheduler.plan()
        self._times.mark("plan")
        for digest in plan.loads:
            self._loading.start(digest)
        self._placing.apply(plan.changes)
        rows = [row for row in plan.rows if row.sequence in self._scheduler.running]
        self._times.mark("apply")
        if rows:
            begun = time.monotonic()
            self._passes.run(rows)
            self._observe(plan, time.monotonic() - begun)
            self._pulse.stepped()
            self._admission.begun([row.sequence.request.id for row in rows if row.sequence.request is not None])
        self._progress = bool(rows or plan.changes)
        self._snapshot()
        self._tell(self._scheduler.take_events())
        if rows:
            self._times.mark("publish")
            self._times.end(len(rows), plan.tokens)
        if self._scheduler.idle:
            self._check_leaks()
            self._progress = self._progress or (not self._inbox and self._runner.prepare())

    def _end_overdue(self) -> None:
        for request_id, error in self._admission.overdue():
            self._observer.refused(error.limit)
            self._scheduler.fail(request_id, error)

    def _recovered(self, error: AdapterdError) -> bool:
        try:
            self._recover(error)
        except Exception:
            log.exception("the engine could not recover from a failed step")
            return False
        return True

    def _recover(self, error: AdapterdError) -> None:
        """After a step that broke half way: who ran fails, and what was planned but never reached the device is undone."""
        self._progress = False  # what keeps breaking is tried once per wait, not in a loop
        for sequence in list(self._scheduler.running):
            self._scheduler.fail_sequence(sequence, error)
        self._placing.undo(error)
        self._snapshot()
        self._tell(self._scheduler.take_events())

    def _observe(self, plan: Plan, seconds: float) -> None:
        adapters = {digest for row in plan.rows for digest in row.sequence.adapters}
        families = len(self._placing.families(adapters))
        self._observer.observe_step(
            rows=len(plan.rows), tokens=plan.tokens, adapters=len(adapters), families=families, seconds=seconds
        )
        for _ in range(plan.preempted):
            self._observer.preempted()
        for row in plan.rows:
            sequence = row.sequence
            prefilled = sequence.generated <= 1 and row.start + row.count == sequence.prompt_end
            if sequence.request is not None and prefilled:
                self._observer.prefix_cache(sequence.prompt_end - sequence.virtual, sequence.cached)

    def _snapshot(self) -> None:
        scheduler, residency = self._scheduler, self._scheduler.residency
        self._stats = EngineStats(
            running=sum(1 for s in scheduler.running if s.request is not None),
            waiting=len(scheduler.waiting),
            kv_blocks_used=scheduler.pages.used,
            kv_blocks_total=scheduler.pages.total,
            slots_used=residency.used,
            slots_total=residency.capacity,
            resident=residency.resident,
            waiting_for=tuple(dict.fromkeys(d for s in scheduler.waiting for d in s.adapters)),
            device_bytes=self._runner.adapter_bytes,
            device_budget=residency.budget or 0,
            host_cache_bytes=self._cache.nbytes,
        )

    def _tell(self, events: list[Event]) -> None:
        if not events:
            return
        for event in events:
            if event.finish is not None:
                self._recipes.release(event.request_id)
                self._admission.ended(event.request_id, event.computed_tokens)
        try:
            self._publish(events)
        except Exception:
            log.exception("events could not be published")

    def _check_leaks(self) -> None:
        try:
            self._scheduler.check_idle()
        except RuntimeError:
            log.exception("the engine is idle and something is still held")

    def _end_all(self) -> None:
        """The last act: nobody who was accepted is left without an answer."""
        gone = UnavailableError("the server is shutting down")
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self._scheduler.fail_sequence(sequence, gone)
        self._warming.end(gone)
        self._tell(self._scheduler.take_events())
        self._snapshot()


def _facts(adapter: Adapter) -> AdapterFacts:
    prefix, head = adapter.prefix, adapter.head
    facts = AdapterFacts(adapter.pools, head=None if head is None else "every" if head.every_position else "last")
    if prefix is None:
        return facts
    ids = () if prefix.ids is None else tuple(prefix.ids.tolist())
    embedded = prefix.keys is None
    return replace(facts, virtual=prefix.length, embedded=embedded, shift=prefix.shift, ids=ids, tasks=prefix.tasks)
