"""The event loop's side of the engine: requests go in, each one's deltas come out, and nothing waits on a thread.

Owns whose events are whose, stop sequences, time limits, cancellation and the metrics of a request. Never
touches a tensor, the scheduler or HTTP.

    engine thread                      event loop
    step -> publish([event, ...]) ---> one call_soon_threadsafe -> request's Events -> Generation -> Delta, Delta, ...
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self

from adapters_store.digest import Digest

from ..audit import Trail
from ..errors import AdapterdError, GenerationError, UnavailableError
from ..metrics import EngineStats, Metrics
from ..model.text import Text, Transcript
from ..requests import Event, FinishReason, Request, Token
from ..step_times import StepTimes
from .mailbox import Events, Mailbox


class EngineLike(Protocol):
    """What the API needs of an engine. Every method may be called from any thread.

    The event that ends a request by length or EOS carries its last token, the EOS included.
    """

    def submit(self, request: Request) -> None:
        """Accept at once. Raises: OverloadedError, QuotaError for what is over a limit, UnavailableError when stopping."""

    def cancel(self, request_id: str) -> None:
        """End a request with one `Event(finish=CANCELLED)`. Unknown and finished ids are ignored."""

    def warm(self, digests: tuple[Digest, ...], tenant: str = "default") -> Future[None]:
        """Load adapters onto the device, at the expense of `tenant`'s slots; the future fails with an AdapterdError."""

    def unload(self, digest: Digest, *, deleted: bool = False) -> bool:
        """Drop an adapter from the device once nothing needs it; false when it was not there, or is to go later.

        `deleted`: nobody can find it by name any more, so it is not to come back either.
        """

    def residency(self, digest: Digest) -> tuple[str, str | None]:
        """stored, loading, resident or failed, and why."""

    def stats(self) -> EngineStats: ...

    def step_times(self) -> StepTimes: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request, and what the API knows about it that the engine does not need."""

    request: Request
    stop: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()  # the names behind request.adapters, for metrics
    started: float = 0.0  # time.monotonic() when the HTTP request came in
    trail: Trail = field(default_factory=lambda: Trail("-"))  # of the HTTP request, told how this ends


class TokenText(NamedTuple):
    """One generated token as clients see it. `text` is what it made final: empty in the middle of a character."""

    id: int
    text: str
    logprob: float
    special: bool
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Summary:
    """What is known of a generation; complete with the last delta. Times are seconds."""

    prompt_tokens: int
    seed: int | None
    generated_tokens: int = 0
    cached_tokens: int = 0
    answer: str = ""  # with the stop sequence, without special tokens
    prefill: tuple[Token, ...] = ()
    validation: float = 0.0  # HTTP request in -> submitted
    queue: float = 0.0  # submitted -> first step
    first_token: float = 0.0  # submitted -> first token
    total: float = 0.0  # HTTP request in -> last token

    @property
    def inference(self) -> float:
        return max(0.0, self.total - self.validation - self.queue)

    @property
    def per_token(self) -> float:
        return self.inference / max(1, self.generated_tokens)

    @property
    def per_output_token(self) -> float:
        """Mean time between tokens after the first."""
        decode = self.total - self.validation - self.first_token
        return max(0.0, decode) / max(1, self.generated_tokens - 1)


class Delta(NamedTuple):
    """One token's worth of progress. The last delta of a generation, and only it, has `finish`.

    `text` is the answer's gain without special tokens and stop sequences; it lags behind `token.text` while a stop
    sequence may be beginning.
    """

    token: TokenText
    text: str
    finish: FinishReason | None = None


@dataclass(slots=True)
class _Listener:
    job: Job
    alarm: asyncio.TimerHandle  # one for a request, not one for each event
    events: Events
    scheduled: bool = False  # whether the engine has begun it


class EngineClient:
    """The API's engine. Invariant: every generation ends once, in metrics and in the engine.

    Usage:
        async with client.generate(job) as generation:
            async for delta in generation:
                ...
        generation.summary.answer
    """

    def __init__(self, engine: EngineLike, mailbox: Mailbox, text: Text, metrics: Metrics, *, request_timeout: float) -> None:
        """`request_timeout` is in seconds, from the request's arrival to its last token."""
        self.engine = engine
        self.text = text
        self.metrics = metrics
        self._mailbox = mailbox
        self.timeout = request_timeout
        self._listeners: dict[str, _Listener] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def generate(self, job: Job) -> Generation:
        """Submit at once. Raises: OverloadedError, UnavailableError."""
        return Generation(self, job, self.submit(job))

    def submit(self, job: Job) -> Events:
        """Hand a request to the engine, and have its events put where they are returned until `close`.

        Raises: OverloadedError, UnavailableError.
        """
        loop, events = self._attach(), Events()
        alarm = loop.call_later(job.request.arrival + self.timeout - time.monotonic(), events.put, None)
        self._listeners[job.request.id] = _Listener(job, alarm, events)
        try:
            self.engine.submit(job.request)
        except AdapterdError as error:
            self.close(job.request.id, cancel=False)
            self.metrics.finished(error.error_type)
            raise
        return events

    async def warm(self, digests: Sequence[Digest], tenant: str = "default") -> None:
        """Wait until the adapters are on the device. Raises: AdapterdError when one cannot be loaded."""
        await asyncio.wrap_future(self.engine.warm(tuple(digests), tenant))

    def waiting_adapters(self) -> list[str]:
        """Names of adapters that some request wants and that no step has used for it yet."""
        names = (name for item in list(self._listeners.values()) if not item.scheduled for name in item.job.adapters)
        return sorted(set(names))

    def close(self, request_id: str, *, cancel: bool) -> None:
        """Stop listening to a request; events that still come for it are dropped."""
        known = self._listeners.pop(request_id, None)
        if known is None:
            return
        known.alarm.cancel()
        if cancel:
            self.engine.cancel(request_id)

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Have events delivered to the running loop. The loop is known only once a request is served on it."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._mailbox.attach(loop, self._deliver)
        return loop

    def _deliver(self, event: Event) -> None:
        listener = self._listeners.get(event.request_id)
        if listener is not None:
            listener.scheduled = True
            listener.events.put(event)


