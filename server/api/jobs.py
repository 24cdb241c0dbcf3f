"""From a checked body to a job for the engine: tokens counted, room in the context made sure of. Shared by all formats."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from anyio import to_thread

from ..audit import Trail
from ..engine.client import Job
from ..errors import ValidationError
from ..model.text import Text
from ..requests import Request
from .context import Services
from .keyring import Principal
from .prompts import PLAIN, Frame
from .quotas import check_stops, new_tokens
from .resolve import Resolved
from .rules import Wish, check_max_new_tokens, sampling_of

_INLINE = 4096  # characters that are tokenised faster than a thread is reached


@dataclass(frozen=True, slots=True)
class Order:
    """What a client wants generated, whichever wire format it spoke."""

    prompt: tuple[int, ...]
    resolved: Resolved
    wish: Wish
    max_new_tokens: int | None  # None = as many as fit
    stop: tuple[str, ...] = ()


async def encode(
    text: Text, inputs: str, *, truncate: int | None = None, special: bool = True, frame: Frame = PLAIN
) -> tuple[int, ...]:
    """Token ids of what follows the prefix; a long text is tokenised in a thread, which does not hold the GIL."""
    if len(inputs) <= _INLINE:
        return tuple(frame.ids(text, inputs, truncate, special=special))
    ids = await to_thread.run_sync(lambda: frame.ids(text, inputs, truncate, special=special))
    return tuple(ids)


def job_of(order: Order, services: Services, caller: Principal, trail: Trail) -> Job:
    """Raises: ValidationError for parameters out of range and for a prompt that leaves no room; QuotaError."""
    prompt_tokens = len(order.prompt) + order.resolved.virtual_tokens
    wanted = check_max_new_tokens(order.max_new_tokens)
    room = _room(prompt_tokens, order.resolved.virtual_tokens, wanted, services.limits.max_total_tokens)
    check_stops(len(order.stop), caller.policy)
    room = new_tokens(wanted, room, len(order.prompt), caller.policy)
    trail.about(adapters=order.resolved.names, digests=order.resolved.digests)
    return Job(
        request=Request(
            id=trail.new_run(),
            tenant=caller.tenant,
            adapters=order.resolved.digests,
            prompt=order.prompt,
            sampling=sampling_of(order.wish, room),
            arrival=time.monotonic(),
            recipes=order.resolved.recipes,
            policy=caller.policy,
        ),
        stop=order.stop,
        adapters=order.resolved.names,
        started=trail.started,
        trail=trail,
    )


def copies(job: Job, count: int) -> list[Job]:
    """`count` jobs that differ in id and seed alone."""
    seed = job.request.sampling.seed
    return [
        replace(
            job,
            request=replace(
                job.request,
                id=job.trail.new_run(),
                sampling=replace(job.request.sampling, seed=(seed + index) % (1 << 64)),
            ),
        )
        for index in range(count)
    ]


def check_ids(prompt: Sequence[int], text: Text) -> tuple[int, ...]:
    """Raises: ValidationError for a prompt of token ids that the tokenizer does not have."""
    for id in prompt:
        if not 0 <= id < text.vocab_size:
            raise ValidationError(f"`prompt` token ids must be >= 0 and < {text.vocab_size}. Given: {str(id)[:20]}")
    return tuple(prompt)


def _room(prompt_tokens: int, virtual_tokens: int, wanted: int | None, limit: int) -> int:
    """New tokens the request may have. Raises: ValidationError with the numbers when they do not fit."""
    if prompt_tokens == 0:
        raise ValidationError("`inputs` cannot be empty")
    virtual = f" ({virtual_tokens} of them are its adapter's)" if virtual_tokens else ""
    if wanted is not None and prompt_tokens + wanted > limit:
        raise ValidationError(
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. "
            f"Given: {prompt_tokens} `inputs` tokens{virtual} and {str(wanted)[:20]} `max_new_tokens`"
        )
    if prompt_tokens >= limit:
        raise ValidationError(f"`inputs` must have less than {limit} tokens. Given: {prompt_tokens}{virtual}")
    return limit - prompt_tokens if wanted is None else wanted
