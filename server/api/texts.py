"""Requests with one text or several that are read and not continued: from the body to jobs. Shared by /classify and /embed.

Words no answer and runs nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from anyio import to_thread
from fastapi import Request

from ..engine.client import Job
from ..errors import ValidationError
from ..model.text import Offset
from ..requests import Request as Work
from ..requests import Sampling, Task
from .body import shown
from .context import Services
from .failures import trail_of
from .generate import identity_headers, user_of
from .keyring import Principal
from .quotas import check_answers, check_tokens
from .resolve import Resolved, resolve
from .schemas import TextsRequest

MAX_INPUTS = 32  # texts of one request; text-embeddings-inference's default


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one request, tokenised, and the adapters they go through."""

    tokens: tuple[tuple[Offset, ...], ...]
    tail: tuple[int, ...]  # what an adapter's template puts behind each text
    resolved: Resolved
    several: bool  # whether a list was sent, and is to be sent back

    @property
    def named(self) -> str:
        """The adapters in an error message."""
        return " and ".join(f"adapter {name!r}" for name in self.resolved.names) or "the base model"


async def texts_of(request: Request, body: TextsRequest, services: Services, caller: Principal) -> Texts:
    """Raises: ValidationError, QuotaError, NotFound."""
    inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    _check_inputs(inputs)
    check_answers("inputs", len(inputs), caller.policy)
    _check_truncate(body.parameters.truncate, services.limits.max_total_tokens)
    resolved = await resolve(
        services.store,
        services.names,
        caller.tenant,
        adapter_id=_adapter_id(body),
        user_id=user_of(request, body.user_id),
        compose=body.parameters.compose,
        task_id=_task_id(body),
    )
    frame, tail = resolved.frame, tuple(resolved.frame.closed(services.text, ()))
    tokens = await to_thread.run_sync(lambda: [frame.offsets(services.text, text) for text in inputs])
    kept = tuple(tuple(offsets[-body.parameters.truncate :] if body.parameters.truncate else offsets) for offsets in tokens)
    for offsets in kept:
        _check_room(len(offsets), resolved.virtual_tokens + len(tail), services.limits.max_total_tokens)
    check_tokens(sum(len(offsets) + len(tail) for offsets in kept), caller.policy)
    return Texts(kept, tail, resolved, several=not isinstance(body.inputs, str))


def jobs_of(
    texts: Texts,
    task: Task,
    request: Request,
    services: Services,
    caller: Principal,
    *,
    pooling: Literal["last", "mean"] = "mean",
) -> list[Job]:
    """One job per text."""
    trail = trail_of(request)
    trail.about(adapters=texts.resolved.names, digests=texts.resolved.digests)
    return [
        Job(
            request=Work(
                id=trail.new_run(),
                tenant=caller.tenant,
                adapters=texts.resolved.digests,
                prompt=(*(token.id for token in tokens), *texts.tail),
                sampling=Sampling(max_new_tokens=0),
                arrival=time.monotonic(),
                task=task,
                pooling=pooling,
                recipes=texts.resolved.recipes,
                policy=caller.policy,
            ),
            adapters=texts.resolved.names,
            started=trail.started,
            trail=trail,
        )
        for tokens in texts.tokens
    ]


def headers_of(services: Services, jobs: list[Job], body: TextsRequest) -> dict[str, str]:
    """LoRAX's headers, counting all texts together."""
    tokens = sum(len(job.request.prompt) for job in jobs)
    return {**identity_headers(services, jobs[0], "".join(body.inputs)), "x-prompt-tokens": str(tokens)}


def _check_inputs(inputs: list[str]) -> None:
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise ValidationError(f"`inputs` must have >= 1 and <= {MAX_INPUTS} texts. Given: {len(inputs)}")
    if not all(inputs):
        raise ValidationError("`inputs` cannot be empty")


def _check_truncate(truncate: int | None, limit: int) -> None:
    if truncate is not None and not 0 < truncate <= limit:
        raise ValidationError(f"`truncate` must be strictly positive and at most {limit}. Given: {shown(truncate)}")


def _check_room(tokens: int, virtual: int, limit: int) -> None:
    if not tokens:
        raise ValidationError("`inputs` cannot be empty")
    if tokens + virtual > limit:
        adds = f" and {virtual} of its adapter" if virtual else ""
        raise ValidationError(f"`inputs` must have at most {limit} tokens. Given: {tokens}{adds}")


def _task_id(body: TextsRequest) -> int | None:
    inner, outer = body.parameters.task_id, body.task_id
    if inner is not None and outer is not None and inner != outer:
        raise ValidationError("`task_id` is given twice, with different values")
    return outer if inner is None else inner


def _adapter_id(body: TextsRequest) -> str | None:
    inner, outer = body.parameters.adapter_id, body.adapter_id
    if inner is not None and outer is not None and inner != outer:
        raise ValidationError("`adapter_id` is given twice, with different values")
    return outer if inner is None else inner
