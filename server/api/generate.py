"""LoRAX's and TGI's routes: /generate, /generate_stream, / (both in one, as their clients call it) and /tokenize."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from ..engine.client import Delta, Generation, Job, Summary, TokenText, collect
from ..errors import ValidationError
from ..model.text import Text
from .auth import Caller, requires
from .body import documented, json_body
from .context import Context, Services, require_ready
from .failures import counting_refusals, reported, trail_of
from .jobs import Order, encode, job_of
from .keyring import Principal
from .merged import check_merged
from .quotas import check_answers
from .resolve import resolve
from .rules import check_generate, check_stop, generate_wish
from .schemas import ErrorResponse, GenerateRequest, GenerateResponse, SimpleToken, StreamResponse, TokenizeRequest
from .sse import EventStream, event, while_connected

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON"},
    404: {"model": ErrorResponse, "description": "No such adapter"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    422: {"model": ErrorResponse, "description": "Input validation error"},
    424: {"model": ErrorResponse, "description": "The generation failed"},
    429: {"model": ErrorResponse, "description": "Too many requests; see Retry-After"},
    503: {"model": ErrorResponse, "description": "Starting or shutting down"},
}

_EVENTS: dict[str, Any] = {"text/event-stream": {}}
_STREAM: dict[str, Any] = {"model": StreamResponse, "content": _EVENTS}
_BODY = documented(
    GenerateRequest,
    base_model={"inputs": "What is deep learning?", "parameters": {"max_new_tokens": 20}},
    an_adapter={"inputs": "I want my money back", "parameters": {"adapter_id": "support", "max_new_tokens": 20}},
    a_user={"inputs": "Hello!", "user_id": "alice", "parameters": {"max_new_tokens": 20, "details": True}},
)

router = APIRouter(tags=["generate"], dependencies=[Depends(require_ready)])
tokenizer_router = APIRouter(tags=["generate"])

GenerateBody = Annotated[GenerateRequest, Depends(json_body(GenerateRequest, counted=True))]
TokenizeBody = Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]


@router.post("/generate", responses={200: {"model": GenerateResponse, "content": _EVENTS}, **REFUSALS}, openapi_extra=_BODY)
@requires("infer", action="generate")
async def generate(request: Request, body: GenerateBody, services: Context, caller: Caller) -> Response:
    """Generate text, through an adapter if one is named. With `stream`, the same as `/generate_stream`."""
    if body.stream:
        return await _stream(request, body, services, caller)
    content, headers = await _complete(request, body, services, caller)
    return JSONResponse(content, headers=headers)


@router.post("/generate_stream", responses={200: _STREAM, **REFUSALS}, openapi_extra=_BODY)
@requires("infer", action="generate")
async def generate_stream(request: Request, body: GenerateBody, services: Context, caller: Caller) -> Response:
    """Generate text, one server-sent event per token; the last has `generated_text`.

    What is wrong before the first token has its own status; what goes wrong later is an event `{"error", "error_type"}`.
    """
    return await _stream(request, body, services, caller)


@router.post("/", responses={200: {"model": list[GenerateResponse], "content": _EVENTS}, **REFUSALS}, openapi_extra=_BODY)
@requires("infer", action="generate")
async def compat_generate(request: Request, body: GenerateBody, services: Context, caller: Caller) -> Response:
    """What the LoRAX, TGI and Hugging Face clients call: `/generate` in a list of one, or a stream with `stream`."""
    if body.stream:
        return await _stream(request, body, services, caller)
    content, headers = await _complete(request, body, services, caller)
    return JSONResponse([content], headers=headers)


@tokenizer_router.post(
    "/tokenize",
    responses={200: {"model": list[SimpleToken]}, 400: REFUSALS[400], 413: REFUSALS[413], 422: REFUSALS[422]},
    openapi_extra=documented(TokenizeRequest, text={"inputs": "My name is Olivier and I"}),
)
@requires("infer")
async def tokenize(body: TokenizeBody, services: Context) -> Response:
    """The tokens of a text and the characters that each covers."""
    special = body.add_special_tokens is not False
    tokens = await to_thread.run_sync(lambda: services.text.offsets(body.inputs, special=special))
    return JSONResponse([{"id": t.id, "text": t.text, "start": t.start, "stop": t.stop} for t in tokens])


# -- the two ways to answer ------------------------------------------------------------------------------------------


async def _complete(
    request: Request, body: GenerateRequest, services: Services, caller: Principal
) -> tuple[dict[str, object], dict[str, str]]:
    """The answer's body and headers."""
    job = await _prepare(request, body, services, caller, streaming=False)
    generation = services.client.generate(job)
    try:
        deltas = await while_connected(request.receive, collect(generation))
    finally:
        generation.close()
    summary = generation.summary
    answer: dict[str, object] = {"generated_text": _full_text(body, summary)}
    if body.parameters.details or body.parameters.decoder_input_details:
        answer["details"] = _details(body, deltas, summary, services.text)
    return answer, {**identity_headers(services, job, body.inputs), **timing_headers(summary)}


async def _stream(request: Request, body: GenerateRequest, services: Services, caller: Principal) -> Response:
    """Waits for the first token before the status line, so that an adapter that cannot be loaded is no 200."""
    job = await _prepare(request, body, services, caller, streaming=True)
    generation = services.client.generate(job)
    try:
        await while_connected(request.receive, generation.begin())
    except BaseException:
        generation.close()
        raise
    events = reported(_events(body, generation, services.text), request)
    return EventStream(events, headers=identity_headers(services, job, body.inputs), close=generation.close)


async def _events(body: GenerateRequest, generation: Generation, text: Text) -> AsyncGenerator[bytes, None]:
    index = 0
    async for delta in generation:
        index += 1
        yield event(_stream_event(body, index, delta, generation.summary, text))


