"""Engine: the one thread that joins the scheduler to the runner. The only code that touches both halves.

    submit, cancel, loaded adapters --inbox--> [ drain -> plan -> apply -> run -> advance ] --publish(events)-->

Everything that crosses its border is plain data, so it can move to another process without a rewrite. Any number of
threads may call the public methods; state is touched by the engine's own thread alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

import structlog

from adapters_store.digest import Digest

from ..errors import AdapterdError, GenerationError, OverloadedError, UnavailableError
from ..methods.base import Adapter
from ..metrics import EngineStats
from ..model.runner import Runner
from ..requests import Event, FinishReason, Request
from ..step_times import StepTimes
from .derived import Recipes
from .footprint import Footprint
from .loading import HostCache, Load, Loading
from .plan import Change, Copy, Evict, Fill, Plan, Put, Row, Sample, Sequence
from .residency import AdapterFacts
from .scheduler import Scheduler

log = structlog.get_logger(__name__)


class StepObserver(Protocol):
    """What the engine reports as it goes; called on its thread, so it must be cheap."""

    def observe_step(self, rows: int, tokens: int, adapters: int, families: int, seconds: float) -> None: ...
    def adapter_loaded(self, seconds: float, outcome: str) -> None: ...
    def evicted(self) -> None: ...
    def preempted(self) -> None: ...
    def prefix_cache(self, queried: int, hit: int) -> None: ...
    def speculated(self, guessed: int, right: int) -> None: ...


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
    ) -> None:
        """`weigh` says what an adapter takes of the device, and raises AdapterError for one that can never fit."""
        self._runner = runner
        self._scheduler = scheduler
        self._observer = observer
        self._publish = publish
        self._cache = HostCache(host_cache_bytes)
        self._recipes = Recipes()
        self._weigh = weigh
        self._loading = Loading(load, self._cache, self._on_loaded, recipes=self._recipes)
        self._ready: dict[Digest, Adapter] = {}  # loaded, on their way to a slot
        self._families: dict[Digest, frozenset[str]] = {}  # of adapters that are on the device
        self._sources: dict[Digest, frozenset[Digest]] = {}  # of those of them that were computed from stored ones
        self._evictions: deque[Evict] = deque()  # to be done before anything else: their slots may be given out again
        self._warm: list[tuple[set[Digest], Future[None]]] = []  # (still missing, whom to tell)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._progress = False  # the last step did something, so the next may too
        self._times = runner.times
        self._pending = 0  # accepted requests that have not ended yet
        self._snapshot()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.beat = time.monotonic()  # when the loop last came round, for a watchdog

    # -- any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every request with an error event, then the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self.turn()  # never started: whoever was accepted is told here
        self._loading.stop()

    def submit(self, request: Request) -> None:
        """Take a request. Raises: OverloadedError when the queue is full, UnavailableError when stopping."""
        limits = self._scheduler.limits
        with self._wake:
            if self._closing:
                raise UnavailableError("the server is shutting down")
            if self._pending >= limits.max_running + limits.max_waiting:
                raise OverloadedError
            self._pending += 1
            self._recipes.hold(request)
            self._inbox.append(lambda: self._submit(request))
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """The request ends with a CANCELLED event within one step, unless it has ended already."""
        self._post(lambda: self._scheduler.cancel(request_id))

    def warm(self, digests: tuple[Digest, ...]) -> Future[None]:
        """Make adapters resident. The future raises the first thing that went wrong."""
        future: Future[None] = Future()
        if not self._post(lambda: self._start_warming(digests, future)):
            future.set_exception(UnavailableError("the server is shutting down"))
        return future

    def unload(self, digest: Digest) -> bool:
        """Drop an adapter from device and host memory; false when it was not there or running requests still use it.

        Waits for the step that is running now.
        """
        future: Future[bool] = Future()

        def work() -> None:
            try:
                future.set_result(self._unload(digest))
            except Exception as error:
                future.set_exception(error)

        return self._post(work) and future.result()

    def residency(self, digest: Digest) -> tuple[str, str | None]:
        """(stored | loading | resident | failed, reason)."""
        return self._scheduler.residency.state(digest)

    def stats(self) -> EngineStats:
        return self._stats

    def step_times(self) -> StepTimes:
        """Where the last steps' time went."""
        return self._times

    @property
    def pending(self) -> int:
        """Accepted requests that have not ended yet."""
        with self._wake:
            return self._pending

    def _post(self, work: Callable[[], None]) -> bool:
        """Have the engine's thread do something between steps; false when it is stopping and will not."""
        with self._wake:
            if self._closing:
                return False
            self._inbox.append(work)
            self._wake.notify()
            return True

    def _on_loaded(self, digest: Digest, result: Adapter | AdapterdError, seconds: float) -> None:
        """On a loader's thread."""
        loaded = result if isinstance(result, AdapterdError) else self._weighed(result)
        outcome = "failed" if isinstance(loaded, AdapterdError) else "loaded"
        self._observer.adapter_loaded(seconds, outcome)
        self._post(lambda: self._take_loaded(digest, loaded))

    def _weighed(self, adapter: Adapter) -> tuple[Adapter, AdapterFacts] | AdapterdError:
        try:
            return adapter, replace(_facts(adapter), footprint=self._weigh(adapter))
        except Exception as error:  # as any adapter that cannot be loaded
            failure = _failure("the adapter's load", error)
            failure.__cause__ = None if failure is error else error
            return failure

    # -- the engine's thread: inbox ------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        try:
            self._scheduler.submit(request)
        except Exception as error:
            self._tell([Event(request.id, finish=FinishReason.ERROR, error=_failure("the request", error))])

    def _take_loaded(self, digest: Digest, result: tuple[Adapter, AdapterFacts] | AdapterdError) -> None:
        if isinstance(result, AdapterdError):
            log.warning("adapter could not be loaded", digest=digest.short, error=str(result), exc_info=result.__cause__)
            self._scheduler.residency.failed(digest, str(result))
            self._scheduler.fail_adapter(digest, result)
            self._warmed(digest, result)
            return
        self._ready[digest], facts = result
        self._scheduler.residency.loaded(digest, facts)

    def _start_warming(self, digests: tuple[Digest, ...], future: Future[None]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # from here on it cannot be cancelled, so telling it cannot fail
        missing = {d for d in digests if not self._scheduler.residency.is_resident(d)}
        if not missing:
            future.set_result(None)
            return
        self._warm.append((missing, future))
        for digest in missing:
            self._scheduler.warm(digest)

    def _warmed(self, digest: Digest, error: AdapterdError | None = None) -> None:
        """Tell those who wait for this adapter to become resident."""
        for missing, future in [entry for entry in self._warm if digest in entry[0]]:
            missing.discard(digest)
            if error is not None:
                future.set_exception(error)
            elif not missing:
                future.set_result(None)
        self._warm = [(missing, future) for missing, future in self._warm if not future.done()]

    def _unload(self, digest: Digest) -> bool:
        """What was computed from the adapter goes with it."""
        self._cache.discard(digest)
        for derived in [each for each, sources in self._sources.items() if digest in sources]:
            self._withdraw(derived)
        return self._withdraw(digest)

    # -- the engine's thread: steps ------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self.turn(wait=1.0):
            pass

    def turn(self, wait: float = 0.0) -> bool:
        """Take in what has arrived and run one step; false once the engine has stopped.

        `wait` is how many seconds to wait for work when there is none. Called by the engine's own thread, or by an
        embedder that has not called `start`.
        """
        self.beat = time.monotonic()
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._closing or self._has_work(), timeout=wait)
            work, self._inbox = self._inbox, deque()
            closing = self._closing
        for job in work:
            try:
                job()
            except Exception:
                log.exception("a message to the engine could not be handled")
        if closing:
            self._end_all()
            return False
        try:
            self._step()
        except Exception as error:  # a defect here must cost the requests it met, never the engine
            log.exception("the engine's step failed")
            self._recover(_failure("the step", error))
        return True

    def _has_work(self) -> bool:
        return self._progress or bool(self._scheduler.running)

    def _step(self) -> None:
        self._times.begin()
        self._evict()
        plan = self._scheduler.plan()
        self._times.mark("plan")
        for digest in plan.loads:
            self._loading.start(digest)
        for change in plan.changes:
            if isinstance(change, Fill) and not self._scheduler.residency.is_resident(change.digest):
                continue  # its adapter could not be put
            self._apply(change)
        if len(self._ready) > len(self._scheduler.residency.loaded_only):
            self._ready = {d: self._ready[d] for d in self._scheduler.residency.loaded_only}
        rows = [row for row in plan.rows if row.sequence in self._scheduler.running]
        self._times.mark("apply")
        if rows:
            begun = time.monotonic()
            self._run(rows)
            self._observe(plan, time.monotonic() - begun)
        self._progress = bool(rows or plan.changes)
        self._snapshot()
        self._tell(self._scheduler.take_events())
        if rows:
            self._times.mark("publish")
            self._times.end(len(rows), plan.tokens)
        if self._scheduler.idle:
            self._check_leaks()

    def _apply(self, change: Change) -> None:
        if isinstance(change, Evict):
            self._evict(change)
            self._observer.evicted()
            return
        try:
            self._runner.apply([change], self._ready)
        except Exception as error:
            if isinstance(change, Copy):
                raise
            self._put_failed(change.digest, error)
            return
        if isinstance(change, Put):
            adapter = self._ready.pop(change.digest)
            self._families[change.digest] = frozenset(part.method for part in adapter.parts)
            if adapter.sources:
                self._sources[change.digest] = adapter.sources
            self._warmed(change.digest)

    def _evict(self, *more: Evict) -> None:
        """Clear slots on the device. One that raises stays in line, and no step runs until it has been cleared."""
        self._evictions.extend(more)
        for change in more:
            self._families.pop(change.digest, None)
            self._sources.pop(change.digest, None)
        while self._evictions:
            self._runner.apply([self._evictions[0]], {})
            self._evictions.popleft()

    def _put_failed(self, digest: Digest, error: Exception) -> None:
        """The device would not take an adapter (out of memory, say): only those who asked for it fail."""
        log.error("adapter could not be put on the device", digest=digest.short, exc_info=error)
        failure = GenerationError(f"the adapter could not be put on the device ({type(error).__name__})")
        self._ready.pop(digest, None)
        for sequence in [s for s in self._scheduler.running if digest in s.adapters]:
            self._scheduler.fail_sequence(sequence, failure)
        self._scheduler.fail_adapter(digest, failure)
        self._withdraw(digest)
        self._warmed(digest, failure)

    def _withdraw(self, digest: Digest) -> bool:
        """Take an adapter that nobody runs with off the device, its shared prefixes included."""
        slots = self._scheduler.residency.unload(digest)
        if slots is None:
            return False
        self._scheduler.forget(digest)
        self._evict(Evict(digest, slots))
        return True

    def _recover(self, error: AdapterdError) -> None:
        """After a step that broke half way: who ran fails, and what was planned but never reached the device is undone."""
        for sequence in list(self._scheduler.running):
            self._scheduler.fail_sequence(sequence, error)
        for digest in self._scheduler.residency.resident:
            self._scheduler.forget(digest)  # the blocks of its prefix may never have been written
            if digest not in self._families:
                self._scheduler.residency.unload(digest)  # there is nothing to clear
                self._warmed(digest, error)
        self._progress = False  # what keeps breaking is tried once per wait, not in a loop
        self._snapshot()
        self._tell(self._scheduler.take_events())

    def _run(self, rows: list[Row]) -> None:
        """One forward pass; if it raises, the batch is halved until the culprit is alone, and only that one fails."""
        try:
            samples: dict[Sequence, Sample] = self._runner.run(rows)
        except Exception as error:
            if len(rows) > 1:
                half = len(rows) // 2
                self._run(rows[:half])
                self._run(rows[half:])
                return
            log.exception("a step failed", adapters=[d.short for d in rows[0].sequence.adapters])
            self._scheduler.fail_sequence(rows[0].sequence, _failure("the step", error))
            return
        guessed = sum(len(row.draft) for row in rows)
        if guessed:
            self._observer.speculated(guessed, sum(len(sample.more) for sample in samples.values()))
        self._scheduler.advance(rows, samples)

    def _observe(self, plan: Plan, seconds: float) -> None:
        adapters = {digest for row in plan.rows for digest in row.sequence.adapters}
        families = {family for digest in adapters for family in self._families.get(digest, ())}
        self._observer.observe_step(
            rows=len(plan.rows), tokens=plan.tokens, adapters=len(adapters), families=len(families), seconds=seconds
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
        ended = [event.request_id for event in events if event.finish is not None]
        for request_id in ended:
            self._recipes.release(request_id)
        with self._wake:
            self._pending -= len(ended)
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
        while self._warm:
            self._warm.pop()[1].set_exception(gone)
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


def _failure(what: str, error: Exception) -> AdapterdError:
    """What a client is told: its own error as it is, a defect by its type alone."""
    return error if isinstance(error, AdapterdError) else GenerationError(f"{what} failed ({type(error).__name__})")
