"""OpenAI's routes: /v1/completions, /v1/chat/completions, /v1/models. `model` is the base model's name or an adapter's."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol
from uuid import uuid4

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from adapters_store.errors import Invalid, NotFound
from adapters_store.records import AdapterRecord
from adapters_store.store import Store

from .. import __version__
from ..engine.client import Delta, Generation, Job, TokenText, merge
from ..errors import ValidationError
from ..model.text import Text
from ..requests import FinishReason
from .auth import Caller, Tenant, requires
from .body import documented, json_body
from .context import Context, Services, require_ready
from .failures import UnknownModelError, counting_refusals, reported, trail_of
from .generate import identity_headers, user_of
from .jobs import Order, check_ids, copies, encode, job_of
from .keyring import Principal
from .prompts import Frame
from .quotas import check_answers, check_tokens, default_new_tokens
from .resolve import Resolved, resolve
from .rules import check_choices, check_stop, check_top_n, openai_wish
from .schemas import ChatMessage, ChatRequest, CompletionRequest, OpenAIErrorResponse, OpenAIRequest
from .sse import DONE, EventStream, event, while_connected

MAX_CHOICES = 16  # of one request, all its prompts together
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_PAGE = 1000

_BASE_ALIASES = ("", "tgi", "dummy")  # what TGI's documentation and Hugging Face's client call a server's only model

_FINISH = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}

_REFUSALS: dict[int | str, dict[str, Any]] = {
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
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "OpenAI's object or its chunks"}
}

router = APIRouter(prefix="/v1", tags=["openai"])

CompletionBody = Annotated[CompletionRequest, Depends(json_body(CompletionRequest, counted=True))]
ChatBody = Annotated[ChatRequest, Depends(json_body(ChatRequest, counted=True))]


@router.post(
    "/completions",
    dependencies=[Depends(require_ready)],
    responses={**_ANSWERS, **_REFUSALS},
    openapi_extra=documented(
        CompletionRequest,
        base_model={"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 8},
        an_adapter={"model": "support", "prompt": "I want my money back", "max_tokens": 20, "temperature": 0},
    ),
)
@requires("infer", action="completion")
async def completions(request: Request, body: CompletionBody, services: Context, caller: Caller) -> Response:
    """Continue one prompt or several, given as text or as token ids."""
    with counting_refusals(services.metrics):
        orders = await _completion_jobs(request, body, services, caller)
    shape = _Completions(body, services.text, [Choice(prefix=prompt if body.echo else "") for prompt, _ in orders])
    return await _answer(request, body, shape, [job for _, job in orders], services)


@router.post(
    "/chat/completions",
    dependencies=[Depends(require_ready)],
    responses={**_ANSWERS, **_REFUSALS},
    openapi_extra=documented(
        ChatRequest,
        base_model={"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello!"}]},
        a_user={"model": "smollm2-135m-instruct", "user": "alice", "messages": [{"role": "user", "content": "Hello!"}]},
    ),
)
@requires("infer", action="chat")
async def chat_completions(request: Request, body: ChatBody, services: Context, caller: Caller) -> Response:
    """The assistant's next message, through the base model's own chat template."""
    with counting_refusals(services.metrics):
        jobs = await _chat_jobs(request, body, services, caller)
    shape = _Chat(body, services.text, [Choice() for _ in jobs])
    return await _answer(request, body, shape, jobs, services)


@router.get("/models")
@requires("infer")
async def models(services: Context, tenant: Tenant) -> Response:
    """The base model, then the adapters that this tenant may use."""
    records = await to_thread.run_sync(_all_adapters, services.store, tenant)
    return JSONResponse({"object": "list", "data": [_base_card(services), *(_card(services, r) for r in records)]})


@router.get("/models/{model:id}", responses={404: _REFUSALS[404]})
@requires("infer")
async def model(model: str, services: Context, tenant: Tenant) -> Response:
    """One model or adapter."""
    if model == services.model_name:
        return JSONResponse(_base_card(services))
    try:
        record = await to_thread.run_sync(services.store.resolve, tenant, model)
    except (NotFound, Invalid):
        raise UnknownModelError(model) from None
    return JSONResponse(_card(services, record))


# -- from body to jobs -----------------------------------------------------------------------------------------------


async def _completion_jobs(
    request: Request, body: CompletionRequest, services: Services, caller: Principal
) -> list[tuple[str, Job]]:
    """(the prompt as text, its job), a prompt's choices side by side."""
    _refuse_unsupported(body, suffix=body.suffix)
    if body.echo and body.logprobs is not None:
        raise ValidationError("`echo` cannot be combined with `logprobs`")
    prompts = _prompts(body.prompt)
    count = check_choices(body, MAX_CHOICES // len(prompts) if len(prompts) <= MAX_CHOICES else 0)
    check_answers("n", count * len(prompts), caller.policy)
    top_n = check_top_n("logprobs", body.logprobs or 0, services.limits)
    resolved = await _resolve(services, caller.tenant, body, user=user_of(request, body.user))
    limit = default_new_tokens(_COMPLETION_TOKENS, caller.policy) if body.max_tokens is None else body.max_tokens
    orders: list[tuple[str, Job]] = []
    for prompt in prompts:
        shown, ids = await _encoded(prompt, services.text, resolved.frame)
        job = _job(request, body, services, caller, ids, resolved, top_n, limit)
        orders += [(shown, copy) for copy in copies(job, count)]
    _check_tokens([job for _, job in orders], caller)
    return orders


async def _chat_jobs(request: Request, body: ChatRequest, services: Services, caller: Principal) -> list[Job]:
    _refuse_unsupported(body, tools=body.tools)
    count = check_choices(body, MAX_CHOICES)
    check_answers("n", count, caller.policy)
    if body.top_logprobs is not None and not body.logprobs:
        raise ValidationError("`top_logprobs` needs `logprobs` to be true")
    top_n = check_top_n("top_logprobs", body.top_logprobs or 0, services.limits)
    resolved = await _resolve(services, caller.tenant, body, user=user_of(request, body.user))
    if not body.messages:
        raise ValidationError("`messages` cannot be empty")
    messages = [_message(index, message) for index, message in enumerate(body.messages)]
    rendered = await to_thread.run_sync(services.text.chat, messages)
    ids = await encode(services.text, rendered, special=False, frame=resolved.frame)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    jobs = copies(_job(request, body, services, caller, ids, resolved, top_n, limit), count)
    _check_tokens(jobs, caller)
    return jobs


def _check_tokens(jobs: Sequence[Job], caller: Principal) -> None:
    requests = [job.request for job in jobs]
    check_tokens(sum(len(request.prompt) + request.sampling.max_new_tokens for request in requests), caller.policy)


def _job(
    request: Request,
    body: OpenAIRequest,
    services: Services,
    caller: Principal,
    ids: tuple[int, ...],
    resolved: Resolved,
    top_n: int,
    max_tokens: int | None,
) -> Job:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stop = check_stop(stops, services.limits)
    order = Order(ids, resolved, openai_wish(body, top_n=top_n), max_tokens, stop)
    return job_of(order, services, caller, trail_of(request))


async def _encoded(prompt: str | Sequence[int], text: Text, frame: Frame) -> tuple[str, tuple[int, ...]]:
    """One prompt as text and as the ids behind the adapter's prefix."""
    if isinstance(prompt, str):
        return prompt, await encode(text, prompt, frame=frame)
    given = check_ids(prompt, text)
    return text.decode(given), tuple(frame.closed(text, given))


async def _resolve(services: Services, tenant: str, body: OpenAIRequest, *, user: str | None) -> Resolved:
    """The base model's name leaves the choice to the user's binding; any other name is an adapter's.

    Raises: UnknownModelError when the name is neither; NotFound when it is the user's adapter that is missing.
    """

    async def through(adapter: str | None) -> Resolved:
        return await resolve(
            services.store,
            services.names,
            tenant,
            adapter_id=adapter,
            user_id=user,
            compose=body.compose,
            task_id=body.task_id,
        )

    model = body.model
    adapter = None if model in (services.model_name, "") else model
    try:
        return await through(adapter)
    except NotFound as error:
        if error.name != adapter:
            raise
    if model in _BASE_ALIASES:
        return await through(None)
    raise UnknownModelError(model)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | Sequence[int]]:
    """One entry per prompt, each a text or token ids. Raises: ValidationError for an empty one."""
    many: Sequence[str | Sequence[int]]
    if isinstance(prompt, str):
        many = [prompt]
    elif all(isinstance(item, int) for item in prompt):
        many = [[item for item in prompt if isinstance(item, int)]]
    else:
        many = [item for item in prompt if not isinstance(item, int)]
    if not many or any(not item for item in many):
        raise ValidationError("`prompt` cannot be empty")
    return many


