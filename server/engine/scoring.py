"""The event loop's side of tasks that generate nothing: classify, embed and score. A request goes in, its scores come out.

Owns their time limit, cancellation and metrics. Never touches a tensor, the scheduler or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..errors import GenerationError, UnavailableError
from ..requests import Event, FinishReason
from .client import EngineClient, Job

Scores = tuple[tuple[float, ...], ...]  # see requests.Task


class Scoring:
    """One running request. Ends once: by its scores, by an error or by `close`, whichever comes first."""

    def __init__(self, client: EngineClient, job: Job) -> None:
        """Submits at once. Raises: OverloadedError, UnavailableError."""
        self.job = job
        self._client = client
        self._events = client.submit(job)
        self._ended = False

    async def result(self) -> Scores:
        """Raises: AdapterdError when the request fails or takes too long."""
        await self._events.wait()
        event = self._events.take()
        if event is None:
            self._end("timeout", cancel=True)
            raise GenerationError(f"the request took longer than {self._client.timeout:g} seconds")
        return self._take(event)

    def close(self) -> None:
        """Cancel what is still running. Idempotent, and never waits."""
        self._end("cancelled", cancel=True)

    def _take(self, event: Event) -> Scores:
        if event.queue_seconds is not None:
            self._client.metrics.queued(event.queue_seconds)
            self.job.trail.waited(event.queue_seconds)
        if event.finish is not FinishReason.SCORED:
            error = event.error or UnavailableError("the server ended the request before it was complete")
            self._end(error.error_type, cancel=False)
            raise error
        self._end("success", cancel=False)
        return event.scores

    def _end(self, outcome: str, *, cancel: bool) -> None:
        """The one place where it ends; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        request, metrics = self.job.request, self._client.metrics
        self._client.close(request.id, cancel=cancel)
        metrics.finished(outcome)
        if outcome == "success":
            metrics.request_seconds(time.monotonic() - request.arrival)
        prompt = len(request.prompt) if outcome == "success" else 0
        metrics.tokens(request.tenant, self.job.adapters, prompt, 0)
        self.job.trail.ran(outcome, prompt, 0, 0)


async def score_all(client: EngineClient, jobs: Sequence[Job]) -> list[Scores]:
    """Run several requests side by side; when one fails, or the caller stops, none goes on.

    Raises: AdapterdError, the first in the order of `jobs`.
    """
    running: list[Scoring] = []
    try:
        running.extend(Scoring(client, job) for job in jobs)  # those before one that is refused are in the list
        return [await scoring.result() for scoring in running]
    finally:
        for scoring in running:
            scoring.close()