async def _prepare(request: Request, body: GenerateRequest, services: Services, caller: Principal, *, streaming: bool) -> Job:
    """Raises: ValidationError, QuotaError, NotFound."""
    with counting_refusals(services.metrics):
        parameters = body.parameters
        check_generate(parameters, services.limits, streaming=streaming)
        check_answers("best_of", 1, caller.policy)
        if not body.inputs:
            raise ValidationError("`inputs` cannot be empty")
        stop = check_stop(parameters.stop, services.limits)
        wish = generate_wish(parameters, services.limits)
        resolved = await resolve(
            services.store,
            services.names,
            caller.tenant,
            adapter_id=_adapter_id(body),
            user_id=user_of(request, body.user_id),
            compose=parameters.compose,
            merged=check_merged(parameters.merged_adapters, _adapter_id(body)),
            task_id=_task_id(body),
        )
        prompt = await encode(services.text, body.inputs, truncate=parameters.truncate, frame=resolved.frame)
        order = Order(prompt, resolved, wish, parameters.max_new_tokens, stop)
        return job_of(order, services, caller, trail_of(request))


def _adapter_id(body: GenerateRequest) -> str | None:
    inner, outer = body.parameters.adapter_id, body.adapter_id
    if inner is not None and outer is not None and inner != outer:
        raise ValidationError("`adapter_id` is given twice, with different values")
    return outer if inner is None else inner


def _task_id(body: GenerateRequest) -> int | None:
    inner, outer = body.parameters.task_id, body.task_id
    if inner is not None and outer is not None and inner != outer:
        raise ValidationError("`task_id` is given twice, with different values")
    return outer if inner is None else inner


# -- pieces that other formats use too -------------------------------------------------------------------------------


def user_of(request: Request, named: str | None) -> str | None:
    """The user a request is for: the body's field, or else the header X-User-Id."""
    return named if named is not None else request.headers.get("x-user-id")


def identity_headers(services: Services, job: Job, inputs: str) -> dict[str, str]:
    """LoRAX's headers that are known before the first token."""
    headers = {
        "x-compute-type": "gpu+optimized" if services.info.get("model_device_type") == "cuda" else "cpu",
        "x-compute-characters": str(len(inputs)),
        "x-model-id": services.model_name.encode("ascii", "replace").decode(),
        "x-prompt-tokens": str(len(job.request.prompt)),
    }
    if job.adapters:
        headers |= {"x-adapter-id": ",".join(job.adapters), "x-adapter-source": "local"}
    return headers


def timing_headers(summary: Summary) -> dict[str, str]:
    """LoRAX's headers that are known after the last token; whole milliseconds."""
    milliseconds = {
        "x-compute-time": summary.total,
        "x-total-time": summary.total,
        "x-validation-time": summary.validation,
        "x-queue-time": summary.queue,
        "x-inference-time": summary.inference,
        "x-time-per-token": summary.per_token,
        "x-time-to-first-token": summary.first_token,
        "x-time-per-output-token": summary.per_output_token,
    }
    counts = {
        "x-generated-tokens": summary.generated_tokens,
        "x-total-tokens": summary.prompt_tokens + summary.generated_tokens,
        "x-skipped-tokens": 0,  # LoRAX: tokens that speculation took for granted
        "x-cached-tokens": summary.cached_tokens,
    }
    rounded = {name: str(round(seconds * 1000)) for name, seconds in milliseconds.items()}
    return rounded | {name: str(count) for name, count in counts.items()}


# -- LoRAX's JSON ----------------------------------------------------------------------------------------------------


def _full_text(body: GenerateRequest, summary: Summary) -> str:
    return body.inputs + summary.answer if body.parameters.return_full_text else summary.answer


def _token(token: TokenText, text: Text) -> dict[str, object]:
    shown: dict[str, object] = {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
        "skipped": False,
    }
    if token.alternatives:
        shown["alternative_tokens"] = [
            {"id": id, "text": text.piece(id), "logprob": logprob} for id, logprob in token.alternatives
        ]
    return shown


def _top_tokens(token: TokenText, text: Text) -> list[dict[str, object]]:
    """TGI's form of the alternatives."""
    return [
        {"id": id, "text": text.piece(id), "logprob": logprob, "special": id in text.special_ids}
        for id, logprob in token.alternatives
    ]


def _stream_details(last: Delta, summary: Summary) -> dict[str, object]:
    return {
        "finish_reason": last.finish,
        "prompt_tokens": summary.prompt_tokens,
        "generated_tokens": summary.generated_tokens,
        "seed": summary.seed,
    }


def _details(body: GenerateRequest, deltas: list[Delta], summary: Summary, text: Text) -> Mapping[str, object]:
    details = {
        **_stream_details(deltas[-1], summary),
        "skipped_tokens": 0,
        "prefill": [{"id": t.id, "text": text.piece(t.id), "logprob": t.logprob} for t in summary.prefill],
        "tokens": [_token(delta.token, text) for delta in deltas],
    }
    if body.parameters.top_n_tokens:
        details["top_tokens"] = [_top_tokens(delta.token, text) for delta in deltas]
    return details


def _stream_event(body: GenerateRequest, index: int, delta: Delta, summary: Summary, text: Text) -> dict[str, object]:
    shown: dict[str, object] = {
        "index": index,
        "token": _token(delta.token, text),
        "generated_text": None,
        "details": None,
    }
    if body.parameters.top_n_tokens:
        shown["top_tokens"] = _top_tokens(delta.token, text)
    if delta.finish is not None:
        shown["generated_text"] = _full_text(body, summary)
        shown["details"] = _stream_details(delta, summary) if body.parameters.details else None
    return shown