def _message(index: int, message: ChatMessage) -> Mapping[str, object]:
    content = message.content
    if isinstance(content, list):
        strange = next((part.type for part in content if part.type != "text" or part.text is None), None)
        if strange is not None:
            raise ValidationError(f"`messages[{index}].content` may hold text only. Given: a part of type {strange!r}")
        content = "".join(part.text or "" for part in content)
    shown = {"role": message.role, "content": content or ""}
    return shown if message.name is None else {**shown, "name": message.name}


def _refuse_unsupported(body: OpenAIRequest, **fields: object) -> None:
    wanted = {**fields, "logit_bias": body.logit_bias}
    if body.response_format is not None and body.response_format.get("type") != "text":
        wanted["response_format"] = body.response_format
    for name, value in wanted.items():
        if value:
            raise ValidationError(f"`{name}` is not supported")


# -- from deltas to OpenAI's objects ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Choice:
    """One choice as it grows."""

    prefix: str = ""  # the prompt, where it is to be echoed
    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens.append(delta.token)
        self.finish = None if delta.finish is None else _FINISH[delta.finish]


class _Shape(Protocol):
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


class _Completions:
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
        before = sum(len(token.text) for token in choice.tokens[:-1])
        logprobs = self._listed([delta.token], before) if self.logprobs else None
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


