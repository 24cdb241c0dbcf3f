"""OpenAI's /v1/completions and /v1/chat/completions: from a body to jobs. `model` is the base's name or an adapter's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters_store.errors import NotFound

from ..engine.client import Job
from ..errors import ValidationError
from ..model.text import Text
from .auth import Caller, requires
from .body import documented, json_body
from .context import Context, Services, require_ready
from .failures import UnknownModelError, counting_refusals, trail_of
from .generate import user_of
from .jobs import Order, check_ids, copies, encode, job_of
from .keyring import Principal
from .openai_answers import REFUSALS, Chat, Choice, Completions, answer
from .prompts import Frame
from .quotas import check_answers, check_tokens, default_new_tokens
from .resolve import Resolved, resolve
from .rules import check_choices, check_stop, check_top_n, openai_wish
from .schemas import ChatMessage, ChatRequest, CompletionRequest, OpenAIRequest

MAX_CHOICES = 16  # of one request, all its prompts together
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions

_BASE_ALIASES = ("", "tgi", "dummy")  # what TGI's documentation and Hugging Face's client call a server's only model

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "OpenAI's object or its chunks"}
}

router = APIRouter(prefix="/v1", tags=["openai"])

CompletionBody = Annotated[CompletionRequest, Depends(json_body(CompletionRequest, counted=True))]
ChatBody = Annotated[ChatRequest, Depends(json_body(ChatRequest, counted=True))]


@router.post(
    "/completions",
    dependencies=[Depends(require_ready)],
    responses={**_ANSWERS, **REFUSALS},
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
    shape = Completions(body, services.text, [Choice(prefix=prompt if body.echo else "") for prompt, _ in orders])
    return await answer(request, body, shape, [job for _, job in orders], services)


@router.post(
    "/chat/completions",
    dependencies=[Depends(require_ready)],
    responses={**_ANSWERS, **REFUSALS},
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
    shape = Chat(body, services.text, [Choice() for _ in jobs])
    return await answer(request, body, shape, jobs, services)


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