class Generation(AsyncIterator[Delta]):
    """One running request. Ends once: by its last delta, by an error or by `aclose`, whichever comes first."""

    def __init__(self, client: EngineClient, job: Job, events: Events) -> None:
        sampling = job.request.sampling
        self.job = job
        self.summary = Summary(len(job.request.prompt), sampling.seed if sampling.do_sample else None)
        self.summary.validation = max(0.0, job.request.arrival - job.started)
        self._client = client
        self._events = events
        self._transcript = Transcript(client.text, job.request.prompt, job.stop)
        self._ready: deque[Delta] = deque()
        self._last_token: float | None = None  # time.monotonic()
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is still running. Idempotent, and never waits."""
        self._end("cancelled", cancel=True)

    async def begin(self) -> None:
        """Wait until there is something to report. Raises: AdapterdError when the request fails first."""
        while not self._ready and not self._ended:
            await self._wait()
            self._take()

    async def __anext__(self) -> Delta:
        """Raises: AdapterdError when the request fails; it is over then."""
        while (delta := self.poll()) is None:
            if self._ended:
                raise StopAsyncIteration
            await self._wait()
        return delta

    def poll(self) -> Delta | None:
        """The next delta if it has come. Raises: AdapterdError when the request fails; it is over then."""
        while not self._ready and not self._ended and self._events:
            self._take()
        return self._ready.popleft() if self._ready else None

    @property
    def over(self) -> bool:
        """Whether no delta comes any more."""
        return self._ended and not self._ready

    def share(self, arrived: asyncio.Event) -> None:
        """Have `arrived` set from now on when something comes, for a task that waits for several generations."""
        self._events.arrived = arrived

    async def _wait(self) -> None:
        try:
            await self._events.wait()
        except BaseException:
            self._end("cancelled", cancel=True)
            raise

    def _take(self) -> None:
        """Take in one event of the engine, or the alarm."""
        event = self._events.take()
        if event is None:
            self._end("timeout", cancel=True)
            raise GenerationError(f"the request took longer than {self._client.timeout:g} seconds")
        self._note(event)
        self._translate(event)

    def _note(self, event: Event) -> None:
        if event.queue_seconds is not None:
            self.summary.queue = event.queue_seconds
            self._client.metrics.queued(event.queue_seconds)
            self.job.trail.waited(event.queue_seconds)
        if event.prompt:
            self.summary.prefill += event.prompt  # one event per chunk of the prompt
        self.summary.cached_tokens = max(self.summary.cached_tokens, event.cached_tokens)

    def _translate(self, event: Event) -> None:
        """Queue the deltas of one event and end the generation where it ends."""
        if event.finish in (FinishReason.ERROR, FinishReason.CANCELLED):
            error = event.error or UnavailableError("the server ended the request before it was complete")
            self._end(error.error_type, cancel=False)
            raise error
        for index, token in enumerate(event.tokens):
            last = event.finish is not None and index == len(event.tokens) - 1
            finish = self._delta(token, event.finish if last else None)
            if finish is not None:
                self._end("success", cancel=event.finish is None)
                return
        if event.finish is not None:
            self._end("error", cancel=False)
            raise GenerationError("the generation ended without a last token")

    def _delta(self, token: Token, finish: FinishReason | None) -> FinishReason | None:
        """Queue one token; returns why the generation is over with it, if it is. A stop sequence beats the length."""
        self._clock()
        text = self._transcript.push(token.id, last=finish is not None)
        finish = FinishReason.STOP if self._transcript.stopped else finish
        shown = TokenText(
            id=token.id,
            text=text,
            logprob=0.0 if token.logprob is None else token.logprob,
            special=token.id in self._client.text.special_ids,
            alternatives=token.alternatives,
        )
        self._ready.append(Delta(shown, self._transcript.take(last=finish is not None), finish))
        return finish

    def _clock(self) -> None:
        now = time.monotonic()
        if self._last_token is None:
            self.summary.first_token = now - self.job.request.arrival
            self._client.metrics.first_token(self.summary.first_token)
            self.job.trail.began(self.summary.first_token)
        else:
            self._client.metrics.next_token(now - self._last_token)
        self._last_token = now
        self.summary.generated_tokens += 1

    def _end(self, outcome: str, *, cancel: bool) -> None:
        """The one place where a generation ends; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._client.close(self.job.request.id, cancel=cancel)
        now, summary, metrics = time.monotonic(), self.summary, self._client.metrics
        summary.answer = self._transcript.answer
        summary.total = now - self.job.started
        metrics.finished(outcome)
        if outcome == "success":
            metrics.request_seconds(now - self.job.request.arrival)
        prompt = summary.prompt_tokens if summary.generated_tokens else 0
        metrics.tokens(self.job.request.tenant, self.job.adapters, prompt, summary.generated_tokens, summary.cached_tokens)
        self.job.trail.ran(outcome, prompt, summary.cached_tokens, summary.generated_tokens)


async def collect(generation: Generation) -> list[Delta]:
    """Run a generation to its end; closes it, whatever happens."""
    async with generation:
        return [delta async for delta in generation]


async def merge(generations: Iterable[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index, delta) of several generations as they come. All are closed when one fails or the caller stops."""
    running, arrived = dict(enumerate(generations)), asyncio.Event()
    try:
        for generation in running.values():
            generation.share(arrived)
        while running:
            arrived.clear()
            for index, generation in list(running.items()):
                while (delta := generation.poll()) is not None:
                    yield index, delta
                if generation.over:
                    del running[index]
            if running:
                await arrived.wait()
    finally:
        for generation in running.values():
            generation.close()