class _Chat:
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


async def _answer(request: Request, body: OpenAIRequest, shape: _Shape, jobs: list[Job], services: Services) -> Response:
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


async def _run(shape: _Shape, batch: _Batch) -> None:
    async with aclosing(merge(batch.generations)) as deltas:
        async for index, delta in deltas:
            shape.choices[index].add(delta)


async def _stream(
    request: Request,
    shape: _Shape,
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


async def _events(shape: _Shape, batch: _Batch, head: Mapping[str, object], *, usage: bool) -> AsyncGenerator[bytes, None]:
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


# -- models ----------------------------------------------------------------------------------------------------------


def _all_adapters(store: Store, tenant: str) -> list[AdapterRecord]:
    records, cursor = store.list(tenant, limit=_PAGE, shared=True)
    found = list(records)
    while cursor is not None:
        records, cursor = store.list(tenant, limit=_PAGE, cursor=cursor, shared=True)
        found += records
    return found


def _base_card(services: Services) -> dict[str, object]:
    return _model_card(services, services.model_name, services.started_at, root=services.model_name, parent=None)


def _card(services: Services, record: AdapterRecord) -> dict[str, object]:
    created = int(record.created_at.timestamp())
    return _model_card(services, record.name, created, root=record.name, parent=services.model_name)


def _model_card(services: Services, name: str, created: int, *, root: str, parent: str | None) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "adapterd",
        "root": root,
        "parent": parent,
        "max_model_len": services.limits.max_total_tokens,
    }
