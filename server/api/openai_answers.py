"""OpenAI's answers: completions and chats, whole or streamed, from the tokens of their generations, and what is refused."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from fastapi import Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..engine.client import Delta, Generation, Job, TokenText, merge
from ..model.text import Text
from ..requests import FinishReason
from .context import Services
from .failures import reported
from .generate import identity_headers
from .schemas import ChatRequest, CompletionRequest, OpenAIErrorResponse, OpenAIRequest
from .sse import DONE, EventStream, event, while_connected

_FINISH = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorResponse, "description": text}
    for status, text in {
        400: "The body is not JSON",
        404: "No such model",
        413: "The body is too large",
        422: "Input validation error",
        424: "The generation failed",
        429: "Too many requests; see Retry-After",
        503: "Starting or shutting down",
    }.items()
}


# -- from deltas to OpenAI's objects ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Choice:
    """One choice as it grows."""

    prefix: str = ""  # the prompt, where it is to be echoed
    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    offset: int = 0  # characters of all tokens but the last
    finish: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.offset += len(self.tokens[-1].text) if self.tokens else 0
        self.tokens.append(delta.token)
        self.finish = None if delta.finish is None else _FINISH[delta.finish]


class Shape(Protocol):
    """How a wire format says things: `kind` names what it answers, `chunk` what it streams."""

    prefix: str
    kind: str
    chunk: str
    choices: list[Choice]
    logprobs: bool

    def whole(self, index: int) -> dict[str, Any]:
        """A finished choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a streamed choice starts with, before its first token."""

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """One token's worth of a streamed choice; the delta has been added to it."""


class Completions:
    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, text: Text, choices: list[Choice]) -> None:
        self.choices = choices
        self.logprobs = body.logprobs is not None
        self._text = text

    def whole(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        logprobs = self._listed(choice.tokens, 0) if self.logprobs else None
        return {
            "index": index,
            "text": choice.prefix + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        prefix = self.choices[index].prefix
        return {"index": index, "text": prefix, "logprobs": None, "finish_reason": None} if prefix else None

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        choice = self.choices[index]
        logprobs = self._listed([delta.token], choice.offset) if self.logprobs else None
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _listed(self, tokens: list[TokenText], offset: int) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "text_offset": offsets,
            "top_logprobs": [self._top(token) for token in tokens],
        }

    def _top(self, token: TokenText) -> dict[str, float]:
        return {self._text.piece(id): logprob for id, logprob in token.alternatives}


class Chat:
    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, text: Text, choices: list[Choice]) -> None:
        self.choices = choices
        self.logprobs = body.logprobs
        self._text = text

    def whole(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": {"content": [self._listed(token) for token in choice.tokens]} if self.logprobs else None,
            "finish_reason": choice.finish,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, "", None)

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = {"content": [self._listed(delta.token)]} if self.logprobs else None
        return self._chunk(index, delta.text, logprobs)

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Role and tool_calls are in every chunk because TGI's own client insists on them."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": text, "tool_calls": None},
            "logprobs": logprobs,
            "finish_reason": self.choices[index].finish,
        }

    def _listed(self, token: TokenText) -> dict[str, Any]:
        top = [_scored(self._text.piece(id), logprob) for id, logprob in token.alternatives]
        return {**_scored(token.text, token.logprob), "top_logprobs": top}


def _scored(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


# -- the two ways to answer ------------------------------------------------------------------------------------------


async def answer(request: Request, body: OpenAIRequest, shape: Shape, jobs: list[Job], services: Services) -> Response:
    batch = _Batch(_submit(jobs, services), per_prompt=body.n or 1)
    headers = identity_headers(services, jobs[0], "")
    envelope = {
        "id": f"{shape.prefix}-{uuid4().hex}",
        "created": int(time.time()),
        "model": body.model or services.model_name,
        "system_fingerprint": f"adapterd-{__version__}",
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await _stream(request, shape, batch, envelope, headers, usage=usage)
    try:
        await while_connected(request.receive, _run(shape, batch))
    finally:
        batch.close()
    choices = [shape.whole(index) for index in range(len(jobs))]
    return JSONResponse({**envelope, "object": shape.kind, "choices": choices, "usage": batch.usage()}, headers=headers)


@dataclass(frozen=True, slots=True)
class _Batch:
    """The generations of one request: `per_prompt` choices for each prompt, side by side."""

    generations: list[Generation]
    per_prompt: int

    def usage(self) -> dict[str, object]:
        """A prompt counts once, however many choices it has."""
        prompts = [generation.summary for generation in self.generations[:: self.per_prompt]]
        prompt = sum(summary.prompt_tokens for summary in prompts)
        completion = sum(generation.summary.generated_tokens for generation in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(summary.cached_tokens for summary in prompts)},
        }

    def close(self) -> None:
        for generation in self.generations:
            generation.close()


def _submit(jobs: list[Job], services: Services) -> list[Generation]:
    """All or none. Raises: OverloadedError, UnavailableError."""
    generations: list[Generation] = []
    try:
        for job in jobs:
            generations.append(services.client.generate(job))  # noqa: PERF401 - those before a refusal must be known
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return generations


async def _run(shape: Shape, batch: _Batch) -> None:
    async with aclosing(merge(batch.generations)) as deltas:
        async for index, delta in deltas:
            shape.choices[index].add(delta)


async def _stream(
    request: Request,
    shape: Shape,
    batch: _Batch,
    envelope: Mapping[str, object],
    headers: Mapping[str, str],
    *,
    usage: bool,
) -> Response:
    """Waits for the first token before the status line, as /generate_stream does."""
    try:
        await while_connected(request.receive, batch.generations[0].begin())
    except BaseException:
        batch.close()
        raise
    events = _events(shape, batch, {**envelope, "object": shape.chunk}, usage=usage)
    return EventStream(reported(events, request), headers=headers, close=batch.close)


async def _events(shape: Shape, batch: _Batch, head: Mapping[str, object], *, usage: bool) -> AsyncGenerator[bytes, None]:
    trailer = {"usage": None} if usage else {}
    for index in range(len(batch.generations)):
        if (opening := shape.opening(index)) is not None:
            yield event({**head, "choices": [opening], **trailer})
    async with aclosing(merge(batch.generations)) as deltas:
        async for index, delta in deltas:
            shape.choices[index].add(delta)
            if delta.text or delta.finish is not None or shape.logprobs:
                yield event({**head, "choices": [shape.piece(index, delta)], **trailer})
    if usage:
        yield event({**head, "choices": [], "usage": batch.usage()})
    yield DONE
